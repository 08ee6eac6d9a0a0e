"""A simulation: step times and times to a target on 1 to 1,024 ranks. None of it was run on more than two.

    python benchmarks/scale_simulation.py

Compute is the package's roofline, reductions are rings, ranks wait for the slowest, the package's policy chooses k,
noise scales are recorded ones. Writes `results/scaling/simulation.json`, the page and its figure.
"""

import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hf_trainopt.accumulation import GoodputPolicy, NoiseScale, Observation, limit_change
from hf_trainopt.machine.devices import DEVICES, DeviceSpec


RESULTS = Path(__file__).resolve().parent / "results"
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FIXED = (1, 2, 4, 8, 16, 32, 64)
BUCKET = 25 * 2**20  # bytes of DDP's buckets: the last one has no computation to hide behind
REACHED = 0.8  # share of a link's rate that a ring is taken to reach
JITTER = 0.02  # standard deviation of a micro-batch's time over ranks and time, relative; normal, independent
DWELL = 4  # windows between two changes of k, as in `AccumulationController`
TOKENS_RECORDED = 128  # in a sample of the recorded task
GOODPUT = GoodputPolicy(anneals=False)  # this model has no learning rate that decays


@dataclass(frozen=True)
class Network:
    """Links of a cluster whose nodes have `ranks_in_node` devices: bytes/s of a rank and direction, seconds a hop."""

    name: str
    ranks_in_node: int
    inside: float
    outside: float
    inside_latency: float = 3.4e-6  # ring over NVLink, protocol Simple, in NCCL's tuning table (src/graph/tuning.cc)
    outside_latency: float = 9.6e-6  # the same over a network


# NVLink: 600 and 900 GB/s of both directions (data sheets of A100 and H100). InfiniBand: HDR 200 Gb/s and NDR 400 Gb/s
# for each GPU (data sheets of DGX A100 and DGX H100). Ethernet: one port for all of a node (IEEE 802.3). PCIe 4.0 x16:
# 31.5 GB/s a direction (PCI-SIG), 5.7 µs a hop in NCCL's table.
NETWORKS = {
    "A100 InfiniBand": Network("NVLink 3, InfiniBand HDR", 8, 300e9, 25e9),
    "A100 Ethernet": Network("NVLink 3, 100 GbE a node", 8, 300e9, 12.5e9 / 8),
    "H100 InfiniBand": Network("NVLink 4, InfiniBand NDR", 8, 450e9, 50e9),
    "H100 Ethernet": Network("NVLink 4, 100 GbE a node", 8, 450e9, 12.5e9 / 8),
    "PCIe": Network("PCIe 4, 10 GbE a node", 4, 31.5e9, 1.25e9 / 4, inside_latency=5.7e-6),
    "single": Network("one a machine, 10 GbE", 1, 31.5e9, 1.25e9),
}


def ring_bytes(size: float, ranks: int) -> float:
    """Return the bytes that each rank sends in a ring all-reduce of `size` bytes (Patarasuk and Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * size


def ring_seconds(size: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Return the time of a ring all-reduce: 2(W − 1) hops."""
    return 2 * (ranks - 1) * latency + ring_bytes(size, ranks) / (REACHED * bandwidth)


def all_reduce_seconds(size: float, ranks: int, network: Network) -> float:
    """Return the time of an all-reduce: a ring in each node, and rings of the nodes over equal parts of the result.

    A reduce-scatter or an all-gather takes half of it.
    """
    node = min(ranks, network.ranks_in_node)
    inside = ring_seconds(size, node, network.inside, network.inside_latency)
    return inside + ring_seconds(size / node, math.ceil(ranks / node), network.outside, network.outside_latency)


@dataclass(frozen=True)
class Model:
    """A transformer and its micro-batch. Linear layers without biases; embedding and head are counted once."""

    name: str
    layers: int
    width: int
    key_width: int
    mlp: int
    mlp_matrices: int
    vocabulary: int
    sequence: int
    samples: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Shapes of one layer's matrices."""
        attention = [(self.width, self.width + 2 * self.key_width), (self.width, self.width)]
        return attention + [(self.width, self.mlp)] * self.mlp_matrices

    @property
    def parameters(self) -> int:
        return self.layers * sum(a * b for a, b in self.matrices) + self.vocabulary * self.width

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.samples * self.sequence

    def forward_seconds(self, device: DeviceSpec) -> float:
        """Return the time of a forward pass in bf16 by the roofline; a backward pass takes twice that."""

        def product(a: int, b: int) -> float:
            moved = 2 * (self.tokens * (a + b) + a * b)
            return device.seconds(2 * self.tokens * a * b, moved, torch.bfloat16, aligned=a % 8 == b % 8 == 0)

        row = 2 * self.tokens * self.width  # bytes
        attention = device.seconds(2 * self.tokens * self.sequence * self.width, 4 * row, torch.bfloat16)  # causal
        elementwise = 20 * row / device.bandwidth  # two norms, two residuals, one activation, rotary embedding
        layer = sum(product(a, b) for a, b in self.matrices) + attention + elementwise
        logits = 4 * 4 * self.tokens * self.vocabulary / device.bandwidth  # cross-entropy in fp32
        return self.layers * layer + product(self.width, self.vocabulary) + logits


