"""Writes `benchmarks/gpu.md` from the records of `run.py` in `benchmarks/results/gpu/`.

    python benchmarks/gpu/report.py [--results FOLDER] [--output FILE]

A stage without a record appears as not run yet. Records of a rehearsal are refused: they hold a CPU's figures.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from page_tables import mean_spread, table  # noqa: E402
from stage_list import STAGES  # noqa: E402


RESULTS = HERE.parent / "results" / "gpu"
PAGE = HERE.parent / "gpu.md"
NOT_RUN = "**Not run yet.**"
TITLES = {
    "environment": "The card",
    "exactness": "Exactness",
    "memory": "Peaks: predicted and measured",
    "memory_expandable": "Peaks with expandable segments",
    "time": "Step times",
    "language": "Language: GPT-2 Small on WikiText-2",
    "vision": "Vision: ResNet-50 on CIFAR-10",
    "plans": "Planning",
}
WHAT = {
    "environment": "How fast the card multiplies matrices, copies memory (we count bytes read and bytes written) and "
    "runs a small operator.",
    "exactness": "These checks train small models on the card and compare bits or gradients. Kernels are "
    "deterministic, except where the table says otherwise.",
    "memory": "We compare the peak that each plan predicts with the peak that the allocator saw in a real step. "
    "*Measured* and *reserved* say how far above the prediction the two are; the allocator reserves more than it "
    "hands out. *Outside* is memory that no allocator sees. *Runs within* is the smallest limit, as a multiple of the "
    "prediction, at which the plan still ran; 1.20 is the largest that we tried.",
    "memory_expandable": "The same measurement with `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`. Each pair of "
    "columns shows PyTorch's default allocator and then expandable segments.",
    "time": "Device events time each step, and the plans take turns. We compare with the predicted time, with stock "
    "checkpointing and with `torch.compile`, and measure what our training loop costs.",
    "language": "GPT-2 Small from scratch, T = 1024, bf16, three epochs. Stock `Trainer` runs at k = 8, 2 and 1 and "
    "scales its learning rate by the root of k. Ours runs with its defaults, at the learning rate of k = 8.",
    "vision": "ResNet-50 from scratch at 96² (each pixel repeated), bf16, 57,000 images, with the same arms. Records "
    "of 2026-11-28 are of a clock without the limit that `adam_clock` has now (an eighth of the run), which changes a "
    "β2 of .999.",
    "plans": "How many seconds of one CPU core it took to plan for the models above.",
}
# First match wins: a part of a check's name, and what the check shows.
FAMILIES = (
    ("fixed is stock", "`fixed` gives the bits of stock `Trainer`"),
    ("windows at constant k", "windows at constant k give the bits of stock `Trainer`"),
    ("a window of any k", "a window of any k has the gradient of one big batch"),
    ("gradient statistics", "gradient statistics agree with the slow reference"),
    ("out of memory", "after a real out-of-memory error, smaller micro-batches give the same bits"),
    ("fp16", "fp16: skipped windows leave no trace, and bf16 takes over when the scale collapses"),
    ("killed and resumed", "a run that is killed and resumed ends with the same bits"),
    ("SyncBatchNorm", "placements give the same bits with SyncBatchNorm"),
    ("on one rank", "one rank of NCCL and DDP gives the bits of a run without"),
    ("is none to the bit", "a placement gives the same bits as no placement"),
    ("agrees with none", "a placement gives the same gradients with the default kernels (not deterministic)"),
)


class RehearsalError(ValueError):
    """Records that were not made on a GPU."""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records by stage; `summary` is among them.

    Raises:
        RehearsalError: One is of a rehearsal, or of a CPU.
    """
    records = {}
    for name in [*(stage.name for stage in STAGES), "summary"]:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        on_cpu = name not in ("summary", "plans") and (record.get("device") or {}).get("type") == "cpu"
        if record.get("rehearsal") is not False or on_cpu:
            raise RehearsalError(f"{path} is the record of a rehearsal: its figures are a CPU's; run it on a GPU.")
        records[name] = record
    return records


def seconds(entry: dict[str, float], scale: float = 1e3, form: str = ".1f") -> str:
    """Return a median with its range."""
    return f"{scale * entry['median']:{form}} ({scale * entry['least']:{form}} to {scale * entry['most']:{form}})"


