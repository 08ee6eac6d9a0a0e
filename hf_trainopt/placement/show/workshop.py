"""Builds models and planners from the flags of `hf-trainopt plan`, and describes them."""

import argparse
import functools

import torch

from ..plan.budget import gib
from ..plan.deepspeed_config import auto_settings, config_optimizer, zero_settings
from ..plan.planner import PlacementPlanner
from ..plan.run_sharding import accelerate_groups
from ..plan.stages import find_stages
from ..simulate.optimizers import PAGED
from ..simulate.quantized import Quantization, num_parameters
from ..simulate.sharding import WORDS, Sharding, ZeroSettings
from ..simulate.step_setup import StepSetup
from . import models
from .deepspeed import optimizer_of_flags, sharding_of_flags
from .flags import device_of
from .optimizers import optimizer_maker
from .progress import Progress


class Workshop:
    """Builds models and planners from the flags.

    Args:
        arguments: The flags, checked.
        progress: Called after each piece of work.
    """

    def __init__(self, arguments: argparse.Namespace, progress: Progress):
        self.arguments, self.progress = arguments, progress
        self.device = device_of(arguments)
        self.config_optimizer = optimizer_of_flags(arguments)
        self.request = models.ModelRequest(
            model_type=arguments.model_type,
            config_overrides=arguments.config_overrides,
            timm_model=arguments.timm_model,
            model_args=arguments.model_args,
            model_name_or_path=arguments.model_name_or_path,
            task=arguments.task,
            num_classes=arguments.num_classes,
            attn_implementation=arguments.attn_implementation,
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            lora_r=arguments.lora_r,
            lora_target_modules=arguments.lora_target_modules,
            quantization=_quantization(arguments),
            use_liger_kernel=arguments.use_liger_kernel,
        )

    def build(self, batch: int, block: int | None, image: int | None) -> models.BuiltModel:
        """Return the model and a batch of these sizes."""
        built = models.build_model(self.request, batch, block, image)
        self.progress("built the model")
        return built

    def planner(
        self, built: models.BuiltModel, accumulation_steps: int, like: PlacementPlanner | None = None
    ) -> PlacementPlanner:
        """Return a planner of steps with this model and batch."""
        arguments = self.arguments
        half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
        sharding = sharding_of(arguments, built, half)
        setup = StepSetup(
            device=self.device,
            make_optimizer=optimizer_maker(arguments.optim)
            if self.config_optimizer is None
            else functools.partial(config_optimizer, self.config_optimizer),
            autocast_dtype=None if sharding.is_zero else half,
            accumulation_steps=accumulation_steps,
            max_grad_norm=arguments.max_grad_norm,
            sharding=sharding,
        )
        return PlacementPlanner(
            built.model,
            built.batch,
            setup,
            stages=arguments.placement_stages,
            memory_rewrites=arguments.memory_rewrites,
            offload=arguments.placement_offload,
            like=like,
            progress=self.progress,
        )


def _quantization(arguments: argparse.Namespace) -> Quantization | None:
    if arguments.load_in_8bit:
        return Quantization(8)
    if not arguments.load_in_4bit:
        return None
    # As recipes set bnb_4bit_compute_dtype.
    compute = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return Quantization(4, compute, arguments.bnb_4bit_use_double_quant)


def header(
    workshop: Workshop, built: models.BuiltModel, planner: PlacementPlanner, sizes: str | None = None
) -> list[tuple[str, str]]:
    """Return what is planned for, as names and values; `sizes` stands in for those of the batch."""
    arguments, request = workshop.arguments, workshop.request
    steps, sharding = arguments.gradient_accumulation_steps, planner.setup.sharding
    batch = sizes or f"{arguments.per_device_train_batch_size} x {built.sample}"
    if steps > 1 and sizes is None:
        batch += f", up to {steps} of them accumulated (gradients stay in memory)"
    if sharding.num_devices > 1:
        batch += f", on each of {sharding.num_devices} devices"
    device = planner.setup.device
    if device.kind == "cpu":
        how = "this machine's processor, measured"
    elif arguments.device is None and not torch.cuda.is_available():
        how = f"{device.name} (assumed, there is no GPU here; --device names another)"
    else:
        how = device.name
    if device.memory:
        how += f", {gib(device.memory)}"
    made = workshop.config_optimizer
    optimizer = arguments.optim if made is None else f"{made.get('type')} of the DeepSpeed configuration"
    optimizer += f", gradients clipped at {arguments.max_grad_norm:g}"
    if arguments.optim in PAGED:
        optimizer += "; its pages aren't counted, because they can move to the host"
    total, trained = num_parameters(built.model), num_parameters(built.model, is_trained=True)
    count = f"{_count(total)} parameters" + (f", {_count(trained)} of them trained" if trained < total else "")
    return [
        ("Model", f"{request.name}: {type(built.model).__name__}, {count}"),
        *([("Config", request.changes)] if request.changes else []),
        *([("Kernels", "Liger's")] if request.use_liger_kernel else []),
        ("Batch", batch),
        ("Precision", precision_of(arguments, built)),
        ("Optimizer", optimizer),
        *([("Sharding", spread(planner))] if sharding.num_devices > 1 else []),
        ("Device", how),
        (
            "Assumed",
            "eager mode, samples of full length without padding; times from FLOPs and bytes moved (a roofline)",
        ),
    ]


