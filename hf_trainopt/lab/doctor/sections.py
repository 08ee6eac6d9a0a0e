"""What is said of each part. Every figure is read from the Trainer and the objects that it will train with."""

import contextlib
import inspect
import logging
import os
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.trainer_utils import has_length

from ...accumulation.controller import STARTUP_WINDOWS
from ...accumulation.deepspeed_checks import config_of, stage_of
from ...accumulation.policy import FixedPolicy
from ...accumulation.schedule import METRIC_DRIVEN, NOISE_SCALING_RULES, DataIndexedLR, chosen_rule, torch_optimizer
from ...accumulation.second_moment import LONGEST_MEMORY, decay_of_step, moment_ratio, moment_setting
from ...core.facts import data_parallel_size
from ...machine.device_memory import uses_expandable_segments
from ...placement.plan.budget import gib, is_of_device, stated_budget
from ...placement.show.render import time_words
from .memory import MemoryForecast, device_memory


logger = logging.getLogger(__name__)

# Stock `Trainer` leaves what `do_eval` means without an `eval_strategy` to the script.
_AFTERWARDS = "never while it trains; afterwards, where the script does (do_eval)"

# Lines of a section: what, and its text.
Lines = list[tuple[str, str]]


def describe(trainer: Trainer, dataloader: Any, resumed_from: str | None, memory: MemoryForecast) -> dict[str, Lines]:
    """Return title -> lines of a run whose `on_train_begin` is due.

    Args:
        trainer: An `EfficientTrainer`.
        dataloader: The loader of the run.
        resumed_from: Checkpoint that it goes on from.
        memory: What was planned for it.
    """
    return {
        "Data": data(trainer, dataloader),
        "Gradient accumulation": accumulation(trainer),
        "Learning rate": learning_rate(trainer),
        "Precision": precision(trainer),
        "Memory": memory_of_a_step(trainer, memory),
        "Devices": devices(trainer),
        "Checkpoints and reliability": reliability(trainer, resumed_from),
        "Evidence": evidence(trainer),
    }


def _budget(trainer: Trainer) -> int:
    """Reference windows of the whole run: steps, where k does not vary."""
    return (
        trainer.state.max_steps
        if trainer.trainopt.accumulation.cursor is None
        else trainer.trainopt.accumulation.cursor.budget
    )


def data(trainer: Trainer, dataloader: Any) -> Lines:
    """Return the data budget, in samples and in steps."""
    args, windows = trainer.args, _budget(trainer)
    batch = trainer.get_total_train_batch_size(args)
    unit = "optimizer steps" if trainer.trainopt.accumulation.cursor is None else "reference windows"
    count, groups = args.world_size * max(1, args.n_gpu), data_parallel_size(args)
    on_each = f" on each of {count} devices" if count > 1 else ""
    if groups < args.world_size:
        on_each = f" on each of {groups} groups of {args.world_size // groups} devices"
    lines = [("micro-batch", f"{args.per_device_train_batch_size} samples{on_each}")]
    if has_length(dataloader):
        samples, micro_batches = trainer.num_examples(dataloader), len(dataloader)
        lines.append(("training data", f"{samples:,} samples, {micro_batches:,} micro-batches on each rank"))
        # As upstream counts them: `max_steps` wins over epochs.
        total = windows * batch if args.max_steps > 0 else round(samples * args.num_train_epochs)
        epochs = f"{windows * args.gradient_accumulation_steps / micro_batches:.3g}"
        if args.max_steps <= 0:
            epochs = f"{args.num_train_epochs:g}"
        lines.append(("budget", f"{total:,} samples ({epochs} epochs), {windows:,} {unit} of {batch:,} samples"))
    else:
        lines.append(("training data", "a stream"))
        lines.append(("budget", f"{windows * batch:,} samples, {windows:,} {unit} of {batch:,} samples"))
    if trainer.trainopt.accumulation.cursor is not None:
        lines.append(("intervals", "warm-up, logging, evaluation and saving are counted in reference windows"))
    state = trainer.state
    for name, strategy, every in (
        ("evaluation", args.eval_strategy, state.eval_steps),
        ("logging", args.logging_strategy, state.logging_steps),
    ):
        at_the_end = name == "evaluation" and args.do_eval and strategy == "no"
        lines.append((name, _AFTERWARDS if at_the_end else _interval(strategy.value, every, unit)))
    if args.logging_strategy == "steps" and state.logging_steps > windows and not args.logging_first_step:
        logger.warning(
            "logging_steps is %g and the whole run has %s %s: no loss will be logged before its end; lower it.",
            state.logging_steps,
            f"{windows:,}",
            unit,
        )
    return lines


