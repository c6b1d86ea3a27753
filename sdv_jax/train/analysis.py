"""What `gradients.jsonl` of one or several runs says: cosine and norms of the two tasks' gradients over the steps.

Of one run also the cosine per group of layers, and where there is a `validation.jsonl` the held-out losses.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sdv_jax.data.files import replacing
from sdv_jax.errors import UserError
from sdv_jax.train.monitors import GRADIENTS, VALIDATION

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
_COLUMNS = 3  # panels in a line
_PANEL = (3.6, 2.5)  # inches
_TASKS = ("identity", "motion")


class Run(NamedTuple):
    """The records of one run, by step; runs of one name (seeds) share a colour."""

    name: str
    gradients: list[dict]
    validation: list[dict]


def read(workdir: str | Path, *, name: str = "") -> Run:
    """The run in `workdir`. A half-written last line, which a killed run leaves, is not a record yet.

    Raises UserError where there is no gradients.jsonl, no record in it, or a line that is none.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"analyse: {workdir} is not a folder; give the workdir of a training run")
    path = workdir / GRADIENTS
    if not path.is_file():
        raise UserError(f"analyse: {workdir} has no {GRADIENTS}; train with --config.gradients.every=50 and "
                        "--config.validation.rows=64")  # fmt: skip
    records = _records(path, _check_gradients)
    if not records:
        raise UserError(f"analyse: {path} has no record yet; wait for the run's first comparison")
    for number, record in enumerate(records, start=1):
        if record["groups"].keys() != records[-1]["groups"].keys():
            raise UserError(f"analyse: {path}, line {number} has other 'groups' than the last line; remove one of them")
    validation = workdir / VALIDATION
    return Run(name or workdir.name, records, _records(validation, _check_losses) if validation.is_file() else [])


def read_all(workdirs: Sequence[str | Path]) -> list[Run]:
    """The runs in several workdirs, named by their folders, or by their paths where two folders share a name."""
    folders = [Path(workdir) for workdir in workdirs]
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return [read(folder, name=name if unique else str(folder)) for folder, name in zip(folders, names, strict=True)]


def last_quarter(records: Sequence[dict]) -> Sequence[dict]:
    """The records of the last quarter of a run's steps, at least one."""
    first, last = records[0]["step"], records[-1]["step"]
    return [record for record in records if record["step"] >= last - (last - first) / 4]


def late(records: Sequence[dict], key: str, *, group: str = "") -> float:
    """The median of a number over the last quarter, in all or in one group of layers; NaN where one of them is."""
    values = [(record["groups"][group] if group else record)[key] for record in last_quarter(records)]
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def table(runs: Sequence[Run]) -> str:
    """Per run the first value and the median of the last quarter, and the groups of lowest and highest cosine then."""
    head = ("run", "steps", "cosine", "norm identity", "norm motion", "lowest group", "highest group")
    lines = [head]
    for run in runs:
        records = run.gradients
        numbers = [
            f"{records[0][key]:.{digits}f} -> {late(records, key):.{digits}f}"
            for key, digits in (("cosine", 3), ("norm_identity", 4), ("norm_motion", 4))
        ]
        groups = sorted((late(records, "cosine", group=group), group) for group in records[-1]["groups"])
        extremes = [f"{group} {cosine:.3f}" for cosine, group in (groups[0], groups[-1])]
        lines.append((run.name, f"{records[0]['step']}-{records[-1]['step']}", *numbers, *extremes))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*rows, "first -> median of the last quarter; groups by that median of the cosine"])


