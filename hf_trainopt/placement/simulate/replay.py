"""Replays of a whole training step without memory: forward, backward, clipping, optimizer step, byte for byte."""

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._pytree import tree_leaves

from ...machine.costs import Cost
from ...models.liger import liger_kernels
from ..errors import FilledCacheError, PlacementError, ReplayError
from ..plan.plan import NO_REWRITES, STORE, PlacementPlan, Rewrites, StageChoice, describe
from ..recompute.apply import apply_placement, check_model
from ..recompute.offload import first_computed
from .fake import as_on, as_type, fake_batch, fake_copy, fake_mode, fake_whole
from .fake_contexts import no_checks_of_values, no_logged_traceback, no_packed_sequences
from .host_copies import host_copies_counted
from .liger import liger_replayed
from .passes import calls_of_checkpoint, passes_of
from .rank import removal_of
from .ranks import rank_of
from .scratch import cpu_scratch
from .step_setup import StepSetup, model_loss
from .tracker import Key, Section, StorageTracker, merged_section
from .triton_kernels import triton_not_launched
from .values import UnknownNumberError, following_values, known_pairs
from .zero3_linear import zero3_linear


logger = logging.getLogger(__name__)

_LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnknownNumberError)


_RESIDENT = frozenset({"parameters", "buffers", "optimizer", "gradients", "communication"})


