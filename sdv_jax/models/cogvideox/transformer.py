"""The CogVideoX 1.0 diffusion transformer (2B: sin-cos positions, 5B: rotary ones), with reference images as tokens.

Every token attends to every token in the order [text | reference | video]. A reference image is no new module: its
latent goes through the video's patch embedding and stands on the time axis before the clip (paper A's architecture).
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from sdv_jax.errors import UserError
from sdv_jax.models.config_check import MOST_LAYERS, check_numbers
from sdv_jax.nn import rope
from sdv_jax.nn.attention import attention
from sdv_jax.nn.embeddings import TimestepEmbedding, sincos_3d, timestep_sinusoid
from sdv_jax.nn.linear import Linear
from sdv_jax.nn.modulation import AdaLayerNormOut, AdaLayerNormZero, gated, keep_tokens
from sdv_jax.nn.norms import LayerNorm
from sdv_jax.nn.stack import scan_blocks, stack
from sdv_jax.typing import Array, Float, Int


@no_type_check  # its own checks give the one line that a wrong value is due
@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Keys and defaults of diffusers' `CogVideoXTransformer3DModel`; sizes in latent pixels, `sample_frames` in frames.

    Raises `UserError` for values that CogVideoX 1.0 text-to-video does not have.
    """

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    dropout: float = 0.0
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    def __post_init__(self):
        zero = ("freq_shift", "dropout")
        check_numbers("transformer config", self, may_be_zero=zero, most={"num_layers": MOST_LAYERS})
        only = {"ofs_embed_dim": None, "patch_size_t": None, "activation_fn": "gelu-approximate",
                "timestep_activation_fn": "silu", "use_learned_positional_embeddings": False, "dropout": 0.0}
        for key, value in only.items():
            if getattr(self, key) != value:
                raise UserError(f"transformer config: {key} = {getattr(self, key)!r} is not supported, "
                                f"expected {value!r} (CogVideoX 1.0 text-to-video)")
        rotary = self.use_rotary_positional_embeddings
        if (self.attention_head_dim if rotary else self.width) % 16:
            found = f"attention_head_dim = {self.attention_head_dim}, num_attention_heads = {self.num_attention_heads}"
            wanted = f"{'attention_head_dim' if rotary else 'their product'} to be a multiple of 16"
            raise UserError(f"transformer config: {found}; expected {wanted}, for the position embedding")

    @property
    def width(self) -> int:
        """Width of the token stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_frames(self) -> int:
        """Latent frames of a clip of the default length."""
        return (self.sample_frames - 1) // self.temporal_compression_ratio + 1


class Transformer(nnx.Module):
    """Predicts v for noisy latents, given text and, if there are any, reference images."""

    def __init__(self, config: TransformerConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        c = self.config = config
        norm = {"eps": c.norm_eps, "affine": c.norm_elementwise_affine, "dtype": dtype}
        self.patch_embed = PatchEmbed(c, dtype=dtype, rngs=rngs)
        self.time_embedding = TimestepEmbedding(c.width, c.time_embed_dim, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(c, dtype=dtype, rngs=rngs), c.num_layers, rngs=rngs)
        self.norm_final = LayerNorm(c.width, **norm)
        self.norm_out = AdaLayerNormOut(c.time_embed_dim, c.width, **norm, rngs=rngs)
        self.proj_out = Linear(c.width, c.patch_size**2 * c.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Float[Array, "b t h w c"], text: Float[Array, "b s e"],
                 timesteps: Int[Array, " b"] | Float[Array, " b"], *,
                 reference: Float[Array, "b k h w c"] | None = None, reference_index: Int[Array, "b r"] | None = None,
                 adaln_lora: str = "all") -> Float[Array, "b t h w o"]:
        """Raw prediction (v) for `latents`, in their dtype; o = out_channels, which is c for every published model.

        `reference` holds k clean reference latents per example; they take frames 0..k-1 of the time axis and the clip
        the frames from k on. `reference_index` keeps only those of the k·h·w reference tokens (after patching), each
        with its own position: token drop. `adaln_lora` says which streams an adapter of the adaLN linears acts on,
        "all" or "reference".
        """
        c, p = self.config, self.config.patch_size
        frames, height, width = latents.shape[1], latents.shape[2] // p, latents.shape[3] // p
        dtype = latents.dtype
        time = timestep_sinusoid(timesteps, c.width, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift)
        time = self.time_embedding(time.astype(dtype))

        references = 0 if reference is None else reference.shape[1]
        streams = latents if reference is None else jnp.concatenate([reference.astype(dtype), latents], axis=1)
        words, pixels = self.patch_embed.text(text.astype(dtype)), self.patch_embed.pixels(streams)
        table = positions(c, references + frames, height, width)
        if reference_index is not None:
            pixels, table = keep_tokens(pixels, table, reference_index, references * height * width)
        x = jnp.concatenate([words, pixels], axis=1)
        lengths = (words.shape[1], pixels.shape[1] - frames * height * width)

        if c.use_rotary_positional_embeddings:
            table = tuple(_before(part, lengths[0], value) for part, value in zip(table, (1.0, 0.0), strict=True))
        else:
            x = x + _before(table, lengths[0], 0.0).astype(dtype)
            table = None

        def apply(block, x):
            return block(x, time, table, lengths=lengths, adaln_lora=adaln_lora)

        x = scan_blocks(self.blocks, x, apply)
        x = self.norm_final(x[:, sum(lengths):])
        x = self.proj_out(self.norm_out(x, time))
        return rearrange(x, "b (t h w) (c p q) -> b t (h p) (w q) c", t=frames, h=height, w=width, p=p, q=p)


class PatchEmbed(nnx.Module):
    """Patches of p × p latent pixels, and text embeddings, become tokens."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        self.patch_size = config.patch_size
        patch = config.patch_size**2 * config.in_channels
        self.proj = Linear(patch, config.width, bias=config.patch_bias, dtype=dtype, rngs=rngs)
        self.text_proj = Linear(config.text_embed_dim, config.width, dtype=dtype, rngs=rngs)

    def pixels(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b n d"]:
        """Tokens in (t, h, w) order."""
        p = self.patch_size
        return self.proj(rearrange(latents, "b t (h p) (w q) c -> b (t h w) (p q c)", p=p, q=p))

    def text(self, embeddings: Float[Array, "b s e"]) -> Float[Array, "b s d"]:
        """Text tokens."""
        return self.text_proj(embeddings)


class Block(nnx.Module):
    """Joint attention, then a feed-forward layer, each behind an adaLN-zero."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, "affine": config.norm_elementwise_affine, "dtype": dtype, "rngs": rngs}
        self.norm1 = AdaLayerNormZero(config.time_embed_dim, config.width, **norm)
        self.attn1 = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = AdaLayerNormZero(config.time_embed_dim, config.width, **norm)
        self.ff = FeedForward(config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], time: Float[Array, "b e"], table: rope.Table | None, *,
                 lengths: tuple[int, int], adaln_lora: str) -> Float[Array, "b n d"]:
        y, gates = self.norm1(x, time, lengths=lengths, adaln_lora=adaln_lora)
        x = gated(x, self.attn1(y, table), gates, lengths=lengths)
        y, gates = self.norm2(x, time, lengths=lengths, adaln_lora=adaln_lora)
        return gated(x, self.ff(y), gates, lengths=lengths)


class SelfAttention(nnx.Module):
    """Attention over all tokens, with layer-normed queries and keys and rotary positions."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        d, bias = config.width, config.attention_bias
        self.head_dim = config.attention_head_dim
        self.norm_q = LayerNorm(self.head_dim, eps=1e-6, dtype=dtype)
        self.norm_k = LayerNorm(self.head_dim, eps=1e-6, dtype=dtype)
        self.to_q = Linear(d, d, bias=bias, dtype=dtype, rngs=rngs)
        self.to_k = Linear(d, d, bias=bias, dtype=dtype, rngs=rngs)
        self.to_v = Linear(d, d, bias=bias, dtype=dtype, rngs=rngs)
        self.to_out = Linear(d, d, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], table: rope.Table | None) -> Float[Array, "b n d"]:
        projections = (self.to_q, self.to_k, self.to_v)
        q, k, v = (rearrange(layer(x), "b n (heads k) -> b n heads k", k=self.head_dim) for layer in projections)
        q, k = self.norm_q(q), self.norm_k(k)
        if table is not None:
            q, k = rope.rotate(q, table), rope.rotate(k, table)
        return self.to_out(rearrange(attention(q, k, v), "b n heads k -> b n (heads k)"))


