"""The whole of Wan against diffusers: prompts, guidance, 20 steps of both solvers, two experts, a given first frame."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdv_jax.pipeline import load_pipeline
from tests.parity.compare import assert_close
from tests.tiny_wan import DEFAULTS, TEXT_LENGTH, make_pipeline

STEPS = 20
PROMPT, NEGATIVE = "a  red ball &amp; on sand ", "cat"
SCHEDULERS = {"unipc": diffusers.UniPCMultistepScheduler, "euler": diffusers.FlowMatchEulerDiscreteScheduler}


@pytest.fixture(scope="module", params=["t2v", "ti2v", "a14b"])
def pair(request, tmp_path_factory):
    """(diffusers' pipeline, ours from its folder, pixels per latent)."""
    theirs = make_pipeline(request.param)
    theirs.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("pipeline")
    theirs.save_pretrained(folder)
    (folder / "defaults.json").write_text(json.dumps(DEFAULTS))
    return theirs, load_pipeline(folder, progress=False), 16 if request.param == "ti2v" else 8


def channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def run_both(pair, *, frames, height, width, scheduler="unipc", output="latents", batch=1, image=None, **options):
    """(ours, theirs) from the same initial noise, as numpy [b,t,h,w,c]."""
    theirs, ours, scale = pair
    shape = (batch, (frames - 1) // 4 + 1, height // scale, width // scale, 4)
    latents = np.random.default_rng(frames * height * width).normal(size=shape).astype(np.float32)
    common = dict(height=height, width=width, num_frames=frames, prompt=[PROMPT] * batch,
                  negative_prompt=[NEGATIVE] * batch)  # fmt: skip
    found = ours(
        **common, latents=latents, steps=STEPS, scheduler=scheduler, output=output, image=image, progress=False,
        **options,
    )  # fmt: skip
    shift = {"unipc": {"flow_shift": 5.0}, "euler": {"shift": 5.0}}[scheduler]
    solver = SCHEDULERS[scheduler].from_config(theirs.scheduler.config, **shift)
    if image is None:
        kind, given = diffusers.WanPipeline, {}
    else:
        kind, given = diffusers.WanImageToVideoPipeline, {"image": image}
    parts = {name: part for name, part in theirs.components.items() if name != "scheduler"}
    pipe = kind(**parts, scheduler=solver, boundary_ratio=theirs.config.boundary_ratio,
                expand_timesteps=theirs.config.expand_timesteps)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    scales = {"guidance_scale": options.get("guidance", 5.0), "guidance_scale_2": options.get("guidance_2")}
    expected = pipe(
        **common, **given, latents=channels_first(latents), num_inference_steps=STEPS, max_sequence_length=TEXT_LENGTH,
        output_type="latent" if output == "latents" else "np", **scales,
    ).frames  # fmt: skip
    return found, np.moveaxis(expected.numpy(), 1, -1) if output == "latents" else expected


@pytest.mark.parametrize(
    ("frames", "height", "width", "scheduler"),
    [(9, 32, 64, "unipc"), (5, 64, 32, "euler"), (1, 32, 96, "unipc"), (17, 32, 32, "unipc"), (17, 32, 32, "euler")],
)
def test_latents_after_twenty_steps(pair, frames, height, width, scheduler):
    ours, theirs = run_both(pair, frames=frames, height=height, width=width, scheduler=scheduler)
    assert_close(ours, theirs, relative=1e-3)


def test_video_in_a_batch(pair):
    ours, theirs = run_both(pair, frames=5, height=32, width=64, output="video", batch=2)
    assert ours.shape == (2, 5, 32, 64, 3)
    assert_close(ours, theirs, relative=1e-3)


@pytest.mark.parametrize("size", [(64, 32), (50, 91)])
@pytest.mark.parametrize("pair", ["ti2v"], indirect=True)
def test_a_picture_of_another_shape_is_resized_as_there(pair, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    ours, theirs = run_both(pair, frames=5, height=32, width=64, image=Image.fromarray(pixels))
    assert_close(ours, theirs, relative=1e-3)


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize("pair", ["ti2v"], indirect=True)
def test_image_to_video(pair, scheduler):
    """The first frame is clean, at t = 0 in every step, and comes out as it went in."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    image = Image.fromarray(pixels)
    ours, theirs = run_both(pair, frames=9, height=32, width=64, scheduler=scheduler, image=image)
    assert_close(ours, theirs, relative=1e-3)
    _, pipe, _ = pair
    mean, _ = pipe.encode(pixels[None, None].astype(np.float32) / 127.5 - 1)
    assert_close(ours[:, :1], pipe.traits.latents.to_model(mean), relative=1e-5)


@pytest.mark.parametrize("size", [(1, 32, 64), (17, 96, 32)])
@pytest.mark.parametrize("pair", ["ti2v"], indirect=True)
def test_image_to_video_of_other_lengths(pair, size):
    frames, height, width = size
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    ours, theirs = run_both(pair, frames=frames, height=height, width=width, image=Image.fromarray(pixels))
    assert_close(ours, theirs, relative=1e-3)


@pytest.mark.parametrize("pair", ["a14b"], indirect=True)
def test_two_guidance_scales_and_one_expert_on_the_device(pair, tmp_path):
    ours, theirs = run_both(pair, frames=5, height=32, width=32, guidance=4.0, guidance_2=3.0)
    assert_close(ours, theirs, relative=1e-3)
    single, _ = run_both(pair, frames=5, height=32, width=32, guidance=4.0)
    assert np.abs(single - ours).max() > 1e-3, "the second scale changes nothing"
    pair[0].save_pretrained(tmp_path)
    (tmp_path / "defaults.json").write_text(json.dumps(DEFAULTS))
    offloaded = load_pipeline(tmp_path, offload=True, progress=False)
    again, _ = run_both((pair[0], offloaded, 8), frames=5, height=32, width=32, guidance=4.0, guidance_2=3.0)
    np.testing.assert_array_equal(again, ours)


def test_prompt_embeddings(pair):
    theirs, ours, _ = pair
    prompts = [PROMPT, "", "a prompt that is far too long for this model, and so is cut"]
    expected = theirs.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)[0]
    found = np.asarray(ours.encode_prompt(prompts))
    assert_close(found, expected.detach(), relative=1e-4)
    assert not found[1, 1:].any() and found[1, 0].any()  # the end token, then nothing


def test_one_call_of_the_transformer(pair):
    theirs, ours, _ = pair
    rng = np.random.default_rng(0)
    latents, text = (rng.normal(size=size).astype(np.float32) for size in [(2, 3, 4, 6, 4), (2, 9, 16)])
    timesteps = np.array([7.0, 990.0], np.float32)
    parts = [theirs.transformer] + ([theirs.transformer_2] if theirs.transformer_2 is not None else [])
    for expert, part in enumerate(parts):
        with torch.no_grad():
            expected = part(channels_first(latents), torch.from_numpy(timesteps), torch.from_numpy(text)).sample
        found = ours.denoise(latents, text, timesteps, expert=expert)
        assert_close(found, np.moveaxis(expected.numpy(), 1, -1), relative=1e-4)


def test_encode_and_decode(pair):
    theirs, ours, scale = pair
    video = np.random.default_rng(0).uniform(-1, 1, (1, 9, 2 * scale, 4 * scale, 3)).astype(np.float32)
    mean, logvar = ours.encode(video)
    with torch.no_grad():
        posterior = theirs.vae.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist
        decoded = theirs.vae.decode(posterior.mean).sample
    assert_close(mean, posterior.mean.permute(0, 2, 3, 4, 1), relative=1e-4)
    assert_close(logvar, posterior.logvar.permute(0, 2, 3, 4, 1), relative=1e-4)
    assert_close(ours.decode(mean), decoded.permute(0, 2, 3, 4, 1), relative=1e-4)
