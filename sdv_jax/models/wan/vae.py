"""The causal 3-D VAEs of Wan 2.1 and 2.2 (arXiv:2503.20314, section 4.1), channels-last.

A latent frame depends on the frames before it and never on those after its own, through nothing but convolutions over
time: how a video is cut into pieces changes no number. Short clips are one piece; longer ones go piece by piece, each
with what the convolutions keep of the one before. Source: diffusers' `AutoencoderKLWan`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.errors import UserError
from sdv_jax.models.config_check import check_numbers, check_whole, refuse
from sdv_jax.models.wan.vae_blocks import Decoder, Encoder
from sdv_jax.models.wan.vae_tiling import Tiling
from sdv_jax.nn.causal_conv3d import PointConv
from sdv_jax.nn.tiling import run_tiled
from sdv_jax.typing import Array, Float

__all__ = ["VAE", "Tiling", "VAEConfig"]

# Pixels of the video that are encoded or decoded at once, but at least one latent frame of it: the largest arrays hold
# about 100 numbers for each (2.1 has 96 channels). One latent frame of 832x480, or any clip of the small world.
PIECE_PIXELS = 2**21

_ENCODED_AT_ONCE = 4  # frames that upstream encodes together; those left over at the end are not encoded
_LOGVAR_RANGE = (-30.0, 20.0)
_MOST_LAYERS, _MOST_BLOCKS = 16, 8  # published: 2 and 4. None is scanned: building takes longer with each
_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@no_type_check  # its own checks give the one line that a wrong value is due
@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The keys of a Wan `vae/config.json`, with diffusers' defaults, which are Wan 2.1's.

    latents_mean and latents_std are for whoever calls the VAE. dropout is a matter of upstream's training, clip_output
    is published with Wan 2.2 and has no effect upstream either: decoded pixels are always clipped. The scale factors
    are notes, which small models often leave at their defaults: what the blocks make is what counts.

    Raises:
      UserError: for a combination of values that no model can have.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = _MEAN
    latents_std: tuple[float, ...] = _STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = 4
    scale_factor_spatial: int | None = 8
    clip_output: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as JSON gives them; tuples keep the config hashable
                object.__setattr__(self, field.name, tuple(value))
        check_numbers("vae config", self, may_be_zero=("dropout",), most={"num_res_blocks": _MOST_LAYERS})
        for name in ("decoder_base_dim", "patch_size"):
            if getattr(self, name) is not None:
                check_whole("vae config", name, getattr(self, name))
        if self.attn_scales != ():  # upstream's encoder cannot call the attention that it would build
            refuse("vae config", "attn_scales", self.attn_scales, "an empty list")
        self._check_blocks()
        self._check_latents()
        patch = self.pixels_per_patch
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % patch:
                expected = f"a multiple of {patch}, the pixels of a patch"
                refuse("vae config", name, getattr(self, name), expected)
        for name in ("scale_factor_temporal", "scale_factor_spatial"):
            if getattr(self, name) is not None:
                check_whole("vae config", name, getattr(self, name))

    def _check_blocks(self):
        factors, times = self.dim_mult, self.temperal_downsample
        if not isinstance(factors, tuple) or not 1 <= len(factors) <= _MOST_BLOCKS:
            refuse("vae config", "dim_mult", factors, f"a list of 1 to {_MOST_BLOCKS} whole numbers")
        for level, factor in enumerate(factors):
            check_whole("vae config", f"dim_mult[{level}]", factor)
        if not isinstance(times, tuple) or [type(time) for time in times] != [bool] * (len(factors) - 1):
            expected = f"a list of {len(factors) - 1} times true or false, one less than dim_mult has"
            refuse("vae config", "temperal_downsample", times, expected)
        if sum(times) > 2:
            refuse("vae config", "temperal_downsample", times, "at most two times true: 4 frames are encoded at a time")
        if self.is_residual:
            self._check_shortcuts()
        elif len(factors) > 1 and min(factors[1:]) * (self.decoder_base_dim or self.base_dim) < 2:
            refuse("vae config", "base_dim", self.base_dim, "at least 2: the decoder halves its channels")

    def _check_shortcuts(self):
        """Those of 2.2 average whole groups of values into one, and repeat values a whole number of times."""
        factors = self.dim_mult
        merged = [8 if time else 4 for time in self.temperal_downsample]  # pixels that become one
        down = zip(itertools.pairwise((1, *factors)), [*merged, 1], strict=True)
        up = zip(itertools.pairwise((factors[-1], *factors[:0:-1])), merged[::-1], strict=True)
        ratios = [(fan_in * pixels, fan_out) for (fan_in, fan_out), pixels in down]
        ratios += [(fan_out * pixels, fan_in) for (fan_in, fan_out), pixels in up]
        for many, few in ratios:
            if many % few:
                expected = f"widths that the shortcuts of is_residual can make: {many} is no multiple of {few}"
                refuse("vae config", "dim_mult", factors, expected)

    def _check_latents(self):
        for name, least in (("latents_mean", -math.inf), ("latents_std", 0)):
            values = getattr(self, name)
            numbers = isinstance(values, tuple) and all(type(value) in (int, float) for value in values)
            if not numbers or len(values) != self.z_dim or not all(least < value < math.inf for value in values):
                kind = "finite numbers" if name == "latents_mean" else "finite numbers > 0"
                refuse("vae config", name, values, f"a list of {self.z_dim} {kind}, as many as z_dim says")

    @property
    def latent_channels(self) -> int:
        """z_dim, by the name that all families share."""
        return self.z_dim

    @property
    def pixels_per_patch(self) -> int:
        """Pixels whose colours are together the channels that the encoder sees."""
        return (self.patch_size or 1) ** 2

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** len(self.temperal_downsample) * (self.patch_size or 1)

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame, but for the first one, which stands for one."""
        return 2 ** sum(self.temperal_downsample)