class FeedForward(nnx.Module):
    """Linear to four times the width, tanh-GELU, Linear back."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.up = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


# MARK: positions


def positions(config: TransformerConfig, frames: int, height: int, width: int):
    """Positions of frames × height × width tokens: a rotary table (cos, sin), or absolute embeddings [n, d].

    Rotary: a grid of another size than the trained one is stretched over the trained extent, centred and keeping its
    aspect ratio, as diffusers' CogVideoX pipeline does. Sin-cos: positions are divided by the interpolation scales.
    """
    if config.use_rotary_positional_embeddings:
        trained = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        (top, left), (bottom, right) = _crop_region((height, width), trained)
        grid_h = _linspace(top, bottom, height)
        grid_w = _linspace(left, right, width)
        return rope.table_3d(np.arange(frames, dtype=np.float32), grid_h, grid_w, config.attention_head_dim)
    scale = np.float32(config.spatial_interpolation_scale)
    t = np.arange(frames, dtype=np.float32) / np.float32(config.temporal_interpolation_scale)
    h, w = (np.arange(size, dtype=np.float32) / scale for size in (height, width))
    return sincos_3d(t, h, w, config.width)


def _linspace(start: int, stop: int, count: int) -> np.ndarray:
    return np.linspace(start, start + (stop * (count - 1) / count - start), count, dtype=np.float32)


def _crop_region(grid: tuple[int, int], trained: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left), (bottom, right) of the largest centred box of the grid's aspect ratio inside the trained grid."""
    (h, w), (trained_h, trained_w) = grid, trained
    if h / w > trained_h / trained_w:
        size = trained_h, int(round(trained_h / h * w))
    else:
        size = int(round(trained_w / w * h)), trained_w
    top, left = (int(round((outer - inner) / 2.0)) for outer, inner in zip(trained, size, strict=True))
    return (top, left), (top + size[0], left + size[1])


def _before(x: Float[Array, "*b n k"], count: int, value: float) -> Array:
    """Puts `count` rows of `value` before the tokens: text has no position."""
    pad = [(0, 0)] * x.ndim
    pad[-2] = (count, 0)
    return jnp.pad(x, pad, constant_values=value)

