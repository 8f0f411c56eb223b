"""From winners to a configuration file: intervals around what was measured, merged with what the file already has."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import itertools
import math
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from generated.configuration import ActiveRule, kernel_problem, kernel_registry, rule_problem
from generated.configuration_file import ConfigurationError, File, Rule, parse_file
from tuning import space
from tuning.compilation import Resources
from tuning.coverage import AXES, WIDTHS, Box, Point, Region, box, regions
from tuning.problems import (
    FORM_KERNEL,
    GRADIENTS,
    GRADIENTS_FORM_KERNEL,
    HOPPER,
    HOPPER_KERNEL,
    Problem,
    problem_at,
    same_launch,
)
from tuning.space import knob_values
from tuning.timing import Timing
from tuning.winners import HELD, NOISE, SHARED, Winner

NEEDS = ("registers", "spills", "shared")  # what a rule tells of the compiled kernel
# A form is not given up for what its configuration may lose because it was in use, and is shared.
FORM_HELD = HELD + SHARED


@dataclass(frozen=True)
class Entry:
    """A rule to be, or a point of one: where it was measured, what to use, and with what proof."""

    kernel: str
    point: Point
    use: dict[str, Any]
    proof: str
    figures: dict[str, Any]


def point_of(problem: Problem) -> Point:
    """The point of a problem on the axes of rules."""
    return Point(problem.dtype, problem.K, problem.V, problem.B * problem.H, problem.T)


def entry_of(winner: Winner) -> Entry:
    """A winner as a rule to be."""
    figures: dict[str, Any] = {"ms": _rounded(winner.ms)}
    if winner.default_ms is not None:
        figures["default_ms"] = _rounded(winner.default_ms)
    if winner.best_ms is not None:
        figures["best_ms"] = _rounded(winner.best_ms)
    if not winner.modelled:
        # A default that does not launch or is wrong has no time: the winner's own stands for it.
        figures.setdefault("default_ms", figures["ms"])
        figures["error"] = float(f"{winner.error or 0.0:.2g}")
    figures |= {name: getattr(winner.needs, name) for name in NEEDS} | {"trials": winner.trials}
    point = point_of(winner.problem)
    figures |= {"B": winner.problem.B, "point": point_text(point)}
    proof = "modelled" if winner.modelled else "measured"
    return Entry(winner.problem.kernel, point, knob_values(winner.config), proof, figures)


def form_entries(winners: Iterable[Winner], known: Iterable[Entry] = ()) -> list[Entry]:
    """Which form sweeps fastest at each point, where at least two were tuned, and which way gives the gradients.

    What `known` rules say stays unless it is beaten beyond the noise, where there are none the default: the form chunk,
    and for gradients three sweeps by the chosen form, or by HOPPER where it has a rule. A model does not choose: it is
    good enough to rank the tiles of one form, not to hold one form against another. A form that was not tuned now takes
    part with what its own rule says of just that shape. Forms that come to one launch are as fast as each other.
    """
    winners, known = list(winners), list(known)
    tuned = {winner.problem for winner in winners}
    launched = {same_launch(winner.problem, winner.config) for winner in winners}
    recalled = [_winner_of(entry) for entry in known if "form" not in entry.use and entry.kernel != HOPPER_KERNEL]
    rest = [w for w in recalled if w.problem not in tuned and same_launch(w.problem, w.config) not in launched]
    rules = {(entry.kernel, entry.point): entry for entry in known if "form" in entry.use}
    held = {place: str(entry.use["form"]) for place, entry in rules.items()}
    shapes: dict[Problem, dict[str, Winner]] = {}
    gradients: dict[Problem, Winner] = {}
    by_hopper = _hopper_times(winners, known)
    for winner in _as_fast_as_their_launches([winner for winner in (*winners, *rest) if not winner.modelled]):
        shape = replace(winner.problem, form="")
        if winner.problem.form == GRADIENTS:
            gradients[shape] = winner
        elif winner.problem.form in space.SWEEPS.values:
            shapes.setdefault(shape, {})[winner.problem.form] = winner
    entries = []
    swept = [winner.problem for winner in winners if winner.problem.form in space.SWEEPS.values]
    for shape in dict.fromkeys(replace(problem, form="") for problem in swept):
        point, forms = point_of(shape), shapes.get(shape, {})
        if len(forms) > 1 and not _was_faster(rules.get((FORM_KERNEL, point)), forms):
            chosen = _form_entry(FORM_KERNEL, space.SWEEPS, forms, held.get((FORM_KERNEL, point)))
            entries.append(chosen)
            if together := gradients.get(shape):
                sweep = forms[chosen.use["form"]]
                ms = min(sweep.ms, by_hopper.get(point, math.inf))
                apart = replace(sweep, timing=replace(sweep.timing, ms=3 * ms))
                ways = {"sweeps": apart, "fused_chunk": together}
                now = held.get((GRADIENTS_FORM_KERNEL, point))
                entries.append(_form_entry(GRADIENTS_FORM_KERNEL, space.GRADIENTS, ways, now))
    return entries


def _winner_of(entry: Entry) -> Winner:
    """What a rule says, as if it had been found now."""
    figures, point, config = entry.figures, entry.point, config_from(entry)
    B = int(figures.get("B", 1))
    return Winner(
        replace(problem_at(entry.kernel, **asdict(point)), B=B, H=point.BH // B),
        config,
        Timing.recalled(float(figures.get("ms", math.inf)), figures),
        figures.get("default_ms"),
        figures.get("error"),
        Resources(**{name: int(figures.get(name, 0)) for name in NEEDS}, warps=config.num_warps),  # type: ignore[arg-type]
        int(figures.get("trials", 0)),
        modelled=entry.proof == "modelled",
    )


def without_use(winners: Iterable[Winner], known: Iterable[Entry] = ()) -> list[Winner]:
    """Winners of HOPPER that must have no rule: wherever one holds it is used, whatever form is chosen.

    It must be faster, beyond the noise, than all that were tuned at its shape, and than what `known` rules choose. What
    is in use stays until it is as much slower. A model does not choose.
    """
    winners, others, in_use = list(winners), dict[Point, float](), set[Point]()
    for entry in known:
        if entry.kernel == FORM_KERNEL:
            others[entry.point] = float(entry.figures.get("ms", math.inf))
        elif entry.kernel == HOPPER_KERNEL:
            in_use.add(entry.point)
    for winner in winners:
        if winner.problem.form in space.SWEEPS.values and not winner.modelled:
            point = point_of(winner.problem)
            others[point] = min(winner.ms, others.get(point, math.inf))

    def is_used(winner: Winner) -> bool:
        point = point_of(winner.problem)
        limit = 1 + FORM_HELD if point in in_use else 1 - HELD
        return not winner.modelled and point in others and winner.ms < limit * others[point]

    return [winner for winner in winners if winner.problem.form == HOPPER and not is_used(winner)]


def _hopper_times(winners: list[Winner], known: list[Entry]) -> dict[Point, float]:
    """The milliseconds of HOPPER's sweep wherever it has a rule, or will have one."""
    times = {entry.point: float(entry.figures["ms"]) for entry in known if entry.kernel == HOPPER_KERNEL}
    times |= {point_of(one.problem): one.ms for one in winners if one.problem.form == HOPPER and not one.modelled}
    unused = {point_of(winner.problem) for winner in without_use(winners, known)}
    return {point: ms for point, ms in times.items() if point not in unused}


