"""The causal 3-D VAE of CogVideoX (arXiv:2408.06072, section 2.1), channels-last.

A video is encoded 8 frames and decoded 2 latent frames at a time, the remainder joined to the first batch. That is part
of the model's definition, not an optimisation: group norms see one batch of frames, and only causal convolutions look
back beyond it. Source: diffusers' `AutoencoderKLCogVideoX`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox.vae_blocks import ACTIVATIONS, Decoder, Encoder
from sdv_jax.models.cogvideox.vae_tiling import Tiling, run_tiled
from sdv_jax.models.config_check import check_numbers, check_whole, refuse
from sdv_jax.nn.causal_conv3d import PointConv
from sdv_jax.typing import Array, Float

__all__ = ["VAE", "Tiling", "VAEConfig"]

SAMPLE_FRAMES = 8
LATENT_FRAMES = 2
_LOGVAR_RANGE = (-30.0, 20.0)
_MOST_LAYERS, _MOST_BLOCKS = 16, 8  # published: 3 and 4. None is scanned: building takes longer with each


@no_type_check  # its own checks give the one line that a wrong value is due
@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The keys of a CogVideoX `vae/config.json`, with diffusers' defaults.

    The scaling and shift of latents, `force_upcast` and `invert_scale_latents` are for whoever calls the VAE;
    sample_height and sample_width give the default tiles.

    Raises:
      UserError: for a combination of values that no model can have.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("CogVideoXDownBlock3D",) * 4
    up_block_types: tuple[str, ...] = ("CogVideoXUpBlock3D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = "silu"
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: float = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as JSON gives them; tuples keep the config hashable
                object.__setattr__(self, field.name, tuple(value))
        check_numbers("vae config", self, most={"layers_per_block": _MOST_LAYERS})
        self._check_blocks()
        if self.act_fn not in sorted(ACTIVATIONS):  # a list, as the value may be unhashable
            refuse("vae config", "act_fn", self.act_fn, f"one of {sorted(ACTIVATIONS)}")
        # Upstream sizes these two convolutions by out_channels, so that they fit no other number of latent channels.
        if (self.use_quant_conv or self.use_post_quant_conv) and self.out_channels != self.latent_channels:
            raise UserError(
                f"vae config: quant convolutions need out_channels == latent_channels, found {self.out_channels} and "
                f"{self.latent_channels}"
            )

    def _check_blocks(self):
        channels = self.block_out_channels
        if not isinstance(channels, tuple) or not 1 <= len(channels) <= _MOST_BLOCKS:
            refuse("vae config", "block_out_channels", channels, f"a list of 1 to {_MOST_BLOCKS} whole numbers")
        for level, width in enumerate(channels):
            check_whole("vae config", f"block_out_channels[{level}]", width)
        if any(width % self.norm_num_groups for width in channels):
            expected = f"multiples of norm_num_groups, which is {self.norm_num_groups}"
            refuse("vae config", "block_out_channels", channels, expected)
        levels = len(channels)
        for field, name in (("down_block_types", "CogVideoXDownBlock3D"), ("up_block_types", "CogVideoXUpBlock3D")):
            if getattr(self, field) != (name,) * levels:
                refuse("vae config", field, getattr(self, field), f"{levels} times {name!r}, once per block")
        # diffusers takes a ratio that its blocks cannot make, too.
        if self.temporal_compression_ratio not in [2**level for level in range(_MOST_BLOCKS)]:
            expected = f"a power of two from 1 to {2 ** (_MOST_BLOCKS - 1)}"
            refuse("vae config", "temporal_compression_ratio", self.temporal_compression_ratio, expected)

    @property
    def temporal_levels(self) -> int:
        """How many levels change the number of frames."""
        return int(math.log2(self.temporal_compression_ratio))

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** (len(self.block_out_channels) - 1)


class VAE(nnx.Module):
    """Encoder and decoder between pixels in [-1, 1] and latents, before any scaling factor.

    Computes in the dtype of its input. With a temporal compression of 4, 4k+1 frames become k+1 latent frames and back.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        kwargs = {"dtype": dtype, "rngs": rngs}
        latents, moments = config.latent_channels, 2 * config.latent_channels
        self.encoder = Encoder(config, **kwargs)
        self.decoder = Decoder(config, **kwargs)
        self.quant_conv = PointConv(moments, moments, **kwargs) if config.use_quant_conv else None
        self.post_quant_conv = PointConv(latents, latents, **kwargs) if config.use_post_quant_conv else None

    @property
    def tiling(self) -> Tiling:
        """The tiles that diffusers uses by default."""
        return Tiling.default(self.config)

    def encode(
        self, video: Float[Array, "b t h w c"], *, tiling: Tiling | None = None
    ) -> tuple[Float[Array, "b s i j e"], Float[Array, "b s i j e"]]:
        """Mean and log variance of the latents of a video in [-1, 1].

        Args:
          video: any number of frames, height and width; what does not fill a latent is dropped at the bottom and right.
          tiling: encode in tiles when the video is larger than one; None never does.

        Raises:
          UserError: for a wrong number of channels, or a video, or a tile at its edge, smaller than one latent.
        """
        scale = self.config.spatial_compression
        _check("video", video, self.config.in_channels, minimum=scale)
        if tiling is None or _fits(video, tiling.sample_tile):
            moments = self._encode(video)
        else:
            tile, out_tile = tiling.sample_tile, tiling.latent_tile(scale)
            moments = run_tiled(
                self._encode, video, tile=tile, out_tile=out_tile, overlap=tiling.overlap, smallest=scale
            )
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *_LOGVAR_RANGE)

    def decode(self, latents: Float[Array, "b s i j e"], *, tiling: Tiling | None = None) -> Float[Array, "b t h w c"]:
        """The video, about [-1, 1] and not clipped, of unscaled latents; `tiling` as in `encode`.

        Raises:
          UserError: for a wrong number of channels or no latents at all.
        """
        _check("latents", latents, self.config.latent_channels, minimum=1)
        if tiling is None or _fits(latents, tiling.latent_tile(self.config.spatial_compression)):
            return self._decode(latents)
        tile, out_tile = tiling.latent_tile(self.config.spatial_compression), tiling.sample_tile
        return run_tiled(self._decode, latents, tile=tile, out_tile=out_tile, overlap=tiling.overlap, smallest=1)

    def _encode(self, video: Array) -> Array:
        moments = _over_frames(self.encoder, video, SAMPLE_FRAMES)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, latents: Array) -> Array:
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return _over_frames(self.decoder, latents, LATENT_FRAMES)


