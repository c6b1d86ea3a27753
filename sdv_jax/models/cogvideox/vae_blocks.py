"""The encoder and decoder of the CogVideoX VAE, as they see one batch of frames.

Every call takes `cache`, what the causal convolutions keep from the frames before (None at the start of a video), and
returns the new one beside its output: nested tuples in the order in which the convolutions run. Source: diffusers'
`autoencoder_kl_cogvideox.py`, `CogVideoXDownsample3D`, `CogVideoXUpsample3D`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.nn.causal_conv3d import CausalConv3d, FrameConv, PointConv
from sdv_jax.nn.group_norm import GroupNorm
from sdv_jax.typing import Array, Float


def _rounded_once(function):
    """`function` in float32, its result in the dtype of x: bfloat16 would round the sigmoid too, before the product."""
    return lambda x: function(x.astype(jnp.float32)).astype(x.dtype)


silu = _rounded_once(jax.nn.silu)
ACTIVATIONS = {
    "silu": silu,
    "swish": silu,
    "mish": _rounded_once(jax.nn.mish),
    "gelu": _rounded_once(functools.partial(jax.nn.gelu, approximate=False)),
    "relu": jax.nn.relu,
}
# The decoder's norms and both norm_out ignore the config's norm_eps (upstream writes the number down).
_FIXED_EPS = 1e-6


def repeat_nearest(z: Float[Array, "b s i j c"], shape: tuple[int, int, int]) -> Float[Array, "b t h w c"]:
    """Nearest-neighbour enlargement to `shape` (t, h, w), multiples of z's.

    When t is odd and above one the first frame is the lone first frame of a video: it stays single, the others repeat.
    """
    t, h, w = shape
    if t % 2 and t > 1:
        rest = jnp.repeat(z[:, 1:], (t - 1) // (z.shape[1] - 1), axis=1)
        z = jnp.concatenate([z[:, :1], rest], axis=1)
    else:
        z = jnp.repeat(z, t // z.shape[1], axis=1)
    return jnp.repeat(jnp.repeat(z, h // z.shape[2], axis=2), w // z.shape[3], axis=3)


class SpatialNorm(nnx.Module):
    """Group norm modulated, pixel by pixel, by the latents (`CogVideoXSpatialNorm3D`; MoVQ, arXiv:2209.09002)."""

    def __init__(self, channels: int, latent_channels: int, *, groups: int, dtype, rngs: nnx.Rngs):
        self.norm_layer = GroupNorm(channels, groups=groups, eps=_FIXED_EPS, dtype=dtype)
        self.conv_y = PointConv(latent_channels, channels, dtype=dtype, rngs=rngs)
        self.conv_b = PointConv(latent_channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"], z: Float[Array, "b s i j e"]) -> Float[Array, "b t h w c"]:
        # The 1x1x1 convolutions commute with repetition: they run on the small latents, not on the enlarged ones.
        scale = repeat_nearest(self.conv_y(z), x.shape[1:4])
        return self.norm_layer(x) * scale + repeat_nearest(self.conv_b(z), x.shape[1:4])


class ResnetBlock(nnx.Module):
    """Norm, act, causal conv, twice; plus the input (`CogVideoXResnetBlock3D`). `latents`: the decoder's norms."""

    def __init__(self, config, fan_in: int, fan_out: int, *, latents: bool, dtype, rngs: nnx.Rngs):
        self.act_fn = config.act_fn

        def norm(channels):
            groups = config.norm_num_groups
            if latents:
                return SpatialNorm(channels, config.latent_channels, groups=groups, dtype=dtype, rngs=rngs)
            return GroupNorm(channels, groups=groups, eps=config.norm_eps, dtype=dtype)

        self.norm1 = norm(fan_in)
        self.conv1 = CausalConv3d(fan_in, fan_out, dtype=dtype, rngs=rngs)
        self.norm2 = norm(fan_out)
        self.conv2 = CausalConv3d(fan_out, fan_out, dtype=dtype, rngs=rngs)
        self.conv_shortcut = PointConv(fan_in, fan_out, dtype=dtype, rngs=rngs) if fan_in != fan_out else None

    def __call__(self, x: Float[Array, "b t h w c"], cache, *latents):
        act = ACTIVATIONS[self.act_fn]
        cache1, cache2 = cache or (None, None)
        y, cache1 = self.conv1(act(self.norm1(x, *latents)), cache1)
        y, cache2 = self.conv2(act(self.norm2(y, *latents)), cache2)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + y, (cache1, cache2)


