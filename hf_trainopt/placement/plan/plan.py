"""What a plan says: the choice for every stage, the rewrites, and the figures that it was chosen by."""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


PLAN_FORMAT = 1

# What a stage does in the backward pass, from no recomputation to all of it.
RECOMPUTE_KINDS = ("none", "activation", "selective", "full")

_REMEDY = "make a plan with `hf-trainopt plan --output`"


@dataclass(frozen=True)
class StageChoice:
    """What one stage keeps of its forward pass, and what it recomputes in the backward pass.

    Args:
        recompute: `"none"`: everything that autograd saves is kept. `"activation"`: only the activation functions
            inside the stage are recomputed. `"selective"`: the stage is recomputed but for the outputs of the
            operators in `saved_ops`. `"full"`: only the inputs are kept.
        saved_ops: For `"selective"`: which of the compute-bound operators (matrix products, convolutions,
            attention; numbered from 0 in the order in which one forward pass runs them) keep their outputs.
        run: For `"full"`: consecutive stages with the same number form one region, of which only the inputs of the
            first are kept. `None`: a region of its own.
        offload: For `"full"` and `"selective"`: whether the input is kept on the host; of a run, that of its first
            stage.
    """

    recompute: str = "none"
    saved_ops: tuple[int, ...] = ()
    run: int | None = None
    offload: bool = False

    def __post_init__(self):
        if self.recompute not in RECOMPUTE_KINDS:
            raise ValueError(f"recompute is '{self.recompute}'; choose one of {', '.join(RECOMPUTE_KINDS)}.")
        if self.saved_ops and self.recompute != "selective":
            raise ValueError(f"saved_ops needs recompute='selective', not '{self.recompute}'.")
        if self.run is not None and self.recompute != "full":
            raise ValueError(f"run needs recompute='full', not '{self.recompute}'.")
        if self.offload and self.recompute not in ("full", "selective"):
            raise ValueError(f"offload needs recompute='full' or 'selective', not '{self.recompute}'.")

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as in the JSON file: without what is left at its default."""
        values: dict[str, Any] = {"recompute": self.recompute}
        if self.recompute == "selective":
            values["saved_ops"] = list(self.saved_ops)
        if self.run is not None:
            values["run"] = self.run
        if self.offload:
            values["offload"] = True
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StageChoice":
        """Return the choice that `to_dict` has written.

        Raises:
            ValueError: It is not one.
        """
        _check_keys(values, cls, ("recompute",))
        saved, run = values.get("saved_ops", []), values.get("run")
        if not isinstance(saved, list) or not all(type(index) is int and index >= 0 for index in saved):
            raise ValueError(f"saved_ops is {saved!r}, not a list of numbers from 0")
        if run is not None and type(run) is not int:
            raise ValueError(f"run is {run!r}, not a whole number")
        offload = values.get("offload", False)
        if type(offload) is not bool:
            raise ValueError(f"offload is {offload!r}, neither true nor false")
        return cls(values["recompute"], tuple(saved), run, offload)


STORE = StageChoice()
FULL = StageChoice("full")


@dataclass(frozen=True)
class Rewrites:
    """What computes the same function with less memory and no recomputation; results change by rounding only.

    Args:
        fused_activations: Whether activation functions that are written out in single operations are replaced by
            the fused kernel of the same function.
        chunked_loss: Whether logits and cross-entropy are computed chunk by chunk.
    """

    fused_activations: bool = False
    chunked_loss: bool = False

    def names(self) -> list[str]:
        """Return the names of the rewrites that are on."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]


NO_REWRITES = Rewrites()


