"""The Wan diffusion transformer (2.1 and 2.2), with reference images as clean tokens.

Video tokens attend to each other (self-attention over time, height and width) and to the text (cross-attention). Time
enters through a modulation of every block, and need not be the same for all tokens: reference tokens, and the tokens of
a given first frame, are clean and have t = 0, the others have the step's t. Two values are all there are, and clean
tokens stand first, so that the modulation is computed per value and laid over two runs of tokens.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.errors import UserError
from sdv_jax.models.config_check import MOST_LAYERS, check_numbers, check_whole, refuse
from sdv_jax.nn import rope
from sdv_jax.nn.attention import attention
from sdv_jax.nn.embeddings import TimestepEmbedding, timestep_sinusoid
from sdv_jax.nn.linear import Linear
from sdv_jax.nn.modulation import keep_tokens
from sdv_jax.nn.norms import LayerNorm, RMSNorm
from sdv_jax.nn.rearrange import rearrange
from sdv_jax.nn.stack import scan_blocks, stack
from sdv_jax.typing import Array, Float, Int

PLACEMENTS = ("after", "before")


@no_type_check  # its own checks give the one line that a wrong value is due
@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Keys and defaults of diffusers' `WanTransformer3DModel`.

    `image_dim`, `added_kv_proj_dim` and `pos_embed_seq_len` describe an image encoder that no supported checkpoint has;
    a repackaged Wan2.2-TI2V-5B states two of them all the same, so they are kept and mean nothing: a checkpoint that
    does hold such tensors is refused by conversion. Raises `UserError` for other values that Wan does not have.
    """

    patch_size: tuple[int, ...] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self):
        label = "transformer config"
        object.__setattr__(self, "out_channels", self.out_channels or self.in_channels)  # diffusers: null is the same
        check_numbers(label, self, most={"num_layers": MOST_LAYERS})
        if not isinstance(self.patch_size, tuple) or len(self.patch_size) != 3:
            refuse(label, "patch_size", self.patch_size, "three whole numbers (time, height, width)")
        for size in self.patch_size:
            check_whole(label, "patch_size", size)
        if self.qk_norm != "rms_norm_across_heads":
            refuse(label, "qk_norm", self.qk_norm, "'rms_norm_across_heads'")
        if self.attention_head_dim % 2:
            refuse(label, "attention_head_dim", self.attention_head_dim, "an even number, for the position embedding")
        if self.freq_dim % 2:
            refuse(label, "freq_dim", self.freq_dim, "an even number, for the time embedding")

    @property
    def width(self) -> int:
        """Width of the token stream."""
        return self.num_attention_heads * self.attention_head_dim

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens along (t, h, w) of latents [..., t, h, w, c]; UserError where patches do not fit."""
        for size, patch, axis in zip(shape[-4:-1], self.patch_size, ("frames", "rows", "columns"), strict=True):
            if size % patch:
                raise UserError(f"latents have {size} {axis}; expected a multiple of {patch}, the patch size")
        return tuple(size // patch for size, patch in zip(shape[-4:-1], self.patch_size, strict=True))


@no_type_check
@dataclasses.dataclass(frozen=True)
class ReferencePlacement:
    """Where reference images stand on the rotary grid. Paper A only says that plain continuation does badly in Wan.

    placement: "after" gives reference i the time slot (frames - 1) + offset + i; "before" gives it slot i, and the clip
      starts behind the last one (what the paper does in CogVideoX).
    offset: time slots from the clip's last frame to the first reference, under "after".
    shift: how many grid widths to the right of the clip the references stand.

    The defaults are our choice: a slot of its own after the clip, one grid width aside.
    """

    placement: str = "after"
    offset: int = 1
    shift: float = 1.0

    def __post_init__(self):
        label = "reference"
        if self.placement not in PLACEMENTS:
            refuse(label, "placement", self.placement, " or ".join(map(repr, PLACEMENTS)))
        check_whole(label, "offset", self.offset, least=0)
        if self.placement == "before" and self.offset != 1:
            refuse(label, "offset", self.offset, "1 where references stand before the clip, right before it")
        if type(self.shift) not in (int, float) or not np.isfinite(self.shift) or self.shift < 0:
            refuse(label, "shift", self.shift, "a finite number >= 0")


class Transformer(nnx.Module):
    """Predicts the flow eps - x0 for noisy latents, given text and, if there are any, reference images."""

    def __init__(self, config: TransformerConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        c = self.config = config
        patch = int(np.prod(c.patch_size))
        self.patch_embedding = Linear(patch * c.in_channels, c.width, dtype=dtype, rngs=rngs)
        self.condition_embedder = ConditionEmbedder(c, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(c, dtype=dtype, rngs=rngs), c.num_layers, rngs=rngs)
        self.norm_out = LayerNorm(c.width, eps=c.eps, affine=False)
        self.scale_shift_table = _table(2, c.width, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(c.width, patch * c.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Float[Array, "b t h w c"], text: Float[Array, "b s e"],
                 timesteps: Int[Array, " b"] | Float[Array, " b"], *,
                 reference: Float[Array, "b k h w c"] | None = None, reference_index: Int[Array, "b r"] | None = None,
                 image: Float[Array, "b 1 h w c"] | None = None,
                 placement: ReferencePlacement = ReferencePlacement()) -> Float[Array, "b t h w o"]:
        """Raw prediction (the flow) for `latents`, in their dtype; `timesteps` are in 0..1000.

        `reference` holds k clean reference latents per example, `reference_index` the ones of their tokens (k·h·w after
        patching) that are kept: token drop. `image` is the clean latent of the first frame: it replaces that frame of
        `latents`, and what is predicted there means nothing. Both are at t = 0 and `placement` says where references
        stand.
        """
        c, dtype = self.config, latents.dtype
        if image is not None:
            latents = jnp.concatenate([image.astype(dtype), latents[:, 1:]], axis=1)
        grid = c.grid(latents.shape)
        frame = grid[1] * grid[2]
        x, table = self._patches(latents), positions(c, grid)
        clean = 0 if image is None else frame
        if reference is not None:
            slots = reference.shape[1]
            # A reference is one latent frame; where patches span several frames it fills one of them.
            pictures = jnp.repeat(reference.astype(dtype), c.patch_size[0], axis=1)
            table = positions(c, grid, references=slots, placement=placement)
            x = jnp.concatenate([self._patches(pictures), x], axis=1)
            if reference_index is not None:
                x, table = keep_tokens(x, table, reference_index, slots * frame)
        references = x.shape[1] - grid[0] * frame
        clean += references

        time, modulation = self.condition_embedder.time(_values(timesteps, clean), dtype)
        words = self.condition_embedder.text(text.astype(dtype))
        x = scan_blocks(self.blocks, x, lambda block, x: block(x, words, modulation, table, clean=clean))
        shift, scale = _chunks(self.scale_shift_table[...], time[:, :, None])
        x = _modulate(self.norm_out(x[:, references:].astype(jnp.float32)), scale, shift, clean - references)
        x = self.proj_out(x.astype(dtype))
        sizes = dict(zip("fpq", c.patch_size, strict=True)) | dict(zip("thw", grid, strict=True))
        return rearrange(x, "b (t h w) (f p q c) -> b (t f) (h p) (w q) c", **sizes)

    def _patches(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b n d"]:
        sizes = dict(zip("fpq", self.config.patch_size, strict=True))
        return self.patch_embedding(rearrange(latents, "b (t f) (h p) (w q) c -> b (t h w) (f p q c)", **sizes))


class ConditionEmbedder(nnx.Module):
    """Time steps and text embeddings become vectors of the model's width (`WanTimeTextImageEmbedding`)."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        self.freq_dim, self.width = config.freq_dim, config.width
        self.time_embedder = TimestepEmbedding(config.freq_dim, config.width, dtype=dtype, rngs=rngs)
        self.time_proj = Linear(config.width, 6 * config.width, dtype=dtype, rngs=rngs)
        self.text_embedder = TextEmbedding(config, dtype=dtype, rngs=rngs)

    def time(self, values: Float[Array, "b v"], dtype) -> tuple[Float[Array, "b v d"], Float[Array, "b v 6 d"]]:
        """(embedding, modulation of every block) of the v time values of each example."""
        flat = timestep_sinusoid(values.reshape(-1), self.freq_dim, flip_sin_to_cos=True, freq_shift=0)
        time = self.time_embedder(flat).astype(dtype)  # in float32, as diffusers has it
        modulation = self.time_proj(jax.nn.silu(time))
        return time.reshape(*values.shape, self.width), modulation.reshape(*values.shape, 6, self.width)

    def text(self, embeddings: Float[Array, "b s e"]) -> Float[Array, "b s d"]:
        """Text tokens."""
        return self.text_embedder(embeddings)


