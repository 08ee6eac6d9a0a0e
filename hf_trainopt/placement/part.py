"""Activation checkpointing as a part: plans before the first step, applies, measures, keeps the plan."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ..core.part import Part
from ..core.versions import ACTIVATION_CHECKPOINTING, activation_checkpointing_kwargs
from ..machine.random_state import forked_random_state
from .arguments import is_plan_file
from .errors import PlacementError
from .measure import PeakMeasurement
from .plan.budget import gib
from .plan.plan import PlacementPlan
from .plan.run_planner import RunPlanner
from .recompute.apply import AppliedPlacement, apply_placement
from .rewrite.allowed_rewrites import check_rewrites
from .show.render import time_words
from .simulate.example_batch import batch_elements


logger = logging.getLogger(__name__)

_NEGLIGIBLE_BYTES = 4096

# The plan in the output folder.
PLAN_NAME = "placement.json"


class PlacementPart(Part):
    """Placement of activation checkpoints, for a memory budget or by a named policy.

    With `checkpoint_placement="none"` nothing of this is in play. Else a plan is made on the first device before the
    first step, for the longest samples of the data, and put on the model for the time of `train`.

    Attributes:
        plan: The plan of the present or last run.
        planner: Makes plans for this Trainer.
        keeps_plan: Whether the plan is written into the output folder.
    """

    name = "placement"
    logged_keys = ("measured_peak_gib", "predicted_peak_gib")

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self.plan: PlacementPlan | None = None
        self.planner = RunPlanner(trainer, parts.accumulation)
        self.keeps_plan = True
        self._applied: AppliedPlacement | None = None
        self._peak_measurement: PeakMeasurement | None = None
        self._peaks_to_log: dict[str, float] = {}
        self._warned_of_lost_placement = False
        self._largest_elements: int | None = None
        self._highest_peak = 0

    @property
    def is_on(self) -> bool:
        """Whether a placement is asked for."""
        return self.trainer.args.places_checkpoints

    def listeners(self) -> list[TrainerCallback]:
        return [self] if self._peak_measurement is None else [self._peak_measurement, self]

    def check(self) -> None:
        """Refuse what placement can't work with.

        Raises:
            ValueError: Something asked for doesn't work with it.
        """
        if not self.is_on:
            return
        args, what = self.trainer.args, f"checkpoint_placement='{self.trainer.args.placement_policy}'"
        if args.n_gpu > 1:
            raise ValueError(
                f"{what} does not work with nn.DataParallel; start one process per GPU (accelerate launch, torchrun), "
                "or set CUDA_VISIBLE_DEVICES to one of them."
            )
        if activation_checkpointing_kwargs(args).get("use_reentrant"):
            raise ValueError(
                f"{what} is non-reentrant; remove use_reentrant=True from {ACTIVATION_CHECKPOINTING}_kwargs."
            )

    # ---- A run -----------------------------------------------------------------------------------------------------

    def run(self) -> AbstractContextManager[None]:
        self.check()
        return super().run()

    def end_run(self) -> None:
        self._take_off()

    def apply(self, dataloader: Any) -> None:
        """Plan for the batches of a loader and apply, before the model is wrapped."""
        self._take_off()  # what an earlier trial of a hyperparameter search or a larger batch has left
        self.parts.out_of_memory.planned_size = None
        if not self.is_on:
            self._peak_measurement = None
            return
        self.trainer.args.validate_placement()
        self._peak_measurement = PeakMeasurement(
            self._peak_measured, self._later_peak_measured, lambda: self.parts.accumulation.last_was_halved
        )
        self.plan = self._agreed_plan(dataloader)
        self._applied = self._apply_plan()
        self.parts.out_of_memory.planned_size = self.plan.details.get("micro_batch_size")
        shapes = self.plan.details.get("request", {}).get("batch")
        self._highest_peak = 0
        self._largest_elements = None if shapes is None else sum(map(math.prod, shapes.values()))
        self._log_plan()

    def saw(self, micro_batches: Sequence[Any]) -> None:
        """Look at the next micro-batches: if one is larger than any before, the plan was for another."""
        if self._applied is not None and self._largest_elements is not None:
            largest = max(map(batch_elements, micro_batches), default=0)
            if largest > self._largest_elements:
                self._largest_elements = largest
                self._peak_measurement.measure_next()

    def on_step_begin(self, args, state, control, **kwargs):
        """Put the placement back where somebody has overwritten it since the last step."""
        lost = [] if self._applied is None else self._applied.restore_lost()
        if lost and not self._warned_of_lost_placement:
            self._warned_of_lost_placement = True
            logger.warning(
                "Since the last step, %s. The checkpoint placement is put back before each step; leave out what "
                "changes it (gradient_checkpointing_enable, for example).",
                " and ".join(lost),
            )

    def _take_off(self) -> None:
        if self._peak_measurement is not None:
            self._peak_measurement.stop()
        if self._applied is not None:
            self._applied.undo()
            self._applied = None

    def _apply_plan(self) -> AppliedPlacement:
        try:
            # Who has not asked for the chunked loss may look at logits now and then, which no replay shows.
            asked = "chunked_loss" in check_rewrites(self.trainer.args.memory_rewrites)
            return apply_placement(self.trainer.model, self.plan, strict_logits=asked)
        except ValueError as error:
            if not is_plan_file(self.trainer.args.placement_policy):
                raise
            raise PlacementError(f"{self.trainer.args.placement_policy}: {error}") from error

    def _agreed_plan(self, dataloader: Any) -> PlacementPlan:
        """Return the plan of the first process, on all of them; its error if it has none."""
        # The plan, the class of an error, its text.
        message: list[Any] = [None, None, None]
        failure: Exception | None = None
        if self.trainer.args.process_index == 0:
            try:
                with forked_random_state([self.trainer.args.device]):
                    message[0] = self.planner.make_plan(dataloader, self._plans_of_resumed()).to_dict()
            except Exception as error:  # the other ranks wait: whatever it is, they end with it
                failure = error
                kinds = (PlacementError, ValueError, RuntimeError)
                message[1:] = [next((kind for kind in kinds if isinstance(error, kind)), RuntimeError), str(error)]
        if self.trainer.args.world_size > 1:
            broadcast_object_list(message)
        if failure is not None:
            raise failure
        if message[0] is None:
            raise message[1](message[2])
        return PlacementPlan.from_dict(message[0])

    def _plans_of_resumed(self) -> list[PlacementPlan]:
        """Return plans of the run that is resumed: the checkpoint's, and the one in the output folder."""
        if self.parts.resumed_from is None:
            return []
        saved, path = self.parts.saved_state(self.name), Path(self.trainer.args.output_dir) / PLAN_NAME
        plans, problem = [], None
        try:
            if saved is not None:
                plans.append(PlacementPlan.from_dict(saved["plan"]))
            if path.exists():
                plans.append(PlacementPlan.load(path))
        except ValueError as error:  # of another version, or cut short
            problem = error
        if problem is not None and not plans:
            logger.warning("This plan differs from the resumed run's: %s", problem)
        return plans

    def state_dict(self) -> dict[str, Any] | None:
        return None if self._applied is None else {"plan": self.plan.to_dict()}

    # ---- What is said and kept -------------------------------------------------------------------------------------

    def log_values(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return the peaks that were measured since the last line of training."""
        if "loss" not in line and "train_runtime" not in line:
            return {}
        values, self._peaks_to_log = self._peaks_to_log, {}
        return values

    def _log_plan(self) -> None:
        plan = self.plan
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
        if plan.rewrites.names() and self.trainer.args.memory_rewrites == "auto":
            from_file = is_plan_file(self.trainer.args.placement_policy)
            logger.warning(
                "%s uses %s: results differ by rounding from those of a run without; %s recomputes more instead.",
                "the plan" if from_file else "memory_rewrites='auto'",
                " and ".join(plan.rewrites.names()),
                "one made with --memory_rewrites none" if from_file else "'none'",
            )
        self._write_plan()

    def _write_plan(self) -> None:
        if self.keeps_plan and self.trainer.args.should_save:
            path = Path(self.trainer.args.output_dir) / PLAN_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            self.plan.save(part)
            part.replace(path)  # as a whole, whenever the run is killed

    def _peak_measured(self, num_bytes: int) -> None:
        plan = self.plan
        if self.trainer.args.world_size > 1:
            peak = torch.tensor([num_bytes], device=self.trainer.args.device)
            num_bytes = int(self.trainer.accelerator.gather(peak).max().item())
        self.plan = plan = dataclasses.replace(plan, measured_peak_bytes=num_bytes)
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
        self._write_plan()

    def _later_peak_measured(self, num_bytes: int) -> None:
        """Take in the peak of a later step on this rank: one with longer samples may need more."""
        plan = self.plan
        if num_bytes <= max(plan.measured_peak_bytes or 0, self._highest_peak):
            return
        self._highest_peak = round(1.05 * num_bytes)  # of a little more nothing is said again
        self._warn_if_over_budget(num_bytes)

    def _warn_if_over_budget(self, num_bytes: int) -> None:
        plan, budget = self.plan, self.plan.budget_bytes
        # A step counter more or less is no reason to plan anew.
        if budget is None or num_bytes <= budget + _NEGLIGIBLE_BYTES:
            return
        planned = plan.details.get("request", {}).get("batch")
        logger.warning(
            "The measured peak (%s) of step %d is above memory_budget (%s). The plan was made for a batch of %s: if "
            "batches are larger, cut long samples; else lower the budget by the difference.",
            gib(num_bytes),
            self.trainer.state.global_step,
            gib(budget),
            "unknown size" if planned is None else planned,
        )
