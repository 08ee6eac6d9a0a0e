"""`hf-trainopt plan`: arguments, planning, and what is written."""

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ...machine.costs import DEVICES, DeviceSpec, device_spec, measured_cpu
from ..arguments import is_plan_file
from ..plan.budget import parse_budget
from ..plan.plan import STORE, PlacementPlan
from ..plan.planner import PlacementPlanner
from ..plan.policies import POLICIES, named_choices
from ..rewrite.allowed_rewrites import check_rewrites
from ..simulate.replay import StepSetup
from . import models, plot, render


NAMED = ("none", "all", "every_2", "sqrt")

# Most micro-batches that adaptive accumulation takes unless told otherwise (`max_accumulation_steps`).
_ADAPTIVE_STEPS = 32

# Arguments of an optimizer that `Trainer` fills in for those that work on modules.
_NEEDS_MODEL = {"params", "model", "optimizer_dict"}

EPILOG = """examples:
  hf-trainopt plan --model_type gpt2 --per_device_train_batch_size 8 --block_size 1024 --memory_budget 8GiB
  hf-trainopt plan --timm_model resnet50 --image_size 224 --per_device_train_batch_size 32 --memory_budget 75%
  hf-trainopt plan --model_name_or_path outputs/gpt2 --bf16 --device h100 --plot frontier.png --output plan.json \\
      --checkpoint_placement sqrt
"""


