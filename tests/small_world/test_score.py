"""The yardstick itself: truth scores best, wrong things score badly, each measure reacts to its own fault only."""

import numpy as np
import pytest
from scipy import ndimage

from sdv_jax.errors import UserError
from sdv_jax.small_world import (
    World,
    compare,
    gap_closed,
    identity_errors,
    pair_pool,
    score_clips,
    summary,
    table,
    trials,
)
from sdv_jax.small_world.tracking import sight

WORLD = World()
COUNT = 30  # every motion and background meets once
TRIALS = trials(WORLD, 0, COUNT)
TRUE = TRIALS.video.astype(np.float32) / 255


@pytest.fixture(scope="module")
def truth():
    return score_clips(WORLD, TRUE, TRIALS.scenes)


def test_the_truth_is_found_where_it_is(truth):
    assert truth.identity_error.max() < 0.004
    assert truth.motion_correct.all() and truth.background_correct.all() and truth.clean.all()
    tracks = np.stack([scene.track(WORLD.config.frames) for scene in TRIALS.scenes])
    assert np.abs(truth.track - tracks).max() < 0.3
    velocities = np.array([scene.velocity for scene in TRIALS.scenes])
    assert np.abs(np.stack([one.velocity for one in truth.seen]) - velocities).max() < 0.1


def test_other_subjects_score_badly(truth):
    others = [[scene.subject] for scene in TRIALS.scenes[1:] + TRIALS.scenes[:1]]
    errors = identity_errors(WORLD, TRUE[:, ::4], others)
    assert errors.mean() > 0.06
    assert errors.min() > 5 * truth.identity_error.max()


def test_a_soft_truth_is_still_the_truth():
    soft = score_clips(WORLD, ndimage.gaussian_filter(TRUE[::2], (0, 0, 1, 1, 0)), TRIALS.scenes[::2])
    assert soft.identity_error.max() < 0.025
    assert soft.motion_correct.all() and soft.background_correct.all() and soft.clean.all()


def test_the_subject_is_named_among_others():
    candidates = [[TRIALS.scenes[(i + j) % COUNT].subject for j in range(4)] for i in range(6)]
    soft = ndimage.gaussian_filter(TRUE[:6, ::4], (0, 0, 1, 1, 0))
    assert (identity_errors(WORLD, soft, candidates).argmin(axis=1) == 0).all()


@pytest.mark.parametrize("frames", [[8, 7, 6, 5, 4, 3, 2, 1, 0], [4] * 9], ids=["reversed", "stopped"])
def test_a_wrong_motion_is_noticed_and_nothing_else(frames):
    scores = score_clips(WORLD, TRUE[:10, frames], TRIALS.scenes[:10])
    resting = np.array([scene.motion == "resting" for scene in TRIALS.scenes[:10]])
    np.testing.assert_array_equal(scores.motion_correct, resting)
    assert scores.background_correct.all() and scores.clean.all() and scores.identity_error.max() < 0.004


def test_a_wrong_background_is_noticed_and_nothing_else():
    rng = WORLD.rng("heldout", 9)
    other = {"sand": "grass", "grass": "water", "water": "night", "night": "snow", "snow": "brick", "brick": "sand"}
    moved = [
        WORLD.sample_scene(rng, scene.subject, motion=scene.motion, background=other[scene.background])
        for scene in TRIALS.scenes[::3]
    ]
    scores = score_clips(WORLD, WORLD.render(moved) / 255.0, TRIALS.scenes[::3])
    assert not scores.background_correct.any()
    assert scores.motion_correct.all() and scores.clean.all() and scores.identity_error.max() < 0.004


def test_a_subject_that_changes_is_not_clean():
    rng = WORLD.rng("heldout", 8)
    swapped = [
        WORLD.sample_scene(rng, WORLD.sample_subject(rng), motion=scene.motion, background=scene.background)
        for scene in TRIALS.scenes[::3]
    ]
    clips = np.concatenate([TRUE[::3, :5], WORLD.render(swapped)[:, 5:] / 255.0], axis=1)
    scores = score_clips(WORLD, clips, TRIALS.scenes[::3])
    assert scores.whole.all() and not scores.clean.any()


