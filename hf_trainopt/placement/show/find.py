"""`hf-trainopt plan --find`: the sizes that fit, and the fastest micro-batch."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from ..errors import PlacementError, ReplayError
from ..plan.budget import gib, is_of_device
from ..plan.planner import PlacementPlanner
from ..plan.sizes import SizedPlan, fastest_micro_batch, largest_size
from . import models, render
from .flags import BATCH, BLOCK, IMAGE
from .workshop import Workshop, header, script_of


# Sizes of samples are multiples of this, and the tables begin there.
UNITS = {BATCH: 1, BLOCK: 64, IMAGE: 32}
# No batch, sequence or image of interest is larger.
LIMITS = {BATCH: 2**14, BLOCK: 2**20, IMAGE: 2**12}


_WITHOUT_REWRITES = (
    " A micro-batch that fits as it is has no rewrites; --memory_rewrites fused_activations shows all rows with one."
)


_SMALLER = " Smaller micro-batches weren't tried: on a GPU they do the same work in more and smaller kernels."


class Finder:
    """Searches over sizes with the planners of a workshop.

    The choices that are worth having for a layer are looked for at the first size only.

    Args:
        workshop: Makes models and planners as the flags ask.
    """

    def __init__(self, workshop: Workshop):
        self.workshop = workshop
        self.arguments: argparse.Namespace = workshop.arguments
        self._planners: dict[tuple[Any, ...], PlacementPlanner] = {}
        self._first: PlacementPlanner | None = None
        self.built: models.BuiltModel | None = None

    def planner(self, accumulation_steps: int, **sizes: int) -> PlacementPlanner:
        """Return the planner for sizes; those that aren't named are the flags'."""
        asked = {name: sizes.get(name, getattr(self.arguments, name)) for name in (BATCH, BLOCK, IMAGE)}
        key = (accumulation_steps, *asked.values())
        if key not in self._planners:
            self.built = self.workshop.build(asked[BATCH], asked[BLOCK], asked[IMAGE])
            # Images of another size can be another model, whose layers have other operators.
            self._planners[key] = self.workshop.planner(self.built, accumulation_steps, self._first)
            self._first = self._first or self._planners[key]
        return self._planners[key]

    def texts(self) -> Iterator[str]:
        """Yield what belongs on stdout."""
        names = self.arguments.find
        steps = self.arguments.gradient_accumulation_steps
        start = self.planner(steps)
        if not self.arguments.json:
            about = f"{' and '.join(names)} searched"
            if names == [BATCH]:
                about += f", {self.built.sample} per sample"
            yield render.render_pairs(header(self.workshop, self.built, start, about)) + "\n\n"
        budget = start.bytes_of(self.arguments.memory_budget)
        if names == [BATCH]:
            yield self._batches(budget)
        elif len(names) == 1:
            yield self._samples(names[0], budget)
        else:
            yield self._table(next(name for name in names if name != BATCH), budget)

    # ---- The micro-batch -------------------------------------------------------------------------------------------

    def _batches(self, budget: int) -> str:
        arguments = self.arguments
        first, steps = getattr(arguments, BATCH), arguments.gradient_accumulation_steps
        batch = first * steps
        # With k = 1 there are no gradients of earlier micro-batches: nothing larger fits with any k.
        largest = self._largest(BATCH, budget, 1)
        sizes = {size: batch // size for size in range(1, min(batch, largest) + 1) if batch % size == 0}
        found = fastest_micro_batch(
            lambda size: self.planner(sizes[size], **{BATCH: size}), sizes, arguments.memory_budget
        )
        if arguments.json:
            return _as_json(
                budget_bytes=budget, largest=largest, samples_in_a_step=batch, micro_batches=[_row(s) for s in found]
            )
        text = f"The largest micro-batch that fits {gib(budget)} with recomputation is {largest}."
        if not found:
            more = (
                f" None that divides the {batch} samples of a step fits together with the gradients of earlier ones."
            )
            return render.wrapped(text + more) + "\n"
        best, has_stock = found[0], any(sized.plan.is_stock for sized in found)
        flags = {
            BATCH: str(best.micro_batch),
            "gradient_accumulation_steps": str(best.accumulation_steps),
            **{name: "True" for name in ("bf16", "fp16") if getattr(arguments, name)},
            **({} if self.workshop.config_optimizer else {"optim": arguments.optim}),
            **({} if best.plan.is_stock else {"memory_budget": arguments.memory_budget}),
        }
        if arguments.memory_rewrites != "auto":
            flags["memory_rewrites"] = arguments.memory_rewrites
        flags |= {name: True for name in ("placement_offload", "use_liger_kernel") if getattr(arguments, name)}
        if best.plan.is_stock:
            flags.pop("placement_offload", None)  # which needs a budget
        return "\n".join(
            [
                render.wrapped(text),
                "",
                f"Micro-batches of a step with {batch} samples, each with its best plan:",
                "",
                render.render_sizes(sorted(found, key=lambda sized: -sized.micro_batch), best),
                "",
                render.wrapped(
                    f"The fastest is predicted to be {best.micro_batch}: {render.words(best.plan)}. Times are a "
                    "roofline's, which doesn't know that large matrices run at a higher rate: where two are close, "
                    "try the larger one."
                    + (_SMALLER if first < min(sized.micro_batch for sized in found) else "")
                    + (_WITHOUT_REWRITES if arguments.memory_rewrites == "auto" and has_stock else "")
                ),
                "",
                render.wrapped(render.not_counted(arguments.memory_budget, self.workshop.device.kind)),
                "",
                f"  {self._allocator}{script_of(self.built)} ... {render.flags(flags)}",
                "",
            ]
        )

    @property
    def _allocator(self) -> str:
        """The setting of the allocator that a budget of the device is for."""
        return (
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "
            if is_of_device(self.arguments.memory_budget) and self.workshop.device.kind == "cuda"
            else ""
        )

    def _largest(self, name: str, budget: int, steps: int, **others: int) -> int:
        """Return the largest size that fits with the other sizes as they are.

        Raises:
            PlacementError: Not even the smallest one fits.
        """
        limit = self._limit(name)
        unit = min(UNITS[name], limit)
        first = getattr(self.arguments, name) or 4 * unit
        tried: dict[int, PlacementPlanner] = {}

        def peak(size: int) -> int:
            try:
                tried[size] = self.planner(steps, **{name: size}, **others)
            except ReplayError:
                if not tried:
                    raise
                return budget + 1  # batch norms can't train on one sample
            return tried[size].floor.peak_bytes

        found = largest_size(peak, limit, budget, first=first, unit=unit)
        if not found:
            tried[min(tried)].check_budget(self.arguments.memory_budget)
        return found

    # ---- The size of samples ---------------------------------------------------------------------------------------

    def _samples(self, name: str, budget: int) -> str:
        steps = self.arguments.gradient_accumulation_steps
        largest = self._largest(name, budget, steps)
        planner = self.planner(steps, **{name: largest})
        plan = planner.for_budget(self.arguments.memory_budget)
        if self.arguments.json:
            return _as_json(budget_bytes=budget, largest=largest, plan=plan.to_dict())
        most = " (as many as the model has positions for)" if name == BLOCK and largest == self._limit(name) else ""
        batch = getattr(self.arguments, BATCH)
        return (
            render.wrapped(
                f"The largest {name} that fits {gib(budget)} with micro-batches of {batch} is {largest}{most}: "
                f"{render.words(plan)}, peak {gib(plan.predicted_peak_bytes)} instead of "
                f"{gib(plan.baseline_peak_bytes)}, time {render.time_words(plan)}."
            )
            + "\n"
        )

    def _limit(self, name: str) -> int:
        """Return the largest size of interest: a sequence has no more tokens than the model has positions."""
        most = models.max_positions_of(self.built.model.config) if name == BLOCK else None
        return LIMITS[name] if most is None else most

    def _table(self, name: str, budget: int) -> str:
        """Return, for sizes of samples, the largest micro-batch with and without recomputation."""
        steps, rows = self.arguments.gradient_accumulation_steps, []
        own = getattr(self.arguments, name)
        most = self._limit(name)
        if own is None:
            own = min(most, 1024 if name == BLOCK else 224)
        for size in sorted({own // 4, own // 2, own, 2 * own, 4 * own}):
            if not UNITS[name] <= size <= most:
                continue
            try:
                largest = self._largest(BATCH, budget, steps, **{name: size})
            except PlacementError:
                largest = 0
            stored = largest_size(
                lambda batch, size=size: self.planner(steps, **{BATCH: batch, name: size}).baseline.peak_bytes,
                max(1, largest),
                budget,
                first=max(1, largest // 2),
            )
            rows.append((size, stored, largest))
        if self.arguments.json:
            keys = (name, "largest_without_recomputation", "largest")
            return _as_json(budget_bytes=budget, rows=[dict(zip(keys, row, strict=True)) for row in rows])
        lines = [f"Largest micro-batches that fit {gib(budget)}:", ""]
        lines.append(f"  {name:>12}{'no recomputation':>20}{'with a plan':>16}")
        lines += [f"  {size:>12}{stored or 'none':>20}{largest or 'none':>16}" for size, stored, largest in rows]
        return "\n".join(lines) + "\n"


def _row(sized: SizedPlan) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": sized.micro_batch,
        "gradient_accumulation_steps": sized.accumulation_steps,
        "baseline_peak_bytes": sized.baseline_peak_bytes,
        "seconds": sized.seconds,
        "samples_per_second": sized.samples_per_second,
        "plan": sized.plan.to_dict(),
    }


def _as_json(**values: Any) -> str:
    return json.dumps(values, indent=2) + "\n"