def add_parser(subparsers: Any, **options: Any) -> None:
    """Add `plan` to the subcommands of `hf-trainopt`."""
    parser = subparsers.add_parser(
        "plan",
        description="Plan which activations of a training step are stored and which are recomputed, so that its peak "
        "memory stays within a budget. Needs no GPU, no weights and no data.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    model = parser.add_argument_group("model (one of the first three)")
    which = model.add_mutually_exclusive_group(required=True)
    which.add_argument("--model_type", help="model type of transformers with its default config, such as gpt2")
    which.add_argument("--timm_model", help="architecture of timm, such as resnet50")
    which.add_argument("--model_name_or_path", help="folder or Hub name; only the config is read, no weights")
    model.add_argument("--config_overrides", help="changes to the config of --model_type: n_layer=4,n_embd=256")
    model.add_argument("--model_args", help="more arguments of a timm model as JSON: '{\"in_chans\": 1}'")
    model.add_argument("--num_classes", type=_positive, help="classes of a classifier")
    model.add_argument("--task", choices=tuple(models.TASKS), help="default: what the config is for")
    model.add_argument("--attn_implementation", help="sdpa, eager, ...")
    model.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights")
    step = parser.add_argument_group("training step (as in TrainingArguments)")
    step.add_argument("--per_device_train_batch_size", type=_positive, default=8, help="default: 8")
    step.add_argument("--block_size", type=_positive, help="tokens per sample; default: the model's, at most 1024")
    step.add_argument("--image_size", type=_positive, help="height and width; default: the model's, else 224")
    step.add_argument(
        "--gradient_accumulation_steps",
        type=_accumulation,
        default=1,
        help=f"most micro-batches in a step, or 'adaptive' (at most {_ADAPTIVE_STEPS}), as EfficientTrainer has it "
        "unless accumulation_policy is 'fixed'; default: 1",
    )
    step.add_argument("--optim", default="adamw_torch_fused", help="default: adamw_torch_fused")
    step.add_argument("--max_grad_norm", type=float, default=1.0, help="clipping, 0 for none; default: 1.0")
    precision = step.add_mutually_exclusive_group()
    for name in ("bf16", "fp16"):
        precision.add_argument(f"--{name}", nargs="?", const=True, default=False, type=_boolean, metavar="BOOL")
    step.add_argument("--world_size", type=_positive, default=1, help="processes of distributed training (DDP)")
    step.add_argument("--device", choices=tuple(DEVICES), help="default: the GPU of this machine, else a100")
    choice = parser.add_argument_group("placement (as in EfficientTrainingArguments)")
    choice.add_argument(
        "--memory_budget",
        help="most memory that a step may take: 12GiB, 75%% (of the peak without recomputation), or bytes; set it to "
        "the device's memory less 10 %%; default: none, only the frontier is shown",
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
    result = parser.add_argument_group("result")
    result.add_argument("--output", metavar="PLAN.json", help="write the chosen plan, for --checkpoint_placement")
    result.add_argument("--plot", metavar="FRONTIER.png", help="draw the frontier (needs matplotlib)")
    result.add_argument("--json", action="store_true", help="write JSON to stdout instead of tables")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 on")
    return int(text)


def _accumulation(text: str) -> int:
    return _ADAPTIVE_STEPS if text == "adaptive" else _positive(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return text.lower() == "true"


def run(arguments: argparse.Namespace) -> str:
    """Plan as asked; return what belongs on stdout.

    Raises:
        ValueError: Something asked for is impossible.
    """
    policy = check_arguments(arguments)
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings(), Progress() as progress:
        warnings.simplefilter("ignore")
        request = models.ModelRequest(
            model_type=arguments.model_type,
            config_overrides=arguments.config_overrides,
            timm_model=arguments.timm_model,
            model_args=arguments.model_args,
            model_name_or_path=arguments.model_name_or_path,
            task=arguments.task,
            num_classes=arguments.num_classes,
            attn_implementation=arguments.attn_implementation,
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        )
        built = models.build_model(
            request, arguments.per_device_train_batch_size, arguments.block_size, arguments.image_size
        )
        progress("built the model")
        setup = StepSetup(
            device=_device(arguments.device),
            make_optimizer=optimizer_maker(arguments.optim),
            autocast_dtype=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
            accumulation_steps=arguments.gradient_accumulation_steps,
            max_grad_norm=arguments.max_grad_norm,
            world_size=arguments.world_size,
        )
        planner = PlacementPlanner(
            built.model,
            built.batch,
            setup,
            stages=arguments.placement_stages,
            memory_rewrites=arguments.memory_rewrites,
            progress=progress,
        )
        budget = arguments.memory_budget
        if policy == "budget":
            planner.for_budget(budget)  # before the frontier: an impossible budget is told sooner
        frontier = frontier_of(planner)
        named = [planner.named(name) for name in NAMED if name != "every_2" or len(planner.stages) > 2]
        chosen = None
        if policy == "budget":
            # Again: whatever fits of what the frontier has found is looked at as well.
            chosen = planner.for_budget(budget)
        elif policy is not None:
            chosen = planner.named(policy)
    if arguments.output is not None:
        chosen.save(arguments.output)
    if arguments.plot is not None:
        batch = f"batch {arguments.per_device_train_batch_size} x {built.sample}"
        title = [request.label, batch, _precision(arguments, built), planner.setup.device.name]
        plot.plot_frontier(arguments.plot, frontier, named, chosen, ", ".join(title))
    replay = None if chosen is None else planner.replay(chosen.stages, chosen.rewrites)
    if arguments.json:
        return _as_json(planner, frontier, named, chosen, replay)
    parts = [
        render.render_pairs(_header(arguments, request, built, planner)),
        "Where the memory goes, at the peak of a step without recomputation:\n\n"
        + render.render_memory(
            planner.baseline.peak_by_key, planner.stages, None if replay is None else replay.peak_by_key
        ),
        "The frontier (times in % of a step without placement):\n\n" + render.render_frontier(frontier, named, chosen),
        _advice(arguments, built, chosen),
        render.wrapped(render.NOT_COUNTED),
    ]
    return "\n\n".join(parts) + "\n"


def frontier_of(planner: PlacementPlanner, points: int = 7) -> list[PlacementPlan]:
    """Return the frontier, searched only where plans differ in time.

    Between the baseline and the least peak that costs no time (that of a rewrite, if the model allows any) there is
    nothing to find: each search there would take replays, of which one of a large model takes seconds.
    """
    nothing = dict.fromkeys(planner.stages, STORE)
    floor = planner.floor.peak_bytes  # first: rewrites that turn out not to work are dropped with it
    free = [planner.replay(nothing, rewrites).peak_bytes for rewrites in planner.allowed]
    for peak in free:
        planner.for_budget(f"{peak}B")  # a bare number of less than a MiB is taken for a slip
    for index in range(1, points):
        planner.for_budget(f"{floor + (min(free) - floor) * index // points}B")
    return planner.frontier(points=0)


def check_arguments(arguments: argparse.Namespace) -> str | None:
    """Check arguments against each other, before any work; return the placement that is asked for, if any.

    Raises:
        ValueError: One is no such thing or contradicts another.
    """
    policy, budget = arguments.checkpoint_placement, arguments.memory_budget
    if budget is not None:
        parse_budget(budget)
        if policy not in (None, "budget"):
            raise ValueError(
                f"--memory_budget does not go with --checkpoint_placement {policy}; leave one of them out."
            )
        policy = "budget"
    elif policy == "budget":
        raise ValueError("--checkpoint_placement budget needs --memory_budget, such as 12GiB or 75%.")
    elif policy is not None and is_plan_file(policy):
        raise ValueError(
            f"--checkpoint_placement {policy} is a plan already; pass it to the training run, or choose one of "
            f"{', '.join(POLICIES)} here."
        )
    elif policy is not None:
        named_choices(policy, ["a", "b"])
    check_rewrites(arguments.memory_rewrites)
    if arguments.config_overrides is not None and arguments.model_type is None:
        raise ValueError("--config_overrides needs --model_type; leave it out.")
    if arguments.model_args is not None and arguments.model_type is not None:
        raise ValueError("--model_args is for timm models; use --config_overrides with --model_type.")
    if arguments.dtype is not None and arguments.timm_model is not None:
        raise ValueError("--dtype is for models of transformers; leave it out, or use --bf16 with --timm_model.")
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
    optimizer_maker(arguments.optim)
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


def optimizer_maker(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a function that makes the optimizer of `Trainer` with this name for a model.

    Raises:
        ValueError: There is no such optimizer, it is not installed, or it cannot be planned for.
    """
    usable = "adamw_torch_fused, adamw_torch, adafactor, adagrad, rmsprop, sgd"
    if name not in [optimizer.value for optimizer in OptimizerNames]:
        raise ValueError(f"--optim {name} is not an optimizer of transformers; choose one such as {usable}.")
    settings = TrainingArguments(tempfile.gettempdir(), optim=name, use_cpu=True, report_to="none")
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(settings, None)
    except (ImportError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ValueError(
            f"--optim {name} is not there ({reason}); install what it needs, or choose one of {usable}."
        ) from error
    if _NEEDS_MODEL & options.keys():
        raise ValueError(f"--optim {name} changes modules, which is not planned for; choose one of {usable}.")

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return cls([parameter for parameter in model.parameters() if parameter.requires_grad], **options)

    return make


def _device(name: str | None) -> DeviceSpec:
    if name is None:
        return device_spec(torch.device("cuda"))
    return measured_cpu() if name == "cpu" else DEVICES[name]


def _header(
    arguments: argparse.Namespace, request: models.ModelRequest, built: models.BuiltModel, planner: PlacementPlanner
) -> list[tuple[str, str]]:
    parameters = list(built.model.parameters())
    steps, world = arguments.gradient_accumulation_steps, arguments.world_size
    batch = f"{arguments.per_device_train_batch_size} x {built.sample}"
    if steps > 1:
        batch += f", up to {steps} of them accumulated (gradients stay in memory)"
    if world > 1:
        batch += f", on each of {world} devices (DDP, with gradient buckets)"
    device = planner.setup.device
    if device.kind == "cpu":
        how = "this machine's processor, measured"
    elif arguments.device is None and not torch.cuda.is_available():
        how = f"{device.name} (assumed, there is no GPU here; --device names another)"
    else:
        how = device.name
    return [
        ("Model", f"{request.label}: {type(built.model).__name__}, {_count(sum(p.numel() for p in parameters))}"),
        ("Batch", batch),
        ("Precision", _precision(arguments, built)),
        ("Optimizer", f"{arguments.optim}, gradients clipped at {arguments.max_grad_norm:g}"),
        ("Device", how),
        (
            "Assumed",
            "eager mode, samples of full length without padding; times from FLOPs and bytes moved (a roofline)",
        ),
    ]


def _precision(arguments: argparse.Namespace, built: models.BuiltModel) -> str:
    types = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in built.model.parameters()})
    autocast = "autocast to bfloat16" if arguments.bf16 else "autocast to float16" if arguments.fp16 else "no autocast"
    return f"weights in {' and '.join(types)}, {autocast}"


def _count(number: int) -> str:
    text = f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"
    return f"{text} parameters"


def _advice(arguments: argparse.Namespace, built: models.BuiltModel, chosen: PlacementPlan | None) -> str:
    if chosen is None:
        return render.wrapped(
            "Choose a point of the frontier with --memory_budget (a size such as 8GiB, or a share such as 75%), or a "
            "policy with --checkpoint_placement; --output writes the plan."
        )
    scripts = {"causal-lm": "python run_clm.py", "image-classification": "python run_image.py"}
    # What the plan depends on and a training run does not know from the plan's file.
    flags = {name: getattr(arguments, name) for name in ("memory_budget", "checkpoint_placement")}
    if arguments.memory_rewrites != "auto":
        flags["memory_rewrites"] = arguments.memory_rewrites
    flags["placement_stages"] = arguments.placement_stages
    return render.render_choice(
        chosen,
        arguments.output,
        scripts.get(built.task, "python your_script.py"),
        {name: value for name, value in flags.items() if value is not None and value != "budget"},
    )


def _as_json(planner: PlacementPlanner, frontier: list, named: list, chosen: Any, replay: Any) -> str:
    def rows(peak_by_key):
        found = render.memory_rows(peak_by_key, planner.stages)
        return [{"name": row.name, **row.columns, "total": row.total} for row in found]

    values = {
        "plan": None if chosen is None else chosen.to_dict(),
        "memory": rows(planner.baseline.peak_by_key),
        "memory_under_plan": None if replay is None else rows(replay.peak_by_key),
        "baseline_peak_bytes": planner.baseline.peak_bytes,
        "floor_peak_bytes": planner.floor.peak_bytes,
        "frontier": [plan.to_dict() for plan in frontier],
        "named": [plan.to_dict() for plan in named],
    }
    return json.dumps(values, indent=2) + "\n"


class Progress:
    """Shows progress on stderr: a bar on a terminal, else a line every few seconds.

    How much work there will be is not known before the last of it is done: the total is an estimate that grows.
    """

    def __init__(self, first_total: int = 70, seconds: float = 5.0):
        self.count, self.total, self.seconds = 0, first_total, seconds
        self.started = self.shown = time.monotonic()
        self.bar = None

    def __enter__(self) -> "Progress":
        # Warnings of the planner (stages that are left out) belong on stderr as well.
        self._handler = logging.StreamHandler(sys.stderr)
        logging.getLogger("hf_trainopt").addHandler(self._handler)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc="planning", unit="replay", leave=False, file=sys.stderr)
        return self

    def __call__(self, text: str) -> None:
        self.count += 1
        if self.count > 0.9 * self.total:
            self.total = round(1.25 * self.total)
        now = time.monotonic()
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif now - self.shown >= self.seconds:
            self.shown = now
            sys.stderr.write(f"planning: {self.count} of about {self.total} replays, {text}\n")
            sys.stderr.flush()

    def __exit__(self, kind, *exception) -> None:
        if self.bar is not None:
            self.bar.close()
        logging.getLogger("hf_trainopt").removeHandler(self._handler)
        if kind is None:
            sys.stderr.write(f"planned in {time.monotonic() - self.started:.0f} s\n")
