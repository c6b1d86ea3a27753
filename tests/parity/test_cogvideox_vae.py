"""The CogVideoX VAE against diffusers' AutoencoderKLCogVideoX on equal random weights."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdv_jax.models.cogvideox.vae import Tiling, VAEConfig
from tests.parity.compare import assert_close, relative_error
from tests.parity.weights_vae import decode_theirs, encode_theirs, make_pair, run


def config(levels: int = 3, **changes) -> dict:
    """A tiny model's config with `levels` resolutions."""
    channels = (8, 8, 16, 16)[:levels]
    return {
        "block_out_channels": channels,
        "down_block_types": ("CogVideoXDownBlock3D",) * levels,
        "up_block_types": ("CogVideoXUpBlock3D",) * levels,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "latent_channels": 4,
    } | changes


@functools.cache
def pair(**changes):
    return make_pair(config(**changes))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def latents(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def assert_parity(theirs, ours, video: np.ndarray) -> None:
    """Encoding `video`, and decoding random latents of the shape that it encodes to."""
    mean, logvar = encode_theirs(theirs, video)
    for found, expected in zip(run(ours, "encode", video), (mean, logvar), strict=True):
        assert_close(found, expected)
    z = latents(*mean.shape)
    assert_close(run(ours, "decode", z), decode_theirs(theirs, z))


@pytest.mark.parametrize("frames", [1, 5, 8, 9, 13, 17, 49])
def test_any_number_of_frames(frames):
    assert_parity(*pair(), pixels(1, frames, 8, 12))


@pytest.mark.parametrize("height, width", [(4, 20), (18, 27), (33, 7)])
def test_any_height_and_width(height, width):
    assert_parity(*pair(), pixels(2, 5, height, width))


@pytest.mark.parametrize(
    "changes",
    [
        {"levels": 4, "layers_per_block": 2, "norm_num_groups": 8, "norm_eps": 1e-2},
        {"levels": 4, "temporal_compression_ratio": 8},
        {"levels": 2, "temporal_compression_ratio": 2, "block_out_channels": (12, 4), "act_fn": "gelu"},
        {"levels": 2, "temporal_compression_ratio": 1, "act_fn": "mish", "in_channels": 3, "latent_channels": 5},
        {"levels": 2, "latent_channels": 3, "use_quant_conv": True, "use_post_quant_conv": True, "act_fn": "relu"},
    ],
    ids=["deep", "ratio 8", "ratio 2", "ratio 1", "quant"],
)
def test_any_config(changes):
    assert_parity(*pair(**changes), pixels(1, 9, 16, 8))


@pytest.mark.parametrize(
    "overrides, frames",
    [
        ({}, 17),
        ({"tile_sample_min_height": 10, "tile_sample_min_width": 8, "tile_overlap_factor_height": 0.25}, 5),
        ({"tile_sample_min_width": 100, "tile_overlap_factor_width": 0.5}, 5),
    ],
    ids=["defaults", "overrides", "rows only"],
)
def test_tiles(overrides, frames):
    theirs, ours = make_pair(config(levels=2, sample_height=17, sample_width=24))
    theirs.enable_tiling(**overrides)
    tiling = dataclasses.replace(Tiling.default(ours.config), **overrides)
    video = pixels(1, frames, 18, 27)
    expected = encode_theirs(theirs, video)
    for found, reference in zip(run(ours, "encode", video, tiling=tiling), expected, strict=True):
        assert_close(found, reference)
    z = latents(1, 3 if frames == 5 else 5, 9, 13, 4)
    assert_close(run(ours, "decode", z, tiling=tiling), decode_theirs(theirs, z))


def test_default_tiles():
    changes = {"sample_height": 97, "sample_width": 170, "levels": 4}
    theirs, ours = make_pair(config(**changes))
    tiling = Tiling.default(VAEConfig(**config(**changes)))
    assert tiling.sample_tile == (theirs.tile_sample_min_height, theirs.tile_sample_min_width)
    assert tiling.latent_tile(ours.config.spatial_compression) == (
        theirs.tile_latent_min_height, theirs.tile_latent_min_width
    )
    assert tiling.overlap == (theirs.tile_overlap_factor_height, theirs.tile_overlap_factor_width)


def test_bfloat16_is_as_exact_as_upstreams():
    theirs, ours = make_pair(config(levels=4))
    video, z = pixels(1, 9, 24, 16), latents(1, 3, 3, 2, 4)
    mean, decoded = encode_theirs(theirs, video)[0], decode_theirs(theirs, z)
    theirs = theirs.to(torch.bfloat16)
    ours_mean = run(ours, "encode", video, dtype=jnp.bfloat16)[0]
    ours_decoded = run(ours, "decode", z, dtype=jnp.bfloat16)
    assert ours_mean.dtype == ours_decoded.dtype == jnp.bfloat16
    assert relative_error(ours_mean, mean) <= 2 * relative_error(encode_theirs(theirs, video)[0], mean)
    assert relative_error(ours_decoded, decoded) <= 2 * relative_error(decode_theirs(theirs, z), decoded)
