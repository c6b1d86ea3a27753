"""The Wan VAEs against diffusers' AutoencoderKLWan on equal random weights."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdv_jax.models.wan import vae as wan_vae
from sdv_jax.models.wan.vae import Tiling
from tests.parity.compare import assert_close, relative_error
from tests.parity.weights_vae import decode_theirs, encode_theirs
from tests.parity.weights_wan_vae import make_pair, run

_TINY = {"base_dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "z_dim": 4, "scale_factor_spatial": 4,
         "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}  # fmt: skip
_RESIDUAL = _TINY | {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                     "scale_factor_spatial": 8, "decoder_base_dim": 12}  # fmt: skip
_PUBLISHED = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
CONFIGS = {
    "2.1": _TINY | {"temperal_downsample": [True, True]},
    "2.2": _RESIDUAL | {"temperal_downsample": [True, True]},
    "2.1, 2 frames": _TINY | {"temperal_downsample": [False, True], "scale_factor_temporal": 2},
    "2.2, 2 frames": _RESIDUAL | {"temperal_downsample": [True, False], "scale_factor_temporal": 2},
    "2.1, patches": _TINY | {"temperal_downsample": [False, False], "scale_factor_temporal": 1, "patch_size": 3,
                             "in_channels": 27, "out_channels": 27, "scale_factor_spatial": 12},
    "2.2, narrower": _RESIDUAL | {"temperal_downsample": [True, True], "dim_mult": [4, 2, 1], "decoder_base_dim": None},
    "2.1, published": _TINY | _PUBLISHED | {"scale_factor_spatial": 8},
    "2.2, published": _RESIDUAL | _PUBLISHED | {"scale_factor_spatial": 16, "decoder_base_dim": 8},
}  # fmt: skip


@functools.cache
def pair(kind: str):
    return make_pair(CONFIGS[kind])


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


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_any_number_of_frames(kind, frames):
    assert_parity(*pair(kind), pixels(1, frames, 16, 24))


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_pieces(monkeypatch, kind):
    monkeypatch.setattr(wan_vae, "PIECE_PIXELS", 2 * 4 * 16 * 24)  # 5 chunks are pieces of 1, 2 and 2
    assert_parity(*pair(kind), pixels(1, 21, 16, 24))


@pytest.mark.parametrize("kind, height, width", [("2.1", 24, 40), ("2.1", 7, 13), ("2.2", 48, 80)])
def test_any_height_and_width(kind, height, width):
    assert_parity(*pair(kind), pixels(2, 8, height, width))


@pytest.mark.parametrize("kind", list(CONFIGS)[2:])
def test_any_config(kind):
    assert_parity(*pair(kind), pixels(1, 5, 48, 48))


@pytest.mark.parametrize(
    "kind, overrides, height, width",
    [
        ("2.1", {}, 26, 38),
        ("2.1", {"tile_sample_stride_width": 8, "tile_sample_min_height": 32}, 12, 24),
        ("2.2", {}, 32, 72),
    ],
)
def test_tiles(kind, overrides, height, width):
    sizes = {"tile_sample_min_height": 16, "tile_sample_min_width": 16, "tile_sample_stride_height": 12,
             "tile_sample_stride_width": 12} | overrides  # fmt: skip
    scale = 4 if kind == "2.2" else 2
    flat = {"dim_mult": [1, 1], "temperal_downsample": [True], "scale_factor_temporal": 2, "decoder_base_dim": None}
    theirs, ours = make_pair(CONFIGS[kind] | flat | {"scale_factor_spatial": scale})
    theirs.enable_tiling(**sizes)
    video = pixels(1, 5, height, width)
    expected = encode_theirs(theirs, video)
    for found, reference in zip(run(ours, "encode", video, tiling=Tiling(**sizes)), expected, strict=True):
        assert_close(found, reference)
    z = latents(*expected[0].shape)
    assert_close(run(ours, "decode", z, tiling=Tiling(**sizes)), decode_theirs(theirs, z))


def test_default_tiles():
    theirs, ours = pair("2.1")
    for name, value in dataclasses.asdict(Tiling.default(ours.config)).items():
        assert value == getattr(theirs, name)


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_bfloat16_is_as_exact_as_upstreams(kind):
    theirs, ours = make_pair(CONFIGS[kind])
    video, z = pixels(1, 9, 16, 24), latents(1, 3, 3, 2, 4)
    mean, decoded = encode_theirs(theirs, video)[0], decode_theirs(theirs, z)
    theirs = theirs.to(torch.bfloat16)
    ours_mean = run(ours, "encode", video, dtype=jnp.bfloat16)[0]
    ours_decoded = run(ours, "decode", z, dtype=jnp.bfloat16)
    assert ours_mean.dtype == ours_decoded.dtype == jnp.bfloat16
    assert relative_error(ours_mean, mean) <= 2 * relative_error(encode_theirs(theirs, video)[0], mean)
    assert relative_error(ours_decoded, decoded) <= 2 * relative_error(decode_theirs(theirs, z), decoded)