class Downsample(nnx.Module):
    """Half the height and width by a strided convolution; with `time`, half the frames by averaging pairs.

    An odd number of frames starts with the lone first frame of a video, which is kept as it is.
    """

    def __init__(self, channels: int, *, time: bool, dtype, rngs: nnx.Rngs):
        self.time = time
        self.conv = FrameConv(channels, channels, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j c"]:
        if self.time:
            odd = x.shape[1] % 2
            pairs = x[:, odd:].reshape(x.shape[0], -1, 2, *x.shape[2:]).mean(2)
            x = jnp.concatenate([x[:, :odd], pairs], axis=1)
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the height, the width and, with `time`, the frames (not the first of an odd number), then a convolution."""

    def __init__(self, channels: int, *, time: bool, dtype, rngs: nnx.Rngs):
        self.time = time
        self.conv = FrameConv(channels, channels, stride=1, padding=((1, 1), (1, 1)), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b s i j c"]) -> Float[Array, "b t h w c"]:
        t, h, w = x.shape[1:4]
        if self.time:
            t = 2 * t - t % 2
        return self.conv(repeat_nearest(x, (t, 2 * h, 2 * w)))


class Stage(nnx.Module):
    """Residual blocks, then an optional change of resolution: a down block, an up block or the middle block."""

    def __init__(self, config, widths: tuple[int, ...], *, latents: bool, dtype, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            [
                ResnetBlock(config, fan_in, fan_out, latents=latents, dtype=dtype, rngs=rngs)
                for fan_in, fan_out in itertools.pairwise(widths)
            ]
        )

    def __call__(self, x: Float[Array, "b t h w c"], cache, *latents):
        new = []
        for resnet, old in zip(self.resnets, cache or [None] * len(self.resnets), strict=True):
            x, kept = resnet(x, old, *latents)
            new.append(kept)
        return self.resample(x), tuple(new)

    def resample(self, x):
        return x


class DownStage(Stage):
    """`CogVideoXDownBlock3D` number `level`; the last one keeps the resolution."""

    def __init__(self, config, level: int, *, dtype, rngs: nnx.Rngs):
        channels = config.block_out_channels
        widths = (channels[max(level - 1, 0)],) + (channels[level],) * config.layers_per_block
        super().__init__(config, widths, latents=False, dtype=dtype, rngs=rngs)
        time = level < config.temporal_levels
        last = level == len(channels) - 1
        samplers = [] if last else [Downsample(channels[level], time=time, dtype=dtype, rngs=rngs)]
        self.downsamplers = nnx.List(samplers)

    def resample(self, x):
        for sampler in self.downsamplers:
            x = sampler(x)
        return x


class UpStage(Stage):
    """`CogVideoXUpBlock3D` number `level`, counted from the latents; the last one keeps the resolution."""

    def __init__(self, config, level: int, *, dtype, rngs: nnx.Rngs):
        channels = config.block_out_channels[::-1]
        widths = (channels[max(level - 1, 0)],) + (channels[level],) * (config.layers_per_block + 1)
        super().__init__(config, widths, latents=True, dtype=dtype, rngs=rngs)
        time = level < config.temporal_levels
        last = level == len(channels) - 1
        samplers = [] if last else [Upsample(channels[level], time=time, dtype=dtype, rngs=rngs)]
        self.upsamplers = nnx.List(samplers)

    def resample(self, x):
        for sampler in self.upsamplers:
            x = sampler(x)
        return x


class Encoder(nnx.Module):
    """Pixels to the moments of the latents, 2 * latent_channels (`CogVideoXEncoder3D`)."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        channels = config.block_out_channels
        self.conv_in = CausalConv3d(config.in_channels, channels[0], **kwargs)
        self.down_blocks = nnx.List([DownStage(config, level, **kwargs) for level in range(len(channels))])
        self.mid_block = Stage(config, (channels[-1],) * 3, latents=False, **kwargs)
        self.norm_out = GroupNorm(channels[-1], groups=config.norm_num_groups, eps=_FIXED_EPS, dtype=dtype)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels, **kwargs)

    def __call__(self, x: Float[Array, "b t h w c"], cache=None):
        head, *stages, tail = cache or [None] * (len(self.down_blocks) + 3)
        x, head = self.conv_in(x, head)
        for i, stage in enumerate([*self.down_blocks, self.mid_block]):
            x, stages[i] = stage(x, stages[i])
        x, tail = self.conv_out(silu(self.norm_out(x)), tail)
        return x, (head, *stages, tail)


class Decoder(nnx.Module):
    """Latents to pixels (`CogVideoXDecoder3D`)."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        channels = config.block_out_channels[::-1]
        self.conv_in = CausalConv3d(config.latent_channels, channels[0], **kwargs)
        self.mid_block = Stage(config, (channels[0],) * 3, latents=True, **kwargs)
        self.up_blocks = nnx.List([UpStage(config, level, **kwargs) for level in range(len(channels))])
        self.norm_out = SpatialNorm(channels[-1], config.latent_channels, groups=config.norm_num_groups, **kwargs)
        self.conv_out = CausalConv3d(channels[-1], config.out_channels, **kwargs)

    def __call__(self, z: Float[Array, "b s i j c"], cache=None):
        head, *stages, tail = cache or [None] * (len(self.up_blocks) + 3)
        x, head = self.conv_in(z, head)
        for i, stage in enumerate([self.mid_block, *self.up_blocks]):
            x, stages[i] = stage(x, stages[i], z)
        x, tail = self.conv_out(silu(self.norm_out(x, z)), tail)
        return x, (head, *stages, tail)
