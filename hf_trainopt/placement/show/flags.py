"""The flags of `hf-trainopt plan`, and whether they go together."""

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Callable

import torch

from ...machine.devices import DEVICES, DeviceSpec, apple_device, custom_device, device_spec, measured_cpu
from ..arguments import is_plan_file
from ..plan.budget import is_of_own_peak, parse_budget
from ..plan.policies import POLICIES, named_choices
from ..rewrite.allowed_rewrites import check_rewrites
from ..simulate.sharding import KINDS, OFFLOADS_OPTIMIZER, OFFLOADS_PARAMETERS
from . import plot
from .deepspeed import DEFAULT_OPTIM, settle_deepspeed
from .models import TASKS
from .optimizers import optimizer_maker


# Most micro-batches that adaptive accumulation takes unless told otherwise (`max_accumulation_steps`).
_ADAPTIVE_STEPS = 32

# Devices that are described by flags.
_DESCRIBED = {"custom": custom_device, "apple": apple_device}

# Sizes that can be searched for.
BATCH, BLOCK, IMAGE = "per_device_train_batch_size", "block_size", "image_size"

EPILOG = """examples:
  hf-trainopt plan --model_type gpt2 --per_device_train_batch_size 8 --block_size 1024 --memory_budget 8GiB
  hf-trainopt plan --timm_model resnet50 --image_size 224 --per_device_train_batch_size 32 --memory_budget 75%
  hf-trainopt plan --model_type gpt2 --bf16 --device rtx4090 --memory_budget device \\
      --find per_device_train_batch_size --per_device_train_batch_size 8 --gradient_accumulation_steps 8
  hf-trainopt plan --model_name_or_path outputs/gpt2 --bf16 --device h100 --plot frontier.png --output plan.json \\
      --checkpoint_placement sqrt
  hf-trainopt plan --model_type llama --bf16 --device h100 --num_devices 8 --sharding zero3 --memory_budget device
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    _add_model(parser.add_argument_group("model (one of the first three)"))
    _add_step(parser.add_argument_group("training step (as in TrainingArguments)"))
    _add_sharding(parser.add_argument_group("several devices"))
    _add_device(parser.add_argument_group("device"))
    _add_choice(parser.add_argument_group("placement (as in EfficientTrainingArguments)"))
    result = parser.add_argument_group("result")
    result.add_argument("--output", metavar="PLAN.json", help="write the chosen plan, for --checkpoint_placement")
    result.add_argument("--plot", metavar="FRONTIER.png", help="draw the frontier (needs matplotlib)")
    result.add_argument("--json", action="store_true", help="write JSON to stdout instead of tables")


def _add_model(model: argparse._ArgumentGroup) -> None:
    which = model.add_mutually_exclusive_group(required=True)
    which.add_argument("--model_type", help="model type of transformers with its default config, such as gpt2")
    which.add_argument("--timm_model", help="architecture of timm, such as resnet50")
    which.add_argument("--model_name_or_path", help="folder or Hub name; only the config is read, no weights")
    model.add_argument("--config_overrides", help="changes to the config of --model_type: n_layer=4,n_embd=256")
    model.add_argument("--model_args", help="more arguments of a timm model as JSON: '{\"in_chans\": 1}'")
    model.add_argument("--num_classes", type=_positive, help="classes of a classifier")
    model.add_argument("--task", choices=tuple(TASKS), help="default: what the config is for")
    model.add_argument("--attn_implementation", help="sdpa, eager, ...")
    model.add_argument("--lora_r", type=_positive, help="train LoRA adapters of this rank only (needs peft)")
    model.add_argument(
        "--lora_target_modules",
        nargs="+",
        metavar="NAME",
        help="modules that get adapters, a regular expression, or all-linear; default: PEFT's for the model",
    )
    bits = model.add_mutually_exclusive_group()
    bits.add_argument("--load_in_4bit", action="store_true", help="4-bit weights of bitsandbytes; needs --lora_r")
    bits.add_argument("--load_in_8bit", action="store_true", help="8-bit weights of bitsandbytes; needs --lora_r")
    model.add_argument(
        "--bnb_4bit_use_double_quant", action="store_true", help="quantize the scales of 4-bit weights as well"
    )
    model.add_argument(
        "--use_liger_kernel", action="store_true", help="with the kernels of liger-kernel, as in TrainingArguments"
    )
    model.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights")


def _add_step(step: argparse._ArgumentGroup) -> None:
    step.add_argument(f"--{BATCH}", type=_positive, default=8, help="default: 8")
    step.add_argument("--block_size", type=_positive, help="tokens per sample; default: the model's, at most 1024")
    step.add_argument("--image_size", type=_positive, help="height and width; default: the model's, else 224")
    step.add_argument(
        "--gradient_accumulation_steps",
        type=_accumulation,
        default=1,
        help=f"most micro-batches in a step, or 'adaptive' (at most {_ADAPTIVE_STEPS}), as EfficientTrainer has it "
        "unless accumulation_policy is 'fixed'; default: 1",
    )
    step.add_argument(
        "--optim",
        default=DEFAULT_OPTIM,
        help="as in TrainingArguments; optimizers of other packages (adamw_8bit, paged_adamw_8bit, lion_8bit, "
        f"adamw_torch_4bit, galore_adamw, ...) needn't be installed; default: {DEFAULT_OPTIM}",
    )
    step.add_argument("--max_grad_norm", type=float, default=1.0, help="clipping, 0 for none; default: 1.0")
    precision = step.add_mutually_exclusive_group()
    for name in ("bf16", "fp16"):
        precision.add_argument(f"--{name}", nargs="?", const=True, default=False, type=_boolean, metavar="BOOL")


def _add_sharding(devices: argparse._ArgumentGroup) -> None:
    devices.add_argument(
        "--num_devices",
        type=_positive,
        default=1,
        help="devices that share the training; all figures are for the fullest one; default: 1",
    )
    devices.add_argument(
        "--sharding",
        choices=KINDS,
        help="how it is spread: ddp, DeepSpeed's ZeRO (buckets as transformers fills in 'auto', or as --deepspeed "
        "says), or fsdp2 (each layer gathered on its own); default: ddp, where --num_devices is above 1",
    )
    devices.add_argument(
        "--offload_optimizer",
        action="store_true",
        help="keep optimizer state on the host (zero1, zero2, zero3, fsdp2)",
    )
    devices.add_argument(
        "--offload_parameters", action="store_true", help="keep shards of parameters on the host (zero3, fsdp2)"
    )
    devices.add_argument(
        "--deepspeed",
        metavar="CONFIG.json",
        help="DeepSpeed configuration: its stage, offload, optimizer and buckets; 'auto' is what the flags say",
    )
    devices.add_argument("--world_size", type=_positive, help=argparse.SUPPRESS)


def _add_device(device: argparse._ArgumentGroup) -> None:
    device.add_argument(
        "--device",
        metavar="NAME",
        type=_one_of(*DEVICES, *_DESCRIBED),
        help=f"default: the GPU of this machine, else a100; one of {', '.join(DEVICES)}; or custom, or apple (an "
        "Apple chip), with:",
    )
    device.add_argument("--device_memory", help="its memory, such as 24GiB; default: as its data sheet says")
    device.add_argument(
        "--device_bandwidth", type=float, metavar="GB/s", help="to and from its memory, for custom and apple"
    )
    device.add_argument(
        "--device_tflops",
        type=float,
        metavar="TFLOP/s",
        help="of dense 16-bit matrix products, for custom; of the GPU, for apple",
    )


def _add_choice(choice: argparse._ArgumentGroup) -> None:
    choice.add_argument(
        "--memory_budget",
        help="most memory that a step may take: 12GiB; device (its memory less the CUDA context and room for the "
        "allocator); 90%% of device; 75%% (of the step's own peak); or bytes; default: none, "
        "only the frontier is shown",
    )
    choice.add_argument(
        "--find",
        nargs="+",
        metavar="SIZE",
        type=_one_of(BATCH, BLOCK, IMAGE),
        help=f"find the largest {BATCH}, {BLOCK} or {IMAGE} that fits the budget; for {BATCH} also the fastest one "
        f"with the same samples in a step; {BATCH} together with one of the others gives a table of both",
    )
    choice.add_argument(
        "--checkpoint_placement",
        help=f"{', '.join(POLICIES)}; default: budget with --memory_budget, else no plan is chosen; name "
        "another one to have its figures, or its plan as a file",
    )
    choice.add_argument(
        "--memory_rewrites",
        default="auto",
        help="auto (the default): fused_activations and chunked_loss, which change results by rounding only, where "
        "they are cheaper than recomputing more; none: results to the bit those without placement; or one or both "
        "names with a comma: on in every plan",
    )
    choice.add_argument(
        "--placement_stages",
        metavar="REGEX",
        help="whole names of the modules between which activations are placed; default: the layers; for models where "
        "these are not found, or for finer ones ('transformer\\.h\\.\\d+\\.mlp')",
    )
    choice.add_argument(
        "--placement_offload",
        action="store_true",
        help="let the inputs of recomputed layers be kept in memory of the host where that costs less time than "
        "recomputing more (needs --memory_budget)",
    )


def _one_of(*names: str) -> Callable[[str], str]:
    """Return what checks that a word is one of some names. With `choices` argparse would list all of them."""

    def check(text: str) -> str:
        if text in names:
            return text
        close = difflib.get_close_matches(text, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"'{text}' is not known; {hint}")

    return check


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 on")
    return int(text)


class Adaptive(int):
    """Most micro-batches of a step whose number adapts."""


def _accumulation(text: str) -> int:
    return Adaptive(_ADAPTIVE_STEPS) if text == "adaptive" else _positive(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return text.lower() == "true"


def check_flags(arguments: argparse.Namespace) -> str | None:
    """Check flags against each other, before any work; return the placement that is asked for, if any.

    Raises:
        ValueError: One is no such thing or contradicts another.
    """
    policy = _checked_policy(arguments)
    check_rewrites(arguments.memory_rewrites)
    if arguments.config_overrides is not None and arguments.model_type is None:
        raise ValueError("--config_overrides needs --model_type; leave it out.")
    if arguments.model_args is not None and arguments.model_type is not None:
        raise ValueError("--model_args is for timm models; use --config_overrides with --model_type.")
    if arguments.dtype is not None and arguments.timm_model is not None:
        raise ValueError("--dtype is for models of transformers; leave it out, or use --bf16 with --timm_model.")
    if arguments.use_liger_kernel and arguments.timm_model is not None:
        raise ValueError("--use_liger_kernel is for models of transformers; leave it out with --timm_model.")
    if arguments.lora_target_modules is not None and arguments.lora_r is None:
        raise ValueError("--lora_target_modules needs --lora_r, such as 16.")
    if not arguments.max_grad_norm >= 0:
        raise ValueError(f"--max_grad_norm is {arguments.max_grad_norm}; it must be 0 or positive.")
    if arguments.placement_stages is not None:
        try:
            re.compile(arguments.placement_stages)
        except re.error as error:
            raise ValueError(
                f"--placement_stages {arguments.placement_stages} isn't a regular expression ({error}); escape dots "
                "as in 'encoder\\.layer\\.\\d+'."
            ) from error
    if arguments.placement_offload and arguments.memory_budget is None:
        raise ValueError("--placement_offload needs --memory_budget, such as 12GiB or device.")
    optimizer_maker(arguments.optim)
    _check_sharding(arguments)
    _check_quantization(arguments)
    _check_device(arguments)
    _check_find(arguments)
    if arguments.output is not None and policy is None:
        raise ValueError("--output needs a plan to write; pass --memory_budget or --checkpoint_placement.")
    for name in ("output", "plot"):
        path = getattr(arguments, name)
        if path is not None and not os.path.isdir(os.path.dirname(path) or "."):
            raise ValueError(f"--{name} {path} lies in a folder that does not exist; make it first.")
        if path is not None and os.path.isdir(path):
            raise ValueError(f"--{name} {path} is a folder; name a file in it.")
    if arguments.plot is not None:
        plot.check_plot(arguments.plot)
    return policy


def _checked_policy(arguments: argparse.Namespace) -> str | None:
    policy, budget = arguments.checkpoint_placement, arguments.memory_budget
    if budget is not None:
        parse_budget(budget)
        if policy not in (None, "budget"):
            raise ValueError(
                f"--memory_budget does not go with --checkpoint_placement {policy}; leave one of them out."
            )
        return "budget"
    if policy == "budget":
        raise ValueError("--checkpoint_placement budget needs --memory_budget, such as 12GiB or device.")
    if policy is not None and is_plan_file(policy):
        raise ValueError(
            f"--checkpoint_placement {policy} is a plan already; pass it to the training run, or choose one of "
            f"{', '.join(POLICIES)} here."
        )
    if policy is not None:
        named_choices(policy, ["a", "b"])
    return policy


def _check_quantization(arguments: argparse.Namespace) -> None:
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(arguments, name)), None)
    if bits is not None and arguments.timm_model is not None:
        raise ValueError(f"--{bits} is for models of transformers; leave it out with --timm_model.")
    if bits is not None and arguments.lora_r is None:
        raise ValueError(f"--{bits} needs --lora_r, such as 16: quantized weights can't be trained.")
    if bits is not None and arguments.sharding not in (None, "ddp"):
        raise ValueError(f"--{bits} is planned for whole models only; leave out --sharding {arguments.sharding}.")
    if arguments.bnb_4bit_use_double_quant and not arguments.load_in_4bit:
        raise ValueError("--bnb_4bit_use_double_quant needs --load_in_4bit.")


def _check_sharding(arguments: argparse.Namespace) -> None:
    if arguments.deepspeed is not None:
        settle_deepspeed(arguments)
    kind, names = arguments.sharding, [n for n in ("offload_optimizer", "offload_parameters") if getattr(arguments, n)]
    if arguments.world_size is not None:
        raise ValueError(f"--world_size is --num_devices now; pass --num_devices {arguments.world_size}.")
    if arguments.num_devices == 1 and (kind or names):
        given = "--deepspeed" if arguments.deepspeed else f"--sharding {kind}" if kind else f"--{names[0]}"
        raise ValueError(f"{given} needs --num_devices of 2 or more; add it, or leave {given} out.")
    for name in names:
        usable = {"offload_optimizer": OFFLOADS_OPTIMIZER, "offload_parameters": OFFLOADS_PARAMETERS}[name]
        if kind not in usable:
            raise ValueError(
                f"--{name} needs --sharding {' or '.join((', '.join(usable[:-1]), usable[-1]))}, not {kind or 'ddp'}."
            )
    if kind == "fsdp2" and len(names) == 1:
        raise ValueError("FSDP2 offloads both; pass --offload_optimizer together with --offload_parameters.")
    if kind == "zero0" and (arguments.bf16 or arguments.fp16):
        raise ValueError("ZeRO-0 is planned in float32 only; leave out --bf16 and --fp16, or choose zero1.")


def _check_device(arguments: argparse.Namespace) -> None:
    custom = {name: getattr(arguments, f"device_{name}") for name in ("memory", "bandwidth", "tflops")}
    if custom["memory"] is not None:
        try:
            is_size = parse_budget(custom["memory"]) > 0
        except ValueError:
            is_size = False
        if not is_size:
            raise ValueError(f"--device_memory is {custom['memory']}; give a size, such as 24GiB.")
    if arguments.device in _DESCRIBED:
        missing = [f"--device_{name}" for name, value in custom.items() if value is None]
        if missing:
            raise ValueError(f"--device {arguments.device} needs {' and '.join(missing)} too.")
    for name in ("bandwidth", "tflops"):
        value = custom[name]
        if value is not None and arguments.device not in _DESCRIBED:
            raise ValueError(f"--device_{name} is for --device {' or '.join(_DESCRIBED)}; leave it out.")
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--device_{name} is {value}; it must be positive.")


def _check_find(arguments: argparse.Namespace) -> None:
    names = arguments.find
    if names is None:
        return
    if arguments.memory_budget is None:
        raise ValueError("--find needs --memory_budget, such as 24GiB or device.")
    if is_of_own_peak(arguments.memory_budget):
        raise ValueError(
            f"--find needs a --memory_budget that is the same for all sizes; {arguments.memory_budget} is a share of "
            "each step's own peak. Give a size, device or 90% of device."
        )
    if names == [BATCH] and isinstance(arguments.gradient_accumulation_steps, Adaptive):
        raise ValueError(
            f"--find {BATCH} keeps the samples of a step, which adaptive accumulation changes; give "
            "--gradient_accumulation_steps as a number."
        )
    if len(names) != len(set(names)) or {BLOCK, IMAGE} <= set(names):
        raise ValueError(f"--find takes one size, or {BATCH} with one other; not {' '.join(names)}.")
    for name in ("output", "plot"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is for one size; leave it out, and plan the size that --find finds.")


def device_of(arguments: argparse.Namespace) -> DeviceSpec:
    """Return the device to plan for."""
    memory = None if arguments.device_memory is None else parse_budget(arguments.device_memory)
    if arguments.device in _DESCRIBED:
        return _DESCRIBED[arguments.device](memory, arguments.device_bandwidth, arguments.device_tflops)
    if arguments.device is None:
        device = device_spec(torch.device("cuda"))
    else:
        device = measured_cpu() if arguments.device == "cpu" else DEVICES[arguments.device]
    return device if memory is None else dataclasses.replace(device, memory=memory)