def _as_fast_as_their_launches(winners: list[Winner]) -> list[Winner]:
    """The winners, those that come to one launch with the best time of any of them."""
    launches = [same_launch(winner.problem, winner.config) for winner in winners]
    best: dict[Any, Winner] = {}
    for launch, winner in zip(launches, winners, strict=True):
        if launch not in best or winner.ms < best[launch].ms:
            best[launch] = winner
    return [replace(winner, timing=best[launch].timing) for launch, winner in zip(launches, winners, strict=True)]


def _was_faster(rule: Entry | None, forms: dict[str, Winner]) -> bool:
    """Whether a rule names a form that did not run now, and was faster than all that did."""
    if rule is None or rule.use["form"] in forms:
        return False
    return float(rule.figures.get("ms", math.inf)) * (1 - FORM_HELD) <= min(winner.ms for winner in forms.values())


def _form_entry(kernel: str, choice: space.Choice, ways: dict[str, Winner], held: str | None) -> Entry:
    hold = HELD if held is None else FORM_HELD
    form = choice.choose({way: winner.ms for way, winner in ways.items()}, held, hold=hold, noise=NOISE)
    default = ways.get(choice.values[0], ways[form])
    # best_ms is of another configuration of the same kernel, which is not what is chosen here.
    best = replace(ways[form], default_ms=default.ms, best_ms=None, trials=len(ways))
    return replace(entry_of(best), kernel=kernel, use={choice.name: form})


