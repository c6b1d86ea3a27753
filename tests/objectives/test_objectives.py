"""The objectives with a transformer that only tells what it was given."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.diffusion import FlowSchedule, FlowSchedulerConfig
from sdv_jax.diffusion.schedules import Schedule, SchedulerConfig
from sdv_jax.models.contract import Geometry, LatentScale
from sdv_jax.objectives import denoising, identity, motion, text_to_video

SCHEDULE = Schedule(SchedulerConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0))
GEOMETRY = Geometry(height=48, width=32, num_frames=1, spatial=8, temporal=4, patch=2, channels=4, period=8)
OBJECTIVE = denoising.Objective(schedule=SCHEDULE, latents=LatentScale.factor(0.5), geometry=GEOMETRY)
KEY = jax.random.key(3)
EMPTY = jnp.full((3, 8), 9.0)


class Recorder:
    """Predicts `answer(noisy)` and keeps its calls."""

    def __init__(self, answer=jnp.zeros_like):
        self.calls, self.answer = [], answer
        self.transformer = _Callable(self)

    def encode_text(self, text, dtype):
        return text.astype(dtype)


class _Callable:
    def __init__(self, recorder):
        self.recorder, self.config = recorder, SimpleNamespace(patch_size=2)

    def __call__(self, latents, text, timesteps, **rest):
        self.recorder.calls.append(SimpleNamespace(latents=latents, text=text, timesteps=timesteps, **rest))
        return self.recorder.answer(latents)


def _batch(n=6, frames=1, views=4, logvar=-60.0, seed=0):
    rng = np.random.default_rng(seed)
    moments = rng.normal(size=(n, frames, 6, 4, 4)), rng.normal(size=(n, views, 6, 4, 4))
    mean, reference_mean = (jnp.asarray(moment, jnp.float32) for moment in moments)
    return {
        "mean": mean, "logvar": jnp.full_like(mean, logvar), "reference_mean": reference_mean,
        "reference_logvar": jnp.full_like(reference_mean, logvar),
        "text": jnp.asarray(rng.normal(size=(n, 3, 8)), jnp.float32),
    }  # fmt: skip


def _plain(**changes):
    return dataclasses.replace(OBJECTIVE, **changes)


def test_the_loss_on_v_is_the_published_loss_on_x0():
    latents = _batch(n=32)["mean"]
    model = Recorder(lambda x: 0.3 * x)
    ours = denoising.loss(model, latents, jnp.zeros((32, 3, 8)), KEY, objective=OBJECTIVE)
    call = model.calls[0]
    weight = SCHEDULE.loss_weight(call.timesteps)[:, None, None, None, None]
    x0 = SCHEDULE.predict_x0(0.3 * call.latents, call.latents, call.timesteps)
    np.testing.assert_allclose(ours, jnp.mean(weight * jnp.square(x0 - latents)), rtol=1e-5)


def test_the_noised_latents_are_those_of_the_schedule():
    latents = jnp.ones((512, 1, 2, 2, 4))
    model = Recorder()
    denoising.loss(model, latents, jnp.zeros((512, 3, 8)), KEY, objective=OBJECTIVE)
    call = model.calls[0]
    signal = np.sqrt(SCHEDULE.alphas_cumprod[np.asarray(call.timesteps)])
    noise = (np.asarray(call.latents) - signal[:, None, None, None, None]) / np.sqrt(1 - signal**2)[
        :, None, None, None, None
    ]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_the_law_of_the_timesteps_is_the_configs():
    model = Recorder()
    law = _plain(timesteps="logit_normal", logit_mean=1.0, logit_std=0.5)
    denoising.loss(model, _batch(n=4000)["mean"], jnp.zeros((4000, 3, 8)), KEY, objective=law)
    t = np.asarray(model.calls[0].timesteps)
    logits = np.log((t + 0.5) / (999.5 - t))
    assert abs(np.median(logits) - 1.0) < 0.05 and abs(logits.std() - 0.5) < 0.05


def test_flow_matching():
    """Wan: the target is eps - x0, timesteps are the scheduler's shifted ones unless the config has its own."""
    schedule = FlowSchedule(FlowSchedulerConfig(flow_shift=3.0))
    latents = _batch(n=2000)["mean"]
    for shift, median in ((None, 750), (1.0, 500)):
        model = Recorder(lambda x: 0.3 * x)
        objective = _plain(schedule=schedule, shift=shift, options=(("placement", "there"),))
        found = denoising.loss(model, latents, jnp.zeros((2000, 3, 8)), KEY, objective=objective)
        call = model.calls[0]
        assert call.placement == "there" and abs(np.median(call.timesteps) - median) < 25
        level = np.asarray(call.timesteps)[:, None, None, None, None] / 1000
        noise = (np.asarray(call.latents) - (1 - level) * np.asarray(latents)) / level
        expected = np.mean((0.3 * np.asarray(call.latents) - (noise - np.asarray(latents))) ** 2)
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_latents_are_samples_of_the_posterior_scaled():
    batch = _batch(n=2000, logvar=-2.0)
    drawn = denoising.draw_latents(batch, KEY, OBJECTIVE)
    residual = np.asarray(drawn / 0.5 - batch["mean"])
    assert abs(residual.mean()) < 0.01 and abs(residual.std() - np.exp(-1.0)) < 0.01
    assert not np.array_equal(drawn, denoising.draw_latents(batch, jax.random.key(4), OBJECTIVE))


