"""The UMT5 encoder on its own: sizes, paths, configs, and its table of names against the published tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdv_jax.checkpoints.engine import leaf_shapes, leaves_of, problems_between
from sdv_jax.checkpoints.rules import umt5
from sdv_jax.errors import UserError
from sdv_jax.models.text.t5 import T5Config
from sdv_jax.models.text.umt5 import UMT5Config, UMT5Encoder
from tests import published

WAN = [name for name in published.CHECKPOINTS if name.startswith("Wan")]
XXL = published.config(WAN[0], "text_encoder")
TINY = UMT5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)


def abstract(config: UMT5Config, dtype=jnp.float32) -> UMT5Encoder:
    return nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0), dtype=dtype))


def shapes(encoder: UMT5Encoder) -> dict[str, tuple[int, ...]]:
    return leaf_shapes(nnx.state(encoder, nnx.Param))


@pytest.mark.parametrize("checkpoint", WAN)
def test_published_configs_are_the_default(checkpoint):
    assert UMT5Config.from_json(published.config(checkpoint, "text_encoder")) == UMT5Config()


def test_the_published_encoder_has_the_published_size():
    encoder = abstract(UMT5Config(), jnp.bfloat16)
    leaves = jax.tree.leaves(nnx.state(encoder, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == 5_680_910_336
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    out = nnx.eval_shape(lambda model, ids, mask: model(ids, mask), encoder, ids, ids)
    assert out.shape == (2, 512, 4096) and out.dtype == jnp.bfloat16


def test_parameter_paths_are_the_documented_ones():
    assert shapes(abstract(TINY)) == {
        "shared.embedding": (20, 16),
        "blocks.relative_attention_bias.embedding": (2, 32, 2),
        "blocks.norm1.scale": (2, 16),
        "blocks.attn.q.kernel": (2, 16, 16),
        "blocks.attn.k.kernel": (2, 16, 16),
        "blocks.attn.v.kernel": (2, 16, 16),
        "blocks.attn.o.kernel": (2, 16, 16),
        "blocks.norm2.scale": (2, 16),
        "blocks.ff.wi_0.kernel": (2, 16, 24),
        "blocks.ff.wi_1.kernel": (2, 16, 24),
        "blocks.ff.wo.kernel": (2, 24, 16),
        "final_norm.scale": (16,),
    }


def test_every_published_tensor_has_one_leaf_and_the_right_shape():
    rules = umt5.ENCODER
    leaves = leaves_of(shapes(abstract(UMT5Config())), rules)
    tensors = published.tensors(WAN[0], "text_encoder")
    for alias, name in rules.aliases.items():
        assert tensors.pop(alias) == tensors[name]
    assert problems_between(leaves, tensors, rules) == []
    names = [name for leaf in leaves for name in leaf.names]
    assert len(names) == len(set(names)) == len(tensors) == 242


def test_published_names_lead_to_our_leaves_and_back():
    leaves = {leaf.path: leaf for leaf in leaves_of(shapes(abstract(UMT5Config())), umt5.ENCODER)}
    for name in published.tensors(WAN[0], "text_encoder").keys() - umt5.ENCODER.aliases.keys():
        ((path, layer),) = [found for rule in umt5.ENCODER.table if (found := rule.path(name))]
        assert leaves[path].names[layer or 0] == name


def test_masked_tokens_are_seen_by_none():
    encoder = jax.jit(lambda: UMT5Encoder(TINY, rngs=nnx.Rngs(0)))()
    encode = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))
    ids, other = jnp.array([[3, 4, 5, 6]]), jnp.array([[3, 4, 9, 9]])
    some, none = jnp.array([[1, 1, 0, 0]]), jnp.zeros((1, 4), jnp.int32)
    np.testing.assert_array_equal(encode(encoder, ids, some)[0, :2], encode(encoder, other, some)[0, :2])
    assert np.isfinite(encode(encoder, ids, none)).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "t5"}, "model_type is 't5', expected 'umt5'"),
        ({"d_model": None}, "missing d_model; expected a UMT5 config.json"),
        ({"feed_forward_proj": "relu"}, "UMT5 config: feed_forward_proj is 'relu'"),
        ({"num_layers": 0}, "UMT5 config: num_layers = 0; expected a whole number >= 1"),
        ({"relative_attention_num_buckets": 3}, "UMT5 config: relative_attention_num_buckets 3"),
    ],
)
def test_refused_configs(change, message):
    raw = {key: value for key, value in (XXL | change).items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        UMT5Config.from_json(raw)
    assert "\n" not in str(caught.value)


def test_what_an_older_config_leaves_out():
    raw = {key: value for key, value in XXL.items() if key not in ("feed_forward_proj", "layer_norm_epsilon")}
    assert UMT5Config.from_json(raw) == UMT5Config()
    with pytest.raises(UserError, match="expected 't5'"):
        T5Config.from_json(raw)