def _interval(strategy: str, every: int | None, unit: str) -> str:
    if strategy == "steps":
        return f"every {every:g} {unit}"
    return {"no": "never", "epoch": "at the end of each epoch", "best": "when the metric is the best so far"}[strategy]


def accumulation(trainer: Trainer) -> Lines:
    """Return how k is chosen."""
    args, policy = trainer.args, trainer.accumulation_policy
    if trainer.trainopt.accumulation.has_own_policy:
        what = f"your own: {getattr(policy, '__name__', None) or type(policy).__name__}"
    else:
        what = f"{args.accumulation_policy}: {inspect.getdoc(type(policy)).splitlines()[0]}"
    lines = [("policy", what)]
    controller = trainer.trainopt.accumulation.controller
    if controller is None:
        return [*lines, ("k", f"{args.gradient_accumulation_steps}; the loop is stock Trainer's, bit for bit")]
    if isinstance(policy, FixedPolicy):
        lines.append(("k", f"{controller.reference_steps}"))
    else:
        lines.append(
            (
                "k",
                f"begins at {controller.accumulation_steps}, stays within {controller.minimum} and "
                f"{controller.maximum}; the reference is {controller.reference_steps}",
            )
        )
        batch = controller.micro_batch_samples
        lines.append(("batch", f"{controller.minimum * batch:,} to {controller.maximum * batch:,} samples"))
    if controller.tracker is None:
        lines.append(("noise scale", "not measured: nothing needs it"))
    else:
        interval = controller.measure_interval
        often = f"the first {STARTUP_WINDOWS} steps, then every {interval} steps" if interval > 1 else "every step"
        half_life = f"averages halve in {controller.tracker.half_life:,.0f} samples"
        lines.append(("noise scale", f"measured in {often}; {half_life}"))
    return lines


def learning_rate(trainer: Trainer) -> Lines:
    """Return the schedule at some places of the data, and how it follows k."""
    args, windows, scheduler = trainer.args, _budget(trainer), trainer.lr_scheduler
    inner = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper
    optimizer = torch_optimizer(trainer.optimizer)
    lines = [("optimizer", f"{type(optimizer).__name__} ({getattr(args.optim, 'value', args.optim)})")]
    if isinstance(inner, METRIC_DRIVEN):
        return [*lines, ("schedule", f"{type(inner).__name__}: follows the evaluations, whatever k is")]
    warmup = args.get_warmup_steps(windows)
    text = f"{args.lr_scheduler_type.value}, warm-up over {warmup:,} of {windows:,} {_unit(trainer)}"
    own = inner.inner if isinstance(inner, DataIndexedLR) else inner
    if hasattr(own, "last_batch_iteration"):
        text = f"{type(own).__name__} of the DeepSpeed configuration"
    lines.append(("schedule", text))
    if isinstance(own, torch.optim.lr_scheduler.LambdaLR):
        indexed = inner if isinstance(inner, DataIndexedLR) else DataIndexedLR(inner, optimizer)
        places = dict.fromkeys([0, warmup, windows // 2, windows])
        rates = [f"{args.learning_rate * indexed.factor(place):.3g} at {place / windows:.0%}" for place in places]
        lines.append(
            ("rate", ", ".join(rates) + " of the data" + (", at the reference k" if _adapts(trainer) else ""))
        )
    if _adapts(trainer):
        rule = chosen_rule(args.lr_batch_scaling, trainer.trainopt.accumulation.measures)
        here = "" if rule == args.lr_batch_scaling else f", here '{rule}'"
        unknown = " while the noise scale is not known" if rule in NOISE_SCALING_RULES else ""
        lines.append(("with k", f"lr_batch_scaling='{args.lr_batch_scaling}'{here}: {_scaling(trainer)}{unknown}"))
        lines.append(("second moment", _clock(trainer, optimizer)))
    return lines


def _clock(trainer: Trainer, optimizer: torch.optim.Optimizer) -> str:
    """Return what the optimizer's second moment forgets by."""
    if trainer.args.adam_clock == "steps" or not trainer.trainopt.accumulation.varies:
        return "forgets by optimizer steps, as in stock"
    try:
        setting = moment_setting(optimizer)
    except LookupError as error:
        return f"forgets by optimizer steps: {error}"
    if setting is None:
        return "none"
    accumulation = trainer.trainopt.accumulation
    controller, longest = accumulation.controller, LONGEST_MEMORY * accumulation.cursor.budget
    reference = controller.reference_steps
    if setting.kind == "power":
        return f"forgets by data, as if every step had {reference} micro-batches"
    log_beta2 = setting.log_beta2(optimizer.param_groups[0], 0.0)
    at, is_limited = [], False
    for k in dict.fromkeys([controller.minimum, reference, controller.maximum]):
        ratio = moment_ratio(log_beta2, k / reference, longest)
        is_limited |= ratio != k / reference
        at.append(f"{decay_of_step(log_beta2, ratio):.6g} at a k of {k}")
    why = f" (a half-life of at most an eighth of this run, or the one at a k of {reference})" if is_limited else ""
    return f"forgets by data: a decay of {', '.join(at)} a step{why}"


def _adapts(trainer: Trainer) -> bool:
    return trainer.trainopt.accumulation.controller is not None


def _unit(trainer: Trainer) -> str:
    return "reference windows" if _adapts(trainer) else "steps"


def _scaling(trainer: Trainer) -> str:
    """Return the factors on the rate at the least, the reference and the largest k, as the Trainer would set them."""
    controller, scheduler = trainer.trainopt.accumulation.controller, trainer.lr_scheduler
    scheduler = getattr(scheduler, "scheduler", scheduler)
    kept = controller.accumulation_steps, controller.tracker, scheduler.position, scheduler.scale
    controller.tracker = None  # a probe is no window of the k that was decided
    factors = []
    for k in dict.fromkeys([controller.minimum, controller.reference_steps, controller.maximum]):
        controller.accumulation_steps = k
        trainer.trainopt.learning_rate.place()
        factors.append(f"×{scheduler.scale:.3g} at a k of {k}")
    controller.accumulation_steps, controller.tracker = kept[:2]
    scheduler.set_position(*kept[2:])
    return ", ".join(dict.fromkeys(factors))


def precision(trainer: Trainer) -> Lines:
    """Return the precision and why."""
    choice, mixed = trainer.trainopt.precision.choice, str(trainer.accelerator.mixed_precision)
    if choice is None:
        named = {"no": "fp32 (or the type of the weights)"}.get(mixed, f"{mixed} autocast")
        lines = [("computation", f"{named}: precision is unset, so fp16, bf16 and the launcher decide")]
    else:
        lines = [("computation", f"{choice.precision}: {choice.reason}")]
        if choice.fallback is not None:
            lines.append(("if fp16 overflows", f"left for {choice.fallback}"))
    weights = sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters() if p.requires_grad})
    lines.append(("trained weights", " and ".join(weights)))
    if trainer.args.device.type == "cuda" and (mixed in ("fp16", "bf16") or weights in (["float16"], ["bfloat16"])):
        lines += [("slow", line) for line in unaligned_weights(trainer.model)]
    return lines


