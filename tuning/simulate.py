"""`python -m tuning simulate`: replay ways of searching over landscapes, where every answer is known.

Regret is how much slower the best found so far is than the best that there is: best found / best - 1. A landscape with
fewer candidates than there are measurements has no regret once all were tried. Every search starts from the default
alone, each landscape by itself: the incumbents and neighbours that a real run starts from are not there to help.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from generated.configuration import kernel_registry
from tuning import landscape, plots, rules
from tuning.compilation import ARCHS
from tuning.landscape import Landscape
from tuning.run import RunError
from tuning.samplers import INFORMED, Candidates, check_available
from tuning.search import EFFORTS, Effort, Search

DEFAULT_SAMPLERS = (INFORMED, "tpe", "random")
MARKS = (10, 20, 40, 60)  # measurements after which the table tells the regret
LARGE = 120  # candidates: with fewer, half of them fit into 60 measurements
WITHIN = 0.02
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Replay:
    """One search: the times in the order in which they were measured, and how long the sampler thought."""

    landscape: Landscape
    times: list[float | None]
    compiled: int
    stopped: bool
    seconds: float

    def regrets(self, measurements: int) -> list[float]:
        """The regret after each of so many measurements; the last stays where there were fewer."""
        best, found = self.landscape.best_ms, []
        least = float("inf")
        for ms in self.times[:measurements]:
            least = min(least, float("inf") if ms is None else ms)
            found.append(least / best - 1)
        return found + found[-1:] * (measurements - len(found))


def replay(known: Landscape, sampler: str, effort: Effort, seed: int = 0) -> Replay:
    """Search a landscape as the tuner searches, with the file's answers for the compiler's and the GPU's."""
    answers = {candidate.config: candidate for candidate in known.candidates}
    started = time.perf_counter()
    arch, default = ARCHS[known.gpu.arch], known.problem.default()
    kept = [default] if default in answers else []
    search = Search(Candidates(known.problem, answers, arch, kept=kept), effort, name=sampler, seed=seed)
    times: list[float | None] = []
    compiled = 0
    while not search.finished:
        for config in search.ask():
            search.compiled(config, answers[config].needs)
            compiled += 1
        while (config := search.next()) is not None:
            times.append(answers[config].ms)
            search.tell(config, times[-1])
    return Replay(known, times, compiled, search.stopped, time.perf_counter() - started)


def simulate(options: argparse.Namespace, console: Console) -> int:
    """Replay the samplers and the efforts, and print how far from the best each came."""
    samplers, known = list(dict.fromkeys(options.sampler or DEFAULT_SAMPLERS)), _selected(options.landscape)
    for sampler in samplers:
        check_available(sampler)
    for path in (options.plot, options.json):
        if path:
            rules.check_writable(Path(path))
    if options.plot:
        check_plot(Path(options.plot))
    _say_stale(known, console)
    curves, thinking = {}, {}
    for sampler in samplers:
        replays = _replays(known, sampler, options.measurements, options.seeds)
        curves[sampler] = np.array([[r.regrets(options.measurements) for r in seeds] for seeds in replays])
        thinking[sampler] = statistics.mean(r.seconds for seeds in replays for r in seeds)
    console.print(escape(_about(known, options)), soft_wrap=True)
    console.print(_table(known, curves, thinking))
    console.print(_efforts_table(known))
    if options.each:
        console.print(_each_table(known, curves))
    if options.json:
        figures = {name: curve.tolist() for name, curve in curves.items()}
        names = [one.name for one in known]
        text = json.dumps({"landscapes": names, "measurements": options.measurements, "regret": figures}, indent=1)
        rules.write_whole(Path(options.json), f"{text}\n")
    if options.plot:
        plot(Path(options.plot), curves, len(known))
    for path in filter(None, (options.plot, options.json)):
        console.print(escape(f"wrote {path}"), soft_wrap=True)
    return 0


def _replays(known: list[Landscape], sampler: str, measurements: int, seeds: int) -> list[list[Replay]]:
    """Of each landscape a replay a seed; the sampler `informed` leaves nothing to chance, so that one is enough."""
    effort = sampler_effort(measurements)
    seeds = 1 if sampler == INFORMED else seeds
    return [[replay(one, sampler, effort, seed) for seed in range(seeds)] for one in known]