def test_a_reference_is_one_of_the_views_each_equally_often():
    batch = _batch(n=2000)
    drawn = denoising.draw_references(batch, KEY, OBJECTIVE)
    match = np.isclose(np.asarray(drawn), 0.5 * np.asarray(batch["reference_mean"]), atol=1e-5).all(axis=(2, 3, 4))
    assert drawn.shape == (2000, 1, 6, 4, 4)
    assert (match.sum(axis=1) == 1).all()
    assert (abs(match.mean(axis=0) - 0.25) < 0.04).all()


def test_several_references_are_different_views():
    batch = _batch(n=500)
    drawn = denoising.draw_references(batch, KEY, OBJECTIVE, 3)
    views = 0.5 * np.asarray(batch["reference_mean"])
    match = np.isclose(np.asarray(drawn)[:, :, None], views[:, None], atol=1e-5).all(axis=(3, 4, 5))
    assert drawn.shape == (500, 3, 6, 4, 4) and (match.sum(axis=2) == 1).all() and match.sum(axis=1).max() == 1
    assert len(np.unique(match.argmax(axis=2), axis=0)) == 4 * 3 * 2, "their order is drawn too"


def test_several_references_reach_the_model_and_share_its_token_drop():
    batch, given = _batch(n=64, frames=3), Recorder()
    identity.loss(given, batch, EMPTY, KEY, objective=OBJECTIVE, view_dropped=False, references=2)
    assert given.calls[0].reference.shape == (64, 2, 6, 4, 4)
    motion.loss(given, batch, EMPTY, KEY, objective=OBJECTIVE, token_drop=0.5, references=3)
    index = np.asarray(given.calls[1].reference_index)  # of 3 references of 6 tokens
    assert index.shape == (64, 9) and index.max() == 17


def test_text_dropout_gives_the_empty_prompt():
    batch = _batch(n=2000)
    text = np.asarray(denoising.draw_text(batch, EMPTY, KEY, _plain(text_dropout=0.1)))
    empty = (text == 9.0).all(axis=(1, 2))
    assert abs(empty.mean() - 0.1) < 0.03
    np.testing.assert_array_equal(text[~empty], np.asarray(batch["text"])[~empty])


def test_identity_gives_one_whole_clean_reference():
    batch, model = _batch(), Recorder()
    identity.loss(model, batch, EMPTY, KEY, objective=OBJECTIVE, view_dropped=False)
    call = model.calls[0]
    assert call.latents.shape == (6, 1, 6, 4, 4) and call.reference_index is None
    views = 0.5 * np.asarray(batch["reference_mean"])
    assert np.isclose(np.asarray(call.reference), views, atol=1e-5).all(axis=(2, 3, 4)).sum() == 6