def existing_entries(path: Path) -> list[Entry]:
    """The rules of a file that may be used with the kernels as they are now; none where there is no file to read."""
    with contextlib.suppress(ConfigurationError):
        return _entries(_stored(path))
    return []


def former_entries(path: Path) -> list[Entry]:
    """The same, and those of the kernels as they were: nothing that may be used, but what is worth trying first."""
    with contextlib.suppress(ConfigurationError):
        if file := _stored(path):
            now = kernel_registry()
            as_now = {k: replace(found, source=now[k].source) for k, found in file.kernels.items() if k in now}
            return _entries(replace(file, kernels=as_now))
    return []


def _entries(file: File | None) -> list[Entry]:
    return [
        Entry(kernel, point, dict(rule.use), rule.proof, dict(figures))
        for kernel, found in (file.kernels.items() if file else ())
        if kernel_problem(kernel, found) is None
        for rule in found.rules
        if rule_problem(kernel, rule, file.device.arch if file else None) is None
        for point, figures in points_of(rule).items()
    ]


def owner(path: Path) -> str | None:
    """The GPU or, in a modelled file, the architecture whose rules a file holds; None where there is none to read."""
    with contextlib.suppress(ConfigurationError):
        return _owner(_stored(path))
    return None


def _owner(file: File | None) -> str | None:
    return (file.device.name or file.device.arch) if file else None


def _stored(path: Path) -> File | None:
    """A file, None where there is none; OSError where it cannot be read, ConfigurationError where it is broken."""
    try:
        path.stat()
        return parse_file(path)
    except FileNotFoundError:
        return None
    except ConfigurationError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def _set_aside(path: Path) -> Path | None:
    """Rename what is broken, so that nothing in it is lost; a link to it stays."""
    path = path.resolve()
    if not path.is_file():
        return None
    return path.rename(path.with_name(f"{path.name}.broken-{dt.datetime.now().astimezone():%Y%m%d-%H%M%S}"))