def sampler_effort(measurements: int) -> Effort:
    """Rounds as a quick run has them, as many as are wanted, and no end before."""
    quick = EFFORTS["quick"]
    first = min(quick.first, measurements)
    rounds = -(-(measurements - first) // quick.per_round)
    return replace(quick, first=first, rounds=rounds, gain=0.0)


def check_plot(path: Path) -> None:
    """Say before anything is replayed that there is nothing to draw with, or not in that format."""
    if path.suffix not in PICTURES:
        raise RunError(f"--plot {path}: a picture's name ends in one of {', '.join(PICTURES)}")
    plots.check_available()


def _selected(wanted: Sequence[str]) -> list[Landscape]:
    """The landscapes of files, or of the shipped those whose names (or GPU/names) match; all shipped by default."""
    shipped = landscape.paths()
    paths: list[Path] = []
    for pattern in wanted or ["*"]:
        if Path(pattern).is_file():
            paths.append(Path(pattern))
            continue
        found = [path for name, path in shipped.items() if fnmatch.filter((name, path.stem), pattern)]
        if not found:
            raise RunError(
                f"--landscape {pattern}: neither a file nor a pattern that one of the shipped matches: "
                f"{', '.join(shipped)}"
            )
        paths += found
    return [landscape.read(path) for path in dict.fromkeys(paths)]


def _say_stale(known: list[Landscape], console: Console) -> None:
    stale = [one.name for one in known if one.source != kernel_registry()[one.problem.kernel].source]
    if stale:
        console.print(escape(f"measured with an earlier version of the kernel: {', '.join(stale)}"), soft_wrap=True)


def _about(known: list[Landscape], options: argparse.Namespace) -> str:
    gpus = ", ".join(dict.fromkeys(one.gpu.name for one in known))
    sizes = [len(one.candidates) for one in known]
    return (
        f"{len(known)} landscapes of {min(sizes)} to {max(sizes)} candidates ({gpus}), {options.measurements} "
        f"measurements, {options.seeds} seeds; mean regret in per cent"
    )


def _table(known: list[Landscape], curves: dict[str, Any], thinking: dict[str, float]) -> Table:
    measurements = next(iter(curves.values())).shape[-1]
    marks = [*[mark for mark in MARKS if mark < measurements], measurements]
    large = np.array([len(one.candidates) > LARGE for one in known])
    table = Table(
        "sampler", *(f"after {mark}" for mark in marks), f"over {LARGE} candidates", "to 2 %", "of all", "s a search"
    )
    for name, curve in curves.items():
        cells = [f"{100 * curve[..., mark - 1].mean():.2f}" for mark in marks]
        cells.append(f"{100 * curve[large][..., -1].mean():.2f}" if large.any() else "")
        table.add_row(name, *cells, *_reached(curve <= WITHIN), f"{thinking[name]:.2f}")
    return table


def _reached(within: Any) -> tuple[str, str]:
    """After how many measurements half of the searches are within 2 %, if they ever are; and the share that ends so."""
    ever = within.any(-1)
    first = np.where(ever, within.argmax(-1) + 1.0, np.inf)
    middle = float(np.quantile(first, 0.5, method="lower"))
    return f"{middle:.0f}" if np.isfinite(middle) else "never", f"{ever.mean():.0%}"


def _efforts_table(known: list[Landscape]) -> Table:
    table = Table("effort", "mean regret", "worst", "measured", "compiled", "stopped early")
    for name, effort in EFFORTS.items():
        replays = [replay(one, INFORMED, effort) for one in known]
        regrets = [r.regrets(effort.measurements)[-1] for r in replays]
        measured = statistics.mean(len(r.times) for r in replays)
        table.add_row(
            name,
            f"{statistics.mean(regrets):.2%}",
            f"{max(regrets):.2%}",
            f"{measured:.1f}",
            f"{statistics.mean(r.compiled for r in replays):.1f}",
            f"{sum(r.stopped for r in replays)} of {len(replays)}",
        )
    return table


def _each_table(known: list[Landscape], curves: dict[str, Any]) -> Table:
    """The regret at the end, of each landscape."""
    table = Table("landscape", "candidates", "best ms", *curves)
    for number, one in enumerate(known):
        cells = [f"{100 * curve[number, :, -1].mean():.2f}" for curve in curves.values()]
        table.add_row(one.name, str(len(one.candidates)), f"{one.best_ms:.4g}", *cells)
    return table


def plot(path: Path, curves: dict[str, Any], landscapes: int) -> None:
    """Draw the mean regret of each sampler by measurements, and the middle half of the searches as a band."""
    figure = plots.figure(8, 5)
    axes = figure.subplots()
    for number, (name, curve) in enumerate(curves.items()):
        searches = 100 * curve.reshape(-1, curve.shape[-1])
        steps, colour = np.arange(1, searches.shape[1] + 1), f"C{number}"
        low, high = np.quantile(searches, [0.25, 0.75], axis=0)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, np.median(searches, axis=0), color=colour, linewidth=1, linestyle="--")
        axes.plot(steps, searches.mean(0), color=colour, linewidth=2, label=name)
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="measurements", ylabel="slower than the best, %", xlim=(1, steps[-1]), ylim=(0, None))
    axes.set_yticks([0, 1, 2, 5, 10, 20, 50, 100, 200], ["0", "1", "2", "5", "10", "20", "50", "100", "200"])
    axes.set_title(
        f"Regret over {landscapes} landscapes: mean (solid), median (dashed), middle half (band)", fontsize=10
    )
    plots.strip(axes)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
