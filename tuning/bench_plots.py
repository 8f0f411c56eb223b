"""The figures of `bench` as plots: times against the peers', and rates against the roofline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuning import plots
from tuning.workloads import COPY_BYTES_PER_MS, MATRIX_FLOPS_PER_MS, Workload

HALVES = (("forward", "forward"), ("both", "forward + backward"))
COLOURS = {"tuned": "C0", "fla": "C1", "sdpa": "C2", "helion": "C3"}
NAMES = {"tuned": "retgen", "sdpa": "PyTorch's causal attention"}
MARKS = ("o", "^")
WIDTH = 0.8  # of a group of bars


def check(figures: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError where these are not what `bench --json` writes."""
    rows, workloads = _timed(figures)
    if not rows:
        raise ValueError("no row has any times")
    for row in rows:
        workloads[row["workload"]].passes(backward=True)
        if not all(row[half]["ms"] > 0 for half, _ in HALVES):
            raise ValueError(f"times of {row['workload']}, {row['form']} are not positive")
    _title(figures)


def draw(figures: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Write speedups.png and roofline.png into a folder; `figures` are what `bench --json` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in (("speedups", _speedups), ("roofline", _roofline)):
        figure = plots.figure(11, 4.8)
        plot(figure, *_timed(figures))
        figure.suptitle(_title(figures), fontsize="medium")
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        yield path


def has_times(row: Mapping[str, Any]) -> bool:
    """Whether it tells forward and backward: neither a failure nor a step's."""
    return "failure" not in row and row["both"] is not None


def _timed(figures: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Workload]]:
    rows = [row for row in figures["rows"] if has_times(row)]
    return rows, {name: Workload(**sizes) for name, sizes in figures["workloads"].items()}


def _title(figures: Mapping[str, Any]) -> str:
    software = {name: figures[name] for name in ("torch", "triton")} | figures["peers"]
    return ", ".join([figures["gpu"]["name"], *(f"{name} {found}" for name, found in software.items())])


def best(rows: Sequence[Mapping[str, Any]], half: str, measure: str) -> dict[str, dict[str, float]]:
    """The fewest milliseconds of each variant's forms, by workload and variant; `measure`: ms or gpu_ms."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        ms, variants = row[half].get(measure), found.setdefault(row["workload"], {})
        if ms is not None:
            variants[row["variant"]] = min(ms, variants.get(row["variant"], ms))
    return found


def _speedups(figure: Any, rows: Sequence[Mapping[str, Any]], workloads: Mapping[str, Workload]) -> None:
    """How many times as long as retgen's best form each peer's takes: a group of bars for each workload."""
    peers = [peer for peer in COLOURS if peer != "tuned" and any(row["variant"] == peer for row in rows)]
    for axes, (half, title) in zip(figure.subplots(1, 2, sharey=True), HALVES, strict=True):
        times = best(rows, half, "ms")
        names = [name for name in workloads if "tuned" in times.get(name, {})]
        for number, peer in enumerate(peers):
            there = [
                (i, times[name][peer] / times[name]["tuned"]) for i, name in enumerate(names) if peer in times[name]
            ]
            places = [i + WIDTH * ((number + 0.5) / len(peers) - 0.5) for i, _ in there]
            ratios = [ratio for _, ratio in there]
            above = [ratio - 1 for ratio in ratios]
            bars = axes.bar(places, above, WIDTH / len(peers), 1, color=COLOURS[peer], label=NAMES.get(peer, peer))
            axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], fontsize="small")
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log")
        axes.set_yticks(ticks := [1, 2, 5, 10, 20, 50], list(map(str, ticks)))
        axes.minorticks_off()
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_title(title)
        plots.strip(axes)
    figure.axes[0].set_ylabel("time of the other, retgen = 1")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(peers) or 1)


def _roofline(figure: Any, rows: Sequence[Mapping[str, Any]], workloads: Mapping[str, Workload]) -> None:
    """What rate of arithmetic each workload's best form reaches on the GPU, and what an H100 allows.

    The work is that which no algorithm can do without: the bytes of inputs and outputs, the FLOPs of small chunks.
    """
    variants = [variant for variant in COLOURS if any(row["variant"] == variant for row in rows) and variant != "sdpa"]
    ridge = MATRIX_FLOPS_PER_MS / COPY_BYTES_PER_MS
    reach = [ridge / 8, ridge * 2]
    for axes, (half, title) in zip(figure.subplots(1, 2, sharey=True), HALVES, strict=True):
        axes.plot(
            [reach[0], ridge, reach[1]],
            [reach[0] * COPY_BYTES_PER_MS / 1e9, *[MATRIX_FLOPS_PER_MS / 1e9] * 2],
            color="black",
            label="an H100's measured copy, 3.0 TB/s, and matrix product, 745 TFLOP/s",
        )
        times = best(rows, half, "gpu_ms")
        for variant in variants:
            points = []
            for name, workload in workloads.items():
                moved, flops = map(sum, zip(*workload.passes(backward=half == "both"), strict=True))
                if ms := times.get(name, {}).get(variant):
                    points.append((flops / moved, flops / ms / 1e9, name))
            axes.scatter(
                [x for x, _, _ in points],
                [y for _, y, _ in points],
                color=COLOURS[variant],
                marker=MARKS[half == "both"],
                label=NAMES.get(variant, variant),
            )
            if variant == "tuned":
                _name(axes, points)
        axes.set(xscale="log", yscale="log", title=title, xlabel="FLOPs a byte that must be moved")
        axes.set_xticks(ticks := [32, 64, 128, 256, 512], list(map(str, ticks)))
        low, high = axes.get_ylim()
        axes.set_yticks(ticks := [10**e * step for e in range(-2, 5) for step in (1, 2, 5)], [f"{x:g}" for x in ticks])
        axes.set_ylim(0.8 * low, high)  # room for a name below the lowest
        axes.minorticks_off()
        plots.strip(axes)
    figure.axes[0].set_ylabel("TFLOP/s")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(variants))


def _name(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points, where they do not meet: right and left in turn in a column, else on three sides."""
    alone = itertools.cycle([("center", (0, -14)), ("center", (0, 7)), ("left", (6, -3))])
    for x in sorted({x for x, _, _ in points}):
        column = sorted((point for point in points if point[0] == x), reverse=True)
        places = alone if len(column) == 1 else itertools.cycle([("left", (6, -3)), ("right", (-6, -3))])
        for (_, y, name), (side, offset) in zip(column, places, strict=False):
            axes.annotate(name, (x, y), offset, textcoords="offset points", ha=side, fontsize="small")
