"""The gradient noise scale of a plain `Trainer`, measured as `EfficientTrainer` does."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.state import GradientState
from torch.autograd import Variable
from torch.autograd.graph import register_multi_grad_hook

from ..accumulation.controller import AccumulationController
from ..accumulation.gradient_norms import MicroBatchNorms
from ..accumulation.noise_scale import NoiseScale, NoiseScaleTracker, WindowStatistics
from ..accumulation.policy import FixedPolicy
from ..accumulation.sums import Proposal, local_sums, micro_batch_weights, pack_sums, unpack_sums
from ..accumulation.timing import StepTimer
from ..accumulation.window import count_target_tokens
from ..core.facts import inverse_loss_scale, is_compiled
from ..core.versions import ACTIVATION_CHECKPOINTING, activation_checkpointing, activation_checkpointing_kwargs
from .base import MeasurementCallback
from .meter import count_inputs, is_training_pass


logger = logging.getLogger(__name__)

# Samples of steps that are not measured are added up on each rank until one is.
_UNMEASURED = WindowStatistics(*(0,) * 9)


class _Inputs:
    """Hook before the forward pass: what the model is given in each micro-batch of a measured step.

    Attributes:
        num_samples: Samples in this step so far, measured or not.
        skipped_samples: Samples in earlier steps that the averages have not heard of.
        listens: Whether this step is measured.
        micro_batches: Samples and what tells the weight, of each micro-batch.
    """

    def __init__(self):
        self.num_samples = 0
        self.skipped_samples = 0
        self.listens = False
        self.restart()

    def restart(self) -> None:
        """Begin with the first micro-batch of a step."""
        self.skipped_samples += self.num_samples
        self.num_samples = 0
        self.micro_batches: list[tuple[int, dict[str, Any]]] = []
        self._current: tuple[int, dict[str, Any]] | None = None

    def __call__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_training_pass(model):
            return
        samples, _ = count_inputs(args, kwargs)
        self.num_samples += samples
        if self.listens and self._current is None:  # the first pass, where the loss takes several
            names = ("labels", "shift_labels", "num_items_in_batch")
            self._current = (samples, {name: kwargs[name] for name in names if kwargs.get(name) is not None})

    def end_micro_batch(self) -> None:
        self.micro_batches.append(self._current or (0, {}))
        self._current = None


class GradientStatisticsCallback(MeasurementCallback):
    """Measures the gradient noise scale under a plain `Trainer` with gradient accumulation or several ranks.

    Logged keys, as those of `EfficientTrainer`: `noise_scale` (B_noise = tr Σ/|G|², in samples), `noise_scale_low` and
    `noise_scale_high`, its 95 % interval; absent until two steps were measured, and where infinite. `EfficientTrainer`
    measures with `measure_noise_scale=True` (or a policy that needs it); there this callback does nothing.

    In a measured step hooks on the parameters read the norms of micro-batch gradients, a hook on the model reads
    `labels` and `num_items_in_batch`, which say how micro-batches are weighted, and ranks exchange one short vector.
    Where the model sees no labels (label smoothing, `compute_loss_func`) micro-batches are taken to weigh the same,
    unless it sees `num_items_in_batch`: then nothing can be measured.

    Args:
        interval: Every n-th optimizer step is measured (the first 16 all are, until the noise scale is resolved).
        half_life: Half-life of the averages in samples over all ranks, or below 1 as a share of the run.

    Raises:
        ValueError: One of them is out of range.
    """

    def __init__(self, interval: int = 8, half_life: float = 0.05):
        super().__init__()
        if interval < 1:
            raise ValueError(f"interval is {interval}; it must be at least 1.")
        if half_life <= 0:
            raise ValueError(f"half_life is {half_life}; it must be positive.")
        self.interval = interval
        self.half_life = half_life
        # Told by `EfficientTrainer`.
        self.is_redundant = False
        self.k_varies = False
        self.windows_repeat = False
        self._controller: AccumulationController | None = None
        self._norms: MicroBatchNorms | None = None
        self._inputs = _Inputs()
        self._remove: list[Callable[[], None]] = []
        self._remove_listener: Callable[[], None] | None = None
        self._in_step = False
        self._square_norm = 0.0
        self._warned = False

    @property
    def noise(self) -> NoiseScale | None:
        """The running noise scale, once two steps were measured."""
        return self._controller.noise if self._controller is not None else None

    def arguments(self):
        return {"interval": self.interval, "half_life": self.half_life}

    def attributes(self):
        if self._controller is None:
            return {}
        return {
            "controller": self._controller.state_dict(),
            "skipped_samples": self._inputs.skipped_samples + self._inputs.num_samples,
        }

    def begin(self, args, state, saved, model=None, **kwargs):
        self._controller = None
        reason = self._why_not(args, model)
        if reason is not None:
            logger.warning("GradientStatisticsCallback measures nothing: %s", reason)
            return
        # With `split_batches` the ranks share each batch.
        shared = args.world_size if args.accelerator_config.split_batches else 1
        k, micro_batch_size = args.gradient_accumulation_steps, args.train_batch_size // shared
        samples = micro_batch_size * args.world_size
        half_life = self.half_life if self.half_life >= 1 else self.half_life * state.max_steps * k * samples
        self._controller = AccumulationController(
            policy=FixedPolicy(),
            reference_steps=k,
            minimum=k,
            maximum=k,
            world_size=args.world_size,
            micro_batch_size=micro_batch_size,
            tracker=NoiseScaleTracker(half_life),
            measure_interval=self.interval,
            timer=StepTimer(enabled=False),
        )
        self._inputs = _Inputs()
        if saved and "controller" in saved:
            self._controller.load_state_dict(saved["controller"])
            self._inputs.skipped_samples = saved["skipped_samples"]
        self._norms = MicroBatchNorms(model, args.device)
        self._in_step = self._warned = False
        self._remove_listener = model.register_forward_pre_hook(self._inputs, with_kwargs=True).remove

    def _why_not(self, args, model: torch.nn.Module | None) -> str | None:
        if self.is_redundant:
            return "EfficientTrainer already does; remove it."
        if self.windows_repeat:
            return "it cannot follow auto_micro_batch; set measure_noise_scale=True instead, or remove it."
        if model is None or is_compiled(args, model):
            return "a compiled model has no hooks; train without torch_compile, or remove it."
        if args.n_gpu > 1:
            return "nn.DataParallel mixes the gradients of its devices; start one process per GPU, or remove it."
        sharded = any(type(parameter).__name__ in ("DTensor", "FlatParameter") for parameter in model.parameters())
        if sharded or args.deepspeed_plugin is not None or args.fsdp:
            return "no rank of a sharded model (DeepSpeed, FSDP) holds a whole gradient; remove it."
        if activation_checkpointing(args) and activation_checkpointing_kwargs(args).get("use_reentrant"):
            return (
                "re-entrant activation checkpointing hands out gradients in pieces; set use_reentrant=False in "
                f"{ACTIVATION_CHECKPOINTING}_kwargs, or remove it."
            )
        if args.gradient_accumulation_steps * args.world_size < 2 and not self.k_varies:
            return (
                "one micro-batch on one device cannot tell its own noise; set gradient_accumulation_steps to 2 or "
                "more (and per_device_train_batch_size down), or use EfficientTrainer(measure_noise_scale=True), "
                "which now and then splits one or takes two."
            )
        return None

    def close(self):
        self._stop_hooks()
        if self._remove_listener is not None:
            self._remove_listener()
            self._remove_listener = None

    # ---- A step ----------------------------------------------------------------------------------------------------

    @property
    def _measures(self) -> bool:
        return bool(self._remove)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._controller is None:
            return
        # At the end of a stream stock `Trainer` carries gradients over into the next epoch without a step.
        carried_over, self._in_step = self._in_step, True
        self._stop_hooks()
        self._inputs.restart()
        if carried_over or not self._controller.measures_next:
            return
        self._inputs.listens = True
        self._square_norm = 0.0
        self._norms.__enter__()
        self._remove = [
            lambda: self._norms.__exit__(None, None, None),
            register_multi_grad_hook(self._norms.parameters, self._on_backward, mode="any").remove,
        ]

    def _on_backward(self, _: torch.Tensor) -> None:
        """Called with the first gradient of each backward pass."""
        if GradientState().sync_gradients:
            # At the end of the last one, before gradients are clipped. DDP averages them in a callback of the same
            # queue, which is not in it yet: go behind it.
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(self._read_square_norm))

    def _read_square_norm(self) -> None:
        if self._measures:
            self._square_norm = self._norms.accumulated_square_norm()

    def _stop_hooks(self) -> None:
        for remove in self._remove:
            remove()
        self._remove = []
        self._inputs.listens = False

    def on_substep_end(self, args, state, control, **kwargs):
        if self._measures:
            self._end_micro_batch()

    def _end_micro_batch(self) -> None:
        self._norms.end_micro_batch()
        self._inputs.end_micro_batch()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self._controller is None:
            return
        self._in_step = False
        statistics = None
        if self._measures:
            self._end_micro_batch()
            self._stop_hooks()
            if len(self._inputs.micro_batches) * args.world_size >= 2:
                statistics = self._statistics(args, optimizer)
                self._inputs.num_samples = self._inputs.skipped_samples = 0
        controller = self._controller
        k = controller.accumulation_steps
        controller.finish_window(k, statistics or _UNMEASURED, statistics is not None, k)

    def _statistics(self, args, optimizer) -> WindowStatistics:
        """Sums over the micro-batches of all ranks (of none, if their weights cannot be told); all ranks call it."""
        batches = [batch for _, batch in self._inputs.micro_batches]
        by_items = any("num_items_in_batch" in batch for batch in batches)
        unscale = inverse_loss_scale(optimizer)
        square_norm = self._square_norm * unscale**2 if args.process_index == 0 else 0.0
        total = None
        if by_items:
            total = float(torch.as_tensor(batches[0].get("num_items_in_batch", 0)).flatten()[0])
        over_ranks = total if args.average_tokens_across_devices else None
        square_norms = self._norms.finish()
        vectors, excess = [], []
        # Only `Trainer` knows whether labels were shifted before they were counted: what adds up is right.
        for shifted in (True, False):
            items = [samples for samples, _ in self._inputs.micro_batches]
            if by_items:
                items = [_count_targets(batch, shifted) for batch in batches]
                share = total if over_ranks is None else total / args.world_size
                excess.append((sum(items) - share) / max(total, 1.0))
            weights = micro_batch_weights(items, args.world_size, by_items, over_ranks)
            sums = local_sums(square_norms, items, weights, unscale / args.world_size)
            vectors.append(pack_sums(Proposal(), self._inputs.num_samples, square_norm, sums))
            if not by_items:
                break
        skipped = self._inputs.skipped_samples
        vector = torch.cat([*vectors, torch.tensor([*excess, skipped], dtype=torch.float64)])
        if args.world_size > 1:
            vector = vector.to(args.device)
            torch.distributed.all_reduce(vector)
            vector = vector.cpu()
        *found, skipped = vector.tolist()
        self._controller.tracker.skip(skipped)
        length = len(vectors[0])
        if not by_items:
            return unpack_sums(found)[1]
        for index in range(2):
            if abs(found[2 * length + index]) < 1e-6:
                return unpack_sums(found[index * length : (index + 1) * length])[1]
        if not self._warned:
            self._warned = True
            logger.warning(
                "GradientStatisticsCallback measures nothing: num_items_in_batch is not the number of labels that the "
                "model is given."
            )
        return replace(unpack_sums(found[:length])[1], num_micro_batches=0)

    def values(self, args, state, logs):
        return {} if self._controller is None else self._controller.noise_logs()


def _count_targets(batch: dict[str, Any], shifted: bool) -> int:
    tokens = count_target_tokens(batch, shifted)
    return 0 if tokens is None else int(tokens)
