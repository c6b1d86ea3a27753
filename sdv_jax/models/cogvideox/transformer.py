"""The CogVideoX diffusion transformer (1.0 and 1.5, text- and image-to-video), with reference images as tokens.

Every token attends to every token in the order [text | reference | video]. A reference image is no new module: its
latent goes through the video's patch embedding and stands on the time axis before the clip (paper A's architecture).
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
from sdv_jax.nn.embeddings import TimestepEmbedding, sincos_3d, timestep_sinusoid
from sdv_jax.nn.linear import Linear
from sdv_jax.nn.modulation import AdaLayerNormOut, AdaLayerNormZero, gated, keep_tokens
from sdv_jax.nn.norms import LayerNorm
from sdv_jax.nn.rearrange import rearrange
from sdv_jax.nn.stack import scan_blocks, stack
from sdv_jax.sharding import reshard
from sdv_jax.typing import Array, Float, Int

OFS = 2.0  # the one value that models with an ofs embedding are given (diffusers' CogVideoXImageToVideoPipeline)

Grid = tuple[int, int, int]


@no_type_check  # its own checks give the one line that a wrong value is due
@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Keys and defaults of diffusers' `CogVideoXTransformer3DModel`; sizes in latent pixels, `sample_frames` in frames.

    `patch_size_t` is what makes a 1.5: patches span that many latent frames, and positions count patches from 0 on
    instead of being stretched over the trained grid. There `patch_bias` means nothing (the patch embedding has one).
    Raises `UserError` for values and combinations that no CogVideoX has.
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
        label = "transformer config"
        zero = ("freq_shift", "dropout")
        check_numbers(label, self, may_be_zero=zero, most={"num_layers": MOST_LAYERS})
        only = {"activation_fn": "gelu-approximate", "timestep_activation_fn": "silu", "dropout": 0.0}
        for key, value in only.items():
            if getattr(self, key) != value:
                raise UserError(f"{label}: {key} = {getattr(self, key)!r} is not supported, expected {value!r}")
        if self.patch_size_t is not None:
            check_whole(label, "patch_size_t", self.patch_size_t)
        if self.ofs_embed_dim is not None and self.ofs_embed_dim != self.time_embed_dim:
            refuse(label, "ofs_embed_dim", self.ofs_embed_dim, f"null or time_embed_dim, {self.time_embed_dim}")
        self._check_positions(label)

    def _check_positions(self, label: str):
        rotary = self.use_rotary_positional_embeddings
        for key in ("use_learned_positional_embeddings", "patch_size_t"):
            if getattr(self, key) and not rotary:
                raise UserError(f"{label}: {key} = {getattr(self, key)} needs use_rotary_positional_embeddings = true")
        if self.use_learned_positional_embeddings and self.patch_size_t:
            raise UserError(f"{label}: use_learned_positional_embeddings = true; expected false with a patch_size_t")
        if (self.attention_head_dim if rotary else self.width) % 16:
            found = f"attention_head_dim = {self.attention_head_dim}, num_attention_heads = {self.num_attention_heads}"
            wanted = f"{'attention_head_dim' if rotary else 'their product'} to be a multiple of 16"
            raise UserError(f"{label}: {found}; expected {wanted}, for the position embedding")

    @property
    def width(self) -> int:
        """Width of the token stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> Grid:
        """Latent frames, rows and columns of a patch."""
        return self.patch_size_t or 1, self.patch_size, self.patch_size

    @property
    def takes_image(self) -> bool:
        """Whether half of the input channels are a first frame's (image-to-video)."""
        return self.in_channels == 2 * self.out_channels

    @property
    def latent_channels(self) -> int:
        """Channels of the noisy latents, of a reference and of an image."""
        return self.in_channels // 2 if self.takes_image else self.in_channels

    @property
    def latent_frames(self) -> int:
        """Latent frames of a clip of the default length."""
        return (self.sample_frames - 1) // self.temporal_compression_ratio + 1

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """Tokens along (t, h, w) of latents [..., t, h, w, c]. Raises UserError for sizes the model cannot take."""
        *sizes, channels = shape[-4:]
        if channels != self.latent_channels:
            raise UserError(f"latents have {channels} channels; expected {self.latent_channels}")
        for size, patch, axis in zip(sizes, self.patch, ("frames", "rows", "columns"), strict=True):
            if size % patch:
                raise UserError(f"latents have {size} {axis}; expected a multiple of {patch}, the patch size")
        trained = [self.sample_height, self.sample_width]
        if self.use_learned_positional_embeddings and sizes[1:] != trained:
            raise UserError(
                f"latents are {sizes[1]} x {sizes[2]} (height x width); expected {trained[0]} x {trained[1]}, the only "
                "size that this model has learned positions for"
            )
        return tuple(size // patch for size, patch in zip(sizes, self.patch, strict=True))


class Transformer(nnx.Module):
    """Predicts v for noisy latents, given text and, if there are any, reference images and a first frame."""

    def __init__(self, config: TransformerConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        c = self.config = config
        norm = {"eps": c.norm_eps, "affine": c.norm_elementwise_affine, "dtype": dtype}
        self.patch_embed = PatchEmbed(c, dtype=dtype, rngs=rngs)
        self.time_embedding = TimestepEmbedding(c.width, c.time_embed_dim, dtype=dtype, rngs=rngs)
        self.ofs_embedding = nnx.data(None)
        if c.ofs_embed_dim is not None:
            self.ofs_embedding = TimestepEmbedding(c.ofs_embed_dim, c.time_embed_dim, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(c, dtype=dtype, rngs=rngs), c.num_layers, rngs=rngs)
        self.norm_final = LayerNorm(c.width, **norm)
        self.norm_out = AdaLayerNormOut(c.time_embed_dim, c.width, **norm, rngs=rngs)
        self.proj_out = Linear(c.width, int(np.prod(c.patch)) * c.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Float[Array, "b t h w c"], text: Float[Array, "b s e"],
                 timesteps: Int[Array, " b"] | Float[Array, " b"], *,
                 reference: Float[Array, "b k h w c"] | None = None, reference_index: Int[Array, "b r"] | None = None,
                 image: Float[Array, "b 1 h w c"] | None = None, adaln_lora: str = "all") -> Float[Array, "b t h w o"]:
        """Raw prediction (v) for `latents`, in their dtype; o = out_channels, which is c for every published model.

        `reference` holds k clean reference latents per example; they take slots 0..k-1 of the time axis and the clip
        the slots from k on. `reference_index` keeps only those of the k·h·w reference tokens (after patching), each
        with its own position: token drop. `image` is the clean latent of the first frame, for models that take one;
        without it such a model sees an empty one. `adaln_lora` says which streams an adapter of the adaLN linears acts
        on, "all" or "reference".

        Our choices where the paper names none: a slot of a model whose patches span several frames is filled by
        repeating the reference; the image channels of a reference are empty; learned positions, which are absolute and
        of one clip length, give every reference those of the clip's first frame (its slot is told by the rotary table).

        Raises:
          UserError: latents of a size or kind that the model cannot take, or an `image` for a model that takes none.
        """
        c, dtype = self.config, latents.dtype
        grid = c.grid(latents.shape)
        references = 0 if reference is None else reference.shape[1]
        pixels = self.patch_embed.pixels(_with_image(c, latents, image))
        if reference is not None:
            pixels = jnp.concatenate([self.patch_embed.pixels(_pictures(c, reference.astype(dtype))), pixels], axis=1)
        words = self.patch_embed.text(text.astype(dtype))
        table = rotary(c, grid, references=references)
        word_places, places = self.patch_embed.places(grid, words.shape[1], references=references)
        if reference_index is not None:
            frame = grid[1] * grid[2]
            pixels, (table, places) = keep_tokens(pixels, (table, places), reference_index, references * frame)
        if word_places is not None:
            words = words + word_places.astype(dtype)
        if places is not None:
            pixels = pixels + places.astype(dtype)
        if table is not None:
            table = tuple(_before(part, words.shape[1], value) for part, value in zip(table, (1.0, 0.0), strict=True))

        lengths = (words.shape[1], pixels.shape[1] - int(np.prod(grid)))
        time = self._time(timesteps, dtype)
        x = scan_blocks(self.blocks, jnp.concatenate([words, pixels], axis=1),
                        lambda block, x: block(x, time, table, lengths=lengths, adaln_lora=adaln_lora))
        x = self.norm_final(x[:, sum(lengths):])
        x = self.proj_out(self.norm_out(x, time))
        sizes = dict(zip("fpq", c.patch, strict=True)) | dict(zip("thw", grid, strict=True))
        return rearrange(x, "b (t h w) (c f p q) -> b (t f) (h p) (w q) c", **sizes)

    def _time(self, timesteps: Array, dtype) -> Float[Array, "b d"]:
        c = self.config
        kind = {"flip_sin_to_cos": c.flip_sin_to_cos, "freq_shift": c.freq_shift}
        time = self.time_embedding(timestep_sinusoid(timesteps, c.width, **kind).astype(dtype))
        if self.ofs_embedding is None:
            return time
        ofs = timestep_sinusoid(jnp.array([OFS]), c.ofs_embed_dim, **kind)
        return time + self.ofs_embedding(ofs.astype(dtype))


class PatchEmbed(nnx.Module):
    """Patches of latent pixels, and text embeddings, become tokens; what is added to them to tell their place."""

    def __init__(self, config: TransformerConfig, *, dtype, rngs: nnx.Rngs):
        c = self.config = config
        bias = c.patch_bias or c.patch_size_t is not None  # diffusers heeds `patch_bias` in its 1.0 branch only
        self.proj = Linear(int(np.prod(c.patch)) * c.in_channels, c.width, bias=bias, dtype=dtype, rngs=rngs)
        self.text_proj = Linear(c.text_embed_dim, c.width, dtype=dtype, rngs=rngs)
        self.pos_embedding = nnx.data(None)
        if c.use_learned_positional_embeddings:
            grid = (c.latent_frames, c.sample_height // c.patch_size, c.sample_width // c.patch_size)
            start = jnp.pad(sincos(c, grid), ((c.max_text_seq_length, 0), (0, 0)))
            self.pos_embedding = nnx.Param(start.astype(dtype))  # [words and pixels of a whole clip, d]

    def pixels(self, latents: Float[Array, "b t h w i"]) -> Float[Array, "b n d"]:
        """Tokens in (t, h, w) order."""
        sizes = dict(zip("fpq", self.config.patch, strict=True))
        return self.proj(rearrange(latents, "b (t f) (h p) (w q) c -> b (t h w) (f p q c)", **sizes))

    def text(self, embeddings: Float[Array, "b s e"]) -> Float[Array, "b s d"]:
        """Text tokens."""
        return self.text_proj(embeddings)

    def places(self, grid: Grid, words: int, *, references: int) -> tuple[Array | None, Array | None]:
        """Absolute positions to add to words [s, d] and to pixel tokens [n, d]; None where there is nothing to add.

        Learned positions hold for the trained number of frames; for another one they are sin-cos ones, as in diffusers.
        """
        c = self.config
        frames, height, width = grid
        if self.pos_embedding is None:
            return None, None if c.use_rotary_positional_embeddings else sincos(c, (references + frames, height, width))
        if words != c.max_text_seq_length:
            raise UserError(f"the text has {words} tokens; expected {c.max_text_seq_length} (max_text_seq_length), the "
                            "only length that this model has learned positions for")
        if (frames - 1) * c.temporal_compression_ratio + 1 == c.sample_frames:
            told, clip = jnp.split(reshard(self.pos_embedding[...], jax.P()), [words])
        else:
            told, clip = None, sincos(c, grid)
        return told, jnp.concatenate([clip[: height * width]] * references + [clip])


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


# MARK: inputs


def _with_image(config: TransformerConfig, latents: Float[Array, "b t h w c"],
                image: Float[Array, "b 1 h w c"] | None) -> Float[Array, "b t h w i"]:
    """The latents and, on further channels of a model that takes one, the image in frame 0 and zeros behind it."""
    if not config.takes_image:
        if image is not None:
            raise UserError(f"this model takes no image: in_channels = {config.in_channels}, out_channels = "
                            f"{config.out_channels}; use an image-to-video model such as CogVideoX-5b-I2V")
        return latents
    given = jnp.zeros_like(latents)
    return jnp.concatenate([latents, given if image is None else given.at[:, :1].set(image.astype(given.dtype))], -1)


def _pictures(config: TransformerConfig, reference: Float[Array, "b k h w c"]) -> Float[Array, "b f h w i"]:
    """Reference latents as frames of the model's input: each fills one patch in time, its image channels are empty."""
    empty = [(0, 0)] * 4 + [(0, config.in_channels - reference.shape[-1])]
    return jnp.repeat(jnp.pad(reference, empty), config.patch[0], axis=1)


# MARK: positions


def rotary(config: TransformerConfig, grid: Grid, *, references: int = 0) -> rope.Table | None:
    """The table (cos, sin) of the reference tokens and then of the clip's t × h × w ones; None for a sin-cos model.

    1.0: a grid of another size than the trained one is stretched over the trained extent, centred and keeping its
    aspect ratio. 1.5: rows and columns are counted from 0, however many there are; diffusers takes the first ones of a
    table of the trained size ("slice"), which is the same where it suffices.
    """
    c = config
    if not c.use_rotary_positional_embeddings:
        return None
    frames, height, width = grid
    if c.patch_size_t is None:
        (top, left), (bottom, right) = _crop_region(
            (height, width), (c.sample_height // c.patch_size, c.sample_width // c.patch_size)
        )
        rows, columns = _linspace(top, bottom, height), _linspace(left, right, width)
    else:
        rows, columns = np.arange(height), np.arange(width)
    return rope.table_3d(np.arange(references + frames), rows, columns, c.attention_head_dim)


def sincos(config: TransformerConfig, grid: Grid) -> Float[Array, "n d"]:
    """Sin-cos embeddings of t × h × w tokens; positions are divided by the interpolation scales."""
    scales = (config.temporal_interpolation_scale, *[config.spatial_interpolation_scale] * 2)
    axes = (np.arange(size, dtype=np.float32) / np.float32(by) for size, by in zip(grid, scales, strict=True))
    return sincos_3d(*axes, config.width)


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
    """Puts `count` rows of `value` before the tokens: text has no rotation."""
    pad = [(0, 0)] * x.ndim
    pad[-2] = (count, 0)
    return jnp.pad(x, pad, constant_values=value)