def unaligned_weights(model: torch.nn.Module) -> list[str]:
    """Return a line for each large matrix with a side that is not a multiple of 8: slow on tensor cores in 16 bits."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = None
    with contextlib.suppress(AttributeError, NotImplementedError):  # models of images have none
        embeddings = model.get_input_embeddings()
    lines = []
    for name, parameter in model.named_parameters():
        odd = [side for side in parameter.shape if side % 8]
        if parameter.dim() == 2 and odd and parameter.numel() >= 0.01 * total:
            remedy = ""
            if embeddings is not None and getattr(embeddings, "weight", None) is parameter:
                remedy = "; model.resize_token_embeddings(pad_to_multiple_of=64) fixes that"
            lines.append(
                f"{name} ({' x '.join(map(str, parameter.shape))}): {odd[0]} isn't a multiple of 8, and products "
                f"with it ran at a sixth of the speed on an H100{remedy}"
            )
    return lines


def memory_of_a_step(trainer: Trainer, memory: MemoryForecast) -> Lines:
    """Return the plan, its peak, and what a step could do with at least."""
    args, plan, planner = trainer.args, trainer.placement_plan, memory.planner
    lines = [("placement", args.placement_policy if plan is None else plan.summary())]
    peak = None
    if planner is not None:
        baseline, floor = planner.baseline.peak_bytes, planner.floor.peak_bytes
        peak = baseline
        lines.append(("peak of a step", f"{gib(baseline)} without recomputation"))
        if plan is not None and plan.predicted_peak_bytes is not None:
            peak = plan.predicted_peak_bytes
            lines.append(("with the plan", f"{gib(peak)}, time {time_words(plan)}"))
        if args.memory_budget is not None:
            text = args.memory_budget
            if not is_of_device(text) or planner.memory is not None:
                text = stated_budget(text, planner.bytes_of(text))
            lines.append(("budget", text))
        lines.append(
            ("floor", f"{gib(floor)}, the least that any plan needs (memory_rewrites='{args.memory_rewrites}')")
        )
        lines.append(
            ("for", f"the longest samples, up to {trainer.trainopt.accumulation.most_steps} micro-batches a step")
        )
    elif plan is not None and plan.predicted_peak_bytes is not None:
        peak = plan.predicted_peak_bytes
        lines.append(("peak of a step", f"{gib(peak)}, by the plan"))
    else:
        lines.append(("peak of a step", f"not known: {memory.obstacle or 'no plan was made'}"))
    if args.device.type == "cuda" and not uses_expandable_segments():
        lines.append(
            ("allocator", "PyTorch's default, which can reserve a quarter more than tensors take; "
             "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True reserves less")
        )  # fmt: skip
    available = device_memory(args.device)
    if available is not None:
        lines.append(("there is", f"{gib(available[0])} {available[1]}"))
        if peak is not None and peak > available[0]:
            logger.warning(
                "A step takes %s and there is %s: set memory_budget (not below the floor), or lower "
                "per_device_train_batch_size.",
                gib(peak),
                gib(available[0]),
            )
    return lines


def devices(trainer: Trainer) -> Lines:
    """Return where it runs, and what the launcher's default settings would make of it."""
    args = trainer.args
    kind = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device)
    lines = [("this process", f"{kind}, rank {args.process_index} of {args.world_size}")]
    if args.n_gpu > 1:
        lines.append(("in this process", f"{args.n_gpu} GPUs under nn.DataParallel"))
    strategy = trainer.accelerator.distributed_type
    lines.append(("strategy", "none" if strategy == DistributedType.NO else strategy.value))
    if trainer.is_deepspeed_enabled:
        lines.append(("DeepSpeed", _deepspeed(trainer)))
    if args.world_size == 1 and os.path.isfile(default_config_file):
        config = load_config_from_file(None)
        lines.append(
            (
                "accelerate launch",
                f"{config.num_processes} processes by {default_config_file}, which is not in use here; see what "
                "that does with hf-trainopt doctor --launcher 'accelerate launch'",
            )
        )
    return lines


