import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sdv_jax.nn.attention import attention
from sdv_jax.planning import flops
from tests.tiny_transformer import make


def test_products_convolutions_and_loops_are_counted():
    x, w = jnp.ones((3, 5, 7)), jnp.ones((7, 11))
    assert flops.count(lambda w, x: x @ w, w, x) == (2 * 15 * 7 * 11,) * 2
    assert flops.count(lambda _, x: x @ jnp.swapaxes(x, 1, 2), (), x) == (2 * 3 * 5 * 5 * 7, 0)
    looped = flops.count(lambda w, x: jax.lax.scan(lambda c, _: (c, jax.checkpoint(jnp.dot)(c, w)), x, None, 4), w, x)
    assert looped == (4 * 2 * 15 * 7 * 11,) * 2
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 6))
    numbers = ("NHWC", "HWIO", "NHWC")
    found = flops.count(lambda k, x: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers),
                        kernel, image)  # fmt: skip
    assert found == (2 * 2 * 64 * 6 * 27,) * 2


def test_what_a_loop_carries_needs_a_gradient_where_a_turn_mixes_a_weight_in():
    w, x = jnp.ones((7, 7)), jnp.ones((3, 7))
    one = 2 * 3 * 7 * 7

    def scanned(w, frozen, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ frozen) + w, None), x, None, 4)[0]

    assert flops.count(scanned, jnp.ones(7), w, x) == (one * 4, one * 4)
    both = flops.count(lambda w, x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x), w, x)
    assert both == (one, 2 * one)
    branches = flops.count(lambda w, x: jax.lax.cond(x.sum() > 0, lambda x: x, lambda x: x @ w, x).sum(), w, x)
    assert branches == (one, one)


def test_attention_is_two_products_of_activations():
    q, k = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 10, 4, 8))
    assert flops.count(lambda q, k: attention(q, k, k), q, k) == (4 * 2 * 4 * 6 * 10 * 8, 2 * 2 * 2 * 4 * 6 * 10 * 8)


def test_a_transformer_costs_what_its_shapes_say():
    """Per token 2 · (4 d² + 8 d²) in a block's linears, 4 n d for attention; the rest is small. All trained: thrice."""
    model = make()
    graph, state = nnx.split(model)
    c = model.config
    width, layers = c.num_attention_heads * c.attention_head_dim, c.num_layers
    latents = jnp.ones((1, 2, 8, 8, c.in_channels))
    text = jnp.ones((1, c.max_text_seq_length, c.text_embed_dim))
    found = flops.count(lambda s: nnx.merge(graph, s)(latents, text, jnp.zeros(1)), state)
    tokens = 2 * 16 + c.max_text_seq_length
    products = layers * (4 * tokens**2 * width + 2 * tokens * 12 * width**2)
    assert products <= found[0] <= 1.5 * products
    assert 1.9 <= found[1] / found[0] <= 2
    compiled = jax.jit(lambda x, w: x @ w).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile().cost_analysis()
    assert flops.count(jnp.matmul, jnp.ones((64, 64)), jnp.ones((64, 64)))[0] == pytest.approx(compiled["flops"])
