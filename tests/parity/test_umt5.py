"""The UMT5 encoder against transformers' UMT5EncoderModel."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sdv_jax.models.text.umt5 import UMT5Config, UMT5Encoder  # noqa: E402
from tests.parity.compare import assert_close, relative_error  # noqa: E402
from tests.parity.test_t5 import encode, inputs  # noqa: E402

CONFIGS = {
    "square": UMT5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4),
    "odd heads, wide inner": UMT5Config(vocab_size=50, d_model=40, d_kv=24, d_ff=72, num_layers=2, num_heads=3),
    "odd d_kv, narrow inner, few buckets": UMT5Config(
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


def peer(config: UMT5Config, seed: int = 0):
    """transformers' encoder, lively enough for attention to be far from uniform and for the tables to differ."""
    torch.manual_seed(seed)
    raw = {name: getattr(config, name) for name in config.__dataclass_fields__}
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**raw, dropout_rate=0.0)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith((".q.weight", ".k.weight")):
                weight.normal_(std=config.d_model**-0.5 * config.d_kv**-0.25)
            elif "relative_attention_bias" in name:
                weight.normal_()
    return model


def ours(config: UMT5Config, model, dtype=jnp.float32) -> UMT5Encoder:
    """Our encoder with the peer's weights, copied by hand so that the conversion rules are not part of the test."""
    weights = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}

    def stacked(name):
        return np.stack([weights[f"encoder.block.{i}.layer.{name}.weight"] for i in range(config.num_layers)])

    def linear(name):
        return stacked(name).transpose(0, 2, 1)

    encoder = nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0), dtype=dtype))  # nothing stays at random
    blocks = encoder.blocks
    pairs = [
        (encoder.shared.embedding, weights["shared.weight"]),
        (encoder.final_norm.scale, weights["encoder.final_layer_norm.weight"]),
        (blocks.relative_attention_bias.embedding, stacked("0.SelfAttention.relative_attention_bias")),
        (blocks.norm1.scale, stacked("0.layer_norm")),
        (blocks.norm2.scale, stacked("1.layer_norm")),
        *((getattr(blocks.attn, n).kernel, linear(f"0.SelfAttention.{n}")) for n in "qkvo"),
        *((getattr(blocks.ff, n).kernel, linear(f"1.DenseReluDense.{n}")) for n in ("wi_0", "wi_1", "wo")),
    ]
    for param, value in pairs:
        assert param.shape == value.shape
        param.set_value(jnp.asarray(value, dtype))
    assert len(pairs) == len(nnx.to_flat_state(nnx.state(encoder, nnx.Param)))
    return encoder


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("length", [1, 17, 64])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float32(config, length, masked):
    model = peer(config)
    ids, mask = inputs(config, length, masked)
    with torch.no_grad():
        expected = model(torch.tensor(ids), attention_mask=torch.tensor(mask) if masked else None)[0]
    found = encode(ours(config, model), jnp.asarray(ids), jnp.asarray(mask) if masked else None)
    assert_close(found, expected, relative=1e-4)


def test_float32_at_the_length_of_wan():
    config = CONFIGS["square"]
    model = peer(config)
    ids, mask = inputs(config, 512, True)
    with torch.no_grad():
        expected = model(torch.tensor(ids), attention_mask=torch.tensor(mask))[0]
    assert_close(encode(ours(config, model), jnp.asarray(ids), jnp.asarray(mask)), expected, relative=1e-4)


def test_every_layer_reads_its_own_table():
    """With one layer's table changed, both models change, and alike."""
    config = CONFIGS["square"]
    model = peer(config)
    ids, mask = inputs(config, 17, True)
    before = encode(ours(config, model), jnp.asarray(ids), jnp.asarray(mask))
    for layer in range(config.num_layers):
        with torch.no_grad():
            model.encoder.block[layer].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
            expected = model(torch.tensor(ids), attention_mask=torch.tensor(mask))[0]
        found = encode(ours(config, model), jnp.asarray(ids), jnp.asarray(mask))
        assert_close(found, expected, relative=1e-4)
        assert relative_error(before, expected) > 1e-2
        before = found


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
