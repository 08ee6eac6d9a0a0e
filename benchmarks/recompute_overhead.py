"""What recomputation costs the host: our placements against `torch.utils.checkpoint` on the same layers.

    python benchmarks/recompute_overhead.py --rounds 15

Tiny shapes, one thread: kernels take next to nothing, so that a step's time is Python and autograd. On a GPU the host
does the same work, and where it takes longer than the kernels it limits the step (gpu.md, "Where the time goes").
Writes `benchmarks/results/recompute_overhead.json`; ways take turns, and ratios are within a round.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from hf_trainopt.placement.plan.plan import PlacementPlan, StageChoice
from hf_trainopt.placement.plan.policies import named_choices
from hf_trainopt.placement.plan.stages import find_stages
from hf_trainopt.placement.recompute.apply import apply_placement


RESULT = Path(__file__).resolve().parent / "results" / "recompute_overhead.json"


def gpt2() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    config = GPT2Config(n_layer=12, n_embd=32, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0,
                        eos_token_id=0, use_cache=False)  # fmt: skip
    tokens = torch.randint(0, 64, (1, 16))
    return GPT2LMHeadModel(config), lambda model: model(input_ids=tokens, labels=tokens).loss


def resnet50() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    images = torch.randn(2, 3, 32, 32)
    # One channel in eight: as many operators, and hardly any arithmetic.
    model = timm.create_model("resnet50", num_classes=10, base_width=8)
    return model, lambda model: model(images).sum()


@contextlib.contextmanager
def torch_checkpoint(model: nn.Module) -> Iterator[None]:
    """Context in which each stage is a checkpoint of PyTorch's, which recomputes running statistics a second time."""
    stages = [model.get_submodule(name) for name in find_stages(model)]
    for stage in stages:
        forward = stage.forward
        stage.__dict__["forward"] = lambda *args, _forward=forward, **kwargs: checkpoint(
            _forward, *args, use_reentrant=False, **kwargs
        )
    try:
        yield
    finally:
        for stage in stages:
            del stage.__dict__["forward"]


def ways(model: nn.Module) -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """Return name -> context of each way to train."""
    stages = find_stages(model)

    def placed(policy: str, choices: dict[str, StageChoice]):
        return lambda: apply_placement(model, PlacementPlan(policy, choices))

    return {
        "none": contextlib.nullcontext,
        "torch.utils.checkpoint": lambda: torch_checkpoint(model),
        "all": placed("all", named_choices("all", stages)),
        "sqrt": placed("sqrt", named_choices("sqrt", stages)),
        "selective": placed("budget", dict.fromkeys(stages, StageChoice("selective", (0, 1)))),
    }


def measure(make: Callable, rounds: int) -> dict[str, dict[str, float]]:
    """Return way -> milliseconds of a step, and how many times those of "none" that is."""
    torch.manual_seed(0)
    model, loss = make()
    model.train()

    def step() -> None:
        loss(model).backward()
        model.zero_grad()

    taken: dict[str, list[float]] = {}
    contexts = ways(model)
    for number in range(-1, rounds):  # the first warms up
        for name, context in contexts.items():
            with context():
                step()
                times = []
                for _ in range(5):
                    started = time.perf_counter()
                    step()
                    times.append(time.perf_counter() - started)
            if number >= 0:
                taken.setdefault(name, []).append(1e3 * min(times))
    found = {}
    for name, values in taken.items():
        ratios = sorted(value / none for value, none in zip(values, taken["none"], strict=True))
        found[name] = {
            "milliseconds": round(statistics.median(values), 2), "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    result = {
        "command": " ".join(["python", "benchmarks/recompute_overhead.py", *sys.argv[1:]]),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "timm": timm.__version__},
        "models": {},
    }
    for make in (gpt2, resnet50):
        result["models"][make.__name__] = measure(make, options.rounds)
        print(make.__name__, json.dumps(result["models"][make.__name__], indent=1), flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
