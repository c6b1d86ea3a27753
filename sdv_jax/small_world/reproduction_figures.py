"""The pictures of the reproduction's page; each shows the runs that are in, and says which are not."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdv_jax.small_world.reproduction import ROWS
from sdv_jax.small_world.reproduction_measures import MEASURES, Estimate, Family
from sdv_jax.train import analysis

MAIN = tuple(row for row in ROWS if not row.startswith(("p-", "rank-")))  # another recipe, not another number in it
TITLES = {"cogvideox": "CogVideoX", "wan": "Wan"}
# The held-out motion loss is that of a run's own motion task: rows that change the task cannot be compared by it.
SAME_MOTION = tuple(row for row in MAIN if not any(key.startswith("motion.") for key in ROWS[row].settings))
FOREST = ("identity", "owed", "moves", "prompt", "clean", "nearer")
SHARES = ("moves", "prompt", "clean")  # of them: shares of clips, drawn from 0 to 100
MAPPED = ("full", "image-only")
SHOWN = (1, 7, 13, 19)  # trials of the sheet: every moving motion once, over four backgrounds
_CELL, _GAP, _BLOCK_GAP, _LABEL, _HEAD = 96, 3, 18, 190, 30  # pixels of a sheet


def colour(row: str) -> str:
    """One colour per main row; the rest is grey."""
    return analysis.COLOURS[MAIN.index(row)] if row in MAIN else "#9a9a9a"


def dynamics(families: Mapping[str, Family], out: Path) -> None:
    """Per family: identity against movement, one point per run; the held-out losses over the steps."""
    figure = Figure(figsize=(11.5, 3.4 * len(families)), layout="constrained")
    grid = figure.subplots(len(families), 3, squeeze=False)
    for (name, family), (plane, *curves) in zip(families.items(), grid, strict=True):
        _plane(plane, family, TITLES[name])
        for axes, task, rows in zip(curves, ("identity", "motion"), (MAIN, SAME_MOTION), strict=True):
            for row in rows:
                for record in family.records.get(row, ()):
                    run = analysis.Run(row, [], record["validation"])
                    axes.plot(*analysis.losses(run, task), color=colour(row), linewidth=1.2)
            analysis.logarithmic(axes)
            analysis.tidy(axes, f"{TITLES[name]}: held-out {task} loss")
    told = grid[0][0].get_legend_handles_labels()
    figure.legend(*told, loc="outside lower center", ncols=len(told[0]), fontsize=8, frameon=False)
    analysis.save(figure, out)


def _plane(axes: Axes, family: Family, title: str) -> None:
    for name, marker in (("base", "s"), ("truth", "*")):
        identity, moves = (family.estimate(name, measure) for measure in ("identity", "moves"))
        axes.plot(moves.value, identity.value, marker, color="black", markersize=7, label=name)
    for row in MAIN:
        identity, moves = (family.estimate(row, measure) for measure in ("identity", "moves"))
        points = ((), ()) if identity is None else (moves.seeds, identity.seeds)
        axes.plot(*points, "o", color=colour(row), markersize=6, alpha=0.8, label=row)
    axes.set_xlim(-5, 105)
    axes.set_ylabel("identity gap closed, %", fontsize=8)
    analysis.tidy(axes, f"{title}: identity against movement", x="moves, % of clips asked to")


def ablations(families: Mapping[str, Family], out: Path) -> None:
    """All rows by six measures: mean and standard error, and every seed."""
    rows = ("base", *ROWS)
    figure = Figure(figsize=(13, 3.7 * len(families)), layout="constrained")
    grid = figure.subplots(len(families), len(FOREST), squeeze=False, sharey=True)
    for (name, family), line in zip(families.items(), grid, strict=True):
        for axes, measure in zip(line, FOREST, strict=True):
            full = family.estimate("full", measure)
            if full is not None:
                axes.axvline(full.value, color=colour("full"), linewidth=0.8, linestyle="--")
            for height, row in enumerate(rows):
                _mark(axes, height, family.estimate(row, measure), "black" if row == "base" else colour(row))
            if measure in SHARES:
                axes.set_xlim(-4, 104)
            else:
                axes.axvline(0, color="black", linewidth=0.7)
            analysis.tidy(axes, MEASURES[measure].title, x="%")
        line[0].set_yticks(range(len(rows)), rows)
        line[0].set_ylim(len(rows) - 0.5, -0.5)
        line[0].set_ylabel(TITLES[name], fontsize=11)
    analysis.save(figure, out)


def _mark(axes: Axes, height: int, estimate: Estimate | None, shade: str) -> None:
    if estimate is None:
        return
    axes.errorbar(estimate.value, height, xerr=estimate.error, fmt="o", color=shade, markersize=5, capsize=2)
    if len(estimate.seeds) > 1:
        axes.plot(estimate.seeds, np.full(len(estimate.seeds), height + 0.25), "|", color=shade, markersize=5)


def gradients(family: Family, name: str, out: Path) -> None:
    """The main rows' cosines and norms over the steps, and maps per group of layers for `MAPPED`."""
    runs = [
        analysis.Run(row, record["gradients"], [])
        for row in MAIN for record in family.records.get(row, ())
    ]  # fmt: skip
    maps = [next(run for run in runs if run.name == row) for row in MAPPED if row in family.records]
    analysis.plot(runs, out, maps=maps, title=f"{TITLES[name]}: gradients of the two tasks on held-out rows")


