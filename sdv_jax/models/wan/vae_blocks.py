"""The encoder and decoder of the Wan VAEs (2.1 and 2.2), as they see one piece of a video.

Every part with a memory takes `cache`, what it keeps from the frames before (None at the start of a video), and returns
the new one beside its output. Before the start there are zeros, and the first frame of a video is never merged with
others: 4k+1 frames become k+1 latent frames and back. Source: diffusers' `autoencoder_kl_wan.py`, which always works
one latent frame at a time; here a piece has any number of them, with the same result.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.nn.attention import attention
from sdv_jax.nn.causal_conv3d import CausalConv3d, FrameConv, PointConv, TimeConv
from sdv_jax.nn.linear import Linear
from sdv_jax.typing import Array, Float

_SMALLEST_NORM = 1e-12  # of `torch.nn.functional.normalize`


class ChannelNorm(nnx.Module):
    """Every pixel's channels scaled to root mean square 1, times `scale` [c] (`WanRMS_norm`; computed in float32)."""

    def __init__(self, channels: int, *, dtype):
        self.scale = nnx.Param(jnp.ones((channels,), dtype))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        wide = x.astype(jnp.float32)
        # The bound is put on the square: the gradient of a root at zero would be infinite.
        square = jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), _SMALLEST_NORM**2)
        scale = jax.lax.rsqrt(square) * x.shape[-1] ** 0.5
        return (wide * scale * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class ResnetBlock(nnx.Module):
    """Norm, act, causal conv, twice; plus the input (`WanResidualBlock`)."""

    def __init__(self, fan_in: int, fan_out: int, *, dtype, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(fan_in, dtype=dtype)
        self.conv1 = CausalConv3d(fan_in, fan_out, dtype=dtype, rngs=rngs)
        self.norm2 = ChannelNorm(fan_out, dtype=dtype)
        self.conv2 = CausalConv3d(fan_out, fan_out, dtype=dtype, rngs=rngs)
        self.conv_shortcut = PointConv(fan_in, fan_out, dtype=dtype, rngs=rngs) if fan_in != fan_out else None

    def __call__(self, x: Float[Array, "b t h w c"], cache):
        cache1, cache2 = cache or (None, None)
        y, cache1 = causal(self.conv1, silu(self.norm1(x)), cache1)
        y, cache2 = causal(self.conv2, silu(self.norm2(y)), cache2)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + y, (cache1, cache2)


class FrameAttention(nnx.Module):
    """Attention with one head among the pixels of each frame; plus the input (`WanAttentionBlock`)."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.norm = ChannelNorm(channels, dtype=dtype)
        self.to_qkv = Linear(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.proj = Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        tokens = self.to_qkv(self.norm(x)).reshape(b * t, h * w, 1, 3 * c)
        y = attention(*jnp.split(tokens, 3, axis=-1))
        return x + self.proj(y.reshape(x.shape))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block (`WanMidBlock`)."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.attentions = nnx.List([FrameAttention(channels, **kwargs)])
        self.resnets = nnx.List([ResnetBlock(channels, channels, **kwargs) for _ in range(2)])

    def __call__(self, x: Float[Array, "b t h w c"], cache):
        before, after = cache or (None, None)
        x, before = self.resnets[0](x, before)
        x, after = self.resnets[1](self.attentions[0](x), after)
        return x, (before, after)


class Downsample(nnx.Module):
    """Half the height and width by a strided convolution, then with `time` half the frames by another.

    `WanResample`, modes downsample2d and downsample3d. The first frame of a video passes the second unchanged.
    """

    def __init__(self, channels: int, *, time: bool, dtype, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.resample = FrameConv(channels, channels, stride=2, padding=((0, 1), (0, 1)), **kwargs)
        self.time_conv = TimeConv(channels, channels, stride=2, **kwargs) if time else None

    def __call__(self, x: Float[Array, "b t h w c"], cache):
        x = self.resample(x)
        if self.time_conv is None:
            return x, None
        last = x[:, -1:]
        if cache is None:
            return jnp.concatenate([x[:, :1], self.time_conv(x)], axis=1), last
        return self.time_conv(jnp.concatenate([cache, x], axis=1)), last


class Upsample(nnx.Module):
    """With `time` twice the frames by a convolution; then twice the height and width by repetition and another one.

    `WanResample`, modes upsample2d and upsample3d. The first frame of a video stays single, and the first convolution
    never sees it: after it, as before it, there are zeros.
    """

    def __init__(self, fan_in: int, fan_out: int, *, time: bool, dtype, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.time_conv = TimeConv(fan_in, 2 * fan_in, stride=1, **kwargs) if time else None
        self.resample = FrameConv(fan_in, fan_out, stride=1, padding=((1, 1), (1, 1)), **kwargs)

    def __call__(self, x: Float[Array, "b t h w c"], cache):
        if self.time_conv is not None:
            first = 1 if cache is None else 0
            before = _zeros_before(x) if cache is None else cache
            padded = jnp.concatenate([before, x[:, first:]], axis=1)
            cache = padded[:, -2:]
            pairs = self.time_conv(padded).reshape(*x[:, first:].shape[:-1], 2, x.shape[-1])
            pairs = jnp.moveaxis(pairs, -2, 2).reshape(x.shape[0], -1, *x.shape[2:])
            x = jnp.concatenate([x[:, :first], pairs], axis=1)
        return self.resample(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)), cache


class DownStage(nnx.Module):
    """Residual blocks and an optional downsampling, plus the averaged input (`WanResidualDownBlock`)."""

    def __init__(self, widths: tuple[int, ...], *, down: bool, time: bool, dtype, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.fan_out, self.factors = widths[-1], (2 if time else 1, 2 if down else 1)
        self.resnets = nnx.List([ResnetBlock(*pair, **kwargs) for pair in itertools.pairwise(widths)])
        self.downsampler = Downsample(widths[-1], time=time, **kwargs) if down else None

    def __call__(self, x: Float[Array, "b t h w c"], cache):
        shortcut = average_down(x, self.fan_out, *self.factors)
        x, cache = _run([*self.resnets, self.downsampler], x, cache)
        return x + shortcut, cache


class UpStage(nnx.Module):
    """Residual blocks and an optional upsampling to `fan_out` channels; with `residual`, plus the repeated input.

    `WanUpBlock` and `WanResidualUpBlock`.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        fan_out: int,
        *,
        up: bool,
        time: bool,
        residual: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.fan_out, self.factors = fan_out, (2 if time else 1, 2)
        self.residual = residual and up
        self.resnets = nnx.List([ResnetBlock(*pair, **kwargs) for pair in itertools.pairwise(widths)])
        self.upsampler = Upsample(widths[-1], fan_out, time=time, **kwargs) if up else None

    def __call__(self, x: Float[Array, "b t h w c"], cache):
        y, new = _run([*self.resnets, self.upsampler], x, cache)
        if self.residual:
            shortcut = repeat_up(x, self.fan_out, *self.factors)
            # The first frame of a video becomes one frame only, the last of those it is repeated to.
            y = y + (shortcut[:, self.factors[0] - 1 :] if cache is None else shortcut)
        return y, new


class Encoder(nnx.Module):
    """Patchified pixels to 2 * z_dim channels (`WanEncoder3d`)."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, widths[0], **kwargs)
        blocks = []
        for level, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            inner = (fan_in,) + (fan_out,) * config.num_res_blocks
            down = level < len(config.temperal_downsample)
            time = down and config.temperal_downsample[level]
            if config.is_residual:
                blocks.append(DownStage(inner, down=down, time=time, **kwargs))
            else:
                blocks += [ResnetBlock(*pair, **kwargs) for pair in itertools.pairwise(inner)]
                blocks += [Downsample(fan_out, time=time, **kwargs)] if down else []
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(widths[-1], **kwargs)
        self.norm_out = ChannelNorm(widths[-1], dtype=dtype)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, **kwargs)

    def __call__(self, x: Float[Array, "b t h w c"], cache=None):
        head, inner, tail = cache or (None, None, None)
        x, head = causal(self.conv_in, x, head)
        x, inner = _run([*self.down_blocks, self.mid_block], x, inner)
        x, tail = causal(self.conv_out, silu(self.norm_out(x)), tail)
        return x, (head, inner, tail)


class Decoder(nnx.Module):
    """Latents to patchified pixels (`WanDecoder3d`)."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        base = config.decoder_base_dim or config.base_dim
        widths = [base * factor for factor in reversed((*config.dim_mult, config.dim_mult[-1]))]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], **kwargs)
        self.mid_block = MidBlock(widths[0], **kwargs)
        times = (*reversed(config.temperal_downsample), False)
        blocks, fan_in = [], widths[0]
        for level, width in enumerate(widths[1:]):
            up = level < len(config.temperal_downsample)
            fan_out = width // 2 if up and not config.is_residual else width
            inner = (fan_in,) + (width,) * (config.num_res_blocks + 1)
            blocks.append(UpStage(inner, fan_out, up=up, time=times[level], residual=config.is_residual, **kwargs))
            fan_in = fan_out
        self.up_blocks = nnx.List(blocks)
        self.norm_out = ChannelNorm(widths[-1], dtype=dtype)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, **kwargs)

    def __call__(self, x: Float[Array, "b t h w c"], cache=None):
        head, inner, tail = cache or (None, None, None)
        x, head = causal(self.conv_in, x, head)
        x, inner = _run([self.mid_block, *self.up_blocks], x, inner)
        x, tail = causal(self.conv_out, silu(self.norm_out(x)), tail)
        return x, (head, inner, tail)