def _over_frames(step: Callable, x: Array, size: int) -> Array:
    """Runs `step(frames, cache) -> (output, cache)` over batches of `size` frames; the remainder joins the first one.

    The equal batches after it are one scan, so that a program does not grow with the length of the video.
    """
    batches = max(x.shape[1] // size, 1)
    first = x.shape[1] - (batches - 1) * size
    y, cache = step(x[:, :first], None)
    if batches == 1:
        return y
    rest = x[:, first:].reshape(x.shape[0], batches - 1, size, *x.shape[2:])
    _, ys = jax.lax.scan(lambda cache, frames: step(frames, cache)[::-1], cache, jnp.moveaxis(rest, 1, 0))
    ys = jnp.moveaxis(ys, 0, 1)
    return jnp.concatenate([y, ys.reshape(y.shape[0], -1, *y.shape[2:])], axis=1)


def _fits(x: Array, tile: tuple[int, int]) -> bool:
    return x.shape[2] <= tile[0] and x.shape[3] <= tile[1]


def _check(name: str, x: Array, channels: int, *, minimum: int) -> None:
    if x.shape[-1] != channels:
        raise UserError(f"VAE: {name} must have {channels} channels in its last axis, found shape {tuple(x.shape)}")
    if x.shape[1] < 1 or min(x.shape[2:4]) < minimum:
        raise UserError(
            f"VAE: {name} must have at least 1 frame of {minimum}x{minimum}, found [b, t, h, w, c] = {tuple(x.shape)}"
        )
