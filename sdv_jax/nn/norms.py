"""Layer norm and RMS norm over the last axis. Statistics are taken in float32 whatever the dtype of the input."""

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.typing import Array, Float


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps), then scale and bias if `affine`."""

    def __init__(self, width: int, *, eps: float, affine: bool = True, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((width,), dtype)) if affine else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros((width,), dtype)) if affine else nnx.data(None)
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale."""

    def __init__(self, width: int, *, eps: float, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)