class VAE(nnx.Module):
    """Encoder and decoder between pixels in [-1, 1] and latents that are not normalised.

    Computes in the dtype of its input. With a temporal compression of 4, 4k+1 frames become k+1 latent frames and back.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.encoder = Encoder(config, **kwargs)
        self.quant_conv = PointConv(2 * config.z_dim, 2 * config.z_dim, **kwargs)
        self.post_quant_conv = PointConv(config.z_dim, config.z_dim, **kwargs)
        self.decoder = Decoder(config, **kwargs)

    @property
    def tiling(self) -> Tiling:
        """The tiles that diffusers uses by default."""
        return Tiling.default(self.config)

    def encode(
        self, video: Float[Array, "b t h w c"], *, tiling: Tiling | None = None
    ) -> tuple[Float[Array, "b s i j e"], Float[Array, "b s i j e"]]:
        """Mean and log variance of the latents of a video in [-1, 1].

        Args:
          video: any number of frames, of which the first and whole groups of 4 after it are encoded. Height and width
            are at least one latent; what does not fill one is dropped at the bottom and right. They must be multiples
            of patch_size, and with is_residual of the compression.
          tiling: encode in tiles when the video is larger than one; None never does.

        Raises:
          UserError: for a wrong number of channels, a size other than those, or tiles that do not fit the VAE.
        """
        config, patch, compression = self.config, self.config.patch_size or 1, self.config.spatial_compression
        _check("video", video, config.in_channels // config.pixels_per_patch, minimum=compression)
        whole = compression if config.is_residual else patch
        if any(size % whole for size in video.shape[2:4]):
            height, width = video.shape[2:4]
            raise UserError(f"VAE: height and width must be multiples of {whole}, found {height}x{width}")
        x = patchify(video, patch)
        if tiling is None or _fits(video, tiling.sample_tile):
            moments = self._encode(x)
        else:
            tiling.check(compression)
            inner = compression // patch
            moments = run_tiled(
                self._encode,
                x,
                tile=tiling.sample_tile,
                stride=tiling.sample_stride,
                out_tile=tiling.latent_tile(inner),
                out_stride=tiling.latent_stride(inner),
                smallest=inner,
            )
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *_LOGVAR_RANGE)

    def decode(
        self, latents: Float[Array, "b s i j e"], *, tiling: Tiling | None = None, clip: bool = True
    ) -> Float[Array, "b t h w c"]:
        """The video of latents; `tiling` as in `encode`.

        It is clipped to [-1, 1], and no gradient comes back from what was outside; training has `clip=False`.

        Raises:
          UserError: for a wrong number of channels, no latents at all, or tiles that do not fit the VAE.
        """
        patch, compression = self.config.patch_size or 1, self.config.spatial_compression
        _check("latents", latents, self.config.z_dim, minimum=1)
        if tiling is None or _fits(latents, tiling.latent_tile(compression)):
            x = self._decode(latents)
        else:
            tiling.check(compression)
            x = run_tiled(
                self._decode,
                latents,
                tile=tiling.latent_tile(compression),
                stride=tiling.latent_stride(compression),
                out_tile=tiling.latent_tile(patch),
                out_stride=tiling.latent_stride(patch),
                smallest=1,
            )
        video = unpatchify(x, patch)
        return jnp.clip(video, -1, 1) if clip else video

    def _encode(self, x: Array) -> Array:
        frames = 1 + (x.shape[1] - 1) // _ENCODED_AT_ONCE * _ENCODED_AT_ONCE
        pixels = _ENCODED_AT_ONCE * math.prod(x.shape[2:4]) * self.config.pixels_per_patch
        y = _over_time(self.encoder, x[:, :frames], chunk=_ENCODED_AT_ONCE, pixels=pixels)
        return self.quant_conv(y)

    def _decode(self, latents: Array) -> Array:
        pixels = math.prod(latents.shape[2:4]) * self.config.spatial_compression**2 * self.config.temporal_compression
        return _over_time(self.decoder, self.post_quant_conv(latents), chunk=1, pixels=pixels)


def patchify(video: Float[Array, "b t h w c"], size: int) -> Float[Array, "b t i j d"]:
    """The colours of size x size pixels as channels in the order (colour, column, row)."""
    b, t, h, w, c = video.shape
    x = video.reshape(b, t, h // size, size, w // size, size, c).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(*x.shape[:4], -1)


def unpatchify(x: Float[Array, "b t i j d"], size: int) -> Float[Array, "b t h w c"]:
    """The inverse of `patchify`."""
    b, t, h, w, _ = x.shape
    x = x.reshape(b, t, h, w, -1, size, size).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(b, t, h * size, w * size, -1)


def _over_time(step: Callable, x: Array, *, chunk: int, pixels: int) -> Array:
    """Runs `step(frames, cache) -> (output, cache)` over pieces of 1 + n * chunk frames of x.

    Pieces have so many chunks that their `pixels` each stay within PIECE_PIXELS. All but the first one are equal and
    one scan, so that a program does not grow with the length of the video.
    """
    chunks = (x.shape[1] - 1) // chunk
    size = max(PIECE_PIXELS // (x.shape[0] * pixels), 1)
    later = max(chunks - 1, 0) // size
    start = x.shape[1] - later * size * chunk
    y, cache = step(x[:, :start], None)
    if later == 0:
        return y
    rest = jnp.moveaxis(x[:, start:].reshape(x.shape[0], later, -1, *x.shape[2:]), 1, 0)
    _, ys = jax.lax.scan(lambda cache, frames: step(frames, cache)[::-1], cache, rest)
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
