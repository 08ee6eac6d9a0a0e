"""The tables and plots of `placement.md`, from the records."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from placement_cases import CASES


HERE = Path(__file__).resolve().parent
_GIB, _MIB = 2**30, 2**20
_OURS, _REWRITTEN, _NAMED, _KNOB = "#1f5fa8", "#1a7f37", "#c2571a", "#7b3fa0"

Record = dict[str, Any]


def records(folder: Path, kind: str) -> list[Record]:
    """Return the records of a subcommand, in the order of the cases."""
    found = {
        path.stem.removeprefix(f"{kind}-"): json.loads(path.read_text()) for path in folder.glob(f"{kind}-*.json")
    }
    order = list(CASES)
    return [found[name] for name in sorted(found, key=lambda name: order.index(name) if name in order else -1)]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(share: float, digits: int = 1) -> str:
    text = f"{100 * share:+.{digits}f}"
    return text if float(text) else text[1:]  # neither +0.0 nor -0.0


def mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f}"


def label(entry: Record) -> str:
    return ", ".join([entry["placement"], *entry.get("also", ())])


# ---- Tables --------------------------------------------------------------------------------------------------------

WITNESSES = ("profiler", "tracker", "process")


def error(entry: Record, witness: str, prediction: str = "replayed") -> float:
    """Return how far a prediction lies above (+) or below (-) what was measured."""
    return entry[f"{prediction}_bytes"] / entry[f"{witness}_bytes"] - 1


def predict_tables(folder: Path) -> str:
    parts = []
    for record in records(folder, "predict"):
        rows = [
            [label(entry), percent(error(entry, "profiler", "chain"), 2) if entry["chain_bytes"] else "",
             mib(entry["replayed_bytes"]), *(mib(entry[f"{name}_bytes"]) for name in WITNESSES),
             *(percent(error(entry, name), 2) for name in WITNESSES)]
            for entry in record["plans"]
        ]  # fmt: skip
        columns = ["placement", "chain of stages, error %", "replayed, MiB", *(f"{name}, MiB" for name in WITNESSES)]
        parts.append(f"**{record['title']}**\n\n" + table([*columns, *(f"error to {n}, %" for n in WITNESSES)], rows))
    return "\n\n".join(parts)


def predict_summary(folder: Path) -> str:
    rows = []
    for record in records(folder, "predict"):
        worst = [
            max((error(entry, name) for entry in record["plans"]), key=abs)
            for name in ("tracker", "profiler", "process")
        ]
        within = sum(abs(error(entry, "profiler")) <= 0.01 for entry in record["plans"])
        rows.append([record["title"], f"{within} of {len(record['plans'])}", *(percent(value, 2) for value in worst)])
    columns = ["model", "within 1 % of the profiler", "worst error to our tracker, %", "to the profiler, %"]
    return table([*columns, "to the process, %"], rows)


def flops_table(folder: Path) -> str:
    rows = []
    for record in records(folder, "flops"):
        stock = record["plans"][0]["counted_flops"]
        for entry in record["plans"]:
            rows.append(
                [record["title"], label(entry), f"{entry['counted_flops'] / 1e9:,.3f}",
                 percent(entry["counted_flops"] / stock - 1, 2), "yes" if entry["exact"] else "no"]
            )  # fmt: skip
    return table(["model", "placement", "counted, GFLOP", "more than none, %", "replay equal to the last digit"], rows)


def between(spread: Record, base: float = 1.0) -> str:
    low, high = spread["quartiles"]
    return f"{percent(spread['median'] - base)} ({percent(low - base)} to {percent(high - base)})"


def time_tables(folder: Path) -> str:
    parts = []
    for record in records(folder, "time"):
        stock = record["plans"][0]
        rows = [
            [label(entry), percent(entry["replayed_bytes"] / stock["replayed_bytes"] - 1),
             percent(entry["extra_flops_ratio"]), percent(entry["extra_time_ratio"] + entry["rewritten_time_ratio"]),
             between(entry["wall_ratio"]), between(entry["cpu_ratio"])]
            for entry in record["plans"]
        ]  # fmt: skip
        cpu, load = record["measured_cpu"], record["machine"]["load_average"]
        head = (
            f"**{record['title']}**, {stock['seconds']['median']:.2f} s a step without placement, {record['rounds']} "
            f"rounds; the processor was measured at {cpu['gflops']:.0f} GFLOP/s and "
            f"{cpu['gigabytes_per_second']:.1f} GB/s; load average at the end {load[0]}"
        )
        columns = [
            "placement",
            "peak, %",
            "FLOPs to recompute, %",
            "predicted time, %",
            "wall-clock, %",
            "CPU time, %",
        ]
        parts.append(f"{head}\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def total(point: Record) -> float:
    """Return how much longer a step takes: what is recomputed, and what rewrites save or cost."""
    return point["extra_time_ratio"] + point["rewritten_time_ratio"]


def best_within(points: Sequence[Record], peak_bytes: int) -> Record | None:
    """Return the fastest plan of a frontier that needs no more than this peak."""
    return min((point for point in points if point["peak_bytes"] <= peak_bytes), key=total, default=None)


def frontier_table(folder: Path) -> str:
    rows = []
    for record in records(folder, "frontier"):
        baseline = record["baseline_bytes"]
        shown = [
            point for point in record["named"] if point["policy"] in ("all", "sqrt", "every_2", "every_3", "every_4")
        ]
        for point in shown:
            cells = [record["title"], point["policy"], f"{point['peak_bytes'] / _GIB:.2f}",
                     percent(point["peak_bytes"] / baseline - 1), percent(point["extra_time_ratio"])]  # fmt: skip
            for name in ("none", "auto"):
                ours = best_within(record.get(name, ()), point["peak_bytes"])
                cells.append("" if ours is None else percent(total(ours)))
            rows.append(cells)
        floors = [
            f"{min(record[name], key=lambda point: point['peak_bytes'])['peak_bytes'] / _GIB:.2f} GiB"
            for name in ("none", "auto")
            if name in record
        ]
        rows.append([record["title"], "floor", "", "", "", *floors, *[""] * (2 - len(floors))])
    columns = ["model", "placement", "peak, GiB", "cut, %", "its time, %", "ours at that peak, %"]
    return table([*columns, "ours with rewrites, %"], rows)


def budgets_table(folder: Path) -> str:
    rows = []
    for record in records(folder, "budgets"):
        for rewrites, name in (("none", "no rewrites"), ("auto", "default")):
            for budget, plan in record[rewrites].items():
                cells = ["below the floor", "", "", ""] if plan is None else [
                    percent(plan["peak_bytes"] / record["baseline_bytes"] - 1),
                    percent(plan["extra_flops_ratio"]), percent(total(plan)), ", ".join(plan["rewrites"]) or "–",
                ]  # fmt: skip
                rows.append([record["title"], f"{budget}, {name}", *cells])
    return table(["model", "`memory_budget`", "cut, %", "more FLOPs, %", "more time, %", "rewrites"], rows)


def figures_table(folder: Path) -> str:
    rows = []
    for record in records(folder, "frontier"):
        baseline = record["baseline_bytes"]
        for figure in record["figures"]:
            cells = [record["title"], figure["what"], f"-{figure['cut']} at {figure['flops']:+} FLOPs"]
            for name in ("same_flops", "same_peak"):
                ours = figure[name]
                cells.append("below our floor" if ours is None else _cut_and_cost(ours, baseline))
            rows.append(cells)
    return table(["model", "figure to beat", "it, %", "ours at no more FLOPs, %", "ours at no more memory, %"], rows)


def _cut_and_cost(point: Record, baseline: int) -> str:
    flops, time = percent(point["extra_flops_ratio"]), percent(point["extra_time_ratio"])
    return f"{percent(point['peak_bytes'] / baseline - 1)} at {flops} FLOPs, {time} time"


def knob_table(folder: Path) -> str:
    parts = []
    for record in records(folder, "knob"):
        eager = record["eager"]
        rows = [["eager, nothing recomputed", mib(eager["peak_bytes"]), str(eager["products"]), "0.0", ""]]
        groups = [(entry, f"torch, budget {entry['knob']:g}") for entry in record["knob"]]
        groups += [(entry, "ours") for entry in record["none"]] + [
            (entry, "ours, rewrites") for entry in record["auto"]
        ]
        for entry, name in groups:
            rows.append([name, mib(entry["peak_bytes"]), str(entry["products"]),
                         percent(entry["flops"] / eager["flops"] - 1), between(entry["time_ratio"])])  # fmt: skip
        columns = ["", "measured peak, MiB", "matrix products", "their FLOPs, %", "CPU time against eager, %"]
        parts.append(f"**{record['title']}**\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def sharded_tables(folder: Path) -> str:
    """Return, for each kind of sharding, what was predicted and what each rank took."""
    parts = []
    for record in records(folder, "sharded"):
        rows = []
        for entry in record["runs"]:
            fullest, least = max(entry["rank_bytes"]), min(entry["rank_bytes"])
            predicted = entry["predicted_bytes"]
            ends = [percent(predicted / value - 1, 2) for value in (least, fullest)]
            rows.append(
                [
                    entry["model"],
                    entry["placement"],
                    mib(predicted),
                    *(mib(value) for value in (least, fullest)),
                    *ends,
                ]
            )
        columns = (
            "model",
            "placement",
            "predicted, MiB",
            "emptier rank",
            "fuller rank",
            "error, %",
            "of the fuller, %",
        )
        machine = f"{record['date']}, load average {record['machine']['load_average'][0]}"
        parts.append(f"### {record['kind']}\n\n{table(columns, rows)}\n\n({machine})")
    return "\n\n".join(parts)


def offload_table(folder: Path) -> str:
    """Return the least peaks without and with inputs of recomputed layers on the host."""
    rows = []
    for record in records(folder, "offload"):
        for run in record["runs"]:
            error = percent(run["replayed_bytes"] / run["profiler_bytes"] - 1, 2)
            what = f"{run['stages_on_host']} inputs on the host" if run["offload"] else "on the device"
            figures = ("baseline_bytes", "replayed_bytes", "profiler_bytes")
            host = [mib(run[name]) if run["offload"] else "" for name in ("predicted_host_bytes", "host_bytes")]
            rows.append([record["title"], what, *(mib(run[name]) for name in figures), error, *host])
    names = (
        "model",
        "inputs",
        "as it is, MiB",
        "floor, predicted",
        "measured",
        "error, %",
        "host, predicted",
        "copied",
    )
    return table(list(names), rows)


def estimators_table(folder: Path) -> str:
    """Return measured peaks of steps without recomputation, our predictions, and what estimators say."""
    rows = []
    for record in records(folder, "estimators"):
        for row in record["rows"]:
            said = [f"{row[name] / 2**20:,.0f}" if name in row else "–" for name in ("accelerate", "deepspeed")]
            rows.append([row["setup"], f"{row['measured'] / 2**20:,.0f}", f"{row['ours'] / 2**20:,.0f}", *said])
    names = ("set-up", "measured, MiB", "`hf-trainopt plan`", "`accelerate estimate-memory`", "DeepSpeed's estimators")
    return table(list(names), rows)


def fastest_table(folder: Path) -> str:
    """Return, for each budget, the micro-batch that was chosen and the one that was fastest."""
    rows = [
        [
            record["title"],
            f"{budget['share']:.0%}",
            str(budget["fitting"]),
            str(budget["chosen"]["micro_batch"]),
            str(budget["fastest"]["micro_batch"]),
            between(budget["ratio"]),
            percent(budget["slowest_ratio"] - 1, 0),
        ]
        for record in records(folder, "fastest")
        for budget in record["budgets"]
    ]
    names = ("model", "budget", "that fit", "chosen", "fastest", "chosen against fastest, %", "slowest, %")
    return table(list(names), rows)


def overhead_table(folder: Path) -> str:
    rows = [
        [record["task"], f"{record['stock_seconds']['median']:.4f}", between(record["ratio"]), str(record["rounds"]),
         str(record["machine"]["load_average"][0])]
        for record in records(folder, "overhead")
    ]  # fmt: skip
    return table(["task", "stock, s a step", "unset against stock, % (quartiles)", "rounds", "load at the end"], rows)


def effort_tables(folder: Path) -> str:
    parts = []
    for record in records(folder, "effort"):
        rows = [
            [row["title"], str(row["stages"]), f"{row['first_answer_cpu_s']:.1f}", f"{row['plan_cpu_s']:.1f}",
             str(row["goal_cpu_s"]), str(row["replays"]), percent(row["optimality_gap"] or 0)]
            for row in record["models"]
        ]  # fmt: skip
        columns = ["model", "stages", "first answer, CPU s", "plan, CPU s", "goal", "replays", "gap, %"]
        parts.append(table(columns, rows))
        rows = [
            [str(row["layers"]), f"{row['first_answer_cpu_s']:.1f}", f"{row['plan_cpu_s']:.1f}", str(row["replays"])]
            for row in record["depths"]
        ]
        parts.append(table(["layers", "first answer, CPU s", "plan, CPU s", "replays"], rows))
    return "\n\n".join(parts)


# ---- Plots ---------------------------------------------------------------------------------------------------------


def plot_frontier(record: Record, path: Path) -> None:
    """Draw peak against time: our lines, and the named placements as labelled points."""
    figure, axes = _axes(record["title"])
    baseline = record["baseline_bytes"] / _GIB
    highest = max(100 * total(point) for point in record["named"]) * 1.25
    lowest = min(100 * total(point) for name in ("none", "auto") for point in record.get(name, ()))
    right = 1.03 * baseline
    if "auto" in record:
        _steps(axes, record["auto"], right, _REWRITTEN, "ours, with rewrites")
    _steps(axes, record["none"], right, _OURS, "ours, nothing rewritten")
    _points(axes, record["named"], "named placements", filled=True)
    if "named_rewritten" in record:
        kept = ("all", "sqrt", "every_2", "every_3", "every_4")
        _points(
            axes, [p for p in record["named_rewritten"] if p["policy"] in kept], "the same, rewritten", filled=False
        )
    axes.axvline(baseline, color="0.5", linestyle=":", linewidth=1.5)
    axes.annotate("nothing recomputed", (baseline, highest), xytext=(-5, -6), textcoords="offset points", rotation=90,
                  ha="right", va="top", color="0.35", fontsize=11)  # fmt: skip
    axes.set_xlim(0, right)
    axes.set_ylim(lowest - 0.03 * (highest - lowest), highest)
    axes.set_xlabel("peak memory of a training step (GiB)", fontsize=12)
    axes.set_ylabel("more time than a step that recomputes nothing (%)", fontsize=12)
    _finish(figure, axes, path)


def plot_knob(record: Record, path: Path) -> None:
    """Draw measured peak against the FLOPs of matrix products."""
    figure, axes = _axes(record["title"])
    base = record["eager"]["flops"]
    styles = [
        ("knob", _KNOB, "s", "torch's activation_memory_budget"),
        ("none", _OURS, "o", "ours, nothing rewritten"),
        ("auto", _REWRITTEN, "o", "ours, with rewrites"),
    ]
    for name, color, marker, text in styles:
        places = [(entry["peak_bytes"] / _MIB, 100 * (entry["flops"] / base - 1)) for entry in record[name]]
        axes.plot(*zip(*places, strict=True), marker, color=color, markersize=8, label=text, zorder=3, alpha=0.85)
        if name == "knob":
            for number, (entry, (x, y)) in enumerate(zip(record[name], places, strict=True)):
                # Those that recompute no product stand side by side.
                offset = (-8, -17) if number % 2 and y < 1 else (5, 7)
                axes.annotate(f"{entry['knob']:g}", (x, y), xytext=offset, textcoords="offset points", color=color)
    eager = record["eager"]["peak_bytes"] / _MIB
    axes.axvline(eager, color="0.5", linestyle=":", linewidth=1.5)
    axes.annotate("eager, nothing recomputed", (eager, 0), xycoords=("data", "axes fraction"), xytext=(-5, 60),
                  textcoords="offset points", rotation=90, ha="right", color="0.35", fontsize=11)  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("measured peak of a training step (MiB)", fontsize=12)
    axes.set_ylabel("more FLOPs in matrix products (%)", fontsize=12)
    _finish(figure, axes, path)


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=13, loc="left")
    return figure, axes


def _steps(axes: Any, points: Sequence[Record], right: float, color: str, text: str) -> None:
    places: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point["peak_bytes"], total(point))):
        if not places or 100 * total(point) < places[-1][1]:
            places.append((point["peak_bytes"] / _GIB, 100 * total(point)))
    xs, ys = zip(*places, strict=True)
    # For a budget between two plans, the one with the lower peak is what fits.
    axes.step([*xs, right], [*ys, ys[-1]], where="post", color=color, linewidth=2, label=text, zorder=3)
    axes.plot(xs, ys, "o", color=color, markersize=4.5, zorder=3)


def _points(axes: Any, points: Sequence[Record], text: str, filled: bool) -> None:
    """Draw named placements; those at about the same place, and all every_n beyond 4, share a label or have none."""
    places = [(point["peak_bytes"] / _GIB, 100 * total(point)) for point in points]
    face = _NAMED if filled else "white"
    axes.plot(*zip(*places, strict=True), "D", color=_NAMED, markerfacecolor=face, markersize=7, label=text, zorder=4)
    if not filled:
        return
    widest, highest = (max(values) for values in zip(*places, strict=True))
    groups: list[tuple[tuple[float, float], list[str]]] = []
    for point, (x, y) in zip(points, places, strict=True):
        if point["policy"] not in ("all", "sqrt", "every_2", "every_3", "every_4", "every_6"):
            continue
        near = next(
            (g for g in groups if abs(g[0][0] - x) < 0.05 * widest and abs(g[0][1] - y) < 0.05 * highest), None
        )
        if near is None:
            groups.append(((x, y), [point["policy"]]))
        else:
            near[1].append(point["policy"])
    for place, names in groups:
        axes.annotate(", ".join(names), place, xytext=(8, 6), textcoords="offset points", color=_NAMED, fontsize=11)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.tick_params(labelsize=11)
    axes.grid(True, color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=11, loc="best", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# ---- The page ------------------------------------------------------------------------------------------------------


def write_report(results: Path, output: Path) -> None:
    """Fill the template `placement.template.md` with the tables, and draw the plots."""
    text = (HERE / "placement.template.md").read_text()
    count = 0
    for kind, draw in (("frontier", plot_frontier), ("knob", plot_knob)):
        pictures = []
        for record in records(results, kind):
            path = output / "figures" / f"placement-{record['case']}.png"
            draw(record, path)
            pictures.append(f"![{record['title']}](figures/{path.name})")
        text = text.replace(f"@@{kind} pictures@@", "\n\n".join(pictures))
        count += len(pictures)
    tables = {
        "predict summary": predict_summary, "predict": predict_tables, "flops": flops_table, "time": time_tables,
        "frontier": frontier_table, "budgets": budgets_table, "figures": figures_table,
        "knob": knob_table, "overhead": overhead_table, "effort": effort_tables, "sharded": sharded_tables,
        "offload": offload_table, "estimators": estimators_table, "fastest": fastest_table,
    }  # fmt: skip
    for name, make in tables.items():
        text = text.replace(f"@@{name}@@", make(results))
    output.mkdir(parents=True, exist_ok=True)
    (output / "placement.md").write_text(text)
    print(f"wrote {output / 'placement.md'} and {count} plots")