@dataclass(frozen=True)
class Replay:
    """What one step took.

    Args:
        peak_bytes: Most live bytes.
        peak_by_key: (kind, stage) -> live bytes at that moment.
        sections: The parts of the step in order.
        boundary_bytes: Stage -> bytes of its outputs.
        holds_output: Stages whose output is alive until their own backward pass is done.
        joined: Stages that take an output of the stage before them as it is.
        led: Those of them whose first computed input it is.
        cost: Everything that ran, the optimizer step included.
        host_bytes: Most bytes on the host of what is offloaded.
    """

    peak_bytes: int
    peak_by_key: dict[Key, int]
    sections: list[Section]
    boundary_bytes: dict[str, int]
    holds_output: frozenset[str]
    joined: frozenset[str]
    led: frozenset[str]
    cost: Cost
    host_bytes: int = 0

    def section(self, phase: str, stage: str = "") -> Section:
        """Return the section of this name; an empty one for the backward pass of a stage that has none.

        Several, of a step with more than one forward pass, are put together to one.
        """
        found = [section for section in self.sections if section.phase == phase and section.stage == stage]
        if not found and phase == "backward":
            return Section(phase, stage, 0, 0)
        if not found:
            raise KeyError(f"no section {phase} {stage}")
        return found[0] if len(found) == 1 else merged_section(found)

    def has_backward(self, stage: str) -> bool:
        """Whether gradients flow through a stage (not, if all up to it is frozen)."""
        return any(section.phase == "backward" and section.stage == stage for section in self.sections)

    @property
    def order(self) -> list[str]:
        """Stages in the order in which they ran first."""
        return list(dict.fromkeys(section.stage for section in self.sections if section.phase == "forward"))

    def peak_by_kind(self) -> dict[str, int]:
        """Return kind -> live bytes at the peak."""
        kinds: dict[str, int] = {}
        for (kind, _), num_bytes in self.peak_by_key.items():
            kinds[kind] = kinds.get(kind, 0) + num_bytes
        return {kind: num_bytes for kind, num_bytes in kinds.items() if num_bytes}

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters, gradients and optimizer state at the peak, which no placement changes."""
        return sum(self.resident_by_kind().values())

    def resident_by_kind(self) -> dict[str, int]:
        """Return kind -> bytes at the peak of parameters, gradients and optimizer state; with k = 1 gradients may come
        after the peak.
        """
        return {kind: num_bytes for kind, num_bytes in self.peak_by_kind().items() if kind in _RESIDENT}


# What the host does besides issuing recomputed operators, as shares of its time for the forward pass: Python handles
# each saved tensor, and in selective recomputation each operator, twice (fitted in benchmarks/gpu.md).
SAVED_TENSORS = 1.0
_HOST_OVERHEAD = {"full": SAVED_TENSORS, "selective": SAVED_TENSORS + 1.2}


class StepReplayer:
    """Replays steps of one model on one batch under one plan after another.

    Args:
        model: A model, real or made of fake tensors in `mode`. Real ones are copied without their data.
        batch: A batch, real or fake.
        setup: How the step is made.
        stages: Names of the stages.
        mode: The mode of the model's fake tensors; `None`: the model is real.

    Raises:
        ValueError: The model cannot be run on fake tensors.
    """

    def __init__(self, model: nn.Module, batch: Any, setup: StepSetup, stages: list[str], mode: Any = None):
        self.mode = mode or fake_mode()
        self.setup = setup
        cast = setup.sharding.dtype
        if mode is not None and cast is None:
            self.model = model
        else:
            self.model = fake_copy(model, self.mode, fake_whole if cast is None else as_type(cast))
        if mode is None and setup.compute_loss is model_loss and "forward" in vars(type(self.model)):
            # A `forward` that someone has put on the instance (TRL does) may call the real model; a method of it
            # (Liger's) is one of the copy by now.
            forward = self.model.__dict__.pop("forward", None)
            if getattr(forward, "__self__", None) is self.model:
                self.model.forward = forward
        self.kernels = liger_kernels(self.model)
        self._tracker: StorageTracker | None = None
        self.model.train()
        self.batch = fake_batch(batch, self.mode, keeps_mask=setup.follows_values)
        self._known = known_pairs(self.batch, batch) if setup.follows_values else None
        self._packed = isinstance(batch, Mapping) and "position_ids" in batch
        self._replays: dict[Any, Replay] = {}
        # So many numbers of the model does the loss look at, at most.
        self.assumed_numbers = 0
        with self._on_device():
            self.stages = self._stages_called_once(stages)
            self.rank = rank_of(self.model, self.mode, setup, self.stages, model)
            self.optimizer = self._optimizer_with_state()

    @contextmanager
    def _on_device(self):
        with ExitStack() as stack:
            stack.enter_context(as_on(self.setup.device.kind, self.mode))
            if self.setup.sharding.keeps_linear_inputs:
                stack.enter_context(zero3_linear())
            stack.enter_context(no_checks_of_values())
            if not self._packed:
                stack.enter_context(no_packed_sequences())
            stack.enter_context(triton_not_launched(self._count_kernel))
            stack.enter_context(host_copies_counted(lambda: self._tracker, self.setup.device))
            if self.kernels:
                stack.enter_context(liger_replayed(self.setup.device, self._count_kernel))
            if self._known is not None:
                reads = stack.enter_context(following_values(self._known))
                stack.callback(self._count_assumed, reads)
            yield

    def _optimizer_with_state(self) -> torch.optim.Optimizer | None:
        """Return the optimizer as it is after a first step."""
        try:
            optimizer = self.rank.make_optimizer()
        except Exception as error:
            raise PlacementError(
                f"no optimizer like that of the run can be made for a replay ({error!r}), so that no peak can be "
                "predicted; pass optim=... in place of an optimizer, or choose checkpoint_placement='all', 'every_n' "
                "or 'sqrt'."
            ) from error
        if optimizer is None:
            return None
        for group in optimizer.param_groups:
            # What torch chooses on CUDA by itself, where it looks at the device of the parameters.
            if self.rank.chooses_foreach and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer.step()
        except Exception as error:
            raise PlacementError(
                f"{type(optimizer).__name__} cannot take a step without memory ({error!r}), so that no peak can be "
                "predicted; choose another optimizer, or checkpoint_placement='all', 'every_n' or 'sqrt'."
            ) from error
        optimizer.zero_grad()
        return optimizer

    def _stages_called_once(self, stages: list[str]) -> list[str]:
        """Return the stages that each forward pass calls exactly once, in the order of these calls."""
        check_model(self.model)
        with calls_of_checkpoint() as checkpoints:
            passes = self._followed(
                lambda: passes_of(self.model, stages, lambda: self.setup.compute_loss(self.model, self.batch))
            )
        if checkpoints:
            raise PlacementError(
                f"{type(self.model).__name__} calls torch.utils.checkpoint in its forward pass, so that a placement "
                "would recompute what is recomputed already; turn its own checkpointing off or leave out the plan."
            )
        if passes.others:
            logger.warning(
                "Not planned: %s, called more than once or never in a forward pass.", describe(passes.others)
            )
        if not passes.once:
            raise ReplayError(
                f"none of the stages of {type(self.model).__name__} is called exactly once in a forward pass, so that "
                "placement cannot be planned; name other stages with placement_stages='a regular expression'."
            )
        self._num_calls = passes.count * len(passes.once)
        return passes.once

    def _followed(self, run: Callable[[], Any], is_placed: bool = False) -> Any:
        """Run something on fake tensors; say what to do where that is impossible.

        Args:
            run: What to run.
            is_placed: Whether stages are recomputed in it, and a step in which none is has run.
        """
        try:
            with no_logged_traceback():
                return run()
        except FilledCacheError as error:
            raise PlacementError(f"{type(self.model).__name__}: {error}") from error
        except Exception as error:
            if is_placed:  # so that other placements will fail likewise
                raise PlacementError(
                    f"{type(self.model).__name__} cannot be run with stages that are recomputed "
                    f"({type(error).__name__}: {error}), though it can without; leave out the placement or name other "
                    "stages with placement_stages='a regular expression'."
                ) from error
            why = "operations that look at values cannot be followed; " if isinstance(error, _LOOKS_AT_VALUES) else ""
            raise ReplayError(
                f"{type(self.model).__name__} cannot be replayed without memory ({type(error).__name__}: {error}); "
                f"{why}choose checkpoint_placement='all', 'every_n' or 'sqrt', which need no replay, if the model "
                "trains without a placement."
            ) from error

    def _count_kernel(self, num_bytes: int, flops: int, dtype: torch.dtype) -> None:
        if self._tracker is not None:
            device = self.setup.device
            self._tracker.charge(Cost(flops, num_bytes, device.seconds(flops, num_bytes, dtype), device.host_s))

    def _count_assumed(self, reads: Any) -> None:
        self.assumed_numbers = max(self.assumed_numbers, reads.assumed)

    def replay(self, plan: PlacementPlan) -> Replay:
        """Return what one step takes under a plan.

        Raises:
            ValueError: The model cannot be run on fake tensors.
        """
        key = (plan.rewrites, tuple((name, choice) for name, choice in plan.stages.items() if choice != STORE))
        if key not in self._replays:
            self._replays[key] = self._replay(plan)
        return self._replays[key]

    def replay_choices(self, stages: Mapping[str, StageChoice], rewrites: Rewrites = NO_REWRITES) -> Replay:
        """Return what one step takes under these choices."""
        return self.replay(PlacementPlan("replay", dict(stages), rewrites, details={"kernels": self.kernels}))

    def _replay(self, plan: PlacementPlan) -> Replay:
        is_placed = any(choice != STORE for choice in plan.stages.values())
        with self._on_device(), apply_placement(self.model, plan, strict_logits=True), ExitStack() as stack:
            self.rank.rehearse(lambda: self._followed(self._passes, is_placed))
            tracker = self._start()
            boundary: dict[str, int] = {}
            joined: dict[str, bool] = {}
            stack.callback(self._watch_stages(tracker, boundary, joined))
            stack.callback(self.rank.watch(tracker, _owners(self.model, self.stages)))
            self._tracker = tracker
            try:
                with tracker:
                    self._followed(lambda: self._step(tracker), is_placed)
            finally:
                self._tracker = None
                self.rank.reset()
        tracker.end()
        for section in tracker.sections:
            if section.phase == "forward" and (choice := plan.stages.get(section.stage)) is not None:
                section.cost.host_seconds *= 1 + _HOST_OVERHEAD.get(choice.recompute, 0.0)
        holds = frozenset(
            stage for stage, section in tracker.boundary_ends if section.phase == "backward" and section.stage == stage
        )
        return Replay(
            tracker.peak_bytes,
            tracker.peak_by_key,
            tracker.sections,
            boundary,
            holds,
            frozenset(joined),
            frozenset(name for name, leads in joined.items() if leads),
            tracker.total_cost(),
            tracker.host_bytes,
        )

    def _start(self) -> StorageTracker:
        """Return a tracker that has counted what is there before the step."""
        device = self.setup.device
        tracker = StorageTracker(device, cpu_scratch if device.kind == "cpu" else None)
        owner = _owners(self.model, self.stages)
        self.rank.count(tracker, self.optimizer, owner)
        for name, buffer in self.model.named_buffers():
            tracker.count([buffer], "buffers", owner(name))
        tracker.count(self.setup.residents(self.mode), "parameters")
        inputs = [leaf for leaf in tree_leaves(self.batch) if isinstance(leaf, torch.Tensor)]
        tracker.count(inputs, "inputs")
        # `Trainer` fetches all micro-batches of a step at once.
        self._held = [torch.empty_like(leaf) for leaf in inputs for _ in range(self.setup.accumulation_steps - 1)]
        tracker.count(self._held, "inputs")
        self._workspace = torch.empty(2 * device.workspace, dtype=torch.uint8)
        tracker.count([self._workspace], "workspace")
        return tracker

    def _watch_stages(
        self, tracker: StorageTracker, boundary: dict[str, int], joined: dict[str, bool]
    ) -> Callable[[], None]:
        """Let the tracker know where stages and their backward passes begin; return what takes that back."""
        owner = _owners(self.model, self.stages)
        last = self.stages[-1] if self.stages else ""
        handles = []
        passed: list[str] = []
        outputs_before: list[weakref.ref] = []

        def before(name):
            def hook(module, args, kwargs):
                if not torch.is_grad_enabled():
                    return
                inputs = list(_tensors([args, kwargs]))
                passed_on = [output for reference in outputs_before if (output := reference()) is not None]
                if any(leaf is output for leaf in inputs for output in passed_on):
                    place = first_computed(inputs)
                    joined[name] = place is not None and any(inputs[place] is output for output in passed_on)
                if not passed:
                    for leaf in _tensors([args, kwargs]):
                        if leaf.requires_grad and not leaf.is_leaf:
                            leaf.register_hook(begin_tail)
                            break
                tracker.begin("forward", name)
                tracker.kind, tracker.scope = "activations", name

            return hook

        def after(name):
            def hook(module, args, outputs):
                if not torch.is_grad_enabled():
                    return
                passed.append(name)
                is_last = len(passed) == self._num_calls
                tensors = [leaf for leaf in _tensors(outputs) if leaf.requires_grad]
                outputs_before[:] = [weakref.ref(leaf) for leaf in tensors]
                boundary[name] = boundary.get(name, 0) + sum(tracker.mark_boundary(leaf, name) for leaf in tensors)
                tracker.begin("head" if is_last else "between", "")
                tracker.kind, tracker.scope = "loss" if is_last else "activations", ""
                if tensors:
                    tensors[0].register_hook(begin_backward(name))

            return hook

        def begin_backward(name):
            def hook(gradient):
                tracker.begin("backward", name)
                tracker.kind, tracker.scope = "temporary", name

            return hook

        def begin_tail(gradient):
            tracker.begin("tail")
            tracker.kind, tracker.scope = "temporary", ""

        def done(name):
            def hook(parameter):
                tracker.count([parameter.grad], "gradients", owner(name))

            return hook

        for name in self.stages:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
        if not last:
            tracker.kind = "activations"
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(done(name)))

        return removal_of(handles)

    def _step(self, tracker: StorageTracker) -> None:
        tracker.begin("between")
        tracker.kind, tracker.scope = "activations", ""
        self._passes(tracker)
        self.rank.end_backward(tracker)
        tracker.begin("step")
        tracker.kind, tracker.scope = "temporary", ""
        if self.optimizer is not None:
            self.rank.step(tracker, self.optimizer)

    def _passes(self, tracker: StorageTracker | None = None) -> None:
        """Run the model forward and backward."""
        enabled = self.setup.autocast_dtype is not None
        autocast = torch.autocast("cpu", dtype=self.setup.autocast_dtype) if enabled else nullcontext()
        with autocast:
            loss = self.setup.compute_loss(self.model, self.batch)
        if tracker is not None:
            tracker.kind = "loss"
        if loss.requires_grad:
            loss.backward()


def _tensors(outputs: Any) -> Iterable[torch.Tensor]:
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor))


def _owners(model: nn.Module, stages: list[str]) -> Callable[[str], str]:
    """Return a function from the name of a parameter to that of its stage, `""` for none."""

    def owner(name: str) -> str:
        return next((stage for stage in stages if name.startswith(f"{stage}.")), "")

    return owner
