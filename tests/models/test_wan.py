"""What Wan's transformer refuses, and that time is never laid out per token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdv_jax.errors import UserError
from sdv_jax.models.wan.transformer import ReferencePlacement, Transformer, TransformerConfig, positions

TINY = dict(num_attention_heads=2, attention_head_dim=20, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
            ffn_dim=40, num_layers=1, rope_max_seq_len=16)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"qk_norm": None}, "qk_norm = None"),
        ({"patch_size": (2, 2)}, "patch_size = (2, 2)"),
        ({"patch_size": (1, 0, 2)}, "patch_size = 0"),
        ({"attention_head_dim": 7}, "attention_head_dim = 7"),
        ({"freq_dim": 5}, "freq_dim = 5"),
        ({"eps": 0.0}, "eps = 0.0"),
        ({"num_layers": True}, "num_layers = True"),
    ],
)
def test_configs_that_are_not_wans(changes, told):
    with pytest.raises(UserError) as error:
        TransformerConfig(**TINY | changes)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_keys_of_an_image_encoder_that_is_not_there_mean_nothing():
    """A repackaged Wan2.2-TI2V-5B states them."""
    config = TransformerConfig(**TINY, image_dim=1280, added_kv_proj_dim=5120)
    assert nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert TransformerConfig(**TINY | {"out_channels": None}).out_channels == 4


@pytest.mark.parametrize(
    "wrong", [{"placement": "beside"}, {"offset": -1}, {"offset": 1.5}, {"shift": -1.0}, {"shift": float("nan")}]
)
def test_placements_that_are_none(wrong):
    with pytest.raises(UserError, match=f"reference: {next(iter(wrong))} = "):
        ReferencePlacement(**wrong)


def test_positions_beyond_the_table_are_told():
    config = TransformerConfig(**TINY)
    with pytest.raises(UserError, match="reach position 17; expected at most 16"):
        positions(config, (17, 2, 2))
    with pytest.raises(UserError, match="and 1 references reach position 18"):
        positions(config, (2, 2, 9), references=1)


def test_latents_that_do_not_fill_patches():
    model = Transformer(TransformerConfig(**TINY), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="latents have 5 columns; expected a multiple of 2"):
        model(jnp.zeros((1, 1, 4, 5, 4)), jnp.zeros((1, 3, 12)), jnp.zeros(1))


def test_modulation_is_computed_per_value_of_time():
    """No array of the program has an axis of tokens beside one of six modulations."""
    config = TransformerConfig(**TINY | {"rope_max_seq_len": 64})
    model = Transformer(config, rngs=nnx.Rngs(0))
    latents, picture = jnp.zeros((1, 5, 6, 14, 4)), jnp.zeros((1, 1, 6, 14, 4))
    tokens = 6 * 21

    def call(x, reference):
        return model(x, jnp.zeros((1, 3, 12)), jnp.ones(1), reference=reference, image=reference)

    shapes = {tuple(v.aval.shape) for eqn in _equations(jax.make_jaxpr(call)(latents, picture).jaxpr)
              for v in eqn.outvars}  # fmt: skip
    assert any(tokens in shape for shape in shapes), "tokens have another number"
    assert not [s for s in shapes if tokens in s and (6 in s or 6 * config.width in s)]


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _equations(getattr(inner, "jaxpr", inner))


def test_bfloat16_is_near_float32():
    graph, state = nnx.split(Transformer(TransformerConfig(**TINY), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 2, 4, 6, 4), (1, 3, 12))]
    exact = nnx.merge(graph, state)(*inputs, jnp.array([300.0]))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    rough = nnx.merge(graph, half)(*(x.astype(jnp.bfloat16) for x in inputs), jnp.array([300.0]))
    assert rough.dtype == jnp.bfloat16
    assert np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()