@dataclass(frozen=True)
class PlacementPlan:
    """Which activations are stored and which are recomputed, stage by stage.

    Args:
        policy: What made it: `"none"`, `"all"`, `"every_2"`, `"sqrt"`, `"budget"`, ...
        stages: Module name -> choice, in the order of the forward pass. Stages that are not named store everything.
        rewrites: What computes the same with less memory.
        baseline_peak_bytes: Replayed peak of one optimizer step without recomputation and rewrites.
        predicted_peak_bytes: Replayed peak of one optimizer step under this plan.
        floor_peak_bytes: The least peak that any known plan for this model and batch has.
        budget_bytes: The budget that was asked for.
        extra_time_ratio: Recomputation as a share of the time of a step without it, at least 0.
        optimality_gap: How much of a step's time, at most, a better plan for the same budget could save (0: none).
        measured_peak_bytes: Peak of a real step under this plan, as a training run has measured it.
        details: Model, batch, optimizer, precision, device, versions: what the figures were computed for.
    """

    policy: str
    stages: dict[str, StageChoice]
    rewrites: Rewrites = NO_REWRITES
    baseline_peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    floor_peak_bytes: int | None = None
    budget_bytes: int | None = None
    extra_time_ratio: float | None = None
    optimality_gap: float | None = None
    measured_peak_bytes: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_stock(self) -> bool:
        """Whether the plan changes nothing."""
        return not self.rewrites.names() and all(choice == STORE for choice in self.stages.values())

    @property
    def offloads(self) -> bool:
        """Whether an input of a stage is kept on the host."""
        return any(choice.offload for choice in self.stages.values())

    def counts(self) -> dict[str, int]:
        """Return how many stages make each choice."""
        return {
            kind: count
            for kind in RECOMPUTE_KINDS
            if (count := sum(choice.recompute == kind for choice in self.stages.values()))
        }

    def summary(self) -> str:
        """Return in words what the plan does."""
        parts = [
            f"{kind}: {describe(name for name, choice in self.stages.items() if choice.recompute == kind)}"
            for kind in self.counts()
            if kind != "none"
        ]
        if self.offloads:
            parts.append(f"inputs on the host: {describe(n for n, choice in self.stages.items() if choice.offload)}")
        return f"{self.policy} ({'; '.join(parts + self.rewrites.names()) or 'nothing is recomputed'})"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as in the JSON file."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["stages"] = {name: choice.to_dict() for name, choice in self.stages.items()}
        values["rewrites"] = dataclasses.asdict(self.rewrites)
        return {"format": PLAN_FORMAT, **values}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PlacementPlan":
        """Return the plan that `to_dict` has written.

        Raises:
            ValueError: A key is missing or unknown, or a choice is not one.
        """
        if isinstance(values, dict) and values.get("format") != PLAN_FORMAT:
            raise ValueError(f"not a placement plan of format {PLAN_FORMAT}; {_REMEDY}.")
        try:
            return cls._read(values)
        except ValueError as error:
            raise ValueError(f"not a placement plan ({str(error).rstrip('.')}); {_REMEDY}.") from error

    @classmethod
    def _read(cls, values: Any) -> "PlacementPlan":
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        values = {name: value for name, value in values.items() if name != "format"}
        _check_keys(values, cls, ("policy", "stages"))
        for name, value in values.items():
            _check_value(name, value)
        values["stages"] = {name: _choice(name, choice) for name, choice in values["stages"].items()}
        values["rewrites"] = Rewrites(**values.get("rewrites", {}))
        plan = cls(**values)
        peaks = (plan.predicted_peak_bytes, plan.baseline_peak_bytes, plan.extra_time_ratio)
        if any(peak is None for peak in peaks) != all(peak is None for peak in peaks):
            raise ValueError("predicted_peak_bytes, baseline_peak_bytes and extra_time_ratio belong together")
        return plan

    @classmethod
    def load(cls, path: str | Path) -> "PlacementPlan":
        """Read a plan.

        Raises:
            ValueError: There is no such file, or it is no plan.
        """
        try:
            values = json.loads(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"no placement plan can be read at {path} ({error.strerror}); {_REMEDY}.") from error
        except ValueError as error:
            raise ValueError(f"{path} isn't a placement plan ({error}); {_REMEDY}.") from error
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _choice(name: str, values: Any) -> StageChoice:
    try:
        return StageChoice.from_dict(values)
    except ValueError as error:
        raise ValueError(f"stage '{name}': {error}") from error


def _check_keys(values: Any, cls: type, needed: Iterable[str] = ()) -> None:
    """Refuse what is no mapping, lacks a key, or has one that is no field of a class."""
    if not isinstance(values, dict):
        raise ValueError(f"{values!r} stands for a mapping")
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"without {' and '.join(missing)}")
    known = [item.name for item in dataclasses.fields(cls)]
    if unknown := [str(name) for name in values if name not in known]:
        raise ValueError(f"{', '.join(unknown)} is none of {', '.join(known)}")


def _check_value(name: str, value: Any) -> None:
    """Refuse the value of a field of a plan that is of another type or out of range."""
    if name == "rewrites":
        _check_keys(value, Rewrites)
        fits, what = all(type(on) is bool for on in value.values()), "true or false for each of them"
    elif name == "policy":
        fits, what = isinstance(value, str), "a text"
    elif name in ("stages", "details"):
        fits, what = isinstance(value, dict), "a mapping"
    elif name.endswith("_bytes"):
        fits, what = value is None or (type(value) is int and value > 0), "a number of bytes"
    else:
        fits = value is None or (type(value) in (int, float) and math.isfinite(value) and value >= 0)
        what = "a number that is not negative"
    if not fits:
        raise ValueError(f"{name} is {value!r}, not {what}")


def runs_of(stages: dict[str, StageChoice]) -> list[list[str]]:
    """Return the regions of more than one stage: names in order, first to last.

    Raises:
        ValueError: Stages of one run are not consecutive, or one that isn't the first is to be offloaded.
    """
    regions: dict[int, list[str]] = {}
    previous: int | None = None
    for name, choice in stages.items():
        if choice.run is not None:
            if choice.run in regions and choice.run != previous:
                raise ValueError(f"the stages of run {choice.run} are not consecutive: {name} stands apart.")
            if choice.offload and choice.run in regions:
                raise ValueError(f"{name} is inside run {choice.run}, which keeps no input of it to offload.")
            regions.setdefault(choice.run, []).append(name)
        previous = choice.run
    return [names for names in regions.values() if len(names) > 1]


def describe(names: Iterable[str]) -> str:
    """Return module names with runs of indices shortened: `h.0, h.1, h.2` is `h.0-2`."""
    groups: list[list[Any]] = []
    for name in names:
        prefix, _, last = name.rpartition(".")
        index = int(last) if last.isdigit() else None
        if index is not None and groups and groups[-1][0] == prefix and groups[-1][2] == index - 1:
            groups[-1][2] = index
        else:
            groups.append([prefix, index, index, name])
    return ", ".join(f"{name}-{last}" if first != last else name for _, first, last, name in groups)