def merge(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """The new entries, and the old ones at other points.

    A point knows B * H alone. Of new entries of several workloads at one point, that is used whose choice loses least
    against its fastest and, among equals, gains most over its default; then that of the smallest B.
    """
    merged = {(entry.kernel, entry.point): entry for entry in old}
    best_last = sorted(new, key=lambda entry: _worth(entry.figures), reverse=True)
    merged.update({(entry.kernel, entry.point): entry for entry in best_last})
    return sorted(merged.values(), key=lambda entry: (entry.kernel, entry.point.dtype, _position(entry.point)))


def _worth(figures: Mapping[str, Any]) -> tuple[float, float, int]:
    ms = figures.get("ms", 0.0)
    return slowness(figures), ms / (figures.get("default_ms") or ms or 1.0), figures.get("B", 0)


def document(entries: list[Entry], device: dict[str, Any], driver: str | None) -> dict[str, Any]:
    """The configuration file as plain data; of an entry's origin its figures tell what the file's head does not."""
    registry = kernel_registry()
    software = {"triton": version("triton"), "torch": version("torch")} | ({"driver": driver} if driver else {})
    today = dt.datetime.now().astimezone().date()
    entries = [_without(entry, software | {"tuned": str(today)}) for entry in entries]
    kernels = {
        name: {
            "source": registry[name].source,
            "rules": _rules({entry.point: entry for entry in entries if entry.kernel == name}),
        }
        for name in sorted({entry.kernel for entry in entries})
    }
    return {"format": 1, "device": _Flow(device), "software": _Flow(software), "tuned": today, "kernels": kernels}


def _without(entry: Entry, head: Mapping[str, str]) -> Entry:
    own = {name: value for name, value in entry.figures.items() if head.get(name) != value}
    return replace(entry, figures=own)


def _with_origin(file: File | None) -> list[Entry]:
    """A file's entries, whose figures say when and with what each was tuned."""
    origin = {**file.software, "tuned": file.tuned} if file else {}
    return [replace(entry, figures={**origin, **entry.figures}) for entry in _entries(file)]


def _rules(entries: Mapping[Point, Entry]) -> list[dict[str, Any]]:
    """The rules of a kernel: one for neighbours that share a configuration and the kind of its proof."""
    uses = {point: (entry.proof, config_from(entry)) for point, entry in entries.items()}
    found = regions(uses, {point: reach(entry) for point, entry in entries.items() if entry.proof == "modelled"})
    return [_rule(region, [entries[point] for point in region.points]) for region in found]


def reach(entry: Entry) -> Box:
    """How far what a model chose is taken to hold: no farther than the default is the one that it was held against."""
    whole = box(entry.point)
    own = {axis: (getattr(entry.point, axis),) * 2 for axis in AXES}
    for axis, end in itertools.product(AXES, (0, 1)):
        ends = list(own[axis])
        ends[end] = whole[axis][end]
        wider = own | {axis: (ends[0], ends[1])}
        if len(set(_defaults(entry.kernel, entry.point.dtype, wider))) == 1:
            own = wider
    return own


def _defaults(kernel: str, dtype: str, of: Box) -> Iterator[Any]:
    """A kernel's defaults at the corners of a box: of even widths, because odd ones run no rules."""
    ends = [(low + low % 2 if axis in WIDTHS else low, high) for axis, (low, high) in of.items()]
    for corner in itertools.product(*ends):
        yield problem_at(kernel, dtype, **dict(zip(of, corner, strict=True))).default()


def _rule(region: Region, entries: list[Entry]) -> dict[str, Any]:
    worst, *others = sorted(entries, key=lambda entry: slowness(entry.figures), reverse=True)
    rule: dict[str, Any] = {
        "when": _Flow(dtype=worst.point.dtype, **{axis: list(region.box[axis]) for axis in AXES}),
        "use": _Flow(worst.use),
        worst.proof: _Flow(worst.figures),
    }
    return rule | ({"also": [_Flow(entry.figures) for entry in others]} if others else {})


def slowness(figures: Mapping[str, Any]) -> float:
    """A point's time as a multiple of the fastest that was found there; 1 where that is all that is known."""
    ms = figures.get("ms", 0.0)
    return float(ms / best) if (best := figures.get("best_ms", ms)) else 1.0


def update(
    path: Path,
    entries: Iterable[Entry],
    device: dict[str, Any],
    driver: str | None,
    *,
    gone: Collection[tuple[str, Point]] = (),
) -> Path | None:
    """Merge the entries into the file, whoever else does so at the same time; say where a broken one went.

    `gone`: kernels and points of which the file shall have no rule any more.
    """
    with _alone(path.resolve().parent):
        file = aside = None
        try:
            file = _stored(path)
        except ConfigurationError:
            aside = _set_aside(path)
        if _owner(file) not in (None, device.get("name") or device["arch"]):
            raise FileExistsError(errno.EEXIST, "holds another GPU's rules since this run began", str(path))
        stays = [entry for entry in _with_origin(file) if (entry.kernel, entry.point) not in gone]
        write(path, document(merge(stays, entries), device, driver))
    return aside


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Be the only tuner that changes files of a directory; what was changed then outlives a loss of power."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the file whole or not at all, and only if it can be read back."""
    head = "# Written by `python -m tuning run`, which writes it anew: rules of your own belong in another file.\n"
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=180)
    write_whole(path, head + text, readable=parse_file)


def write_whole(path: Path, text: str, readable: Callable[[Path], object] = Path.read_bytes) -> None:
    """Leave the old file or the whole new one, whatever happens, and none that `readable` raises over."""
    path = path.resolve()  # a link stays, and its target is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        readable(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"was not written: {error.strerror or error}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise OSError where `write` would fail, before time is spent on what to write."""
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot be written here: {error.strerror}", str(path)) from error


class _Flow(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


_Dumper.add_representer(
    _Flow, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)


def _position(point: Point) -> tuple[int, ...]:
    return tuple(int(getattr(point, axis)) for axis in AXES)


def point_text(point: Point) -> str:
    """The point as figures name it."""
    return " ".join(f"{axis}={getattr(point, axis)}" for axis in AXES)


def points_of(rule: Rule | ActiveRule) -> dict[Point, Mapping[str, Any]]:
    """Where the tuner measured, with the figures of each point; none in a rule that it did not write."""
    found = {point_in(figures, rule.when.dtype): figures for figures in (rule.figures, *rule.also)}
    return {point: figures for point, figures in found.items() if point is not None}


def point_in(figures: Mapping[str, Any], dtype: str) -> Point | None:
    """The point that the figures are of, if they name one."""
    pattern = " ".join(rf"{axis}=([1-9]\d{{0,17}})" for axis in AXES)
    found = re.fullmatch(pattern, str(figures.get("point")), re.ASCII)
    return Point(dtype, *map(int, found.groups())) if found else None


def _rounded(ms: float) -> float:
    return float(f"{ms:.4g}")


def config_from(entry: Entry) -> Any:
    """The entry's configuration as the kernel's dataclass."""
    return kernel_registry()[entry.kernel].config_type(**entry.use)
