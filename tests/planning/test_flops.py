import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sdv_jax.nn.attention import attention
from sdv_jax.planning import flops
from tests.tiny_transformer import make


def test_products_convolutions_and_loops_are_counted():
    x, w = jnp.ones((3, 5, 7)), jnp.ones((7, 11))
    assert flops.count(lambda x, w: x @ w, x, w) == (2 * 15 * 7 * 11, 0)
    assert flops.count(lambda x: x @ jnp.swapaxes(x, 1, 2), x) == (0, 2 * 3 * 5 * 5 * 7)
    looped = flops.count(lambda x, w: jax.lax.scan(lambda c, _: (c, jax.checkpoint(jnp.dot)(c, w)), x, None, 4), x, w)
    assert looped == (4 * 2 * 15 * 7 * 11, 0)
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 6))
    numbers = ("NHWC", "HWIO", "NHWC")
    found = flops.count(lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers),
                        image, kernel)  # fmt: skip
    assert found == (2 * 2 * 64 * 6 * 27, 0)


def test_attention_is_two_products_of_activations():
    q, k = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 10, 4, 8))
    assert flops.count(attention, q, k, k) == (0, 4 * 2 * 4 * 6 * 10 * 8)


def test_a_transformer_costs_what_its_shapes_say():
    """Per token 2 · (4 d² + 8 d²) in a block's linears, 4 n d for attention; the rest is small and exact too."""
    model = make()
    graph, state = nnx.split(model)
    c = model.config
    width, layers = c.num_attention_heads * c.attention_head_dim, c.num_layers
    latents = jnp.ones((1, 2, 8, 8, c.in_channels))
    text = jnp.ones((1, c.max_text_seq_length, c.text_embed_dim))
    found = flops.count(lambda s: nnx.merge(graph, s)(latents, text, jnp.zeros(1)), state)
    tokens = 2 * 16 + c.max_text_seq_length
    assert found[1] == layers * 4 * tokens**2 * width
    assert found[0] >= layers * 2 * tokens * 12 * width**2
    compiled = jax.jit(lambda x, w: x @ w).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile().cost_analysis()
    assert flops.count(jnp.matmul, jnp.ones((64, 64)), jnp.ones((64, 64)))[0] == pytest.approx(compiled["flops"])
