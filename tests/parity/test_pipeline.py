"""The whole pipeline against diffusers' CogVideoXPipeline: prompts, guidance, 20 steps of both solvers, decoding."""

import functools

import numpy as np
import pytest
import torch

from sdv_jax.diffusion import DPM, SchedulerConfig
from sdv_jax.pipeline import load_pipeline
from tests.parity.compare import assert_close
from tests.tiny_pipeline import SCHEDULER, make_pipeline

STEPS = 20
PROMPT, NEGATIVE = "a red ball on sand", "cat"


@pytest.fixture(scope="module", params=[True, False], ids=["rotary", "sincos"])
def pair(request, tmp_path_factory):
    """(diffusers' pipeline, ours from its folder)."""
    theirs = make_pipeline(rotary=request.param)
    theirs.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("pipeline")
    theirs.save_pretrained(folder)
    return theirs, load_pipeline(folder, progress=False)


def run_both(monkeypatch, pair, *, frames, height, width, scheduler="ddim", dynamic=False, output="latents", batch=1):
    """(ours, theirs) from the same initial and step noise, as numpy [b,t,h,w,c]."""
    theirs, ours = pair
    shape = (batch, (frames - 1) // 4 + 1, height // 4, width // 4, 4)
    rng = np.random.default_rng(frames * height * width)
    latents, noise = rng.normal(size=shape), rng.normal(size=(STEPS, *shape))
    latents, noise = latents.astype(np.float32), noise.astype(np.float32)
    with_scheduler(monkeypatch, theirs, scheduler, noise)
    common = dict(
        height=height, width=width, num_frames=frames, negative_prompt=[NEGATIVE] * batch, prompt=[PROMPT] * batch
    )
    found = ours(
        **common, latents=latents, step_noise=noise, steps=STEPS, scheduler=scheduler, dynamic_guidance=dynamic,
        output=output, progress=False,
    )  # fmt: skip
    expected = theirs(
        **common, latents=channels_first(latents), num_inference_steps=STEPS, guidance_scale=6.0,
        use_dynamic_cfg=dynamic, output_type="latent" if output == "latents" else "np",
        max_sequence_length=ours.traits.text_length,
    ).frames  # fmt: skip
    return found, expected.permute(0, 1, 3, 4, 2).numpy() if output == "latents" else expected


def with_scheduler(monkeypatch, theirs, name, noise):
    """Gives the pipeline that solver, and makes it add `noise` [steps, b,t,h,w,c] instead of drawing.

    A second-order step of diffusers' DPM draws twice and adds the second draw.
    """
    import diffusers

    kind = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}[name]
    monkeypatch.setattr(theirs, "scheduler", kind.from_config(theirs.scheduler.config))
    if name == "dpm":
        twice = DPM(SchedulerConfig(**SCHEDULER), len(noise)).second_order
        draws = iter([channels_first(n) for n, more in zip(noise, twice, strict=True) for _ in range(1 + more)])
        module = "diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor"
        monkeypatch.setattr(module, lambda *_, **__: next(draws))


def channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, -3).copy())


@pytest.mark.parametrize(
    ("frames", "height", "width", "scheduler"),
    [(9, 16, 24, "ddim"), (9, 16, 24, "dpm"), (13, 24, 40, "dpm"), (1, 40, 8, "ddim"), (49, 8, 24, "dpm")],
)
def test_latents_after_twenty_steps(monkeypatch, pair, frames, height, width, scheduler):
    ours, theirs = run_both(monkeypatch, pair, frames=frames, height=height, width=width, scheduler=scheduler)
    assert_close(ours, theirs, relative=1e-3)


def test_dynamic_guidance_in_a_batch(monkeypatch, pair):
    ours, theirs = run_both(monkeypatch, pair, frames=5, height=16, width=24, dynamic=True, batch=2)
    assert_close(ours, theirs, relative=1e-3)


def test_video(monkeypatch, pair):
    ours, theirs = run_both(monkeypatch, pair, frames=9, height=16, width=24, output="video")
    assert ours.shape == (1, 9, 16, 24, 3)
    assert_close(ours, theirs, relative=1e-3)


def test_defaults_are_those_of_diffusers(pair):
    theirs, ours = pair
    shapes = []
    # diffusers would denoise 50 steps; where it prepares latents it has settled every default
    keep = functools.partial(_remember_and_stop, shapes)
    theirs.prepare_latents, original = keep, theirs.prepare_latents
    with pytest.raises(_Stop):
        theirs(PROMPT, max_sequence_length=ours.traits.text_length)
    theirs.prepare_latents = original
    g = ours.geometry
    assert shapes == [(g.channels, g.num_frames, g.height, g.width)]


class _Stop(Exception):
    pass


def _remember_and_stop(shapes, batch, channels, frames, height, width, *_):
    shapes.append((channels, frames, height, width))
    raise _Stop


def test_prompt_embeddings(pair):
    theirs, ours = pair
    prompts = [PROMPT, "", "a prompt that is far too long for this model, and so is cut"]
    length = ours.traits.text_length
    expected = theirs.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)[0]
    assert_close(ours.encode_prompt(prompts), expected, relative=1e-4)


def test_one_call_of_the_transformer(pair):
    theirs, ours = pair
    rng = np.random.default_rng(0)
    latents, text = (rng.normal(size=size).astype(np.float32) for size in [(2, 3, 4, 6, 4), (2, 12, 16)])
    timesteps = np.array([7, 990])
    rotary = theirs._prepare_rotary_positional_embeddings(16, 24, 3, torch.device("cpu"))
    with torch.no_grad():
        expected = theirs.transformer(
            channels_first(latents), torch.from_numpy(text), torch.from_numpy(timesteps),
            image_rotary_emb=rotary if theirs.transformer.config.use_rotary_positional_embeddings else None,
        ).sample.permute(0, 1, 3, 4, 2)  # fmt: skip
    assert_close(ours.denoise(latents, text, timesteps), expected, relative=1e-4)


def test_encode_and_decode(pair):
    theirs, ours = pair
    video = np.random.default_rng(0).uniform(-1, 1, (1, 9, 16, 24, 3)).astype(np.float32)
    mean, logvar = ours.encode(video)
    with torch.no_grad():
        posterior = theirs.vae.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist
        decoded = theirs.vae.decode(posterior.mean).sample
    assert_close(mean, posterior.mean.permute(0, 2, 3, 4, 1), relative=1e-4)
    assert_close(logvar, posterior.logvar.permute(0, 2, 3, 4, 1), relative=1e-4)
    assert_close(ours.decode(mean), decoded.permute(0, 2, 3, 4, 1), relative=1e-4)
