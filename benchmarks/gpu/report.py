"""Writes `benchmarks/gpu.md` from the records of `run.py` in `benchmarks/results/gpu/`.

    python benchmarks/gpu/report.py [--results FOLDER] [--output FILE]

What has no record stands there as not run yet. Records of a rehearsal are refused: a CPU's figures are no GPU's.
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
from run import STAGES  # noqa: E402


RESULTS = HERE.parent / "results" / "gpu"
PAGE = HERE.parent / "gpu.md"
NOT_RUN = "**Not run yet.**"
TITLES = {
    "environment": "The card",
    "exactness": "Exactness",
    "memory": "Peaks: predicted and measured",
    "time": "Step times",
    "language": "Language: GPT-2 Small on WikiText-2",
    "vision": "Vision: ResNet-50 on CIFAR-10",
    "plans": "Planning",
}
WHAT = {
    "environment": "Rates of matrix products, bandwidth of copies (bytes read and written), time of a small operator.",
    "exactness": "Small models trained on the card: `fixed` against stock in three precisions, windows of any k "
    "against one big batch, statistics against the slow twin, resuming, every placement, fp16 with real overflows, a "
    "real out-of-memory error, NCCL and SyncBatchNorm on one rank.",
    "memory": "The replayed peak of each plan against the allocator's mark in a real step; how much more the "
    "allocator reserves; what the context takes; with how little a plan runs where the allocator has no more.",
    "time": "Step times by device events, plans in turns, against the roofline's prediction, stock checkpointing and "
    "`torch.compile` with its activation memory budget; what our loop costs.",
    "language": "GPT-2 Small from scratch, T = 1024, bf16, three epochs: stock `Trainer` at k = 8, 2 and 1 (rates by "
    "the root of k) against ours with defaults at the rate of k = 8.",
    "vision": "ResNet-50 from scratch at 96² (pixels repeated), bf16, 57,000 images: the same arms.",
    "plans": "Seconds of one core of that machine to plan for the models above.",
}


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
    rows = []
    for name, passed in record["checks"].items():
        part = record["parts"].get(name, {})
        notes = [f"{key.replace('_', ' ')}: {part[key]}" for key in
                 ("differs", "repeats_itself", "has_no_deterministic_kernel", "largest_difference", "micro_batch",
                  "precisions", "kernel", "wrapped_in") if key in part]  # fmt: skip
        rows.append(
            [name, "yes" if passed else "**no**", "; ".join(notes)[:300].replace("|", "\\|").replace("\n", " ")]
        )
    count = sum(record["checks"].values())
    return f"{count} of {len(rows)} hold.\n\n" + table(["check", "holds", "notes"], rows)


def memory(record: dict[str, Any]) -> str:
    sections = []
    for part in record["parts"].values():
        if "plans" not in part:
            continue
        rows = [
            [plan["placement"], ", ".join(plan["rewrites"]) or "–", gib(plan["predicted_bytes"]),
             gib(plan.get("peak_bytes")), percent(plan.get("measured_over_predicted")),
             percent(plan.get("reserved_over_predicted")), gib(plan.get("outside_bytes")),
             f"{plan['runs_within']:.2f}" if plan.get("runs_within") else "–"]
            for plan in part["plans"]
        ]  # fmt: skip
        header = ["placement", "rewrites", "predicted GiB", "measured GiB", "measured", "reserved", "outside GiB",
                  "runs within"]  # fmt: skip
        sections.append(f"### {part['title']}\n\n" + table(header, rows))
    context = record["parts"].get("context", {})
    if "after_start" in context:
        sections.insert(0, "The context takes " + ", ".join(
            f"{gib(entry['outside_bytes'])} GiB {name.replace('_', ' ')}" for name, entry in context.items()
            if isinstance(entry, dict)
        ) + ". `reserved` is above the predicted peak, `outside` is what no allocator sees, `runs within` the least "
        "multiple of the prediction with which steps ran.")  # fmt: skip
    return "\n\n".join(sections)


def step_time(record: dict[str, Any]) -> str:
    sections = []
    for part in record["parts"].values():
        if "predicted_seconds" not in part:
            continue
        rate = part.get("tokens_per_second")
        speed = f"{rate:,.0f} tokens/s" if rate else f"{part.get('images_per_second', 0):,.0f} images/s"
        text = (
            f"### {part['title']}\n\nA step takes {seconds(part['seconds'])} ms, predicted "
            f"{1e3 * part['predicted_seconds']:.1f} ms; {speed}, MFU {part['mfu_by_data_sheet']:.1%} by the data sheet"
        )
        if "mfu_by_measured_rate" in part:
            text += f", {part['mfu_by_measured_rate']:.1%} by the measured rate of products"
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
        sections.append(f"{text}; {part['rounds']} rounds.\n\n" + table(header, rows))
    loops = record["parts"].get("loops of the Trainer", {})
    if "windows" in loops:
        waits = loops["synchronisations_per_step"]
        rows = [
            [name, waits.get(name), percent(loops[name]["median"]) if name in loops else "–"]
            for name in ("stock", "windows", "measured")
        ]
        sections.append(
            f"### What the loop costs\n\nSteps of k = 2 of {loops['case']}, {loops['rounds']} rounds; `measured` has "
            f"gradient statistics in every {loops['measured_every']}th step, a measured step takes "
            f"{percent(loops['a_measured_step'])}.\n\n" + table(["loop", "synchronisations a step", "more time"], rows)
        )
    sections += _compiled(record["parts"].get("torch.compile", {}))
    return "\n\n".join(sections)


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
        f"The plan for the budget: {plan['summary']}; predicted {gib(plan['predicted_peak_bytes'])} GiB of "
        f"{gib(plan['baseline_peak_bytes'])}, measured {gib(plan['measured_peak_bytes'])}."
        for plan in plans
    ]
    text = f"{record.get('title')}; {record.get('data')}. The target is the loss of stock k = 8 at 80 % of its data."
    return "\n\n".join([text, table(header, rows), *notes])


def plans(record: dict[str, Any]) -> str:
    rows = [[part.get("title", name), len(part.get("plans", [])), part.get("cpu_s", "–")]
            for name, part in record["parts"].items()]  # fmt: skip
    return table(["model", "plans", "CPU seconds"], rows)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "environment": environment, "exactness": exactness, "memory": memory, "time": step_time, "language": headline,
    "vision": headline, "plans": plans,
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
        if record.get("status") != "ok":
            reasons = [record["reason"]] if "reason" in record else []
            reasons += [f"an error in {part}" for part in record.get("errors", {})]
            reasons += [f"not so: {check}" for check, passed in record.get("checks", {}).items() if not passed]
            lines += [f"**Failed**: {'; '.join(reasons)[:1500]}. What was measured before stands below.", ""]
        if record.get("skipped"):
            lines += [f"Left out: {'; '.join(record['skipped'])}.", ""]
        try:
            lines.append(make(record))
        except (KeyError, TypeError, ValueError, IndexError, statistics.StatisticsError) as error:
            lines.append(f"The record is incomplete ({type(error).__name__}: {error}).")
    return "\n".join(lines).rstrip() + "\n"


def _head(records: dict[str, dict[str, Any]]) -> list[str]:
    text = [
        "Everything that needs a GPU is one script, `python benchmarks/gpu/run.py`. Its head says how a session with "
        "a card runs it and what its stages were sized for. CI rehearses it on a CPU. This page is made from the "
        "records in `results/gpu/` by `python benchmarks/gpu/report.py`."
    ]
    if not records:
        return [*text, "", "**Nothing here ran on a GPU yet.** No figure of this project is a GPU's."]
    first = next((record for record in records.values() if (record.get("device") or {}).get("name")), None)
    if first is not None:
        device, found = first["device"], first["versions"]
        text += ["", f"{device['name']}, {gib(device['total_bytes'])} GiB, driver {device['driver']}, CUDA "
                 f"{found.get('cuda')}; torch {found.get('torch')}, transformers {found.get('transformers')}, Python "
                 f"{found.get('python')}; {first['date']}."]  # fmt: skip
    if "summary" in records:
        entries = records["summary"]["stages"]
        rows = [[name, entry["status"], f"{entry['seconds']:.0f}"] for name, entry in entries.items()]
        text += ["", table(["stage", "status", "seconds"], rows)]
    return text


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
