"""Checkpoint placement in `Trainer`: plans before the first step, applies, measures, keeps the plan."""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from .._compat import rank_batch_size
from .._versions import ACTIVATION_CHECKPOINTING, activation_checkpointing_kwargs, is_sharded_at_load
from .apply import AppliedPlacement, apply_placement
from .arguments import is_plan_file
from .budget import gib, parse_budget
from .chunked_loss_check import check_chunked_loss
from .costs import DeviceSpec, device_spec
from .errors import PlacementError, ReplayError
from .example_batch import batch_elements, largest_batch
from .global_state import forked_random_state
from .measure import PeakMeasurement
from .own_loss import has_own_loss, overridden, own_loss_planner
from .plan import NO_REWRITES, PlacementPlan, Rewrites
from .planner import PlacementPlanner, allowed_rewrites, check_rewrites
from .policies import named_choices
from .render import time_words
from .replay import StepSetup, model_loss
from .residents import ResidentModules
from .rewrites import available_rewrites
from .shadow import shadow_of
from .stages import find_stages


logger = logging.getLogger(__name__)

_NEGLIGIBLE_BYTES = 4096

# The plan in the output folder.
PLAN_NAME = "placement.json"


class PlacementTrainerMixin:
    """Checkpoint placement for any `Trainer` class: put it before that class.

    With `checkpoint_placement="none"` nothing of this is in play. Else a plan is made on the first device before the
    first step, for the longest samples of the data, and put on the model for the time of `train`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.placement_plan: PlacementPlan | None = None
        self._placement: AppliedPlacement | None = None
        self._peak_measurement: PeakMeasurement | None = None
        self._peaks_to_log: dict[str, float] = {}
        self._resumes = False
        self._warned_of_lost_placement = False
        self._largest_elements: int | None = None
        self._highest_peak = 0
        if getattr(self.args, "places_checkpoints", False):
            self._watch_placement()

    def _watch_placement(self) -> None:
        """Add the callbacks of a placement."""
        self._peak_measurement = PeakMeasurement(self._peak_measured, self._later_peak_measured)
        self.add_callback(self._peak_measurement)
        self.add_callback(_KeepsPlacement(self))

    def _check_placement(self) -> None:
        """Refuse what placement cannot work with."""
        args, what = self.args, f"checkpoint_placement='{self.args.placement_policy}'"
        if args.n_gpu > 1:
            raise ValueError(
                f"{what} does not work with nn.DataParallel; start one process per GPU (accelerate launch, torchrun), "
                "or set CUDA_VISIBLE_DEVICES to one of them."
            )
        if self._is_sharded and args.placement_policy == "budget":
            raise ValueError(
                f"{what} cannot predict the memory of sharded models yet (FSDP, DeepSpeed); choose 'all', 'every_n', "
                "'sqrt' or a plan file."
            )
        if activation_checkpointing_kwargs(args).get("use_reentrant"):
            raise ValueError(
                f"{what} is non-reentrant; remove use_reentrant=True from {ACTIVATION_CHECKPOINTING}_kwargs."
            )

    @property
    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or is_sharded_at_load(self)

    # ---- When ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in `Trainer`; the placement is on the model for as long."""
        self._resumes = bool(resume_from_checkpoint)
        if getattr(self.args, "places_checkpoints", False):
            self._check_placement()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._peak_measurement is not None:
                self._peak_measurement.stop()
            self._undo_placement()

    def set_initial_training_values(self, args, dataloader, *other, **kwargs):
        """As in `Trainer`; the placement is planned and applied before the model is wrapped."""
        values = super().set_initial_training_values(args, dataloader, *other, **kwargs)
        if self._peak_measurement is not None:
            self._peak_measurement.stop()
        self._undo_placement()  # of an earlier trial of a hyperparameter search or of a larger batch
        if getattr(self.args, "places_checkpoints", False):
            if self._peak_measurement is None:  # asked for since the Trainer was made
                self._watch_placement()
            self.args.validate_placement()
            self.placement_plan = self._agreed_plan(dataloader)
            self._placement = self._applied()
            shapes = self.placement_plan.details.get("request", {}).get("batch")
            self._highest_peak = 0
            self._largest_elements = None if shapes is None else sum(map(math.prod, shapes.values()))
            self._log_plan()
        return values

    def get_batch_samples(self, *args, **kwargs):
        """As in `Trainer`; a batch that is larger than any before is measured, since the plan was for another."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self._placement is not None and self._largest_elements is not None:
            largest = max(map(batch_elements, batches), default=0)
            if largest > self._largest_elements:
                self._largest_elements = largest
                self._peak_measurement.measure_next()
        return batches, num_items

    def _applied(self) -> AppliedPlacement:
        try:
            # Who has not asked for the chunked loss may look at logits now and then, which no replay shows.
            asked = "chunked_loss" in check_rewrites(self.args.memory_rewrites)
            return apply_placement(self.model, self.placement_plan, strict_logits=asked)
        except ValueError as error:
            if not is_plan_file(self.args.placement_policy):
                raise
            raise PlacementError(f"{self.args.placement_policy}: {error}") from error

    def _restore_placement(self) -> None:
        """Put the placement back where somebody has overwritten it since the last step."""
        lost = [] if self._placement is None else self._placement.restore_lost()
        if lost and not self._warned_of_lost_placement:
            self._warned_of_lost_placement = True
            logger.warning(
                "Since the last step, %s. The checkpoint placement is put back before each step; leave out what "
                "changes it (gradient_checkpointing_enable, for example).",
                " and ".join(lost),
            )

    def _undo_placement(self) -> None:
        if self._placement is not None:
            self._placement.undo()
            self._placement = None

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`; the next line of training has `measured_peak_gib` and `predicted_peak_gib` too."""
        if "loss" in logs or "train_runtime" in logs:
            logs.update(self._peaks_to_log)
            self._peaks_to_log = {}
        super().log(logs, *args, **kwargs)

    # ---- What ------------------------------------------------------------------------------------------------------

    def _agreed_plan(self, dataloader) -> PlacementPlan:
        """Return the plan of the first process, on all of them; its error if it has none."""
        # The plan, the class of an error, its text.
        message: list[Any] = [None, None, None]
        failure: ValueError | None = None
        if self.args.process_index == 0:
            try:
                with forked_random_state([self.args.device]):
                    message[0] = self._make_plan(dataloader).to_dict()
            except ValueError as error:
                failure = error
                message[1:] = [PlacementError if isinstance(error, PlacementError) else ValueError, str(error)]
        if self.args.world_size > 1:
            broadcast_object_list(message)
        if failure is not None:
            raise failure
        if message[0] is None:
            raise message[1](message[2])
        return PlacementPlan.from_dict(message[0])

    def _make_plan(self, dataloader) -> PlacementPlan:
        args = self.args
        policy = args.placement_policy
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
        if (kept := self._kept_plan(request)) is not None:
            return kept
        available = available_rewrites(self.model)
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
        asked = rank_batch_size(self)
        if self.accelerator.split_batches:
            return asked
        for owner in (dataloader, getattr(dataloader, "batch_sampler", None)):
            rows = getattr(owner, "batch_size", None)
            if isinstance(rows, int):
                return rows
        return asked

    def _plan_of_file(self, path: str, dataloader) -> PlacementPlan:
        plan = PlacementPlan.load(path)
        asked = dict.fromkeys(check_rewrites(self.args.memory_rewrites), True)
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
            "device": "cpu" if self.args.device.type == "cpu" else "an accelerator",
            "precision": {"fp16": "float16", "bf16": "bfloat16"}.get(self.accelerator.mixed_precision, "float32"),
            "accumulation_steps": self._most_accumulation_steps,
        }
        made_for = {name: plan.details[name] for name in found if plan.details.get(name) is not None}
        if "batch" in made_for:
            made_for["batch"] = _largest_shape(made_for["batch"])
        if made_for.get("device", "cpu") != "cpu":
            made_for["device"] = "an accelerator"
        if min(made_for.get("accumulation_steps", 1), found["accumulation_steps"]) > 1:
            del made_for["accumulation_steps"]  # what counts is whether gradients of earlier micro-batches are there
        differing = [f"{name} {made}, not {found[name]}" for name, made in made_for.items() if made != found[name]]
        if differing:
            logger.warning(
                "The placement plan was made for %s: its peaks are not those of this run; make another one with "
                "`hf-trainopt plan` or memory_budget.",
                "; ".join(differing),
            )

    def _plan_for(self, policy: str, batch: Any, available: Rewrites) -> PlacementPlan:
        args = self.args
        if self._is_sharded:
            return self._unpredicted(policy, allowed_rewrites(args.memory_rewrites, available)[0])
        try:
            planner = self._planner(batch, available)
        except ValueError as error:
            if policy == "budget" or check_rewrites(args.memory_rewrites):
                raise
            logger.warning("No peak is predicted for checkpoint_placement='%s': %s", policy, error)
            return self._unpredicted(policy)
        if policy == "budget":
            return planner.for_budget(args.memory_budget)
        return planner.named(policy, self._every_n)

    @property
    def _every_n(self) -> int:
        """n of `checkpoint_placement="every_n"`, as transformers takes it."""
        return activation_checkpointing_kwargs(self.args).get("every_n_layers", 2)

    def _unpredicted(self, policy: str, rewrites: Rewrites = NO_REWRITES) -> PlacementPlan:
        """Return the plan of a named policy without a replay."""
        stages = find_stages(self.model, self.args.placement_stages)
        return PlacementPlan(policy, named_choices(policy, stages, self._every_n), rewrites)

    def _planner(self, batch: Any, available: Rewrites) -> PlacementPlanner:
        shadow: list[Any] = [None]
        residents = ResidentModules(self)

        def compute_loss(model, batch):
            # Held until the next one: what `compute_loss` keeps on the trainer is there in the backward pass as well.
            shadow[0] = shadow_of(self, model, residents.fakes(next(model.parameters()).fake_mode))
            with shadow[0].compute_loss_context_manager():
                return shadow[0].compute_loss(model, dict(batch), num_items_in_batch=1)

        setup = StepSetup(
            device=self._device_spec,
            compute_loss=compute_loss,
            make_optimizer=self._optimizer_of,
            autocast_dtype={"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision),
            accumulation_steps=self._most_accumulation_steps,
            max_grad_norm=self.args.max_grad_norm or 0.0,
            world_size=self.args.world_size,
            residents=residents.tensors,
        )
        args = self.args
        options = {"stages": args.placement_stages, "memory_rewrites": args.memory_rewrites, "available": available}
        try:
            return own_loss_planner(self, batch, setup, options)
        except ReplayError as error:
            own = has_own_loss(self)
            if not isinstance(batch, Mapping) or not own:
                raise
            if "chunked_loss" not in check_rewrites(args.memory_rewrites):
                # Who looks at values may well look at logits.
                options["available"] = dataclasses.replace(available, chunked_loss=False)
            models_own = dataclasses.replace(setup, compute_loss=model_loss)
            try:
                planner = PlacementPlanner(self.model, batch, models_own, **options)
            except ValueError:
                # The batch may be one that only `compute_loss` can take: the first reason is the one that counts.
                raise PlacementError(
                    f"{type(self).__name__}.compute_loss cannot be replayed, and the model alone has no loss for this "
                    f"batch: {error}"
                ) from error
            logger.warning(
                "%s.compute_loss cannot be replayed, so that only the model's own loss is planned for and the peak is "
                "not proved: %s",
                type(self).__name__,
                error,
            )
            return planner

    @functools.cached_property
    def _device_spec(self) -> DeviceSpec:
        return device_spec(self.args.device)

    @property
    def _most_accumulation_steps(self) -> int:
        """Most micro-batches that a step may have."""
        return self.args.gradient_accumulation_steps

    def _optimizer_of(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return an optimizer like that of the run, over the same parameters of another model."""
        if self.optimizer is not None:
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            taken = _parameters_of(type(inner))
            defaults = {n: v for n, v in inner.defaults.items() if n in taken}
            return type(inner)(_same_groups(inner, self.model, model), **defaults)
        if "create_optimizer" in overridden(self):
            shadow = shadow_of(self, model)
            shadow.model = shadow.model_wrapped = model
            made = shadow.create_optimizer()
            return shadow.optimizer if made is None else made
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.optimizer_cls_and_kwargs is not None:
            cls, kwargs = self.optimizer_cls_and_kwargs
        else:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("params", "model", "optimizer_dict")}
        return cls(trained, **kwargs)

    def _check_chunked_loss(self, batch: Any) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.compute_loss_context_manager())
            if self.accelerator.mixed_precision in ("fp16", "bf16"):
                stack.enter_context(self.accelerator.autocast())
            check_chunked_loss(self.model, batch)

    def _request(self, batch: Any) -> dict[str, Any]:
        """What a plan depends on; a resumed run with the same takes the plan that it began with."""
        args = self.args
        tensors = batch.items() if isinstance(batch, Mapping) else enumerate(tree_leaves(batch))
        return {
            "checkpoint_placement": args.placement_policy,
            "memory_budget": args.memory_budget,
            "memory_rewrites": args.memory_rewrites,
            "placement_stages": args.placement_stages,
            "batch": {str(name): list(value.shape) for name, value in tensors if isinstance(value, torch.Tensor)},
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "parameters": _digest(self.model),
            "attention": getattr(getattr(self.model, "config", None), "_attn_implementation", None),
            "device": args.device.type,
            "precision": str(self.accelerator.mixed_precision),
            "clips_gradients": bool(args.max_grad_norm),
            "optim": str(args.optim),
            "world_size": args.world_size,
            "accumulation_steps": self._most_accumulation_steps,
        }

    def _kept_plan(self, request: dict[str, Any]) -> PlacementPlan | None:
        path = Path(self.args.output_dir) / PLAN_NAME
        if not self._resumes or not path.exists():
            return None
        try:
            plan = PlacementPlan.load(path)
        except ValueError as error:
            logger.warning("Another plan is made than that of the run that is resumed: %s", error)
            return None
        if plan.details.get("request") != request:
            return None
        logger.info("The placement is the one in %s.", path)
        return plan

    # ---- What is said and kept -------------------------------------------------------------------------------------

    def _log_plan(self) -> None:
        plan = self.placement_plan
        if plan.predicted_peak_bytes is None:
            logger.info("Checkpoint placement: %s.", plan.summary())
        else:
            logger.info(
                "Checkpoint placement: %s; predicted peak %s instead of %s (%.1f %% less), time %s.",
                plan.summary(),
                gib(plan.predicted_peak_bytes),
                gib(plan.baseline_peak_bytes),
                100 * (1 - plan.predicted_peak_bytes / plan.baseline_peak_bytes),
                time_words(plan),
            )
        if plan.rewrites.names() and self.args.memory_rewrites == "auto":
            from_file = is_plan_file(self.args.placement_policy)
            logger.warning(
                "%s uses %s: results differ by rounding from those of a run without; %s recomputes more instead.",
                "the plan" if from_file else "memory_rewrites='auto'",
                " and ".join(plan.rewrites.names()),
                "one made with --memory_rewrites none" if from_file else "'none'",
            )
        self._keep_plan()

    def _keep_plan(self) -> None:
        if self.args.should_save:
            path = Path(self.args.output_dir) / PLAN_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            self.placement_plan.save(part)
            part.replace(path)  # as a whole, whenever the run is killed

    def _peak_measured(self, num_bytes: int) -> None:
        plan = self.placement_plan
        if self.args.world_size > 1:
            peak = torch.tensor([num_bytes], device=self.args.device)
            num_bytes = int(self.accelerator.gather(peak).max().item())
        self.placement_plan = plan = dataclasses.replace(plan, measured_peak_bytes=num_bytes)
        peaks = {"measured_peak_gib": num_bytes, "predicted_peak_gib": plan.predicted_peak_bytes}
        # Not logged here, within a step: `log` would take back that a log is due at its end.
        self._peaks_to_log = {name: value / 2**30 for name, value in peaks.items() if value is not None}
        if plan.predicted_peak_bytes is None:
            logger.info("Measured peak of an optimizer step: %s.", gib(num_bytes))
        else:
            logger.info(
                "Measured peak of an optimizer step: %s, predicted %s (%+.1f %%).",
                gib(num_bytes),
                gib(plan.predicted_peak_bytes),
                100 * (num_bytes / plan.predicted_peak_bytes - 1),
            )
            if num_bytes > 1.05 * plan.predicted_peak_bytes:
                logger.warning(
                    "The measured peak (%s) is above the predicted one (%s): the plan was made for another batch or "
                    "set-up, or something needs memory that it does not see.",
                    gib(num_bytes),
                    gib(plan.predicted_peak_bytes),
                )
        self._warn_if_over_budget(num_bytes)
        self._keep_plan()

    def _later_peak_measured(self, num_bytes: int) -> None:
        """Take in the peak of a later step on this rank: one with longer samples may need more."""
        plan = self.placement_plan
        if num_bytes <= max(plan.measured_peak_bytes or 0, self._highest_peak):
            return
        self._highest_peak = round(1.05 * num_bytes)  # of a little more nothing is said again
        self._warn_if_over_budget(num_bytes)

    def _warn_if_over_budget(self, num_bytes: int) -> None:
        plan, budget = self.placement_plan, self.placement_plan.budget_bytes
        if budget is None and self.args.memory_budget is not None:
            budget = parse_budget(self.args.memory_budget, plan.baseline_peak_bytes)
        # A step counter more or less is no reason to plan anew.
        if budget is None or num_bytes <= budget + _NEGLIGIBLE_BYTES:
            return
        planned = plan.details.get("request", {}).get("batch")
        logger.warning(
            "The measured peak (%s) of step %d is above memory_budget (%s). The plan was made for a batch of %s: if "
            "batches are larger, cut long samples; else lower the budget by the difference.",
            gib(num_bytes),
            self.state.global_step,
            gib(budget),
            "unknown size" if planned is None else planned,
        )


class _KeepsPlacement(TrainerCallback):
    """Looks before each step whether the placement is still on the model."""

    def __init__(self, trainer: PlacementTrainerMixin):
        self._trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self._trainer._restore_placement()


def _largest_shape(batch: Any) -> list[int] | None:
    """Return the shape of the largest tensor of a batch, or of the largest shape in a plan's details."""
    leaves = batch.values() if isinstance(batch, Mapping) else [batch]
    shapes = [list(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return max((shape for shape in shapes if isinstance(shape, list)), key=math.prod, default=None)


def _digest(model: torch.nn.Module) -> str:
    """Return what tells names, shapes and types of a model's parameters, and which of them are trained."""
    lines = [f"{n} {list(p.shape)} {p.dtype} {p.requires_grad}" for n, p in model.named_parameters()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _parameters_of(cls: type) -> set[str]:
    """Names of what a class's constructor takes, also of those that it hands on to the class that it is made from."""
    names: set[str] = set()
    for owner in cls.__mro__:
        if "__init__" in vars(owner):
            parameters = inspect.signature(owner.__init__).parameters
            names |= set(parameters)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return names


def _same_groups(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, other: torch.nn.Module
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer, with the parameters of the same names in another model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    others = dict(other.named_parameters())
    groups = []
    for group in optimizer.param_groups:
        unknown = [parameter for parameter in group["params"] if id(parameter) not in names]
        if unknown:
            raise ValueError(
                f"the optimizer has {len(unknown)} parameters that the model lacks, so that no peak can be predicted; "
                "choose checkpoint_placement='all', 'every_n' or 'sqrt'."
            )
        groups.append({**group, "params": [others[names[id(parameter)]] for parameter in group["params"]]})
    return groups