def gib(num_bytes: float | None) -> str:
    """Return bytes as GiB."""
    return "–" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


def percent(ratio: float | None) -> str:
    """Return by how much a ratio is above 1."""
    return "–" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def environment(record: dict[str, Any]) -> str:
    parts = record["parts"]
    rates = parts.get("matrix products", {}).get("teraflops", {})
    rows = [
        [f"{name} product of {entry['size']}³, TFLOP/s", seconds(entry, 1, ".0f")] for name, entry in rates.items()
    ]
    for name, form, what in (
        ("copies", ".0f", "copy on the device, GB/s"), ("from the host", ".1f", "copy from pinned memory, GB/s")
    ):  # fmt: skip
        if "gigabytes_per_second" in parts.get(name, {}):
            rows.append([what, seconds(parts[name]["gigabytes_per_second"], 1, form)])
    if "microseconds" in parts.get("launches", {}):
        rows.append(["a small operator, µs", seconds(parts["launches"]["microseconds"], 1)])
    rows += [
        [f"attention with dropout, {name}", f"`{kernel}`"]
        for name, kernel in parts.get("attention", {}).items()
        if isinstance(kernel, str)
    ]
    return table(["what", "median (range)"], rows)


def exactness(record: dict[str, Any]) -> str:
    families: dict[str, list[str]] = {text: [] for _, text in FAMILIES}
    for name in record["checks"]:
        family = next((text for part, text in FAMILIES if part in name), "other checks")
        families.setdefault(family, []).append(name)
    rows = []
    for text, names in families.items():
        worst = [record["parts"].get(name, {}).get("largest_difference") for name in names]
        worst = [value for value in worst if value is not None]
        passed = sum(record["checks"][name] for name in names)
        rows.append(
            [text, f"{passed} of {len(names)}" if names else "not run yet", f"{max(worst):.1e}" if worst else "–"]
        )
    lines = [f"{sum(record['checks'].values())} of {len(record['checks'])} checks passed.", "",
             table(["what must hold", "passed", "largest difference"], rows)]  # fmt: skip
    lacking = [name for name, part in record["parts"].items() if "has_no_deterministic_kernel" in part]
    if lacking:
        lines += ["", f"{len(lacking)} of them ran an operator that has no deterministic kernel."]
    for name, passed in record["checks"].items():
        if not passed:
            part = record["parts"].get(name, {})
            notes = [f"{key.replace('_', ' ')}: {part[key]}" for key in ("differs", "repeats_itself", "errors")
                     if key in part]  # fmt: skip
            lines += ["", f"**Failed**: {name}. " + "; ".join(notes)[:400].replace("\n", " ")]
    return "\n".join(lines)


def within(plan: dict[str, Any] | None) -> str:
    """Return the least limit at which a plan ran."""
    if plan is None or "runs_within" not in plan:
        return "–"
    return "more than 1.20" if plan["runs_within"] is None else f"{plan['runs_within']:.2f}"


def memory(record: dict[str, Any]) -> str:
    sections = []
    for part in record["parts"].values():
        if "plans" not in part:
            continue
        rows = [
            [plan["placement"], ", ".join(plan["rewrites"]) or "–", gib(plan["predicted_bytes"]),
             gib(plan.get("peak_bytes")), percent(plan.get("measured_over_predicted")),
             percent(plan.get("reserved_over_predicted")), gib(plan.get("outside_bytes")), within(plan)]
            for plan in part["plans"]
        ]  # fmt: skip
        header = ["placement", "rewrites", "predicted GiB", "measured GiB", "measured", "reserved", "outside GiB",
                  "runs within"]  # fmt: skip
        sections.append(f"### {part['title']}\n\n" + table(header, rows))
    context = record["parts"].get("context", {})
    if "after_start" in context:
        outside = ", ".join(
            f"{gib(entry['outside_bytes'])} GiB {name.replace('_', ' ')}" for name, entry in context.items()
            if isinstance(entry, dict)
        )  # fmt: skip
        text = f"Outside the allocator, CUDA takes {outside}."
        if context.get("after_a_product", {}).get("allocated_bytes"):
            workspace = context["after_a_product"]["allocated_bytes"] / 2**20
            text += (
                f" The first matrix product makes cuBLAS take {workspace:.1f} MiB from the allocator and keep them."
            )
        sections.insert(0, text)
    return "\n\n".join(sections)


