"""Makes the plan of a training run: for its batches, its loss and its optimizer."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ...core.batch import copy_batch, count_rows, split_batch
from ...core.facts import is_sharded, loss_divides_itself, rank_batch_size
from ...core.shadow import shadow_of
from ...core.versions import activation_checkpointing_kwargs
from ...machine.device_memory import memory_of_run, uses_expandable_segments
from ...machine.devices import DeviceSpec, device_spec
from ...models.liger import liger_kernels
from ..arguments import is_plan_file
from ..errors import PlacementError, ReplayError
from ..rewrite.allowed_rewrites import allowed_rewrites, check_rewrites
from ..rewrite.chunked_loss_check import check_chunked_loss
from ..rewrite.rewrites import available_rewrites
from ..simulate.example_batch import largest_batch
from ..simulate.residents import ResidentModules
from ..simulate.sharding import Sharding
from ..simulate.step_setup import StepSetup, model_loss
from ..simulate.wrapped import num_elements, whole_like
from .budget import is_of_device, is_of_own_peak
from .own_loss import has_own_loss, own_loss_planner
from .plan import NO_REWRITES, PlacementPlan, Rewrites
from .planner import PlacementPlanner
from .policies import named_choices
from .run_optimizer import optimizer_of
from .run_sharding import sharding_of
from .sizes import fastest_micro_batch
from .stages import find_stages


logger = logging.getLogger(__name__)


class RunPlanner:
    """Plans the steps of a Trainer's run.

    Args:
        trainer: The Trainer.
        accumulation: Tells how many micro-batches a step may have (`most_steps`).

    Attributes:
        last: The planner made last, on the first process: what a step takes, with and without recomputation.
    """

    def __init__(self, trainer: Any, accumulation: Any):
        self.trainer = trainer
        self.last: PlacementPlanner | None = None
        self._accumulation = accumulation
        self._spread: Sharding | None = None

    def make_plan(self, dataloader: Any, resumed: Sequence[PlacementPlan]) -> PlacementPlan:
        """Return the plan that the arguments ask for.

        Args:
            dataloader: For training.
            resumed: Plans of the run that is resumed: the first that was made for the same request is kept.

        Raises:
            PlacementError: There is none, or the budget can't be met.
            ValueError: An argument doesn't fit.
        """
        args = self.trainer.args
        policy = args.placement_policy
        self._spread = None
        if is_plan_file(policy):
            return self._plan_of_file(policy, dataloader)
        try:
            batch = largest_batch(dataloader, self._rows_of(dataloader))
        except ValueError as error:
            if policy == "budget" or check_rewrites(args.memory_rewrites):
                raise
            logger.warning("No peak is predicted for checkpoint_placement='%s': %s", policy, error)
            return self._unpredicted(policy)
        request = self._request(batch)
        for plan in resumed:
            if plan.details.get("request") == request:
                logger.info("The placement is the resumed run's.")
                return plan
        available = available_rewrites(self.trainer.model)
        asked = check_rewrites(args.memory_rewrites)
        if "chunked_loss" in asked and available.chunked_loss:
            self._check_chunked_loss(batch)
        if policy == "budget":
            logger.info(
                "Planning checkpoint placement for a budget of %s, with memory_rewrites='%s'; this takes seconds to "
                "minutes.",
                args.memory_budget,
                args.memory_rewrites,
            )
        plan = self._plan_for(policy, batch, available)
        if plan.rewrites.chunked_loss and "chunked_loss" not in asked:
            try:
                self._check_chunked_loss(batch)
            except ValueError as error:
                logger.warning("The chunked loss is not used: %s", error)
                plan = self._plan_for(policy, batch, dataclasses.replace(available, chunked_loss=False))
        return dataclasses.replace(plan, details={**plan.details, "request": request})

    def _rows_of(self, dataloader) -> int:
        """Samples in a batch of this rank: a loader of the user's may make others than the arguments say."""
        asked = rank_batch_size(self.trainer)
        if self.trainer.accelerator.split_batches:
            return asked
        for owner in (dataloader, getattr(dataloader, "batch_sampler", None)):
            rows = getattr(owner, "batch_size", None)
            if isinstance(rows, int):
                return rows
        return asked

    def _plan_of_file(self, path: str, dataloader) -> PlacementPlan:
        plan = PlacementPlan.load(path)
        asked = dict.fromkeys(check_rewrites(self.trainer.args.memory_rewrites), True)
        plan = dataclasses.replace(plan, rewrites=dataclasses.replace(plan.rewrites, **asked))
        try:
            batch = largest_batch(dataloader, self._rows_of(dataloader))
        except ValueError as error:
            if plan.rewrites.chunked_loss:
                raise PlacementError(
                    f"{path}: its chunked loss is compared with the stock one before it is used, and there is no "
                    f"batch for that ({error}); make a plan with --memory_rewrites none or fused_activations."
                ) from error
            logger.warning("Whether %s was made for batches like these is not known: %s", path, error)
            return plan
        self._warn_of_another_setup(plan, batch)
        if plan.rewrites.chunked_loss:
            self._check_chunked_loss(batch)
        return plan

    def _warn_of_another_setup(self, plan: PlacementPlan, batch: Any) -> None:
        """Warn if the figures of a plan file are not those of this run."""
        found = {
            "batch": _largest_shape(batch),
            "device": "cpu" if self.trainer.args.device.type == "cpu" else "an accelerator",
            "precision": {"fp16": "float16", "bf16": "bfloat16"}.get(
                self.trainer.accelerator.mixed_precision, "float32"
            ),
            "accumulation_steps": self._accumulation.most_steps,
            "kernels": _kernel_words(liger_kernels(self.trainer.model)),
            **self._spread_over(),
        }
        if "micro_batch_size" in plan.details:
            self._warn_of_another_micro_batch(plan.details["micro_batch_size"])
            del found["batch"], found["accumulation_steps"]
        made_for = {name: plan.details[name] for name in found if plan.details.get(name) is not None}
        if "kernels" in made_for:
            made_for["kernels"] = _kernel_words(made_for["kernels"])
        if "batch" in made_for:
            made_for["batch"] = _largest_shape(made_for["batch"])
        if made_for.get("device", "cpu") != "cpu":
            made_for["device"] = "an accelerator"
        if min(made_for.get("accumulation_steps", 1), found.get("accumulation_steps", 1)) > 1:
            del made_for["accumulation_steps"]  # what counts is whether gradients of earlier micro-batches are there
        differing = [f"{name} {made}, not {found[name]}" for name, made in made_for.items() if made != found[name]]
        if differing:
            logger.warning(
                "The placement plan was made for %s: its peaks don't hold for this run; make another one with "
                "`hf-trainopt plan` or memory_budget.",
                "; ".join(differing),
            )

    def _warn_of_another_micro_batch(self, size: int) -> None:
        if size != rank_batch_size(self.trainer) and not self.trainer.args.auto_micro_batch:
            logger.warning(
                "The placement plan was made for micro-batches of %d samples, not %d: set auto_micro_batch=True, or "
                "per_device_train_batch_size=%d and more gradient_accumulation_steps.",
                size,
                rank_batch_size(self.trainer),
                size,
            )

    def _plan_for(self, policy: str, batch: Any, available: Rewrites) -> PlacementPlan:
        args = self.trainer.args
        try:
            planner = self.planner_for(batch, available)
        except ValueError as error:
            if policy == "budget" or (check_rewrites(args.memory_rewrites) and not is_sharded(self.trainer)):
                raise
            logger.warning("No peak is predicted for checkpoint_placement='%s': %s", policy, error)
            return self._unpredicted(policy, allowed_rewrites(args.memory_rewrites, available)[0])
        if policy == "budget":
            if args.auto_micro_batch:
                return self._with_micro_batch(batch, available, planner)
            return planner.for_budget(args.memory_budget)
        return planner.named(policy, self._every_n)

    def _with_micro_batch(self, batch: Any, available: Rewrites, whole: PlacementPlanner) -> PlacementPlan:
        """Return the plan of the micro-batch that is fastest within the budget: the batch, or a part of it.

        Args:
            batch: As the data loader makes it.
            available: Rewrites that the model allows.
            whole: Planner for it.
        """
        budget = self.trainer.args.memory_budget
        if has_own_loss(self.trainer) or is_of_own_peak(budget):
            # What a loss of the user's does with a part of a batch is known in the run only, and the peak that a share
            # is of is another for each part.
            return whole.for_budget(budget)
        try:
            rows = count_rows(batch)
        except ValueError as error:
            logger.info("The micro-batch is not planned: %s", error)
            return whole.for_budget(budget)
        if rows != rank_batch_size(self.trainer):  # packed samples, pairs: what a part of it is isn't known
            return whole.for_budget(budget)
        if "labels" not in batch and loss_divides_itself(self.trainer, None):
            return whole.for_budget(budget)  # divided by items that no part has (see `OutOfMemoryPart`)
        sizes = {size: -(-rows // size) for size in halves(rows)}
        planners = {rows: whole}

        def planner_for(size: int) -> PlacementPlanner:
            if size not in planners:
                part = _with_mask_of(batch, split_batch(copy_batch(batch), size)[0])
                planners[size] = self._make_planner(part, available, sizes[size], whole)
            return planners[size]

        found = fastest_micro_batch(planner_for, sizes, budget)
        if not found:
            return planners[min(planners)].for_budget(budget)  # which says what would fit
        best = found[0]
        self.last = planner_for(best.micro_batch)
        return dataclasses.replace(best.plan, details={**best.plan.details, "micro_batch_size": best.micro_batch})

    @property
    def _every_n(self) -> int:
        """n of `checkpoint_placement="every_n"`, as transformers takes it."""
        return activation_checkpointing_kwargs(self.trainer.args).get("every_n_layers", 2)

    def _unpredicted(self, policy: str, rewrites: Rewrites = NO_REWRITES) -> PlacementPlan:
        """Return the plan of a named policy without a replay."""
        stages = find_stages(self.trainer.model, self.trainer.args.placement_stages)
        return PlacementPlan(policy, named_choices(policy, stages, self._every_n), rewrites)

    def planner_for(self, batch: Any, available: Rewrites) -> PlacementPlanner:
        """Return a planner of steps on batches like this one.

        Args:
            batch: The largest micro-batch.
            available: Rewrites that the model allows.

        Raises:
            ReplayError: The step can't be replayed.
            PlacementError: Likewise, and the model's own loss can't be either.
        """
        self.last = self._make_planner(batch, available)
        return self.last

    def _make_planner(
        self, batch: Any, available: Rewrites, pieces: int = 1, like: PlacementPlanner | None = None
    ) -> PlacementPlanner:
        """Return a planner of steps on these micro-batches, `pieces` of which are one of the data loader's."""
        shadow: list[Any] = [None]
        residents = ResidentModules(self.trainer)

        def compute_loss(model, batch):
            # Held until the next one: what `compute_loss` keeps on the trainer is there in the backward pass as well.
            shadow[0] = shadow_of(self.trainer, model, residents.fakes(next(model.parameters()).fake_mode))
            with shadow[0].compute_loss_context_manager():
                return shadow[0].compute_loss(model, dict(batch), num_items_in_batch=1)

        setup = StepSetup(
            device=self._device_spec,
            compute_loss=compute_loss,
            make_optimizer=self._optimizer_of,
            # DeepSpeed casts the model instead.
            autocast_dtype=None
            if self._sharding.is_zero
            else {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.trainer.accelerator.mixed_precision),
            accumulation_steps=pieces * self._accumulation.most_steps,
            max_grad_norm=self.trainer.args.max_grad_norm or 0.0,
            sharding=self._sharding,
            residents=residents.tensors,
            memory=memory_of_run(self.trainer.args.device, self.trainer.model, self.trainer.args.world_size),
        )
        args = self.trainer.args
        options = {
            "stages": args.placement_stages,
            "memory_rewrites": args.memory_rewrites,
            "available": available,
            "offload": args.placement_offload,
            "like": like,
        }
        try:
            return own_loss_planner(self.trainer, batch, setup, options)
        except ReplayError as error:
            own = has_own_loss(self.trainer)
            if not isinstance(batch, Mapping) or not own:
                raise
            if "chunked_loss" not in check_rewrites(args.memory_rewrites):
                # Who looks at values may well look at logits.
                options["available"] = dataclasses.replace(available, chunked_loss=False)
            models_own = dataclasses.replace(setup, compute_loss=model_loss)
            try:
                planner = PlacementPlanner(self.trainer.model, batch, models_own, **options)
            except ValueError:
                # The batch may be one that only `compute_loss` can take: the first reason is the one that counts.
                raise PlacementError(
                    f"{type(self.trainer).__name__}.compute_loss cannot be replayed, and the model alone has no loss "
                    f"for this batch: {error}"
                ) from error
            logger.warning(
                "%s.compute_loss cannot be replayed, so that only the model's own loss is planned for and the peak is "
                "not proved: %s",
                type(self.trainer).__name__,
                error,
            )
            return planner

    @property
    def _sharding(self) -> Sharding:
        """How the run is spread; a part of the request, so read once for each plan.

        Raises:
            PlacementError: Its memory can't be predicted.
        """
        if self._spread is None:
            self._spread = sharding_of(self.trainer)
        return self._spread

    @functools.cached_property
    def _device_spec(self) -> DeviceSpec:
        return device_spec(self.trainer.args.device)

    def _optimizer_of(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return optimizer_of(self.trainer, model, is_flat=self._sharding.is_zero)

    def _check_chunked_loss(self, batch: Any) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.trainer.compute_loss_context_manager())
            if self.trainer.accelerator.mixed_precision in ("fp16", "bf16"):
                stack.enter_context(self.trainer.accelerator.autocast())
            check_chunked_loss(self.trainer.model, batch)

    def _device_memory(self) -> str:
        """What a budget of the device depends on, apart from what is free at the moment."""
        total = self._device_spec.memory / 2**30
        return f"{total:.0f} GiB{', expandable segments' if uses_expandable_segments() else ''}"

    def _spread_over(self) -> dict[str, Any]:
        """What a plan file says of the devices that it was made for."""
        try:
            return {"sharding": self._sharding.kind, "num_devices": self._sharding.num_devices}
        except PlacementError:
            return {"sharding": "another way of sharding"}

    def _sharding_request(self) -> dict[str, Any]:
        """How the model is spread, where it is."""
        if not is_sharded(self.trainer):
            return {}
        try:
            return {"sharding": repr(self._sharding)}
        except PlacementError as error:
            return {"sharding": str(error)}

    def _request(self, batch: Any) -> dict[str, Any]:
        """What a plan depends on; a resumed run with the same takes the plan that it began with."""
        args = self.trainer.args
        tensors = batch.items() if isinstance(batch, Mapping) else enumerate(tree_leaves(batch))
        return {
            "checkpoint_placement": args.placement_policy,
            "memory_budget": args.memory_budget,
            "memory_rewrites": args.memory_rewrites,
            "placement_stages": args.placement_stages,
            "batch": {str(name): list(value.shape) for name, value in tensors if isinstance(value, torch.Tensor)},
            "num_parameters": sum(map(num_elements, self.trainer.model.parameters())),
            "parameters": _digest(self.trainer.model),
            "attention": getattr(getattr(self.trainer.model, "config", None), "_attn_implementation", None),
            "device": args.device.type,
            "precision": str(self.trainer.accelerator.mixed_precision),
            "clips_gradients": bool(args.max_grad_norm),
            "optim": str(args.optim),
            "world_size": args.world_size,
            **self._sharding_request(),
            "accumulation_steps": self._accumulation.most_steps,
            **({"auto_micro_batch": True} if args.auto_micro_batch else {}),
            **({"placement_offload": True} if args.placement_offload else {}),
            **({"kernels": kernels} if (kernels := liger_kernels(self.trainer.model)) else {}),
            **({"device_memory": self._device_memory()} if is_of_device(args.memory_budget or "") else {}),
        }


def _kernel_words(kernels: list[str]) -> str:
    """Return in words what `liger_kernels` has found."""
    return f"of {kernels[0]} ({len(kernels) - 1} replaced)" if kernels else "of torch"


def halves(rows: int) -> list[int]:
    """Return the sizes of micro-batches that out of memory comes down to: 12, 6, 3, 2, 1."""
    sizes = [rows]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _with_mask_of(batch: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a part of a batch with padding in its mask if there is some in the batch: masks need memory."""
    mask, whole = part.get("attention_mask"), batch.get("attention_mask")
    if (
        not isinstance(mask, torch.Tensor)
        or mask.dim() != 2
        or bool(whole.bool().all())
        or not bool(mask.bool().all())
    ):
        return part
    mask = mask.clone()
    mask[0, -1] = 0
    return {**part, "attention_mask": mask}


def _largest_shape(batch: Any) -> list[int] | None:
    """Return the shape of the largest tensor of a batch, or of the largest shape in a plan's details."""
    leaves = batch.values() if isinstance(batch, Mapping) else [batch]
    shapes = [list(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return max((shape for shape in shapes if isinstance(shape, list)), key=math.prod, default=None)


def _digest(model: torch.nn.Module) -> str:
    """Return what tells names, shapes and types of a model's parameters, and which of them are trained."""
    named = [(name, whole_like(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    lines = [f"{name} {list(whole.shape)} {whole.dtype} {trained}" for name, whole, trained in named]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