def sheet(family: Family, name: str, clips: Path, out: Path) -> bool:
    """Reference, true clip and the main rows' clips (seed 0) of four trials; False where no run's clips are there."""
    found = {row: clips / name / f"{row}-0" / "clips.npz" for row in MAIN}
    found = {row: path for row, path in found.items() if path.is_file()}
    if not found:
        return False
    videos: dict[str, UInt8[np.ndarray, "n t h w 3"] | None] = {"true clip": family.trial.video}
    for row in MAIN:
        videos[row] = None
        if row in found:
            with np.load(found[row], allow_pickle=False) as file:
                videos[row] = file["adapted"]
    block = 3 * (_CELL + _GAP) + _BLOCK_GAP
    width = _LABEL + len(SHOWN) * block
    height = _HEAD + (1 + len(videos)) * (_CELL + _GAP) + _GAP
    canvas = np.full((height, width, 3), 255, np.uint8)
    figure = Figure(figsize=(width / 160, height / 160))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for column, trial in enumerate(SHOWN):
        left = _LABEL + column * block
        said = family.trial.captions[trial].replace("<cls> ", "")
        axes.text(left, _HEAD / 2, f"“{said}”", fontsize=5.2, va="center")
        _place(canvas, family.trial.reference[trial], _HEAD, left)
        for line, video in enumerate(videos.values(), start=1):
            top = _HEAD + line * (_CELL + _GAP)
            if video is None:
                axes.text(left, top + _CELL / 2, "not in yet", fontsize=5.5, va="center", color="grey")
                continue
            for number, frame in enumerate((0, video.shape[1] // 2, video.shape[1] - 1)):
                _place(canvas, video[trial, frame], top, left + number * (_CELL + _GAP))
    for line, title in enumerate(("reference", *videos)):
        axes.text(_LABEL - 8, _HEAD + line * (_CELL + _GAP) + _CELL / 2, title, fontsize=6.5, va="center", ha="right")
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    analysis.save(figure, out)
    return True


def _place(canvas: UInt8[np.ndarray, "h w 3"], picture: UInt8[np.ndarray, "i j 3"], top: int, left: int) -> None:
    factor = _CELL // len(picture)
    canvas[top : top + _CELL, left : left + _CELL] = picture.repeat(factor, axis=0).repeat(factor, axis=1)
