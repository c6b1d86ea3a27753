"""Attention: the only file that names a kernel. Everything else calls `attention`."""

import jax
import jax.numpy as jnp

from sdv_jax.typing import Array, Float

# Scores of one block of queries that may exist at once in the plain form: 2**27 float32 numbers are 512 MB.
_SCORES_AT_ONCE = 2**27


def attention(q: Float[Array, "b n heads k"], k: Float[Array, "b m heads k"], v: Float[Array, "b m heads k"], *,
              bias: Float[Array, "#b heads #n m"] | None = None,
              scale: float | None = None) -> Float[Array, "b n heads k"]:
    """softmax(q kᵀ · scale + bias) v, bidirectional; `scale` defaults to 1/sqrt(head dimension). Softmax is in float32.

    On a GPU half-precision inputs without bias go to cuDNN's flash kernel. Elsewhere the plain form is used, over
    blocks of queries where the whole score matrix would be too large.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if bias is None and q.dtype in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "gpu":
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    b, n, heads, _ = q.shape
    blocks = -(-b * heads * n * k.shape[1] // _SCORES_AT_ONCE)
    if blocks == 1 or bias is not None:
        return _plain(q, k, v, bias, scale)
    size = -(-n // blocks)
    blocks = -(-n // size)
    padded = jnp.pad(q, ((0, 0), (0, blocks * size - n), (0, 0), (0, 0)))
    queries = jnp.moveaxis(padded.reshape(b, blocks, size, heads, -1), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda block: _plain(block, k, v, None, scale)), queries)
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :n]


def _plain(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> Array:
    scores = jnp.einsum("bnhk,bmhk->bhnm", q * jnp.asarray(scale, q.dtype), k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    return jnp.einsum("bhnm,bmhk->bnhk", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