def memory_expandable(record: dict[str, Any], default: dict[str, Any]) -> str:
    """Return the peaks of both allocators side by side; `default` is the record of the usual one, or empty."""
    sections = []
    for name, part in record["parts"].items():
        if "plans" not in part:
            continue
        usual = {plan["placement"]: plan for plan in default.get("parts", {}).get(name, {}).get("plans", [])}
        rows = []
        for plan in part["plans"]:
            other = usual.get(plan["placement"])
            rows.append(
                [plan["placement"], ", ".join(plan["rewrites"]) or "–", gib(plan["predicted_bytes"]),
                 percent(plan.get("measured_over_predicted")), percent((other or {}).get("reserved_over_predicted")),
                 percent(plan.get("reserved_over_predicted")), within(other), within(plan)]
            )  # fmt: skip
        header = ["placement", "rewrites", "predicted GiB", "measured", "reserved", "reserved, expandable",
                  "runs within", "runs within, expandable"]  # fmt: skip
        sections.append(f"### {part['title']}, expandable segments\n\n" + table(header, rows))
    return "\n\n".join(sections)


def step_time(record: dict[str, Any]) -> str:
    sections = []
    for name, part in record["parts"].items():
        if "predicted_seconds" not in part:
            continue
        rate = part.get("tokens_per_second")
        speed = f"{rate:,.0f} tokens/s" if rate else f"{part.get('images_per_second', 0):,.0f} images/s"
        text = (
            f"### {part['title']}\n\nA step without placement takes {seconds(part['seconds'])} ms; we predicted "
            f"{1e3 * part['predicted_seconds']:.1f} ms. That is {speed}, or {part['mfu_by_data_sheet']:.1%} of the "
            "FLOP/s in the data sheet"
        )
        if "mfu_by_measured_rate" in part:
            text += f" and {part['mfu_by_measured_rate']:.1%} of those that matrix products reached"
        rounds = part["rounds"]
        note = f"{rounds} round{'s' * (rounds > 1)} of all plans" if rounds else "the warm-up round only"
        rows = [
            [plan["placement"], ", ".join(plan["rewrites"]) or "–", seconds(plan["seconds"]),
             percent(plan["ratio"]["median"]), percent(plan["predicted_ratio"]), gib(plan["predicted_bytes"])]
            for plan in part["plans"]
        ]  # fmt: skip
        stock = part["stock checkpointing"]
        rows.append(
            ["stock checkpointing", "–", seconds(stock["seconds"]), percent(stock["ratio"]["median"]), "–", "–"]
        )
        header = ["placement", "rewrites", "ms", "more time", "predicted", "predicted peak GiB"]
        sections.append(f"{text}. Measured in {note}.\n\n" + table(header, rows))
        sections += _where(record["parts"].get(f"{name}: where the time goes", {}))
    loops = record["parts"].get("loops of the Trainer", {})
    if "windows" in loops:
        waits = loops["synchronisations_per_step"]
        rows = [
            [name, waits.get(name), percent(loops[name]["median"]) if name in loops else "–"]
            for name in ("stock", "windows", "measured")
        ]
        sections.append(
            f"### What the loop costs\n\nSteps of k = 2 of {loops['case']} in {loops['rounds']} round(s). `windows` "
            "is our loop at constant k. `measured` also takes gradient statistics in every "
            f"{loops['measured_every']}th step; such a step takes {percent(loops['a_measured_step'])}.\n\n"
            + table(["loop", "synchronisations per step", "more time"], rows)
        )
    sections += _compiled(record["parts"].get("torch.compile", {}))
    return "\n\n".join(sections)


