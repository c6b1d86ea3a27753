"""A stack of blocks against the same blocks in a Python loop, and NNX without its graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.nn.linear import Linear
from sdv_jax.nn.stack import scan_blocks, stack
from tests.parity.compare import assert_close
from tests.tiny_transformer import NAMES, fill_adapter, inputs, make, run

DEPTH = 4


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = Linear(6, 10, rngs=rngs), Linear(10, 6, bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


@pytest.fixture
def blocks():
    return stack(Block, DEPTH, rngs=nnx.Rngs(0))


def forward(blocks, x):
    return scan_blocks(blocks, x, lambda block, x: block(x))


def loop(blocks, x):
    for i in range(DEPTH):
        x = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)(x)
    return x


def test_leaves_have_a_layer_axis_and_start_unequal(blocks):
    shapes = {".".join(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(blocks))}
    assert shapes == {"up.kernel": (DEPTH, 6, 10), "up.bias": (DEPTH, 10), "down.kernel": (DEPTH, 10, 6)}
    kernels = np.asarray(blocks.up.kernel[...])
    assert len(np.unique(kernels.reshape(DEPTH, -1), axis=0)) == DEPTH


def test_outputs_and_gradients_equal_a_loop(blocks):
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))
    assert_close(forward(blocks, x), loop(blocks, x), relative=1e-6)
    graph, state = nnx.split(blocks)

    def gradient(apply):
        return jax.grad(lambda state: jnp.square(apply(nnx.merge(graph, state), x)).sum())(state)

    for ours, expected in zip(*(jax.tree.leaves(gradient(apply)) for apply in (forward, loop)), strict=True):
        assert_close(ours, expected, relative=1e-5)


def test_order_matters(blocks):
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))
    reverse = jax.tree.map(lambda leaf: leaf[::-1], blocks)
    assert not np.allclose(forward(reverse, x), forward(blocks, x), atol=1e-4)


def test_the_program_does_not_grow_with_depth():
    def lines(depth):
        x = jnp.zeros((2, 5, 6))
        blocks = nnx.eval_shape(lambda: stack(Block, depth, rngs=nnx.Rngs(0)))
        return len(jax.jit(forward).lower(blocks, x).as_text().splitlines())

    assert lines(2) == lines(20)


def test_without_nnx_graph_mode():
    """The models need nothing of NNX but modules as trees: its graph machinery can be off."""
    given = inputs(references=1)
    model = make()
    expected = run(model, given)

    def everything():
        model = make()
        np.testing.assert_array_equal(run(model, given), expected)
        lora.add(model, lora.LoraConfig(rank=2, targets=("to_q", "proj")), names=NAMES, rngs=nnx.Rngs(0))
        fill_adapter(model)
        graph, adapter, rest = lora.split(model)
        loss = jax.jit(lambda adapter: jnp.square(run(nnx.merge(graph, adapter, rest), given)).mean())
        return jax.value_and_grad(loss)(adapter)

    with_graph = everything()
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    try:
        without = everything()
    finally:
        nnx.set_graph_mode(True)
        nnx.set_graph_updates(True)
    for ours, usual in zip(jax.tree.leaves(without), jax.tree.leaves(with_graph), strict=True):
        np.testing.assert_array_equal(ours, usual)
