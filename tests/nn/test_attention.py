"""Attention: against torch, and the form that goes block by block over the queries against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdv_jax.nn import attention as module
from sdv_jax.nn.attention import attention
from tests.parity.compare import assert_close, relative_error


def draw(n: int = 13, m: int = 9, *, dtype=jnp.float32):
    rng = np.random.default_rng(n)
    return [jnp.asarray(rng.standard_normal((2, size, 3, 8)), dtype) for size in (n, m, m)]


def peer(q, k, v, **options):
    """torch's own attention on [b, n, heads, k]."""
    q, k, v = (torch.from_numpy(np.asarray(x, np.float32)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def loss_and_gradients(q, k, v):
    weights = jnp.arange(q.size, dtype=jnp.float32).reshape(q.shape) / q.size
    return jax.value_and_grad(lambda *qkv: (attention(*qkv) * weights).sum(), argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("scale", [None, 1.0, 0.2])
def test_against_torch(scale):
    q, k, v = draw()
    assert_close(attention(q, k, v, scale=scale), peer(q, k, v, scale=scale), relative=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 13, 9), (2, 3, 1, 9)])
def test_bias_against_torch(shape):
    q, k, v = draw()
    bias = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = peer(q, k, v, attn_mask=torch.from_numpy(bias).expand(2, 3, 13, 9))
    assert_close(attention(q, k, v, bias=jnp.asarray(bias)), expected, relative=1e-6)


@pytest.mark.parametrize("at_once", [1, 2 * 3 * 9, 2 * 3 * 9 * 4, 2 * 3 * 9 * 12])
def test_blocks_of_queries_equal_all_at_once(monkeypatch, at_once):
    """Any number of blocks, also where the last one is not full; and the same gradients."""
    q, k, v = draw()
    expected, gradients = loss_and_gradients(q, k, v)
    calls = []
    plain = module._plain
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(module, "_plain", lambda q, *rest: calls.append(q.shape[-2]) or plain(q, *rest))
    found, their_gradients = loss_and_gradients(q, k, v)
    assert calls and max(calls) < 13  # it did go block by block
    assert_close(found, expected, relative=1e-6)
    for ours, whole in zip(their_gradients, gradients, strict=True):
        assert_close(ours, whole, relative=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_head_by_head_equals_all_at_once(monkeypatch, dtype):
    """The form of a CPU for large inputs; and the same gradients."""
    q, k, v = draw(dtype=dtype)
    expected, gradients = loss_and_gradients(q, k, v)
    calls = []
    by_queries = module._by_queries
    monkeypatch.setattr(module, "_SCORES_IN_CACHE", 1)
    monkeypatch.setattr(module, "_by_queries", lambda q, *rest: calls.append(q.shape) or by_queries(q, *rest))
    assert attention(q, k, v).dtype == dtype
    found, their_gradients = loss_and_gradients(q, k, v)
    assert set(calls) == {(13, 8)}  # one head of one example
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-7
    assert_close(found, expected, relative=tolerance)
    for ours, whole in zip(their_gradients, gradients, strict=True):
        assert_close(ours.astype(jnp.float32), whole.astype(jnp.float32), relative=10 * tolerance)


def test_softmax_is_in_float32():
    """In bfloat16 the error is that of the inputs' and outputs' rounding, not of exponentials summed in bfloat16."""
    q, k, v = draw(64, 2000, dtype=jnp.bfloat16)
    v = v + 3
    found = attention(q, k, v)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found.astype(jnp.float32), peer(q, k, v)) < 2**-7
