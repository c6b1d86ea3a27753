"""Attention: the only file that names a kernel. Everything else calls `attention`."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sdv_jax.typing import Array, Float

OUTPUT = "attention"  # the name by which `stack.remat` keeps what attention returns

# Scores of one block of queries that may exist at once in the plain form: 2**27 float32 numbers are 512 MB.
_SCORES_AT_ONCE = 2**27
# On a CPU: more scores than this (8 MB) leave the caches between the two products, and heads are taken one by one.
_SCORES_IN_CACHE = 2**21
# The widest head of cuDNN's flash kernel on every GPU that has it; a multiple of 8 besides.
_FLASH_HEAD = 128


def attention(q: Float[Array, "b n heads k"], k: Float[Array, "b m heads k"], v: Float[Array, "b m heads k"], *,
              bias: Float[Array, "#b heads #n m"] | None = None,
              scale: float | None = None) -> Float[Array, "b n heads k"]:
    """softmax(q kᵀ · scale + bias) v, bidirectional; `scale` defaults to 1/sqrt(head dimension). Softmax is in float32.

    On a GPU half-precision inputs without bias go to cuDNN's flash kernel, unless a head is too wide for it. Elsewhere
    the plain form is used: over blocks of queries where the whole score matrix would be too large, and on a CPU without
    a mesh head by head.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    flash = bias is None and q.dtype in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "gpu"
    if flash and q.shape[-1] <= _FLASH_HEAD and q.shape[-1] % 8 == 0:
        return checkpoint_name(jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn"), OUTPUT)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    large = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > _SCORES_IN_CACHE
    if bias is not None:
        out = _plain(q, k, v, bias, scale)
    elif large and jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty:
        out = _by_heads(q, k, v, scale)
    else:
        out = _by_queries(q, k, v, scale)
    return checkpoint_name(jnp.swapaxes(out, 1, 2), OUTPUT)


def _by_heads(q: Float[Array, "b heads n k"], k: Float[Array, "b heads m k"], v: Float[Array, "b heads m k"],
              scale: float) -> Float[Array, "b heads n k"]:
    """One head of one example at a time: XLA's CPU backend is fast at float32 products of two matrices, not at batches.

    The scores are computed again in the backward pass, which costs less than writing and reading them.
    """
    heads = tuple(x.astype(jnp.float32).reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = jax.lax.map(jax.checkpoint(lambda head: _by_queries(*head, scale)), heads)
    return out.reshape(q.shape).astype(q.dtype)


def _by_queries(q: Float[Array, "*lead n k"], k: Float[Array, "*lead m k"], v: Float[Array, "*lead m k"],
                scale: float) -> Float[Array, "*lead n k"]:
    """All at once, or block by block over the queries where the scores would be too many."""
    n = q.shape[-2]
    blocks = -(-math.prod(q.shape[:-1]) * k.shape[-2] // _SCORES_AT_ONCE)
    if blocks == 1:
        return _plain(q, k, v, None, scale)
    size = -(-n // blocks)
    padded = jnp.pad(q, [(0, 0)] * (q.ndim - 2) + [(0, -n % size), (0, 0)])
    queries = jnp.moveaxis(padded.reshape(*q.shape[:-2], -1, size, q.shape[-1]), -3, 0)
    out = jax.lax.map(jax.checkpoint(lambda block: _plain(block, k, v, None, scale)), queries)
    return jnp.moveaxis(out, 0, -3).reshape(padded.shape)[..., :n, :]


def _plain(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> Array:
    keys = jnp.swapaxes(k, -1, -2)
    scores = jnp.matmul(q * jnp.asarray(scale, q.dtype), keys, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v
