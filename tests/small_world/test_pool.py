"""Pools are reproducible, show what their captions say, and survive a file."""

import numpy as np
import pytest

from sdv_jax.errors import UserError
from sdv_jax.small_world import MOTIONS, World, clip_pool, load_pool, pair_pool, parse, save_pool, trials
from sdv_jax.small_world.world import SPLITS

WORLD = World()


def test_clips_say_what_they_show_and_a_smaller_pool_is_the_head_of_a_larger():
    pool, head = clip_pool(WORLD, 3, 12), clip_pool(WORLD, 3, 5)
    assert pool.video.shape == (12, 9, 32, 32, 3) and pool.video.dtype == np.uint8
    np.testing.assert_array_equal(pool.video[:5], head.video)
    for text, scene in zip(pool.captions, pool.scenes, strict=True):
        words = parse(text)
        assert (words.motion, words.background, words.marked) == (scene.motion, scene.background, False)
    assert len({scene.subject for scene in pool.scenes}) == 12


def test_pairs_share_the_subject_and_nothing_else():
    pool = pair_pool(WORLD, 0, 20)
    for text, one, other in zip(pool.captions, pool.reference_scenes, pool.scenes, strict=True):
        assert one.subject == other.subject
        assert one.background != other.background and one.scale != other.scale and one.start != other.start
        words = parse(text)
        assert (words.background, words.motion, words.marked) == (other.background, None, True)
    assert pool.reference.shape == pool.target.shape == (20, 32, 32, 3)


def test_splits_and_kinds_share_no_subject():
    pools = [make(WORLD, 0, 20, split=split) for make in (clip_pool, pair_pool, trials) for split in SPLITS]
    subjects = [scene.subject for pool in pools for scene in pool.scenes]
    assert len(set(subjects)) == len(subjects)


def test_trials_go_round_all_motions():
    pool = trials(WORLD, 0, 30)
    assert all(sum(scene.motion == motion for scene in pool.scenes) == 6 for motion in MOTIONS)
    pairs = zip(pool.reference_scenes, pool.scenes, strict=True)
    assert all(one.background != other.background for one, other in pairs)


@pytest.mark.parametrize("make", [clip_pool, pair_pool, trials])
def test_a_pool_survives_a_file(make, tmp_path):
    pool = make(WORLD, 1, 4)
    save_pool(pool, tmp_path / "folder" / "pool.npz")
    again = load_pool(tmp_path / "folder" / "pool.npz")
    assert type(again) is type(pool)
    for name, value in vars(pool).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    np.testing.assert_array_equal(WORLD.render(again.scenes), WORLD.render(pool.scenes))


def test_a_file_that_is_no_pool_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("text.npz", "other.npz", "missing.npz"):
        with pytest.raises(UserError, match="is not a pool"):
            load_pool(tmp_path / name)