def test_two_subjects_or_none_are_not_whole():
    ground = np.median(TRUE, (1, 2, 3), keepdims=True)
    both = np.where(np.abs(TRUE - ground).max(-1, keepdims=True) > 0.15, TRUE, TRUE[:, :, ::-1, ::-1])
    apart = [i for i, scene in enumerate(TRIALS.scenes) if np.abs(scene.track(9).mean(axis=0) - 16).max() > 8]
    assert len(apart) >= 3
    assert not any(sight(WORLD, both[i]).whole for i in apart)
    blank = score_clips(WORLD, np.full_like(TRUE[:2], 0.5), TRIALS.scenes[:2])
    assert not blank.whole.any() and not blank.clean.any() and not blank.motion_correct.any()
    assert blank.identity_error.min() > 0.03


def test_noise_earns_nothing():
    noise = np.random.default_rng(0).uniform(size=(5, 9, 32, 32, 3))
    scores = score_clips(WORLD, noise, TRIALS.scenes[:5])
    assert not (scores.motion_correct | scores.background_correct | scores.clean).any()
    assert scores.identity_error.min() > 0.05


def test_pictures_are_scored_too():
    pool = pair_pool(WORLD, 0, 6, split="heldout")
    scores = score_clips(WORLD, pool.target[:, None] / 255.0, pool.scenes)
    assert scores.identity_error.max() < 0.004 and scores.clean.all() and scores.motion_correct.all()


def test_the_comparison_of_a_perfect_adapter():
    scenes, clips = TRIALS.scenes[:6], TRUE[:6]
    rng = WORLD.rng("heldout", 7)
    strangers = WORLD.render([
        WORLD.sample_scene(rng, WORLD.sample_subject(rng), motion=s.motion, background=s.background) for s in scenes
    ])
    swapped = WORLD.render([
        WORLD.sample_scene(rng, other.subject, motion=s.motion, background=s.background)
        for s, other in zip(scenes, scenes[1:] + scenes[:1], strict=True)
    ])
    rows, verdicts = compare(
        WORLD, scenes, base=strangers / 255.0, adapted=clips, wrong=swapped / 255.0, truth=clips
    )
    assert verdicts["identity_gap_closed"] == pytest.approx(1)
    assert verdicts["wrong_reference_gap_closed"] < 0.4
    assert verdicts["wrong_reference_shows_its_own_subject"] == 1
    assert verdicts["motion_kept"] == 1
    text = table(rows)
    assert text.count("\n") == len(rows) + 1 and "wrong reference" in text


def test_gap_closed_and_summary(truth):
    assert gap_closed(0.1, 0.1, 0.0) == 0 and gap_closed(0.1, 0.05, 0.0) == pytest.approx(0.5)
    assert summary(truth)["clips"] == COUNT and summary(truth)["motion"] == 1


@pytest.mark.parametrize("video, complaint", [
    (TRUE[:2, :, :16], r"expects video \[n, t, 32, 32, 3\]"),
    (TRUE[:1], "1 clips, 2 scenes and 2 subjects"),
    (TRIALS.video[:2], "divide by 255"),
])
def test_wrong_input_is_refused(video, complaint):
    with pytest.raises(UserError, match=complaint):
        score_clips(WORLD, video, TRIALS.scenes[:2])


@pytest.mark.parametrize(("change", "message"), [
    (lambda video: video * 2 - 1, "colours in \\[0, 1\\], found -"),
    (lambda video: video * 255, "colours in \\[0, 1\\], found"),
    (lambda video: np.where(np.arange(video.size).reshape(video.shape) == 7, np.nan, video), "found nan"),
    (lambda video: video[:0], "no clip"),
])
def test_clips_of_another_range_are_refused(change, message):
    world = World()
    trial = trials(world, 0, 2)
    video = change(trial.video / 255.0)
    with pytest.raises(UserError, match=message):
        score_clips(world, video, trial.scenes[: len(video)])
