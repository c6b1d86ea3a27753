"""What the raw scores of `reproduction` are summed up to, and when two rows differ by more than noise.

Every measure is a ratio of sums over the 64 trials, Σ num / Σ den. All rows share trials, noise, base and truth, hence
every denominator, so the difference of two rows is a ratio of the same kind over the paired numerators.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sdv_jax.errors import UserError
from sdv_jax.small_world.pool import Trials, trials
from sdv_jax.small_world.reproduction import ROWS, SAMPLING
from sdv_jax.small_world.world import World

Parts = tuple[np.ndarray, np.ndarray]  # numerators and denominators per clip
NOISE = 2.0  # standard errors that a difference must exceed


@dataclasses.dataclass(frozen=True)
class Clips:
    """The raw scores of one set of 64 clips, and what they are held against."""

    own: Mapping[str, list]  # `reproduction.raw_scores` of the clips
    wrong: Mapping[str, list] | None  # of those with a wrong reference; None where there is no reference at all
    base: Mapping[str, list]
    truth: Mapping[str, list]
    trial: Trials

    def of(self, name: str) -> np.ndarray:
        """A raw score as numbers; what was not seen (no speed) is NaN."""
        return np.array(self.own[name], float)


class Measure(NamedTuple):
    """A column of the table, in percent; `paper` is the paper's metric of the same intent."""

    title: str
    parts: Callable[[Clips], Parts | None]  # None: means nothing for these clips
    paper: str = ""


def _identity(clips: Clips) -> Parts:
    base = np.array(clips.base["identity"])
    return base - clips.of("identity"), base - np.array(clips.truth["identity"])


def _wrong(clips: Clips) -> Parts | None:
    if clips.wrong is None:
        return None
    return _all(np.array(clips.wrong["given"]) < np.array(clips.wrong["identity"]))


def _owed(clips: Clips) -> Parts | None:
    if clips.wrong is None:
        return None
    return np.array(clips.wrong["identity"]) - clips.of("identity"), _identity(clips)[1]


def _moves(clips: Clips) -> Parts:
    asked = np.array([scene.motion != "resting" for scene in clips.trial.scenes])
    return asked & (clips.of("speed") >= World().config.speed / 2), asked  # NaN, no blob to follow, does not move


def _speed(clips: Clips) -> Parts:
    asked = np.array([scene.motion != "resting" for scene in clips.trial.scenes])
    speeds = (np.nan_to_num(np.array(scores["speed"], float)) for scores in (clips.own, clips.base))
    return tuple(asked * speed for speed in speeds)


def _prompt(clips: Clips) -> Parts:
    return _all((clips.of("motion") > 0) & (clips.of("background_correct") > 0))


def _ground(clips: Clips) -> Parts:
    theirs = [scene.background for scene in clips.trial.reference_scenes]
    return _all(np.array([seen == ground for seen, ground in zip(clips.own["background"], theirs, strict=True)]))


def _nearer(clips: Clips) -> Parts:
    base = np.array(clips.base["copied"])
    return base - clips.of("copied"), base


def _all(hits: np.ndarray) -> Parts:
    return hits, np.ones(len(hits))


MEASURES = {
    "identity": Measure("identity gap closed", _identity, "DINO-I"),
    "moves": Measure("moves", _moves, "dynamic degree"),
    "prompt": Measure("prompt followed", _prompt, "CLIP-T"),
    "clean": Measure("clean", lambda clips: _all(clips.of("clean")), "motion smoothness"),
    "owed": Measure("gap closed by the picture", _owed),
    "motion": Measure("motion followed", lambda clips: _all(clips.of("motion"))),
    "speed": Measure("speed, of the base's", _speed),
    "whole": Measure("whole", lambda clips: _all(clips.of("whole"))),
    "wrong": Measure("wrong reference shown", _wrong),
    "ground": Measure("reference's background", _ground),
    "nearer": Measure("frame 0 nearer to picture", _nearer),
}


class Estimate(NamedTuple):
    """A value in percent with its standard error: over seeds, or over clips where there is one seed."""

    value: float
    error: float
    seeds: tuple[float, ...]


class Difference(NamedTuple):
    """Of a row from the full recipe, in points; `error` is over clips (paired) and seeds together."""

    value: float
    error: float

    @property
    def told(self) -> str:
        """lower, higher, or within noise."""
        if abs(self.value) <= NOISE * self.error:
            return "within noise"
        return "higher" if self.value > 0 else "lower"


