"""Scores of generated clips against the truth: identity by search, the rest by a tracker that knows no subject.

identity_error      mean over frames of the best match's mean squared colour difference, colours in [0, 1]
motion, background  whether what is seen is what the caption asked for
whole               one blob of a subject's size in every frame
change              how much frame 0's foreground differs from its best match in later frames: does it stay one subject
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from sdv_jax.errors import UserError
from sdv_jax.small_world.search import find_patch, find_subject
from sdv_jax.small_world.tracking import Sighting, sight
from sdv_jax.small_world.world import Scene, Subject, World

_OVERSHOOT = 0.1  # how far a decoder that is not clipped may leave [0, 1]
STEADY = 0.015  # largest `change` of a clip that keeps its subject; see docs/small_world.md for the calibration


@dataclasses.dataclass(frozen=True)
class Scores:
    """One entry per clip; `change` is infinite where frame 0 shows no blob."""

    identity_error: Float[np.ndarray, "n"]
    motion_correct: Bool[np.ndarray, "n"]
    background_correct: Bool[np.ndarray, "n"]
    whole: Bool[np.ndarray, "n"]
    change: Float[np.ndarray, "n"]
    track: Float[np.ndarray, "n t 2"]  # of the best match of the true subject
    seen: list[Sighting]

    @property
    def clean(self) -> Bool[np.ndarray, "n"]:
        """One whole subject that stays the same through the clip."""
        return self.whole & (self.change <= STEADY)


def score_clips(
    world: World, video: Float[np.ndarray, "n t h w 3"], scenes: Sequence[Scene], *,
    subjects: Sequence[Subject] | None = None,
) -> Scores:
    """Scores clips with colours in [0, 1] against the scenes they should show; `subjects` replaces the scenes' own.

    The start, speed and scale of a scene play no part: a caption does not say them.
    """
    video = np.asarray(video)
    subjects = [scene.subject for scene in scenes] if subjects is None else subjects
    _check(world, video, scenes, subjects)
    seen = [sight(world, clip) for clip in video]
    found = [
        find_subject(world, clip, subject, one.ground_colour)
        for clip, subject, one in zip(video, subjects, seen, strict=True)
    ]
    return Scores(
        identity_error=np.array([match.error.mean() for match in found]),
        motion_correct=np.array([one.motion == s.motion for one, s in zip(seen, scenes, strict=True)]),
        background_correct=np.array([one.background == s.background for one, s in zip(seen, scenes, strict=True)]),
        whole=np.array([one.whole for one in seen]),
        change=np.array([_change(clip, one) for clip, one in zip(video, seen, strict=True)]),
        track=np.array([match.centre for match in found]),
        seen=seen,
    )


def identity_errors(
    world: World, video: Float[np.ndarray, "n t h w 3"], subjects: Sequence[Sequence[Subject]]
) -> Float[np.ndarray, "n candidates"]:
    """The identity error of every clip against several candidates; its argmin names the subject a clip shows."""
    video = np.asarray(video)
    colours = [sight(world, clip).ground_colour for clip in video]
    return np.array([
        [find_subject(world, clip, who, colour).error.mean() for who in candidates]
        for clip, candidates, colour in zip(video, subjects, colours, strict=True)
    ])


def gap_closed(base: float, adapted: float, truth: float) -> float:
    """The share of the way from the base's error to the truth's that adapting went; 1 is the truth, 0 the base."""
    return (base - adapted) / (base - truth)


def summary(scores: Scores) -> dict[str, float]:
    """Means over the clips; `identity_stderr` is the standard error of `identity_error`."""
    n = len(scores.identity_error)
    finite = scores.change[np.isfinite(scores.change)]
    return {
        "clips": n,
        "identity_error": float(scores.identity_error.mean()),
        "identity_stderr": float(scores.identity_error.std() / np.sqrt(n)),
        "motion": float(scores.motion_correct.mean()),
        "background": float(scores.background_correct.mean()),
        "whole": float(scores.whole.mean()),
        "clean": float(scores.clean.mean()),
        "change": float(np.median(finite)) if len(finite) else float("inf"),
    }


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Summaries as a Markdown table, one row per name."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, row in rows.items():
        cells = (f"{row[key]:.4g}" if key in row else "" for key in keys)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(
    world: World, scenes: Sequence[Scene], *,
    base: Float[np.ndarray, "n t h w 3"], adapted: Float[np.ndarray, "n t h w 3"],
    wrong: Float[np.ndarray, "n t h w 3"], truth: Float[np.ndarray, "n t h w 3"],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The comparison a demo prints: rows for `table`, and the verdicts.

    `base` is sampled without reference, `adapted` with the right one; `truth` is the rendered clips through the VAE;
    `wrong` is `adapted` given, for clip i, the reference picture of scene i + 1 (the last takes the first's).
    """
    given = [scene.subject for scene in [*scenes[1:], scenes[0]]]
    scored = {
        "base": score_clips(world, base, scenes),
        "adapted": score_clips(world, adapted, scenes),
        "wrong reference": score_clips(world, wrong, scenes),
        "wrong reference, its own subject": score_clips(world, wrong, scenes, subjects=given),
        "truth": score_clips(world, truth, scenes),
    }
    rows = {name: summary(scores) for name, scores in scored.items()}
    error = {name: row["identity_error"] for name, row in rows.items()}
    follows = scored["wrong reference, its own subject"].identity_error < scored["wrong reference"].identity_error
    verdicts = {
        "identity_gap_closed": gap_closed(error["base"], error["adapted"], error["truth"]),
        "wrong_reference_gap_closed": gap_closed(error["base"], error["wrong reference"], error["truth"]),
        "wrong_reference_shows_its_own_subject": float(follows.mean()),
        "motion_kept": rows["adapted"]["motion"] / max(rows["base"]["motion"], 1e-9),
        "clean_kept": rows["adapted"]["clean"] / max(rows["base"]["clean"], 1e-9),
    }
    return rows, verdicts


def _change(clip: Float[np.ndarray, "t h w 3"], seen: Sighting) -> float:
    """Mean over later frames of the best match of frame 0's foreground; a picture has no later frame and no change."""
    if len(clip) == 1:
        return 0.0
    if np.isnan(seen.track[0]).any():
        return float("inf")
    return float(find_patch(clip[1:], clip[0], seen.blob[0], tuple(seen.track[0])).error.mean())


def _check(world: World, video: np.ndarray, scenes: Sequence[Scene], subjects: Sequence[Subject]) -> None:
    size = world.config.size
    if video.ndim != 5 or video.shape[2:] != (size, size, 3):
        expected = f"[n, t, {size}, {size}, 3]"
        raise UserError(f"small world: score_clips expects video {expected}, found {list(video.shape)}; reshape it")
    if not len(video) == len(scenes) == len(subjects):
        found = f"{len(video)} clips, {len(scenes)} scenes and {len(subjects)} subjects"
        raise UserError(f"small world: score_clips got {found}; give one of each per clip")
    if len(video) == 0:
        raise UserError("small world: score_clips got no clip; give at least one")
    if not np.issubdtype(video.dtype, np.floating):
        raise UserError(f"small world: score_clips expects floats in [0, 1], found {video.dtype}; divide by 255")
    low, high = video.min(), video.max()
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):  # false for NaN too
        raise UserError(f"small world: score_clips expects colours in [0, 1], found {low:.3g} to {high:.3g}")
