"""The whole pipeline against diffusers' for image-to-video and for CogVideoX 1.5: 20 steps, first frame, decoding.

The posterior of the VAE has no width here, so that both sides draw the same latent of the first frame.
"""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdv_jax.errors import UserError
from sdv_jax.pipeline import load_pipeline
from tests.parity.compare import assert_close, relative_error
from tests.parity.test_pipeline import channels_first, with_scheduler
from tests.parity.weights import randomise
from tests.tiny_pipeline import make_pipeline

STEPS = 20
FRAMES, HEIGHT, WIDTH = 9, 16, 24  # the tiny pipeline's own: 3 latent frames, of which 1.5 makes 4
IN_TIME = {"patch_size_t": 2, "patch_bias": False}
KINDS = {
    "5b-I2V": {"in_channels": 8, "use_learned_positional_embeddings": True},
    "1.5": IN_TIME,
    "1.5-I2V": IN_TIME | {"in_channels": 8, "ofs_embed_dim": 8},
}


def make(kind: str):
    """diffusers' pipeline of that kind: the tiny one with another transformer and its scaling of images."""
    tiny = make_pipeline()
    parts = dict(tiny.components)
    parts["transformer"] = diffusers.CogVideoXTransformer3DModel.from_config(tiny.transformer.config, **KINDS[kind])
    randomise(parts["transformer"], seed=0)
    tiny.vae.register_to_config(invert_scale_latents="1.5" in kind)
    last = tiny.vae.encoder.conv_out.conv
    with torch.no_grad():
        last.weight[4:], last.bias[4:] = 0, -100.0
    cls = diffusers.CogVideoXImageToVideoPipeline if kind.endswith("I2V") else diffusers.CogVideoXPipeline
    pipeline = cls(**parts | {"transformer": parts["transformer"].eval()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(diffusers' pipeline, ours from its folder, whether they take an image)."""
    theirs = make(request.param)
    folder = tmp_path_factory.mktemp("pipeline")
    theirs.save_pretrained(folder)
    return theirs, load_pipeline(folder, progress=False), request.param.endswith("I2V")


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


def run_ours(ours, latents, noise, *, frames=FRAMES, **options):
    return ours(
        "a red ball on sand", negative_prompt="cat", latents=latents, step_noise=noise, steps=STEPS, guidance=6.0,
        num_frames=frames, height=HEIGHT, width=WIDTH, progress=False, **options,
    )  # fmt: skip


def run_both(monkeypatch, pair, *, frames=FRAMES, scheduler="ddim", output="latents"):
    """(ours, theirs) from the same initial and step noise, as numpy [b,t,h,w,c]."""
    theirs, ours, takes_image = pair
    image = {"image": picture()} if takes_image else {}
    latents, noise = start(ours, frames)
    with_scheduler(monkeypatch, theirs, scheduler, noise)
    found = run_ours(ours, latents, noise, frames=frames, scheduler=scheduler, output=output, **image)
    expected = theirs(
        prompt="a red ball on sand", negative_prompt="cat", latents=channels_first(latents), num_frames=frames,
        height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=6.0,
        output_type="latent" if output == "latents" else "np", max_sequence_length=ours.traits.text_length, **image,
    ).frames  # fmt: skip
    return found, expected.permute(0, 1, 3, 4, 2).numpy() if output == "latents" else expected


def start(ours, frames):
    """(initial noise, noise of each step), of as many latent frames as are denoised."""
    count, *rest = ours.geometry.latent_shape(frames, HEIGHT, WIDTH)
    shape = (1, count + ours.geometry.surplus(count), *rest)
    rng = np.random.default_rng(frames)
    return (rng.normal(size=size).astype(np.float32) for size in (shape, (STEPS, *shape)))


@pytest.mark.parametrize(("frames", "scheduler"), [(FRAMES, "ddim"), (FRAMES, "dpm"), (1, "dpm"), (17, "ddim")])
def test_latents_after_twenty_steps(monkeypatch, pair, frames, scheduler):
    assert_close(*run_both(monkeypatch, pair, frames=frames, scheduler=scheduler), relative=1e-3)


def test_video(monkeypatch, pair):
    """With the surplus latent frame dropped, from the front, before decoding."""
    ours, theirs = run_both(monkeypatch, pair, output="video")
    assert ours.shape == (1, FRAMES, HEIGHT, WIDTH, 3)
    assert_close(ours, theirs, relative=1e-3)


def test_the_image_counts_in_its_own_scale(pair):
    """1.5 divides an image's latent by the scaling factor where it multiplies others; 1.0 multiplies all."""
    theirs, ours, takes_image = pair
    latents, noise = start(ours, FRAMES)
    if not takes_image:
        with pytest.raises(UserError, match="^image: this is no image-to-video model"):
            run_ours(ours, latents, noise, image=picture())
        return
    pixels = np.asarray(picture(), np.float32) / 127.5 - 1
    mean, _ = ours.encode(pixels[None, None])
    scale = 1 / 0.7 if theirs.vae.config.invert_scale_latents else 0.7
    shown = run_ours(ours, latents, noise, image=picture(), output="latents")
    for image_latents, least, most in ((mean * scale, 0, 1e-3), (mean / scale, 1e-3, np.inf)):
        given = run_ours(ours, latents, noise, image_latents=np.asarray(image_latents), output="latents")
        assert least <= relative_error(given, shown) <= most


def test_folders_of_every_kind_are_recognised(pair):
    theirs, ours, takes_image = pair
    assert (ours.traits.image_latents is not None) == takes_image
    assert ours.geometry.frame_patch == (theirs.transformer.config.patch_size_t or 1)
    assert dataclasses.asdict(ours.geometry)["channels"] == 4