def test_a_dropped_view_is_absent_and_changes_nothing_else():
    batch, with_view, without = _batch(), Recorder(), Recorder()
    first = identity.loss(with_view, batch, EMPTY, KEY, objective=OBJECTIVE, view_dropped=False)
    second = identity.loss(without, batch, EMPTY, KEY, objective=OBJECTIVE, view_dropped=True)
    assert without.calls[0].reference is None
    np.testing.assert_array_equal(without.calls[0].latents, with_view.calls[0].latents)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("drop", "kept"), [(0.5, 3), (0.25, 4), (0.8, 1)])
def test_motion_keeps_a_fixed_count_of_reference_tokens(drop, kept):
    batch, model = _batch(n=64, frames=3), Recorder()
    motion.loss(model, batch, EMPTY, KEY, objective=OBJECTIVE, token_drop=drop)
    call = model.calls[0]
    index = np.asarray(call.reference_index)  # of 3 × 2 = 6 tokens
    assert call.latents.shape == (64, 3, 6, 4, 4) and index.shape == (64, kept)
    assert (np.diff(index, axis=1) > 0).all() and index.min() == 0 and index.max() == 5
    assert len(np.unique(index, axis=0)) > 1


def test_motion_without_token_drop_keeps_the_sequence():
    model = Recorder()
    motion.loss(model, _batch(frames=3), EMPTY, KEY, objective=OBJECTIVE, token_drop=0.0)
    assert model.calls[0].reference_index is None and model.calls[0].reference.shape == (6, 1, 6, 4, 4)


def test_text_to_video_weighs_clips_and_images():
    clips, images = _batch(frames=3), _batch(frames=1, seed=1)
    alone = [
        text_to_video.loss(Recorder(), clips, images, EMPTY, KEY, objective=OBJECTIVE, image_weight=w)
        for w in (0.0, 1.0)
    ]
    mixed = text_to_video.loss(Recorder(), clips, images, EMPTY, KEY, objective=OBJECTIVE, image_weight=0.25)
    np.testing.assert_allclose(mixed, 0.75 * alone[0] + 0.25 * alone[1], rtol=1e-6)
    no_images = text_to_video.loss(Recorder(), clips, None, EMPTY, KEY, objective=OBJECTIVE, image_weight=0.25)
    np.testing.assert_allclose(no_images, alone[0], rtol=1e-6)


def test_a_given_first_frame_is_the_clips_own_in_the_scale_of_images():
    clips = _batch(frames=3)
    for clamps, counted in ((True, slice(1, None)), (False, slice(None))):
        model = Recorder(lambda x: 0.3 * x)
        objective = _plain(image_latents=LatentScale.factor(2.0), clamps_image=clamps)
        found = text_to_video.loss(
            model, clips, None, EMPTY, KEY, objective=objective, image_weight=0.0, first_frame=2 / 6
        )
        given, plain = model.calls
        assert given.latents.shape[0] == 2 and plain.latents.shape[0] == 4 and not hasattr(plain, "image")
        np.testing.assert_allclose(given.image, 2.0 * clips["mean"][:2, :1], rtol=1e-5)
        expected = 0.0
        for call, rows, kept in ((given, slice(0, 2), counted), (plain, slice(2, 6), slice(None))):
            latents = 0.5 * clips["mean"][rows]
            level = SCHEDULE.alphas_cumprod[np.asarray(call.timesteps)][:, None, None, None, None]
            noise = (call.latents - np.sqrt(level) * latents) / np.sqrt(1 - level)
            errors = np.square(0.3 * call.latents - SCHEDULE.target(latents, noise, call.timesteps))
            expected += errors.shape[0] / 6 * errors[:, kept].mean()
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_all_clips_may_be_given_their_first_frame():
    model, objective = Recorder(), _plain(image_latents=OBJECTIVE.latents, clamps_image=True)
    text_to_video.loss(
        model, _batch(frames=3), None, EMPTY, KEY, objective=objective, image_weight=0.0, first_frame=1.0
    )
    assert [call.image.shape[0] for call in model.calls] == [6]


def test_activations_are_bfloat16_and_the_loss_float32():
    model = Recorder()
    loss = motion.loss(
        model, _batch(frames=3), EMPTY, KEY, objective=_plain(dtype=jnp.dtype("bfloat16")), token_drop=0.5
    )
    assert model.calls[0].latents.dtype == model.calls[0].text.dtype == jnp.bfloat16
    assert loss.dtype == jnp.float32
