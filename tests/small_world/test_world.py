"""The laws of the small world: what is promised about subjects, scenes, backgrounds and pixels."""

import dataclasses

import numpy as np
import pytest

from sdv_jax.errors import UserError
from sdv_jax.small_world import BACKGROUNDS, MOTIONS, World, WorldConfig
from sdv_jax.small_world.backgrounds import paint_backgrounds

WORLD = World()


def _scenes(count, seed=0, **given):
    rng = WORLD.rng("train", seed)
    return [WORLD.sample_scene(rng, WORLD.sample_subject(rng), **given) for _ in range(count)]


def test_a_seed_decides_everything_and_the_splits_differ():
    first, again = (WORLD.render(_scenes(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert WORLD.sample_subject(WORLD.rng("train", 0)) != WORLD.sample_subject(WORLD.rng("heldout", 0))
    assert WORLD.sample_subject(WORLD.rng("train", 0)) != WORLD.sample_subject(WORLD.rng("train", 1))


def test_subjects_differ_from_backgrounds_and_within_themselves():
    rng = WORLD.rng("train", 1)
    colours = np.array([WORLD.sample_subject(rng).colours for _ in range(300)])
    assert np.linalg.norm(colours[:, 0] - colours[:, 1], axis=-1).min() >= 0.75
    grounds = np.array([law.colour for law in BACKGROUNDS.values()])
    assert np.linalg.norm(colours[:, :, None] - grounds, axis=-1).min() >= 0.3


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_subject_stays_inside_and_moves_as_named(motion):
    for scene in _scenes(40, motion=motion):
        track = scene.track(WORLD.config.frames)
        low, high = WORLD.inside(scene.subject, scene.scale)
        assert (track >= low - 1e-9).all() and (track <= high + 1e-9).all()
        step = track[1] - track[0]
        assert np.linalg.norm(step / WORLD.config.speed - MOTIONS[motion]) <= WORLD.config.speed_spread + 1e-9


def test_nothing_is_cut_off_and_areas_are_those_the_tracker_expects():
    rng = WORLD.rng("train", 2)
    for _ in range(50):
        subject = WORLD.sample_subject(rng)
        scene = WORLD.sample_scene(rng, subject)
        centre = (scene.start[0] + 1, scene.start[1] + 1)  # on a canvas with one more pixel on each side
        colour, alpha = WORLD.render_subject(subject, centres=[centre], scales=[scene.scale], size=34)
        assert np.count_nonzero(alpha) == np.count_nonzero(alpha[0, 1:-1, 1:-1])
        assert 60 <= alpha.sum() <= 200
        assert colour.min() >= 0 and colour.max() <= 1


def test_render_is_the_subject_over_its_background():
    scene = _scenes(1, seed=3)[0]
    video = WORLD.render([scene])[0] / 255.0
    ground = paint_backgrounds([scene.background], np.array([scene.variation]), WORLD.config.size)[0]
    track = scene.track(WORLD.config.frames)
    colour, alpha = WORLD.render_subject(scene.subject, centres=track, scales=np.full(len(track), scene.scale))
    np.testing.assert_allclose(video, ground + alpha[..., None] * (colour - ground), atol=0.5 / 255 + 1e-4)


def test_moving_by_one_pixel_moves_the_picture_by_one_pixel():
    subject = WORLD.sample_subject(WORLD.rng("train", 4))
    here, there = WORLD.render_subject(subject, centres=[(14.6, 15.3), (15.6, 15.3)], scales=[1, 1])[1]
    np.testing.assert_allclose(here[:, :-1], there[:, 1:], atol=1e-4)


def test_backgrounds_keep_their_colour_and_stay_calm():
    rng = np.random.default_rng(0)
    colours = np.array([law.colour for law in BACKGROUNDS.values()])
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1) + np.eye(len(colours))
    assert apart.min() > 0.28
    for name, law in BACKGROUNDS.items():
        pictures = paint_backgrounds([name] * 50, rng.uniform(size=(50, 3)), 32)
        median = np.median(pictures.reshape(50, -1, 3), axis=1)
        assert np.linalg.norm(median - law.colour, axis=-1).max() < 0.1
        assert np.linalg.norm(pictures - median[:, None, None], axis=-1).max() < 0.15
        assert pictures.std(axis=(1, 2)).max(axis=-1).min() > 0.01, f"{name} is flat"


def test_single_frames_are_frame_zero():
    scenes = _scenes(2)
    np.testing.assert_array_equal(WORLD.render(scenes, frames=1)[:, 0], WORLD.render(scenes)[:, 0])


def test_another_size_renders_and_an_impossible_world_is_refused():
    world = World(WorldConfig(size=48, frames=13))
    rng = world.rng("train", 0)
    assert world.render([world.sample_scene(rng, world.sample_subject(rng))]).shape == (1, 13, 48, 48, 3)
    with pytest.raises(UserError, match="make size larger"):
        World(dataclasses.replace(world.config, size=24))
    with pytest.raises(UserError, match="unknown split 'test'"):
        world.rng("test", 0)


@pytest.mark.parametrize("options", [{"motion": "flying"}, {"background": "lava"}, {"motion": "rising", "still": True}])
def test_scenes_that_do_not_exist(options):
    world = World()
    rng = world.rng("train", 0)
    with pytest.raises(UserError, match="flying|lava|rising"):
        world.sample_scene(rng, world.sample_subject(rng), **options)