def _where(part: dict[str, Any]) -> list[str]:
    if not part.get("plans"):
        return []
    rows = [
        [plan["placement"], f"{1e3 * plan['step_seconds']:.1f}", f"{1e3 * plan['host_seconds']:.1f}",
         f"{1e3 * plan['device_seconds']:.1f}", f"{1e3 * plan['span_seconds']:.1f}",
         f"{1e3 * plan['predicted_seconds']:.1f}", plan["operators"], plan["kernels"]]
        for plan in part["plans"]
    ]  # fmt: skip
    header = ["placement", "step ms", "host ms", "kernels ms", "first to last kernel ms", "predicted ms", "operators",
              "kernels"]  # fmt: skip
    text = (
        "Where the time goes: *host* is how long the CPU takes to issue a step, *kernels* the sum of all kernels "
        "under the profiler. If *host* is as long as the step, the CPU is what limits it.\n\n" + table(header, rows)
    )
    for plan in part["plans"]:
        if "longest" in plan:
            longest = [[f"`{entry['kernel'].replace('|', '/')}`", entry["number"], f"{entry['milliseconds']:.2f}"]
                       for entry in plan["longest"][:10]]  # fmt: skip
            text += f"\n\nThe kernels that take longest ({plan['placement']}):\n\n"
            text += table(["kernel", "number", "ms"], longest)
    return [text]


def _compiled(part: dict[str, Any]) -> list[str]:
    if not part.get("values"):
        return []
    rows = [["eager, no placement", "–", gib(part["eager"]["peak_bytes"]), seconds(part["seconds_eager"])]] if (
        "eager" in part
    ) else []  # fmt: skip
    for value in part["values"]:
        rows.append([f"compiled, budget {value['budget']}", f"{value['compile_s']} s to compile",
                     gib(value["peak_bytes"]), seconds(value["seconds"])])  # fmt: skip
        if "ours_at_no_more" in value:
            ours = value["ours_at_no_more"]
            what = f"ours, eager, {ours['placement']}"
            rows.append([what, ", ".join(ours["rewrites"]) or "–", gib(ours["peak_bytes"]), seconds(ours["seconds"])])
    return ["### Against `torch.compile`\n\n" + table(["what", "notes", "peak GiB", "ms"], rows)]


def headline(record: dict[str, Any]) -> str:
    found = {(entry["name"], entry["seed"]): entry for entry in record.get("targets", [])}
    names = list(dict.fromkeys(arm["name"] for arm in record.get("arms", [])))
    rows = []
    for name in names:
        arms = [arm for arm in record["arms"] if arm["name"] == name]
        ratios = [found.get((name, arm["seed"])) for arm in arms]
        reached = [entry for entry in ratios if entry and entry["reached"]]

        def ratio(key: str, reached: list = reached, ratios: list = ratios) -> str:
            if not reached:
                return "never"
            more = f" (never by {len(ratios) - len(reached)})" if len(reached) < len(ratios) else ""
            return mean_spread([entry[key] for entry in reached], ".2f") + more

        metric = [arm["final_metric"] for arm in arms if arm["final_metric"] is not None]
        peaks = [arm["peak_bytes"] for arm in arms if arm["peak_bytes"]]
        rate = [arm["tokens_per_second"] or arm["samples_per_second"] or 0 for arm in arms]
        rows.append(
            [name, len(arms), f"{arms[0]['learning_rate']:.2g}", mean_spread([arm["final_loss"] for arm in arms]),
             mean_spread([100 * value for value in metric], ".1f") + " %" if metric else "–",
             f"{statistics.mean(arm['optimizer_steps'] for arm in arms):.0f}", ratio("seconds_ratio"),
             ratio("samples_ratio"), f"{statistics.mean(arm['train_time_s'] for arm in arms):.1f}",
             f"{statistics.mean(rate):,.0f}", gib(max(peaks) if peaks else None)]
        )  # fmt: skip
    header = ["arm", "seeds", "rate", "final loss", "accuracy", "steps", "time to target", "data to target", "seconds",
              "tokens or images/s", "peak GiB"]  # fmt: skip
    plans = [arm["plan"] for arm in record.get("arms", []) if arm.get("plan")]
    notes = [
        f"The plan for the budget: {plan['summary']}. It predicted {gib(plan['predicted_peak_bytes'])} GiB (without a "
        f"plan: {gib(plan['baseline_peak_bytes'])} GiB) and took {gib(plan['measured_peak_bytes'])} GiB."
        for plan in plans
    ]
    text = (
        f"{record.get('title')}. The target is the loss that stock k = 8 reaches after 80 % of its data; *time* and "
        "*data to target* are ratios to that run."
    )
    return "\n\n".join([text, table(header, rows), *notes])