MODELS = {
    "GPT-2 small": Model("GPT-2 small", 12, 768, 768, 3072, 2, 50257, 1024, 8),
    "Llama 1B": Model("Llama 1B", 16, 2048, 512, 8192, 3, 128256, 2048, 4),
    "Llama 7B": Model("Llama 7B", 32, 4096, 4096, 11008, 3, 32000, 4096, 1),
}


def expected_maximum(ranks: int) -> float:
    """Return the mean of the largest of W standard normal numbers (Blom 1958)."""
    return 0.0 if ranks == 1 else statistics.NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


@dataclass(frozen=True)
class Setup:
    """What is simulated. `zero`: 0 for DDP, or DeepSpeed's stage 2 or 3."""

    model: str
    device: str
    network: str
    zero: int
    ranks: int = 1

    @property
    def name(self) -> str:
        how = f"ZeRO-{self.zero}" if self.zero else "DDP"
        return f"{self.model}, {self.device.upper()}, {how}, {NETWORKS[self.network].name}"

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch over all ranks."""
        return MODELS[self.model].tokens * self.ranks


SETUPS = (
    Setup("GPT-2 small", "rtx4090", "single", 0),
    Setup("GPT-2 small", "rtx4090", "PCIe", 0),
    Setup("GPT-2 small", "a100", "A100 InfiniBand", 0),
    Setup("GPT-2 small", "a100", "A100 Ethernet", 0),
    Setup("Llama 1B", "h100", "H100 InfiniBand", 0),
    Setup("Llama 1B", "h100", "H100 Ethernet", 0),
    Setup("Llama 1B", "h100", "H100 Ethernet", 2),
    Setup("Llama 7B", "h100", "H100 InfiniBand", 3),
    Setup("Llama 7B", "h100", "H100 Ethernet", 3),
)


@functools.cache
def step_seconds(setup: Setup, k: int) -> float:
    """Return the time of an optimizer step of k micro-batches.

    DDP reduces fp32 gradients once, behind the backward pass of the last micro-batch; ranks wait for each other once,
    so jitter averages over the window. ZeRO-2 scatters bf16 gradients in each micro-batch and gathers parameters once;
    ZeRO-3 gathers them twice in each. There ranks wait in every micro-batch. AdamW with clipping moves 36 bytes for
    each parameter of a rank. Rank 0's decision is an all-reduce of 20 numbers.
    """
    model, device, network = MODELS[setup.model], DEVICES[setup.device], NETWORKS[setup.network]
    forward = model.forward_seconds(device)
    compute, backward = 3 * forward, 2 * forward
    wait = compute * JITTER * expected_maximum(setup.ranks)
    reduce = functools.partial(all_reduce_seconds, ranks=setup.ranks, network=network)
    optimizer = 36 * model.parameters / device.bandwidth
    if not setup.zero:
        size = 4 * model.parameters
        exposed = max(reduce(min(size, BUCKET)), reduce(size) - backward)
        return k * compute + math.sqrt(k) * wait + exposed + optimizer + reduce(160)
    size = 2 * model.parameters
    half, tail = reduce(size) / 2, reduce(min(size, BUCKET)) / 2
    if setup.zero == 2:
        exposed, once = max(tail, half - backward), half
    else:
        exposed, once = max(tail, half - forward) + max(tail, 2 * half - backward), 0.0
    return k * (compute + wait + exposed) + once + optimizer / setup.ranks + reduce(160)


def efficiency(setup: Setup, k: int) -> float:
    """Return the throughput of a rank over that of one rank alone at the same k (weak scaling)."""
    return step_seconds(replace(setup, ranks=1), k) / step_seconds(setup, k)


# ---- Time to a target ----------------------------------------------------------------------------------------------

Curve = Sequence[tuple[float, float]]  # pieces of a run: steps that they would take without noise, B_noise in tokens


def curve_of(history: Sequence[dict], tokens: int = TOKENS_RECORDED) -> Curve:
    """Return a recorded run as a curve: a step of B samples is worth 1/(1 + B_noise/B) (McCandlish et al. 2018)."""
    lines = [line for line in history if "samples_seen" in line]
    found, step, samples = [], 0, 0
    noise = next(line["noise_scale"] for line in lines if math.isfinite(line.get("noise_scale", math.inf)))
    for line in lines:
        value = line.get("noise_scale", math.inf)
        noise = value if math.isfinite(value) else noise
        steps, batch = line["step"] - step, (line["samples_seen"] - samples) / (line["step"] - step)
        found.append((steps / (1 + noise / batch), noise * tokens))
        step, samples = line["step"], line["samples_seen"]
    return found


def scaled(curve: Curve, last: float) -> Curve:
    """Return a curve of the same shape whose noise scale ends at `last` tokens."""
    factor = last / curve[-1][1]
    return [(steps, noise * factor) for steps, noise in curve]


def fixed_seconds(setup: Setup, curve: Curve, k: int) -> float:
    return step_seconds(setup, k) * sum(steps * (1 + noise / (k * setup.tokens)) for steps, noise in curve)


@dataclass(frozen=True)
class Adaptive:
    """A run whose k a policy has chosen; `seconds_of_one`: of one rank alone that takes the same steps."""

    seconds: float
    steps: float
    micro_batches: float
    seconds_of_one: float


def adaptive_run(setup: Setup, curve: Curve, policy: Callable = GOODPUT) -> Adaptive:
    """Run a policy along a curve. It sees the noise scale and the times as they are, without error."""
    k, alone, sums = 2, replace(setup, ranks=1), [0.0] * 4
    for index, (worth, noise) in enumerate(curve):
        estimate = NoiseScale(noise, noise, noise, noise, 1.0, resolved=True, effective_windows=math.inf)
        while worth > 1e-12:
            micro = step_seconds(setup, k + 1) - step_seconds(setup, k)
            seen = Observation(k, 8, setup.tokens, index / len(curve), noise=estimate, micro_batch_seconds=micro,
                               step_seconds=step_seconds(setup, k) - k * micro)  # fmt: skip
            chosen = limit_change(k, policy(seen), FIXED[0], FIXED[-1])
            steps = worth * (1 + noise / (chosen * setup.tokens))
            steps = steps if chosen == k else min(steps, DWELL)
            worth -= steps / (1 + noise / (chosen * setup.tokens))
            k = chosen
            added = (step_seconds(setup, k), 1.0, float(k), step_seconds(alone, k))
            sums = [total + steps * value for total, value in zip(sums, added, strict=True)]
    return Adaptive(*sums)


def recorded_curves() -> list[Curve]:
    """Return those of one-rank `goodput` runs on the language task, five seeds.

    They were logged while a window of k = 1 was measured by two micro-batches, which tell the noise scale better than
    the halves of one.
    """
    return [curve_of(history) for history in json.loads((RESULTS / "scaling" / "noise_courses.json").read_text())]


# B_noise at the end of a run, in tokens. Kaplan et al. (2020), eq. 1.4: 2e8/L^4.76, at a loss L of 3 nats.
LEVELS = {"as recorded": None, "10⁵ tokens": 1e5, "10⁶ tokens": 2e8 / 3**4.76}


def simulate() -> list[dict]:
    """Return a row for each setup, number of ranks and level of the noise: medians over the recorded curves."""
    rows = []
    for setup in (replace(setup, ranks=ranks) for setup in SETUPS for ranks in RANKS):
        for level, last in LEVELS.items():
            curves = [curve if last is None else scaled(curve, last) for curve in recorded_curves()]
            runs = [adaptive_run(setup, curve) for curve in curves]
            times = {k: statistics.median(fixed_seconds(setup, curve, k) for curve in curves) for k in FIXED}
            best, seconds = min(times, key=times.get), statistics.median(run.seconds for run in runs)
            rows.append({
                "setup": setup.name, "zero": setup.zero, "ranks": setup.ranks, "level": level, "best_k": best,
                "mean_k": round(statistics.median(run.micro_batches / run.steps for run in runs), 3),
                "adaptive_efficiency": round(statistics.median(run.seconds_of_one / run.seconds for run in runs), 4),
                "efficiency": {str(k): round(efficiency(setup, k), 4) for k in (1, 4, 16, 64)},
                "over_best": round(seconds / times[best], 4),
                "over_fixed": {str(k): round(seconds / times[k], 4) for k in (1, 8, 64)},
            })  # fmt: skip
    return rows


def main() -> None:
    import scaling_report

    rows, path = simulate(), RESULTS / "scaling" / "simulation.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    scaling_report.draw_simulation(rows, RESULTS.parent / "figures" / "scaling-simulation.png")
    scaling_report.write_report(json.loads((path.parent / "scaling.json").read_text()), RESULTS.parent / "scaling.md")


if __name__ == "__main__":
    main()
