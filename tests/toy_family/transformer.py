"""Predicts the flow of latents: patches of all frames, references first, in one sequence behind the text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from sdv_jax.models.config_check import check_numbers
from sdv_jax.nn.attention import attention
from sdv_jax.nn.embeddings import TimestepEmbedding, sincos_3d, timestep_sinusoid
from sdv_jax.nn.linear import Linear
from sdv_jax.nn.modulation import keep_tokens
from sdv_jax.nn.norms import LayerNorm
from sdv_jax.nn.stack import scan_blocks, stack
from sdv_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The keys of transformer/config.json."""

    in_channels: int = 4
    patch_size: int = 2
    num_layers: int = 2
    num_heads: int = 2
    width: int = 32
    text_dim: int = 16

    def __post_init__(self):
        check_numbers("transformer config", self)


class Transformer(nnx.Module):
    """References are frames before the clip, whose predictions are dropped."""

    def __init__(self, config: TransformerConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        c = self.config = config
        pixels = c.patch_size**2 * c.in_channels
        self.patch_embed = Linear(pixels, c.width, dtype=dtype, rngs=rngs)
        self.text_embed = Linear(c.text_dim, c.width, dtype=dtype, rngs=rngs)
        self.time_embed = TimestepEmbedding(c.width, c.width, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(c, dtype=dtype, rngs=rngs), c.num_layers, rngs=rngs)
        self.norm_out = LayerNorm(c.width, eps=1e-6, dtype=dtype)
        self.proj_out = Linear(c.width, pixels, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Float[Array, "b t h w c"], text: Float[Array, "b s e"],
                 timesteps: Int[Array, " b"] | Float[Array, " b"], *,
                 reference: Float[Array, "b k h w c"] | None = None,
                 reference_index: Int[Array, "b r"] | None = None) -> Float[Array, "b t h w c"]:
        dtype, patch = latents.dtype, self.config.patch_size
        frames = latents if reference is None else jnp.concatenate([reference.astype(dtype), latents], axis=1)
        x = rearrange(frames, "b t (h p) (w q) c -> b t h w (p q c)", p=patch, q=patch)
        t, h, w = x.shape[1:4]
        clip = latents.shape[1] * h * w
        places = sincos_3d(np.arange(t), np.arange(h), np.arange(w), self.config.width)
        x = self.patch_embed(rearrange(x, "b t h w d -> b (t h w) d")) + places.astype(dtype)
        if reference_index is not None:  # token drop
            x, _ = keep_tokens(x, (), reference_index, x.shape[1] - clip)
        time = timestep_sinusoid(timesteps, self.config.width, flip_sin_to_cos=True, freq_shift=0).astype(dtype)
        x = jnp.concatenate([self.text_embed(text.astype(dtype)), x], axis=1) + self.time_embed(time)[:, None]
        x = scan_blocks(self.blocks, x, lambda block, x: block(x))
        x = self.proj_out(self.norm_out(x[:, -clip:]))
        return rearrange(x, "b (t h w) (p q c) -> b t (h p) (w q) c", h=h, w=w, p=patch, q=patch)


class Block(nnx.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        d = config.width
        self.heads = config.num_heads
        self.norm1, self.norm2 = (LayerNorm(d, eps=1e-6, dtype=dtype) for _ in range(2))
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(4))
        self.up, self.down = Linear(d, 2 * d, dtype=dtype, rngs=rngs), Linear(2 * d, d, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        y = self.norm1(x)
        q, k, v = (rearrange(f(y), "b n (heads k) -> b n heads k", heads=self.heads)
                   for f in (self.to_q, self.to_k, self.to_v))  # fmt: skip
        x = x + self.to_out(rearrange(attention(q, k, v), "b n heads k -> b n (heads k)"))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=True))
