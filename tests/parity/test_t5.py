"""The T5 encoder against transformers' `T5EncoderModel` on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from sdv_jax.models.text.t5 import T5Config, T5Encoder, relative_buckets
from tests.parity.compare import assert_close, relative_error

CONFIGS = {
    "square": T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4),
    "odd heads, wide inner": T5Config(vocab_size=50, d_model=40, d_kv=24, d_ff=72, num_layers=2, num_heads=3),
    "odd d_kv, narrow inner, few buckets": T5Config(
        vocab_size=64,
        d_model=56,
        d_kv=5,
        d_ff=33,
        num_layers=4,
        num_heads=7,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=50,
        layer_norm_epsilon=1e-5,
    ),
}


def peer(config: T5Config, seed: int = 0) -> transformers.T5EncoderModel:
    """transformers' encoder, its weights made lively enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    raw = {name: getattr(config, name) for name in config.__dataclass_fields__}
    model = transformers.T5EncoderModel(transformers.T5Config(**raw, dropout_rate=0.0)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith((".q.weight", ".k.weight")):
                weight.normal_(std=config.d_model**-0.5 * config.d_kv**-0.25)
            elif "relative_attention_bias" in name:
                weight.normal_()
    return model


def ours(config: T5Config, model: transformers.T5EncoderModel, dtype=jnp.float32) -> T5Encoder:
    """Our encoder with the peer's weights, copied by hand so that the conversion rules are not part of the test."""
    weights = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}

    def linear(name):
        return np.stack([weights[f"encoder.block.{i}.layer.{name}.weight"].T for i in range(config.num_layers)])

    encoder = nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0), dtype=dtype))  # nothing of it stays at random
    blocks = encoder.blocks
    pairs = [
        (encoder.shared.embedding, weights["shared.weight"]),
        (
            encoder.relative_attention_bias.embedding,
            weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
        ),
        (encoder.final_norm.scale, weights["encoder.final_layer_norm.weight"]),
        (blocks.norm1.scale, linear("0.layer_norm")),
        (blocks.norm2.scale, linear("1.layer_norm")),
        *((getattr(blocks.attn, n).kernel, linear(f"0.SelfAttention.{n}")) for n in "qkvo"),
        *((getattr(blocks.ff, n).kernel, linear(f"1.DenseReluDense.{n}")) for n in ("wi_0", "wi_1", "wo")),
    ]
    for param, value in pairs:
        assert param.shape == value.shape
        param.set_value(jnp.asarray(value, dtype))
    assert len(pairs) == len(nnx.to_flat_state(nnx.state(encoder, nnx.Param)))
    return encoder


encode = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))


def inputs(config: T5Config, length: int, masked: bool):
    rng = np.random.default_rng(length)
    ids = rng.integers(0, config.vocab_size, (2, length))
    mask = np.ones_like(ids)
    if masked:
        mask[0, max(1, length // 3) :] = 0
        mask[1, max(1, length - 2) :] = 0
    return ids, mask


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("length", [1, 17, 226])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float32(config, length, masked):
    model = peer(config)
    ids, mask = inputs(config, length, masked)
    with torch.no_grad():
        expected = model(torch.tensor(ids), attention_mask=torch.tensor(mask) if masked else None)[0]
    found = encode(ours(config, model), jnp.asarray(ids), jnp.asarray(mask) if masked else None)
    assert_close(found, expected, relative=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(config):
    model = peer(config).to(torch.bfloat16).float()  # one set of weights, exact in both precisions
    ids, mask = inputs(config, 40, True)
    with torch.no_grad():
        exact = model(torch.tensor(ids), attention_mask=torch.tensor(mask))[0]
        rounded = model.to(torch.bfloat16)(torch.tensor(ids), attention_mask=torch.tensor(mask))[0]
    found = encode(ours(config, model, jnp.bfloat16), jnp.asarray(ids), jnp.asarray(mask))
    assert found.dtype == jnp.bfloat16
    assert relative_error(found, exact) <= 2 * relative_error(rounded, exact)


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (12, 50), (8, 16), (64, 300), (5, 9)])
def test_every_distance_falls_in_transformers_bucket(buckets, max_distance):
    distance = np.arange(-2 * max_distance, 2 * max_distance + 1)
    expected = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        torch.tensor(distance), num_buckets=buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(relative_buckets(distance, buckets=buckets, max_distance=max_distance), expected)