def silu(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """x * sigmoid(x), rounded once: bfloat16 would round the sigmoid too, before the product."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def causal(conv: CausalConv3d, x: Array, cache: Array | None) -> tuple[Array, Array]:
    """`conv` with zeros before the start of a video, where the layer alone would repeat the first frame."""
    return conv(x, _zeros_before(x) if cache is None else cache)


def average_down(x: Float[Array, "b t h w c"], channels: int, time: int, space: int) -> Float[Array, "b s i j d"]:
    """Every time x space x space pixels as one, with `channels` averages of neighbouring values (`AvgDown3D`).

    The values are in the order (channel, frame, row, column). Zeros go before a first frame that is alone.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // time, time, h // space, space, w // space, space, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], channels, -1).mean(-1)


def repeat_up(x: Float[Array, "b s i j c"], channels: int, time: int, space: int) -> Float[Array, "b t h w d"]:
    """Every pixel as time x space x space pixels of `channels` (`DupUp3D`).

    Its values, repeated as often as needed, fill the order (channel, frame, row, column).
    """
    b, t, h, w, c = x.shape
    x = jnp.repeat(x, channels * time * space * space // c, axis=-1)
    x = x.reshape(b, t, h, w, channels, time, space, space).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, t * time, h * space, w * space, channels)


def _zeros_before(x: Array) -> Array:
    """The two frames before the start of a video."""
    return jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)


def _run(blocks, x: Array, cache):
    """The blocks one after the other; None stands for no block."""
    new = []
    for block, old in zip(blocks, cache or [None] * len(blocks), strict=True):
        if block is not None:
            x, old = block(x, old)
        new.append(old)
    return x, tuple(new)
