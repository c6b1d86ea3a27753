"""Linear, norms, embeddings and modulation, one by one, against torch and diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_3d_sincos_pos_embed, get_timestep_embedding
from flax import nnx

from sdv_jax.nn import rope
from sdv_jax.nn.embeddings import TimestepEmbedding, sincos_3d, timestep_sinusoid
from sdv_jax.nn.linear import Linear
from sdv_jax.nn.modulation import AdaLayerNormZero, gated
from sdv_jax.nn.norms import LayerNorm, RMSNorm
from tests.parity.compare import assert_close, relative_error


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_layer_norm(eps, affine):
    ours, theirs = LayerNorm(24, eps=eps, affine=affine), torch.nn.LayerNorm(24, eps, affine)
    if affine:
        ours.scale[...], ours.bias[...] = draw(24, seed=1), draw(24, seed=2)
        theirs.load_state_dict(
            {"weight": torch.from_numpy(draw(24, seed=1)), "bias": torch.from_numpy(draw(24, seed=2))}
        )
    x = 3 * draw(2, 5, 24) + 1
    assert_close(ours(jnp.asarray(x)), theirs(torch.from_numpy(x)), relative=1e-6)


def test_rms_norm():
    ours, theirs = RMSNorm(24, eps=1e-3), torch.nn.RMSNorm(24, 1e-3)
    ours.scale[...] = draw(24, seed=1)
    theirs.load_state_dict({"weight": torch.from_numpy(draw(24, seed=1))})
    x = draw(2, 5, 24)
    assert_close(ours(jnp.asarray(x)), theirs(torch.from_numpy(x)), relative=1e-6)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_statistics_are_in_float32(norm):
    """A large common offset leaves nothing of the variance where it is taken in bfloat16."""
    x = jnp.asarray(draw(4, 512) + 30, jnp.bfloat16)
    found = norm(512, eps=1e-6, dtype=jnp.bfloat16)(x)
    assert found.dtype == jnp.bfloat16
    exact = norm(512, eps=1e-6)(x.astype(jnp.float32))
    assert relative_error(found.astype(jnp.float32), exact) < 2**-8


@pytest.mark.parametrize("bias", [True, False])
def test_linear_computes_in_the_dtype_of_its_input(bias):
    layer = Linear(6, 4, bias=bias, rngs=nnx.Rngs(0))
    assert (layer.bias is not None) == bias
    x = draw(2, 3, 6)
    assert_close(layer(jnp.asarray(x)), x @ np.asarray(layer.kernel[...]), relative=1e-6)  # biases start at zero
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.abs(layer.kernel[...]).max() <= 6**-0.5


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 0), (False, 1), (True, 0.5)])
def test_timestep_sinusoid(flip, shift):
    t = np.array([0.0, 1.0, 12.75, 999.0], np.float32)
    expected = get_timestep_embedding(torch.from_numpy(t), 48, flip, shift)
    assert_close(timestep_sinusoid(jnp.asarray(t), 48, flip_sin_to_cos=flip, freq_shift=shift), expected, relative=1e-4)
    whole = timestep_sinusoid(jnp.array([0, 1]), 48, flip_sin_to_cos=flip, freq_shift=shift)
    assert_close(whole, expected[:2], relative=1e-4)


def test_timestep_embedding_is_linear_silu_linear():
    layer, x = TimestepEmbedding(6, 10, rngs=nnx.Rngs(0)), draw(2, 6)
    hidden = x @ np.asarray(layer.linear_1.kernel[...])
    expected = hidden / (1 + np.exp(-hidden)) @ np.asarray(layer.linear_2.kernel[...])
    assert_close(layer(jnp.asarray(x)), expected, relative=1e-6)


def test_sincos_3d():
    found = sincos_3d(np.arange(3) / 0.5, np.arange(4) / 1.875, np.arange(5) / 1.875, 48)
    expected = get_3d_sincos_pos_embed(48, (5, 4), 3, 1.875, 0.5, output_type="pt").flatten(0, 1)
    assert_close(found, expected, relative=1e-5)


def test_rotation_turns_by_angle_and_depends_on_distance_alone():
    """The scalar product of two rotated vectors is a function of the difference of their positions."""
    q, k = jnp.asarray(draw(1, 1, 1, 16)), jnp.asarray(draw(1, 1, 1, 16, seed=1))

    def product(first, second):
        tables = [rope.table_3d(*(np.array([float(x)]) for x in position), 16) for position in (first, second)]
        return float((rope.rotate(q, tables[0]) * rope.rotate(k, tables[1])).sum())

    expected = product((0, 0, 0), (2, 1, 5))
    assert product((4, 7, 3), (6, 8, 8)) == pytest.approx(expected, rel=1e-4)
    for moved in ((3, 1, 5), (2, 2, 5), (2, 1, 4)):
        assert abs(product((0, 0, 0), moved) - expected) > 1e-3 * abs(expected)
    assert rope.rotate(q.astype(jnp.bfloat16), rope.table_3d(*np.zeros((3, 1)), 16)).dtype == jnp.bfloat16


# MARK: modulation


@pytest.fixture
def modulated():
    """(layer with an adapter, tokens, time): 2 words, 3 reference tokens, 4 video tokens."""
    from sdv_jax.nn.linear import LoRA

    layer = AdaLayerNormZero(5, 8, eps=1e-5, affine=True, rngs=nnx.Rngs(0))
    layer.linear.lora = LoRA(layer.linear.kernel[...], rank=2, alpha=2.0, rngs=nnx.Rngs(1))
    layer.linear.lora.b[...] = draw(2, 48)
    return layer, jnp.asarray(draw(2, 9, 8)), jnp.asarray(draw(2, 5, seed=1))


def test_an_adapter_of_the_modulation_reaches_the_streams_its_mode_says(modulated):
    layer, x, time = modulated
    found = {mode: layer(x, time, lengths=(2, 3), adaln_lora=mode)[0] for mode in ("all", "reference")}
    layer.linear.lora = nnx.data(None)
    base = layer(x, time, lengths=(2, 3), adaln_lora="all")[0]
    parts = {"words": slice(0, 2), "reference": slice(2, 5), "video": slice(5, 9)}
    for mode, part in ((m, p) for m in found for p in parts):
        changed = not np.array_equal(found[mode][:, parts[part]], base[:, parts[part]])
        assert changed == (mode == "all" or part == "reference"), (mode, part)
    np.testing.assert_allclose(found["reference"][:, 2:5], found["all"][:, 2:5], rtol=1e-6)


def test_reference_tokens_take_the_modulation_of_the_video(modulated):
    layer, x, time = modulated
    same = x.at[:, 2:6].set(x[:, 2:3])  # three reference tokens and one of the video, all alike
    y, gates = layer(same, time, lengths=(2, 3), adaln_lora="all")
    np.testing.assert_array_equal(y[:, 2:5], jnp.repeat(y[:, 5:6], 3, axis=1))
    assert relative_error(layer(same, time, lengths=(3, 2), adaln_lora="all")[0][:, 2], y[:, 2]) > 1e-3
    update = gated(jnp.zeros_like(x), jnp.ones_like(x), gates, lengths=(2, 3))
    np.testing.assert_array_equal(update[:, 0], gates[0][:, 0])
    np.testing.assert_array_equal(update[:, 2], gates[1][:, 0])


def test_gates_per_stream(modulated):
    layer, x, time = modulated
    _, gates = layer(x, time, lengths=(2, 3), adaln_lora="reference")
    update = gated(x, jnp.ones_like(x), gates, lengths=(2, 3)) - x
    for part, gate in zip((slice(0, 2), slice(2, 5), slice(5, 9)), gates, strict=True):
        np.testing.assert_allclose(update[:, part], jnp.broadcast_to(gate, update[:, part].shape), atol=1e-6)
    assert len({float(jnp.sum(gate)) for gate in gates}) == 3
    assert jax.tree.leaves(gates)[0].shape == (2, 1, 8)