def plot(runs: Sequence[Run], out: str | Path, *, maps: Sequence[Run] = (), title: str = "") -> None:
    """A PNG of all runs' curves, and below them a map of the cosine, groups of layers × steps, of each run in `maps`.

    Raises UserError when the place cannot be written. The file appears complete or not at all.
    """
    panels = _curves(runs)
    lines = -(-len(panels) // _COLUMNS)
    heights = [_PANEL[1]] * lines + [1 + 0.2 * len(run.gradients[-1]["groups"]) for run in maps[:1]]
    figure = Figure(figsize=(_COLUMNS * _PANEL[0], sum(heights) + 0.4), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=[sum(heights[:lines]), heights[-1]]) if maps else [figure]
    grid = parts[0].subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    handles, labels = grid[0].get_legend_handles_labels()
    if len(labels) > 1:
        parts[0].legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    if maps:
        shown = parts[1].subplots(1, len(maps), squeeze=False)[0]
        cosines = [group["cosine"] for run in maps for record in run.gradients for group in record["groups"].values()]
        limit = max((abs(cosine) for cosine in cosines if math.isfinite(cosine)), default=1.0)
        for axes, run in zip(shown, maps, strict=True):
            picture = _map(axes, run, limit=limit)
        bar = parts[1].colorbar(picture, ax=list(shown), shrink=0.8)
        bar.set_label("cosine", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=11)
    save(figure, out)


def save(figure: Figure, out: str | Path) -> None:
    """The figure as a PNG, complete or not at all."""
    with replacing(out, what="picture") as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def losses(run: Run, task: str) -> tuple[list, list]:
    """Steps and held-out losses of a task."""
    records = [record for record in run.validation if task in record]
    return [record["step"] for record in records], [record[task]["loss"] for record in records]


def tidy(axes: Axes, title: str, *, x: str = "step") -> None:
    """One look for all panels."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)


def _curves(runs: Sequence[Run]) -> list[Callable[[Axes], None]]:
    def cosine(axes: Axes) -> None:
        _lines(axes, runs, lambda run: _series(run.gradients, "cosine"))
        axes.axhline(0, color="black", linewidth=0.7)
        tidy(axes, "cosine of the two tasks' gradients")

    def norm(task: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _lines(axes, runs, lambda run: _series(run.gradients, f"norm_{task}"))
            logarithmic(axes)
            tidy(axes, f"norm of the {task} gradient")

        return draw

    def loss(task: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            if len(runs) == 1:
                _bins(axes, runs[0], task)
            _lines(axes, runs, lambda run: losses(run, task))
            logarithmic(axes)
            tidy(axes, f"held-out {task} loss" + ", mean in colour" * (len(runs) == 1))

        return draw

    measured = [task for task in _TASKS if any(task in record for run in runs for record in run.validation)]
    return [cosine, *map(norm, _TASKS), *map(loss, measured)]


def _lines(axes: Axes, runs: Sequence[Run], series: Callable[[Run], tuple[list, list]]) -> None:
    """A line per name: of several runs of one name their mean where all have records, and each of them faintly."""
    for number, name in enumerate(dict.fromkeys(run.name for run in runs)):
        colour, found = COLOURS[number % len(COLOURS)], [series(run) for run in runs if run.name == name]
        if len(found) > 1:
            for steps, values in found:
                axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.4)
        tables = [dict(zip(steps, values, strict=True)) for steps, values in found]
        steps = [step for step in tables[0] if all(step in table for table in tables)]
        mean = [statistics.fmean(table[step] for table in tables) for step in steps]
        axes.plot(steps, mean, color=colour, linewidth=1.4, label=name)


def _series(records: Sequence[dict], key: str) -> tuple[list, list]:
    return [record["step"] for record in records], [record[key] for record in records]


def _bins(axes: Axes, run: Run, task: str) -> None:
    """Each bin of noise levels beside the mean: the darker, the noisier.

    Where `validation.bins` was changed in the run, the records of the newest number of bins.
    """
    every = [record for record in run.validation if task in record]
    records = [record for record in every if len(record[task]["bins"]) == len(every[-1][task]["bins"])]
    steps, bins = [record["step"] for record in records], np.array([record[task]["bins"] for record in records]).T
    for number, values in enumerate(bins):
        shade = str(0.85 - 0.6 * number / max(len(bins) - 1, 1))
        axes.plot(steps, values, color=shade, linewidth=0.9, label=f"bin {number}")
    title = f"{len(bins)} bins, from step {steps[0]}" if len(records) < len(every) else None
    axes.legend(fontsize=6, frameon=False, ncols=2, title=title, title_fontsize=6)


def logarithmic(axes: Axes) -> None:
    """A logarithmic scale with plain numbers, closer than powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _map(axes: Axes, run: Run, *, limit: float):
    """The cosine of every group at every step, blocks first, from the input to the output."""
    names = sorted(run.gradients[-1]["groups"], key=_place)
    steps = np.array([record["step"] for record in run.gradients], float)
    cosines = np.array([[record["groups"][name]["cosine"] for record in run.gradients] for name in names])
    edges = [steps[0], *(steps[1:] + steps[:-1]) / 2, max(steps[-1], steps[0] + 1)]
    picture = axes.pcolormesh(edges, np.arange(len(names) + 1), cosines, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.invert_yaxis()
    tidy(axes, f"{run.name}: cosine by group of layers")
    axes.grid(visible=False)
    return picture


def _place(group: str) -> tuple:
    """"block 10" after "block 9", and layers after all blocks."""
    kind, _, number = group.partition(" ")
    return (0, int(number)) if kind == "block" and number.isdigit() else (1, group)


def _records(path: Path, check: Callable[[dict, str], None]) -> list[dict]:
    """The objects on the lines of a file, each as `check(record, where)` wants it."""
    records = []
    for number, line in enumerate(path.read_bytes().rpartition(b"\n")[0].splitlines(), start=1):
        where = f"analyse: {path}, line {number}"
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
            raise UserError(f"{where} is not JSON; remove it, or train again") from error
        check(record, where)
        records.append(record)
    return records


def _check_gradients(record: dict, where: str) -> None:
    _check_keys(record, where, "step", "cosine", "norm_identity", "norm_motion", "groups")
    groups = record["groups"]
    _check_numbers(record, where, "step", "cosine", "norm_identity", "norm_motion")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{where}: 'groups' is {_shown(groups)}, expected groups of layers; it is no such record")
    for name, group in groups.items():
        _check_keys(group, f"{where}, group {name!r}", "cosine")
        _check_numbers(group, f"{where}, group {name!r}", "cosine")


def _check_losses(record: dict, where: str) -> None:
    _check_keys(record, where, "step")
    _check_numbers(record, where, "step")
    for task in record.keys() & set(_TASKS):
        of = f"{where}, {task!r}"
        _check_keys(record[task], of, "loss", "bins")
        _check_numbers(record[task], of, "loss")
        bins = record[task]["bins"]
        if not isinstance(bins, list) or not all(map(_is_number, bins)):
            raise UserError(f"{of}: 'bins' is {_shown(bins)}, expected a list of numbers; remove the line")


def _check_keys(record: dict, where: str, *keys: str) -> None:
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        raise UserError(f"{where} has no {missing[0]!r}; it is no such record")


def _check_numbers(record: dict, where: str, *keys: str) -> None:
    for key in keys:
        if not _is_number(record[key]):
            raise UserError(f"{where}: {key!r} is {_shown(record[key])}, expected a number; remove the line")


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _shown(value: object) -> str:
    return json.dumps(value)[:40]
