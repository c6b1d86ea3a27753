"""A linear layer with a slot for a low-rank adapter.

The slot is part of the layer, not a wrapper around it: base parameter paths are the same with and without an adapter,
so conversion, sharding and checkpoints never need to know whether one is there.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.typing import Array, Float, Key


class LoRA(nnx.Module):
    """The low-rank update x A B · scale of one linear layer, or of a stack of them (leading axes of the kernel).

    `key` is empty outside of training. While it holds a key, the input of A is dropped out with rate `dropout`, as PEFT
    does.
    """

    def __init__(self, kernel: Float[Array, "*l i o"], *, rank: int, alpha: float, dropout: float = 0.0,
                 rngs: nnx.Rngs):
        *lead, fan_in, fan_out = kernel.shape
        # PEFT's start: A uniform in ±1/sqrt(fan_in) (Kaiming with a = sqrt 5), B zero: nothing changes at first.
        bound = fan_in**-0.5
        self.a = nnx.LoRAParam(jax.random.uniform(rngs.params(), (*lead, fan_in, rank), jnp.float32, -bound, bound))
        self.b = nnx.LoRAParam(jnp.zeros((*lead, rank, fan_out), jnp.float32))
        self.scale = alpha / rank
        self.dropout = dropout
        self.key = nnx.data(None)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        if self.key is not None and self.dropout > 0:
            x = _dropout(x, self.dropout, self.key[...])
        low = x @ self.a[...].astype(x.dtype)
        return (low @ self.b[...].astype(x.dtype)) * self.scale


class Linear(nnx.Module):
    """y = x W + b, computed in the dtype of x; W is [in, out]."""

    def __init__(self, fan_in: int, fan_out: int, *, bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs):
        bound = fan_in**-0.5
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (fan_in, fan_out), dtype, -bound, bound))
        self.bias = nnx.Param(jnp.zeros((fan_out,), dtype)) if bias else nnx.data(None)
        self.lora = nnx.data(None)

    def __call__(self, x: Float[Array, "*b i"], *, adapt: bool = True) -> Float[Array, "*b o"]:
        """`adapt=False` leaves the adapter out, for streams that it must not touch."""
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y + self.lora(x) if adapt and self.lora is not None else y


def _dropout(x: Array, rate: float, key: Key[Array, ""]) -> Array:
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