def sharding_of(arguments: argparse.Namespace, built: models.BuiltModel, half: torch.dtype | None) -> Sharding:
    """Return how the step is spread, with the types and buckets of a run by Trainer.

    Raises:
        ValueError: The configuration of DeepSpeed has what can't be planned for.
    """
    if arguments.deepspeed is not None:
        return sharding_of_flags(arguments, built.model)
    kind, groups = arguments.sharding or "ddp", None
    settings = ZeroSettings()
    if kind == "fsdp2":
        names = find_stages(built.model, arguments.placement_stages)
        classes = set(getattr(built.model, "_no_split_modules", None) or [])
        layers = {module for module in built.model.modules() if type(module).__name__ in classes}
        groups = tuple(accelerate_groups(built.model, layers or {built.model.get_submodule(name) for name in names}))
    if kind.startswith("zero"):
        zero = {"reduce_bucket_size": "auto"}
        if kind == "zero3":
            zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
        if auto_settings(built.model.config) is None:
            zero = {}  # DeepSpeed's own
        settings = zero_settings(zero, built.model)
    return Sharding(
        kind,
        arguments.num_devices,
        offload_optimizer=arguments.offload_optimizer,
        offload_parameters=arguments.offload_parameters,
        # Accelerate gives FSDP2 the type of mixed precision, and keeps shards in float32; DeepSpeed casts the model.
        dtype=half if kind == "fsdp2" or kind.startswith("zero") else None,
        shard_dtype=torch.float32 if kind == "fsdp2" and half else None,
        reduce_dtype=half if kind == "fsdp2" else None,
        groups=groups,
        zero=settings,
    )


def spread(planner: PlacementPlanner) -> str:
    """Return in words how the model is spread, and what that puts on the host."""
    sharding = planner.setup.sharding
    words = f"{WORDS[sharding.kind]} over {sharding.num_devices} devices; bytes are those of one"
    if sharding.kind == "ddp":
        words += ", with gradient buckets"
    if sharding.is_zero and sharding.kind != "zero0":
        words += f"; buckets of {sharding.zero.reduce_bucket_size:,} numbers"
    parts = [
        n for n, on in (("optimizer", sharding.offload_optimizer), ("parameters", sharding.offload_parameters)) if on
    ]
    if parts:
        words += f"; {' and '.join(parts)} on the host, {gib(planner.baseline.host_bytes)} for each device"
    return words


def precision_of(arguments: argparse.Namespace, built: models.BuiltModel) -> str:
    """Return the types of numbers in words."""
    packed = {"uint8": "4 bits", "int8": "8 bits"}
    types = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in built.model.parameters()})
    types = [packed.get(name, name) for name in types]
    half = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
    if half and (arguments.sharding or "").startswith("zero"):
        return f"weights in {half}, master weights in float32 (DeepSpeed)"
    if half and arguments.sharding == "fsdp2":
        return f"shards in float32, gathered in {half}, autocast to {half}"
    return f"weights in {' and '.join(types)}, {f'autocast to {half}' if half else 'no autocast'}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def script_of(built: models.BuiltModel) -> str:
    """Return the command that trains models for this task."""
    scripts = {"causal-lm": "python run_clm.py", "image-classification": "python run_image.py"}
    return scripts.get(built.task, "python your_script.py")
