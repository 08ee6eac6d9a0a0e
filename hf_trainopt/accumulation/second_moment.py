r"""Adam's second moment on a clock of data: what one optimizer step must be told where k isn't k_ref.

Adam forgets old square gradients at β2 per optimizer step. A recipe's β2 is meant for steps of k_ref micro-batches.
Where k varies, the half-life *in data* is what has to stay (Marek et al. 2025, arXiv 2507.07101, section 3). With
κ = k/k_ref,

    β2(κ) = β2^κ.

At κ < 1 that is a longer memory in steps, and a memory that is long against the run still holds the square gradients
of its first steps. So it is stretched up to a share of the run only. An unchanged β2 with a half-life of h steps
remembers h·κ reference windows at κ. What is aimed at is min(h, max(h·κ, H)), with H the longest. In place of κ then
stands κ' ≥ κ, below and in β2(κ).

Adam divides the moment by 1 − β2ⁿ, since it began at zero. After windows of κ_1 … κ_n the true weight of that zero is
Π β2^κ_i = β2^u, u = Σ κ_i the reference windows consumed. The optimizer computes 1 − β2(κ_n)ⁿ from its own step count
n. The quotient

    ρ = √((1 − β2^u)/(1 − β2(κ_n)ⁿ))

turns one into the other exactly: m/(√(v/(1 − β2^u)) + ε) = ρ·m/(√(v/(1 − β2(κ_n)ⁿ)) + ρ·ε). So the step is taken at a
rate of ρη and at ρε. Nothing in the optimizer's state is touched, neither its moments nor its step count, which may be
a number, a tensor on the device or shared: a checkpoint is what stock writes. β1 stays per step. Of a parameter that
had no gradient in some steps (an expert, a layer that was unfrozen) n is another, and ρ is that of the others.

Decoupled weight decay is forgetting as well: AdamW forgets its past updates within 1/(ηλ) steps. That stays the same
in data with λ·κ/f, where the rate was scaled by f (Bergsma et al. 2025, arXiv 2505.13738, section 3); divided by ρ,
too, since the optimizer multiplies it by the rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer


def decay_of_step(log_beta2: float, batch_ratio: float) -> float:
    """Return β2(κ) = β2^κ.

    Args:
        log_beta2: log β2 of the recipe, for a step of k_ref micro-batches.
        batch_ratio: κ = k/k_ref.
    """
    return math.exp(batch_ratio * log_beta2)


# Longest half-life, as a share of the run, that memory is stretched to. Measured: benchmarks/convergence.md.
LONGEST_MEMORY = 0.125


def moment_ratio(log_beta2: float, batch_ratio: float, longest: float) -> float:
    """Return κ', by which the second moment forgets in a step of κ reference windows.

    Args:
        log_beta2: As above.
        batch_ratio: κ.
        longest: H, in reference windows.

    Returns:
        κ itself where κ ≥ 1, the recipe's half-life is at most H, or nothing is forgotten (β2 = 1); else more, up to
        1, at which β2 is unchanged.
    """
    if batch_ratio >= 1 or log_beta2 == 0:
        return batch_ratio
    half_life = -math.log(2.0) / log_beta2
    return max(batch_ratio, min(1.0, half_life * batch_ratio / longest))


def bias_ratio(log_beta2: float, batch_ratio: float, windows: float, steps: int) -> float:
    """Return ρ, what the rate must be multiplied by so that Adam's bias correction is the true one.

    Args:
        log_beta2: As above.
        batch_ratio: κ of this step (κ' where the two differ).
        windows: u, reference windows consumed, this step included (the sum of κ').
        steps: n, optimizer steps taken, this one included.

    Returns:
        1.0 to the bit where the optimizer is right by itself, as it is while k doesn't change.
    """
    assumed = steps * batch_ratio
    return 1.0 if assumed == windows else math.sqrt(math.expm1(windows * log_beta2) / math.expm1(assumed * log_beta2))


# ---- What optimizers call it ----------------------------------------------------------------------------------------

# Lower-case names of classes. They keep no second moment, or `betas` hold none: there is nothing to do.
WITHOUT_SECOND_MOMENT = ("sgd", "lion", "rprop", "asgd", "muon", "signum", "lars")
# Averages that are weighted by the rate, steps that are normalised, rules that change with β2 and the step count: β2
# is not all of their clock.
WITH_A_CLOCK_OF_THEIR_OWN = (
    "schedulefree", "prodigy", "dadapt", "adan", "lomo", "sophia", "radam", "lamb", "came",
)  # fmt: skip
# No division by 1 − β2ⁿ.
WITHOUT_BIAS_CORRECTION = ("adamax", "adopt", "rmsprop", "adagrad", "novograd")


@dataclass(frozen=True)
class MomentSetting:
    """Where an optimizer's parameter group keeps the decay of its second moment.

    Attributes:
        key: Of the group.
        kind: `"betas"` (the second of a tuple), `"decay"` (a number) or `"power"` (Adafactor: the decay of step n is
            1 − n^c, c < 0).
        corrects_bias: Whether the optimizer divides by 1 − β2ⁿ.
        decouples_weight_decay: Whether weights are multiplied by 1 − ηλ.
    """

    key: str
    kind: str
    corrects_bias: bool = False
    decouples_weight_decay: bool = False

    def log_beta2(self, group: dict[str, Any], windows: float) -> float:
        """Return log β2 of the recipe for the reference window that begins after `windows` of them."""
        value = group[self.key]
        if self.kind == "power":
            decay = 1.0 - (windows + 1.0) ** float(value)
        else:
            decay = float(value[1] if self.kind == "betas" else value)
        return math.log(decay) if decay > 0 else -math.inf

    def with_decay(self, value: Any, decay: float, step: int) -> Any:
        """Return the setting that makes `decay` the decay of the optimizer's `step`-th step (from 1)."""
        if self.kind == "betas":
            return type(value)((value[0], decay, *value[2:]))
        if self.kind == "decay":
            return decay
        # 1 − nᶜ = decay. The first step has 1 − 1ᶜ = 0, whatever c is.
        return value if step == 1 else math.log1p(-decay) / math.log(step)


def moment_setting(optimizer: Optimizer) -> MomentSetting | None:
    """Return where the optimizer's groups keep the decay of its second moment; `None` if it has none.

    Raises:
        LookupError: It has one, or may have, and its clock can't be set from outside.
    """
    name, groups = type(optimizer).__name__.lower(), optimizer.param_groups
    have_betas = [isinstance(group.get("betas"), tuple | list) and len(group["betas"]) >= 2 for group in groups]
    if type(optimizer).__module__.startswith("torchao"):
        raise LookupError("it is compiled for the values of its settings, and would be again at every step")
    if any(word in name for word in WITHOUT_SECOND_MOMENT):
        if "muon" in name and any(have_betas):
            raise LookupError("only some of its groups are Adam's")
        return None
    if any(word in name for word in WITH_A_CLOCK_OF_THEIR_OWN):
        raise LookupError("its averages follow a clock of their own")
    if "adafactor" in name:
        for key in ("decay_rate", "beta2_decay"):  # transformers', torch's
            if all(key in group and float(group[key]) < 0 for group in groups):
                return MomentSetting(key, "power")
        raise LookupError("its decay isn't written as a negative power of the step")
    if all(have_betas):
        flags = [group.get("bias_correction", group.get("correct_bias", True)) for group in groups]
        corrects = all(flags) and not any(word in name for word in WITHOUT_BIAS_CORRECTION)
        by_class = "adamw" in name or bool(getattr(optimizer, "adam_w_mode", False))
        decouples = all(group.get("decoupled_weight_decay", by_class) for group in groups)
        return MomentSetting("betas", "betas", corrects, decouples)
    if "rmsprop" in name and all("alpha" in group for group in groups):
        return MomentSetting("alpha", "decay")
    raise LookupError("its parameter groups have no `betas`")


class SecondMomentClock:
    """Changes an optimizer's parameter groups for one step at a time, and puts them back.

    Args:
        optimizer: The optimizer itself, not Accelerate's wrapper.
        setting: What `moment_setting` has found in it.
        steps: n, steps that the optimizer has taken.
        windows: u, reference windows in them; by default one each, as in stock.
        forgotten: Sum of κ' of each group; by default `windows`, as it is while κ' is κ.
        longest: H, longest half-life that memory is stretched to, in reference windows.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        setting: MomentSetting,
        steps: int = 0,
        windows: float | None = None,
        forgotten: Sequence[float] | None = None,
        longest: float = math.inf,
    ):
        self.optimizer = optimizer
        self.setting = setting
        self.steps = steps
        self.windows = float(steps) if windows is None else windows
        self.forgotten = list(forgotten or ())
        self._longest = longest
        self._replaced: list[dict[str, Any]] = []
        self._before: tuple[int, float, list[float]] | None = None
        self._batch_ratio = 1.0
        self._ratios: list[float] = []

    def begin_step(self, batch_ratio: float, rate_factor: float) -> None:
        """Change the groups for a step of κ reference windows.

        Args:
            batch_ratio: κ.
            rate_factor: f, by which the rate in the groups was scaled for this k.
        """
        self.put_back()  # the last step has failed on its way
        self._batch_ratio, self._ratios = batch_ratio, []
        count = len(self.optimizer.param_groups)
        known = self.forgotten if len(self.forgotten) <= count else []  # a checkpoint with other groups has more
        self.forgotten = [*known, *[self.windows] * (count - len(known))]  # groups may have been added
        for group, forgotten in zip(self.optimizer.param_groups, self.forgotten, strict=True):
            log_beta2 = self.setting.log_beta2(group, self.windows)
            keeps = -math.inf < log_beta2 < 0  # else nothing is kept, or everything, at any k
            is_stretched = self.setting.kind != "power"  # Adafactor's memory grows with the run
            ratio = moment_ratio(log_beta2, batch_ratio, self._longest) if is_stretched else batch_ratio
            self._ratios.append(ratio)
            new = self._changed(group, rate_factor, log_beta2, ratio, forgotten) if keeps else {}
            self._replaced.append({key: group[key] for key in new})
            group.update(new)

    def _changed(
        self, group: dict[str, Any], rate_factor: float, log_beta2: float, ratio: float, forgotten: float
    ) -> dict[str, Any]:
        """Return what is other in a group for this step; `ratio` is its κ', `forgotten` their sum so far."""
        setting, step = self.setting, self.steps + 1
        new: dict[str, Any] = {}
        # Adafactor's decay depends on the place as well, which the optimizer counts in steps.
        is_off = setting.kind == "power" and self.windows != self.steps
        if ratio != 1 or is_off:
            new[setting.key] = setting.with_decay(group[setting.key], decay_of_step(log_beta2, ratio), step)
        rate = bias_ratio(log_beta2, ratio, forgotten + ratio, step) if setting.corrects_bias else 1.0
        if rate != 1:
            new["lr"] = group["lr"] * rate
            if "eps" in group:
                new["eps"] = group["eps"] * rate
        weight_decay = self._batch_ratio / rate_factor / rate
        if setting.decouples_weight_decay and weight_decay != 1 and group.get("weight_decay"):
            new["weight_decay"] = group["weight_decay"] * weight_decay
        return new

    def end_step(self, was_taken: bool = True) -> None:
        """Put the groups back after a step, and count it if it was taken."""
        self.put_back()
        if was_taken:
            self._before = self.steps, self.windows, self.forgotten
            self.steps, self.windows = self.steps + 1, self.windows + self._batch_ratio
            self.forgotten = [sum(pair) for pair in zip(self.forgotten, self._ratios, strict=True)]

    def put_back(self) -> None:
        """Give the groups what they had before `begin_step`."""
        for group, old in zip(self.optimizer.param_groups, self._replaced, strict=False):
            group.update(old)
        self._replaced = []

    def take_back(self) -> None:
        """Uncount the last step: the optimizer was told, on the device, not to take it."""
        if self._before is not None:
            (self.steps, self.windows, self.forgotten), self._before = self._before, None


def steps_taken(optimizer: Optimizer) -> int | None:
    """Return the steps that an optimizer has counted in its state; 0 if it has no state, `None` if it has no count."""
    counts = [entry["step"] for entry in optimizer.state.values() if isinstance(entry, dict) and "step" in entry]
    if counts:
        return max(int(count) for count in counts)
    return 0 if not optimizer.state else None