class Family:
    """The runs of one family that are in, and the estimates over them."""

    def __init__(self, records: Mapping[str, Sequence[dict]]):
        """`records`: row -> the records of its seeds, in order. At least one."""
        self.records = records
        self.trial = trials(World(), SAMPLING.pool_seed, SAMPLING.subjects)

    def estimate(self, row: str, measure: str) -> Estimate | None:
        """A row's, or that of "base" or "truth"; None where no run is in or the measure means nothing."""
        parts = self._parts(row, measure)
        if parts is None:
            return None
        numerators, denominators = parts
        seeds = 100 * numerators.sum(axis=1) / denominators.sum()
        if len(seeds) > 1:
            return Estimate(float(seeds.mean()), float(seeds.std(ddof=1) / np.sqrt(len(seeds))), tuple(seeds.tolist()))
        value, error = _ratio(numerators[0], denominators)
        return Estimate(value, error, (value,))

    def difference(self, row: str, measure: str, *, other: str = "full") -> Difference | None:
        """`row` minus `other`, paired over the clips; None where one of them is not in."""
        mine, theirs = self._parts(row, measure), self._parts(other, measure)
        if mine is None or theirs is None:
            return None
        value, over_clips = _ratio(mine[0].mean(axis=0) - theirs[0].mean(axis=0), mine[1])
        spread = self.seed_spread(measure) or 0.0
        over_seeds = spread * np.sqrt(1 / len(mine[0]) + 1 / len(theirs[0]))
        return Difference(value, float(np.hypot(over_clips, over_seeds)))

    def seed_spread(self, measure: str) -> float | None:
        """The standard deviation between seeds, pooled over all rows that have several; None where none has."""
        found = [self.estimate(row, measure) for row in self.records]
        several = [one.seeds for one in found if one is not None and len(one.seeds) > 1]
        if not several:
            return None
        squares = sum(float(np.square(np.array(seeds) - np.mean(seeds)).sum()) for seeds in several)
        return float(np.sqrt(squares / sum(len(seeds) - 1 for seeds in several)))

    def _parts(self, row: str, measure: str) -> tuple[Float[np.ndarray, "seeds n"], Float[np.ndarray, "n"]] | None:
        if row in ("base", "truth"):
            scores = next(iter(self.records.values()))[0]["scores"]
            found = [MEASURES[measure].parts(Clips(scores[row], None, scores["base"], scores["truth"], self.trial))]
        else:
            found = [MEASURES[measure].parts(self._clips(record["scores"])) for record in self.records.get(row, ())]
        if not found or found[0] is None:
            return None
        return np.array([numerators for numerators, _ in found], float), np.array(found[0][1], float)

    def _clips(self, scores: Mapping[str, dict]) -> Clips:
        return Clips(scores["adapted"], scores["wrong"], scores["base"], scores["truth"], self.trial)


def read(results: Path, family: str) -> dict[str, list[dict]]:
    """Row -> the records of its seeds that are in, rows in their order, seeds too; rows without a run are absent.

    Raises UserError for a file that is not such a record, and where runs of different settings are mixed.
    """
    found: dict[str, list[dict]] = {}
    for row, (settings, seeds) in ROWS.items():
        paths = [results / family / f"{row}-{seed}.json" for seed in range(seeds)]
        records = [_record(path, settings) for path in paths if path.is_file()]
        if records:
            found[row] = records
    _check_alike(found, results / family)
    return found


def common(record: Mapping, row: str) -> dict:
    """The settings of a run that all rows should share."""
    return {key: value for key, value in record["settings"].items() if key not in ROWS[row].settings}


def _record(path: Path, settings: Mapping) -> dict:
    try:
        record = json.loads(path.read_text())
        sizes = {len(scores["identity"]) for scores in record["scores"].values()}
        complete = {"base", "truth", "adapted", "wrong"} <= record["scores"].keys() and sizes == {SAMPLING.subjects}
        own = {key: record["settings"].get(key) for key in settings}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"reproduction: {path} is not a run's record; remove it, and the run is done again") from error
    if not complete:
        raise UserError(f"reproduction: {path} lacks clips, expected {SAMPLING.subjects} of each kind; remove it")
    if own != dict(settings):
        raise UserError(f"reproduction: {path} was trained with {own}, expected {dict(settings)}; remove it")
    return record


def _check_alike(found: Mapping[str, Sequence[dict]], folder: Path) -> None:
    first: tuple[str, dict] | None = None
    for row, records in found.items():
        for record in records:
            name, settings = f"{row}-{record['seed']}.json", common(record, row)
            first = first or (name, settings)
            if settings != first[1]:
                key = next(key for key in sorted({**settings, **first[1]}) if settings.get(key) != first[1].get(key))
                raise UserError(
                    f"reproduction: {folder / name} was trained with {key}={settings.get(key)}, {first[0]} with "
                    f"{first[1].get(key)}; keep runs of one setting in a folder"
                )


def _ratio(numerators: Float[np.ndarray, "n"], denominators: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """Σ num / Σ den in percent, and its standard error over the clips, linearised."""
    total, count = denominators.sum(), len(denominators)
    value = numerators.sum() / total
    residuals = numerators - value * denominators
    return float(100 * value), float(100 * np.sqrt(count / (count - 1) * np.square(residuals).sum()) / total)