def _deepspeed(trainer: Trainer) -> str:
    """Return what DeepSpeed spreads and offloads, and how often it reduces gradients."""
    config = config_of(trainer)
    stage, zero = stage_of(config), config.get("zero_optimization", {})
    spread = ("nothing is", "the optimizer's state is", "gradients and the optimizer's state are", "everything is")
    words = f"ZeRO-{stage}: {spread[stage]} spread over the ranks"
    for name, what in (("offload_param", "parameters"), ("offload_optimizer", "optimizer")):
        device = (zero.get(name) or {}).get("device", "none")
        if device != "none":
            words += f", {what} offloaded to {device}"
    in_each = stage >= 2 and not trainer.args.coalesce_grad_reduction
    return f"{words}; gradients are reduced in each {'micro-batch' if in_each else 'optimizer step'}"


def reliability(trainer: Trainer, resumed_from: str | None) -> Lines:
    """Return what is saved, and what becomes of signals and of losses that are not finite."""
    args = trainer.args
    saves = _interval(args.save_strategy.value, trainer.state.save_steps, _unit(trainer))
    if args.save_strategy.value != "no":
        kept = "all are kept" if args.save_total_limit is None else f"the last {args.save_total_limit} are kept"
        saves += f" into {args.output_dir}, {kept}"
    lines = [("checkpoints", saves), ("resumes from", resumed_from or "nothing: it starts from scratch")]
    signals = "save a checkpoint and end" if args.saves_on_interrupt else "end the run, nothing is saved"
    lines.append(("SIGTERM, Ctrl-C", signals))
    obstacle = trainer.trainopt.skipped_steps.obstacle
    limit = trainer.trainopt.skipped_steps.limit
    if not limit:
        text = "taken, as in stock Trainer"
    elif obstacle is not None:
        text = f"taken: max_skipped_windows has no effect, since {obstacle}"
    else:
        text = f"left out; the run stops after {limit} in a row"
    return [*lines, ("steps with NaN or inf", text)]


def evidence(trainer: Trainer) -> Lines:
    """Return what is measured and where it goes."""
    args = trainer.args
    lines = [("measured", ", ".join(args.measured) or "nothing")]
    if args.target_metric is not None:
        ends = ", at which training ends" if args.stop_at_target else ""
        lines.append(("target", f"{args.target_metric} of {args.target_value:g}{ends}"))
    return [*lines, ("trackers", ", ".join(args.report_to or []) or "none")]
