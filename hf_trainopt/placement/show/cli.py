"""`hf-trainopt plan`: what is planned, and what is written."""

import argparse
import json
import warnings
from collections.abc import Iterator
from typing import Any

import transformers

from ..plan.budget import gib, is_of_device
from ..plan.plan import STORE, PlacementPlan
from ..plan.planner import PlacementPlanner
from ..simulate.replay import Replay
from . import models, plot, render
from .find import Finder
from .flags import EPILOG, add_flags, check_flags
from .progress import Progress
from .workshop import Workshop, header, precision_of, script_of


NAMED = ("none", "all", "every_2", "sqrt")


def add_parser(subparsers: Any, **options: Any) -> None:
    """Add `plan` to the subcommands of `hf-trainopt`."""
    parser = subparsers.add_parser(
        "plan",
        description="Plan which activations of a training step are stored and which are recomputed, so that its peak "
        "memory stays within a budget. Find the sizes that fit, and the fastest. Needs no GPU, no weights, no data.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Plan as asked; yield what belongs on stdout as soon as it is known.

    Raises:
        ValueError: Something asked for is impossible.
    """
    policy = check_flags(arguments)
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings(), Progress() as progress:
        warnings.simplefilter("ignore")
        workshop = Workshop(arguments, progress)
        texts = Finder(workshop).texts() if arguments.find else _texts(workshop, policy)
        for text in texts:
            progress.clear()
            yield text


def _texts(workshop: Workshop, policy: str | None) -> Iterator[str]:
    """Plan for the sizes that are given: first what a step takes as it is, then the plan, then what else there is."""
    arguments = workshop.arguments
    built = workshop.build(arguments.per_device_train_batch_size, arguments.block_size, arguments.image_size)
    planner = workshop.planner(built, arguments.gradient_accumulation_steps)
    first = "\n\n".join(
        [
            render.render_pairs(header(workshop, built, planner)),
            "Where the memory goes, at the peak of a step without recomputation:\n\n"
            + render.render_memory(planner.baseline.peak_by_key, planner.stages),
            render.wrapped(render.first_answer(planner.baseline, _budget_words(arguments, planner))),
        ]
    )
    if not arguments.json:
        yield first + "\n\n"
    chosen = None
    if policy == "budget":
        chosen = planner.for_budget(arguments.memory_budget)  # before the rest: an impossible budget is told sooner
    shows_all = policy is None or arguments.plot is not None or arguments.json
    if shows_all:
        frontier = frontier_of(planner)
        named = [planner.named(name) for name in NAMED if name != "every_2" or len(planner.stages) > 2]
    else:  # nothing else is shown beside a step that fits as it is
        fits = chosen is not None and chosen.is_stock
        frontier, named = [] if fits else planner.frontier(points=0), []
    if policy == "budget" and shows_all:
        # Again: whatever fits of what the frontier has found is looked at as well.
        chosen = planner.for_budget(arguments.memory_budget)
    elif policy not in (None, "budget"):
        chosen = planner.named(policy)
    if arguments.output is not None:
        chosen.save(arguments.output)
    if arguments.plot is not None:
        batch = f"batch {arguments.per_device_train_batch_size} x {built.sample}"
        title = [workshop.request.label, batch, precision_of(arguments, built), planner.setup.device.name]
        plot.plot_frontier(arguments.plot, frontier, named, chosen, ", ".join(title))
    replay = None if chosen is None else planner.replay(chosen.stages, chosen.rewrites)
    if arguments.json:
        yield _as_json(planner, frontier, named, chosen, replay)
        return
    parts = []
    if replay is not None and not chosen.is_stock:
        parts.append("At the peak:\n\n" + render.render_totals(planner.baseline.peak_by_key, replay.peak_by_key))
    if shows_all or not chosen.is_stock:
        what = "The frontier" if shows_all else "Plans that were looked at"
        table = render.render_frontier(frontier, named, chosen, ends_at_floor=shows_all)
        parts.append(f"{what} (times in % of a step without placement):\n\n{table}")
    parts.append(_advice(arguments, built, chosen))
    parts.append(render.wrapped(render.not_counted(arguments.memory_budget, planner.setup.device.kind)))
    yield "\n\n".join(parts) + "\n"


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


def _budget_words(arguments: argparse.Namespace, planner: PlacementPlanner) -> str | None:
    """Return what the budget is, and what it leaves of the device; `None` if there is no budget."""
    given = arguments.memory_budget
    if given is None:
        return None
    budget, memory = planner.bytes_of(given), planner.memory
    words = f"The budget is {gib(budget)}"
    if memory is None:
        return f"{words}."
    name, total = planner.setup.device.name, gib(memory.total_bytes)
    if is_of_device(given) and budget == memory.usable_bytes:
        return f"{words}: {total} of {name} less {memory.reserve}."
    if budget > memory.usable_bytes:
        return (
            f"{words}, but tensors can take only {gib(memory.usable_bytes)} of {name}: its {total} less "
            f"{memory.reserve}. Use --memory_budget device."
        )
    return f"{words}; {name} has {total}."


def _advice(arguments: argparse.Namespace, built: models.BuiltModel, chosen: PlacementPlan | None) -> str:
    if chosen is None:
        return render.wrapped(
            "Choose a point of the frontier with --memory_budget (a size such as 8GiB, or device), or a policy with "
            "--checkpoint_placement; --output writes the plan. --find per_device_train_batch_size finds the largest "
            "and the fastest micro-batch."
        )
    # What the plan depends on and a training run does not know from the plan's file.
    flags = {name: getattr(arguments, name) for name in ("memory_budget", "checkpoint_placement")}
    if arguments.memory_rewrites != "auto":
        flags["memory_rewrites"] = arguments.memory_rewrites
    flags["placement_stages"] = arguments.placement_stages
    for name in ("placement_offload", "use_liger_kernel"):
        flags[name] = getattr(arguments, name) or None
    return render.render_choice(
        chosen,
        arguments.output,
        script_of(built),
        {name: value for name, value in flags.items() if value is not None and value != "budget"},
    )


def _as_json(
    planner: PlacementPlanner,
    frontier: list[PlacementPlan],
    named: list[PlacementPlan],
    chosen: PlacementPlan | None,
    replay: Replay | None,
) -> str:
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