def plans(record: dict[str, Any]) -> str:
    rows = [[part.get("title", name), len(part.get("plans", [])), part.get("cpu_s", "–")]
            for name, part in record["parts"].items()]  # fmt: skip
    return table(["model", "plans", "CPU seconds"], rows)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "environment": environment, "exactness": exactness, "memory": memory, "memory_expandable": memory_expandable,
    "time": step_time, "language": headline, "vision": headline, "plans": plans,
}  # fmt: skip


def page(records: dict[str, dict[str, Any]]) -> str:
    """Return the page."""
    lines = ["# On a GPU", "", *_head(records)]
    for name, make in SECTIONS.items():
        lines += ["", f"## {TITLES[name]}", "", WHAT[name], ""]
        record = records.get(name)
        if record is None:
            lines.append(NOT_RUN)
            continue
        for paragraph in how_it_went(record):
            lines += [paragraph, ""]
        more = (records.get("memory", {}),) if name == "memory_expandable" else ()
        try:
            lines.append(make(record, *more))
        except (KeyError, TypeError, ValueError, IndexError, statistics.StatisticsError) as error:
            lines.append(f"The record is incomplete ({type(error).__name__}: {error}).")
    return "\n".join(lines).rstrip() + "\n"


def how_it_went(record: dict[str, Any]) -> list[str]:
    """Return in plain words what failed, what was cut off and what was left out."""
    found = []
    reason = record.get("reason", "")
    if reason.startswith("ended after its limit"):
        found.append(f"**Partial**: time ran out ({reason.split(' of ')[-1]}). Below is what was measured by then.")
    elif reason:
        found.append(f"**Failed**: {reason[:500]}. Below is what was measured by then.")
    if record.get("errors"):
        found.append(f"**Failed**: an error stopped {'; '.join(record['errors'])[:1000]}.")
    false = [check for check, passed in record.get("checks", {}).items() if not passed]
    if false == ["stock and ours have run"]:
        found.append("**Partial**: stock and ours have not both run yet, so there is nothing to compare.")
    elif false and record.get("stage") != "exactness":  # which names its own
        found.append(f"**{len(false)} of {len(record['checks'])} checks failed**: {'; '.join(false)[:1500]}.")
    if record.get("skipped"):
        names = [line.rsplit(": ", 1)[0] for line in record["skipped"]]
        found.append(f"Not measured, because time ran out: {'; '.join(names)}.")
    return found


def _head(records: dict[str, dict[str, Any]]) -> list[str]:
    text = [
        "One script runs everything that needs a GPU: `python benchmarks/gpu/run.py`. Its docstring says how to run "
        "it and how long the stages took. CI rehearses it on a CPU. `python benchmarks/gpu/report.py` writes this "
        "page from the records in `results/gpu/`."
    ]
    if not records:
        return [*text, "", "**Nothing here ran on a GPU yet.** No figure of this project is a GPU's."]
    first = next((record for record in records.values() if (record.get("device") or {}).get("name")), None)
    if first is not None:
        device, found = first["device"], first["versions"]
        text += ["", f"{device['name']}, {gib(device['total_bytes'])} GiB, driver {device['driver']}, CUDA "
                 f"{found.get('cuda')}; torch {found.get('torch')}, transformers {found.get('transformers')}, Python "
                 f"{found.get('python')}."]  # fmt: skip
    if "summary" in records:
        runs = records["summary"].get("runs") or [records["summary"]]
        names = list(dict.fromkeys(name for run in runs for name in run["stages"]))
        header = ["stage", *(f"{run.get('date', 'no date')}, {run.get('card', {}).get('name', 'no card')}"
                             for run in runs)]  # fmt: skip
        rows = [[name, *(_took(run["stages"].get(name)) for run in runs)]
                for name in names]  # fmt: skip
        text += ["", "Seconds that each stage took:", "", table(header, rows)]
    return text


def _took(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["status"] == "skipped":
        return "–"
    cut = "ended after its limit" in entry.get("reason", "")
    return f"{entry['seconds']:.0f}" + (", cut off" if cut else "" if entry["status"] == "ok" else ", see below")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page")
    options = parser.parse_args(arguments)
    try:
        text = page(load(options.results))
    except RehearsalError as error:
        parser.error(str(error))
    options.output.write_text(text)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
