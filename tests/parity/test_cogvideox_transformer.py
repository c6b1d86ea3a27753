"""The CogVideoX transformer against diffusers' one, on random weights moved by the conversion rules."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from sdv_jax.models.cogvideox.transformer import TransformerConfig
from sdv_jax.models.cogvideox.transformer import rotary as our_rotary
from tests.parity.compare import assert_close, relative_error
from tests.parity.weights import TINY, from_torch, inputs, randomise, rotary, run_ours, run_theirs, transformer_pair

ROPE = {"use_rotary_positional_embeddings": True}
CONFIGS = {
    "rotary": ROPE,
    "sin-cos": {},
    "rotary, no biases": ROPE | {"patch_bias": False, "attention_bias": False},
    "sin-cos, norms without weights": {"norm_elementwise_affine": False, "norm_eps": 1e-3, "num_layers": 3},
    "sin-cos, other interpolation, wide time": {
        "spatial_interpolation_scale": 1.0,
        "temporal_interpolation_scale": 0.5,
        "time_embed_dim": 80,
    },
    "rotary, five heads of 32": ROPE
    | {"num_attention_heads": 5, "attention_head_dim": 32, "num_layers": 1, "time_embed_dim": 7},
    "rotary, one head, sine first, shifted": ROPE
    | {"num_attention_heads": 1, "flip_sin_to_cos": False, "freq_shift": 1},
    "sin-cos, patches of 4, other channels out": {"patch_size": 4, "in_channels": 3, "out_channels": 6},
    "rotary, no patches, one word": ROPE
    | {"patch_size": 1, "max_text_seq_length": 1, "sample_width": 6, "sample_height": 4},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_output(config):
    theirs, ours = transformer_pair(**config)
    given = inputs(ours.config, frames=3, height=8, width=12)
    assert_close(run_ours(ours, *given), run_theirs(theirs, *given))


# Latent frames of 1, 9, 13 and 49 pixel frames; sizes other than the trained 8 × 12, on both sides of its aspect ratio.
SIZES = [(1, 6, 20), (3, 18, 4), (4, 10, 14), (13, 4, 6), (1, 2, 2), (3, 26, 22)]


@pytest.fixture(scope="module", params=[ROPE, {}], ids=["rotary", "sin-cos"])
def pair(request):
    return transformer_pair(**request.param)


@pytest.mark.parametrize("frames, height, width", SIZES)
def test_odd_sizes(pair, frames, height, width):
    theirs, ours = pair
    given = inputs(ours.config, frames=frames, height=height, width=width, batch=1)
    assert_close(run_ours(ours, *given), run_theirs(theirs, *given))


def test_fractional_timesteps(pair):
    theirs, ours = pair
    latents, text, _ = inputs(ours.config, frames=3, height=8, width=12)
    timesteps = np.array([12.75, 998.5], np.float32)
    found = run_ours(ours, latents, text, timesteps)
    assert_close(found, run_theirs(theirs, latents, text, timesteps))
    assert relative_error(found, run_ours(ours, latents, text, timesteps.astype(np.int32))) > 1e-3


def test_bfloat16_is_as_good_as_diffusers(pair):
    theirs, ours = pair
    given = inputs(ours.config, frames=3, height=10, width=14)
    exact = run_theirs(theirs, *given)
    half = CogVideoXTransformer3DModel.from_config(theirs.config).eval()
    half.load_state_dict(theirs.state_dict())
    error = relative_error(run_ours(from_torch(theirs, ours.config, "bfloat16"), *given, dtype="bfloat16"), exact)
    their_error = relative_error(run_theirs(half.bfloat16(), *given), exact)
    assert 0 < error <= 2 * their_error, (error, their_error)


@pytest.mark.parametrize("grid", [(30, 45), (30, 30), (17, 45), (44, 9), (1, 1), (31, 46), (48, 85)])
def test_rotary_table_of_the_published_size(grid):
    """At the trained size of CogVideoX-5b; angles reach 45, so that a float32 cosine is good to 5e-6 at best."""
    config = TransformerConfig(num_attention_heads=1, num_layers=1, use_rotary_positional_embeddings=True)
    theirs = CogVideoXTransformer3DModel(**{field: getattr(config, field) for field in config.__dataclass_fields__})
    expected = rotary(theirs, 14, *(2 * n for n in grid))
    for found, table in zip(our_rotary(config, (13, *grid), references=1), expected, strict=True):
        assert_close(found, table, relative=1e-5)


def test_one_block_of_the_published_width():
    """CogVideoX-5b as it is, but one block and a small grid: width 3072, 48 heads of 64, time 512, text 4096."""
    config = TransformerConfig(num_attention_heads=48, num_layers=1, use_rotary_positional_embeddings=True)
    theirs = CogVideoXTransformer3DModel(
        **{field: getattr(config, field) for field in config.__dataclass_fields__}
    ).eval()
    randomise(theirs, seed=0)
    ours = from_torch(theirs, config)
    latents, text, timesteps = inputs(config, frames=2, height=6, width=10, batch=1)
    given = latents, text[:, :32], timesteps
    assert_close(run_ours(ours, *given), run_theirs(theirs, *given))


def test_weights_of_another_config_are_refused():
    """The comparison above stands on the rules: they must notice what does not fit."""
    theirs = CogVideoXTransformer3DModel(**TINY | {"num_layers": 1})
    with pytest.raises(ValueError, match="missing transformer_blocks.1.attn1.norm_k.bias"):
        from_torch(theirs, TransformerConfig(**TINY))
    assert torch.is_tensor(theirs.proj_out.weight)