class TextEmbedding(nnx.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        self.linear_1 = Linear(config.text_dim, config.width, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(config.width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b s e"]) -> Float[Array, "b s d"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=True))


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and the last behind a modulated norm."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        c = config
        self.norm1 = LayerNorm(c.width, eps=c.eps, affine=False)
        self.attn1 = Attention(c, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(c.width, eps=c.eps, dtype=dtype) if c.cross_attn_norm else nnx.data(None)
        self.attn2 = Attention(c, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(c.width, eps=c.eps, affine=False)
        self.ffn = FeedForward(c, dtype=dtype, rngs=rngs)
        self.scale_shift_table = _table(6, c.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], words: Float[Array, "b s d"], modulation: Float[Array, "b v 6 d"],
                 table: rope.Table, *, clean: int) -> Float[Array, "b n d"]:
        dtype, wide = x.dtype, x.astype(jnp.float32)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = _chunks(self.scale_shift_table[...], modulation)
        y = _modulate(self.norm1(wide), scale, shift, clean).astype(dtype)
        x = _gated(wide, self.attn1(y, y, table), gate, clean).astype(dtype)
        x = x + self.attn2(x if self.norm2 is None else self.norm2(x), words)
        wide = x.astype(jnp.float32)
        y = _modulate(self.norm3(wide), ff_scale, ff_shift, clean).astype(dtype)
        return _gated(wide, self.ffn(y), ff_gate, clean).astype(dtype)


class Attention(nnx.Module):
    """Multi-head attention whose queries and keys are RMS-normed over all heads together."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        d = config.width
        self.head_dim = config.attention_head_dim
        self.norm_q = RMSNorm(d, eps=config.eps, dtype=dtype)
        self.norm_k = RMSNorm(d, eps=config.eps, dtype=dtype)
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "b n d"], context: Float[Array, "b m d"],
                 table: rope.Table | None = None) -> Float[Array, "b n d"]:
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        q, k, v = (rearrange(part, "b n (heads k) -> b n heads k", k=self.head_dim) for part in (q, k, v))
        if table is not None:
            q, k = rope.rotate(q, table), rope.rotate(k, table)
        return self.to_out(rearrange(attention(q, k, v), "b n heads k -> b n (heads k)"))


class FeedForward(nnx.Module):
    """Linear to `ffn_dim`, tanh-GELU, Linear back."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        self.up = Linear(config.width, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.down = Linear(config.ffn_dim, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


# MARK: time


def _values(timesteps: Array, clean: int) -> Float[Array, "b v"]:
    """The distinct time values of each example: 0 of the clean tokens if there are any, then the step's own."""
    own = timesteps.astype(jnp.float32)[:, None]
    return jnp.concatenate([jnp.zeros_like(own), own], axis=1) if clean else own


def _table(rows: int, width: int, *, dtype, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (1, rows, width), dtype) * width**-0.5)


def _chunks(table: Float[Array, "1 m d"], values: Float[Array, "b v ..."]) -> list[Float[Array, "b v d"]]:
    """The rows of table + values, in float32."""
    both = table.astype(jnp.float32) + values.astype(jnp.float32)
    return [part[:, :, 0] for part in jnp.split(both, table.shape[1], axis=2)]


def _modulate(x: Float[Array, "b n d"], scale: Float[Array, "b v d"], shift: Float[Array, "b v d"],
              clean: int) -> Float[Array, "b n d"]:
    parts = _runs(x, clean, scale.shape[1])
    return jnp.concatenate([x * (1 + scale[:, i : i + 1]) + shift[:, i : i + 1] for i, x in parts], axis=1)


def _gated(x: Float[Array, "b n d"], update: Float[Array, "b n d"], gate: Float[Array, "b v d"],
           clean: int) -> Float[Array, "b n d"]:
    parts = _runs(update, clean, gate.shape[1])
    return x + jnp.concatenate([part.astype(jnp.float32) * gate[:, i : i + 1] for i, part in parts], axis=1)


def _runs(x: Float[Array, "b n d"], clean: int, values: int) -> list[tuple[int, Array]]:
    """(index of the time value, tokens): clean ones first. Without any, the last value is everybody's."""
    return [(0, x[:, :clean]), (values - 1, x[:, clean:])] if clean else [(values - 1, x)]


# MARK: positions


def positions(config: TransformerConfig, grid: tuple[int, int, int], *, references: int = 0,
              placement: ReferencePlacement = ReferencePlacement()) -> rope.Table:
    """The rotary table (cos, sin), each [n, k], of the reference tokens and then of the clip's t × h × w tokens."""
    frames, height, width = grid
    before = placement.placement == "before"
    start = references if before else 0
    first = 0 if before else frames - 1 + placement.offset
    aside = placement.shift * width if references else 0.0
    last = max(start + frames, references and first + references, height, aside + width)
    if last > config.rope_max_seq_len:
        raise UserError(
            f"{frames} x {height} x {width} tokens and {references} references reach position {last:g}; expected at "
            f"most {config.rope_max_seq_len} (rope_max_seq_len): make the video smaller or shorter"
        )
    rows, columns = np.arange(height), np.arange(width)
    tables = [_rotary(config, start + np.arange(frames), rows, columns)]
    if references:
        tables.insert(0, _rotary(config, first + np.arange(references), rows, columns + aside))
    return tuple(jnp.concatenate(parts) for parts in zip(*tables, strict=True))


def _rotary(config: TransformerConfig, t: np.ndarray, h: np.ndarray, w: np.ndarray) -> rope.Table:
    spatial = 2 * (config.attention_head_dim // 6)
    sizes = (config.attention_head_dim - 2 * spatial, spatial, spatial)
    return rope.table_3d(t, h, w, config.attention_head_dim, sizes=sizes, precision=np.float64)
