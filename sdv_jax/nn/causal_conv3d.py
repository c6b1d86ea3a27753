"""Convolutions over videos [b, t, h, w, c]: causal in time, per frame, and per pixel.

All of them are one 2-D convolution or one matrix product. XLA:CPU runs 3-D convolutions and their gradients several
times slower than the same arithmetic as 2-D ones (forward/gradient at 16 channels, 8 clips 9x32x32: 62/191 ms in 3-D,
10/58 ms as a sum over time taps, 12/73 ms as below; with 3 input channels 60/177, 9/45 and 4/14 ms). Gathering the taps
also keeps the whole sum in one accumulator, where a sum over taps would round bfloat16 three times.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.typing import Array, Float

# Largest input of one convolution, in elements. cuDNN indexes with 32 bits, and the gathered time taps are kt times the
# video, so larger inputs are convolved in several groups of frames; this also bounds the memory of the taps.
MAX_CONV_ELEMENTS = 2**30

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the peer's initialisation.
_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class CausalConv3d(nnx.Module):
    """A 3-D convolution that looks only back in time, zero padding in space, stride 1.

    Source: `CogVideoXCausalConv3d`. Parameters: `kernel` [kt, kh, kw, in, out], `bias` [out]; odd kh and kw.
    """

    def __init__(self, fan_in: int, fan_out: int, *, kernel_size=(3, 3, 3), dtype=jnp.float32, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_INIT(rngs.params(), (*kernel_size, fan_in, fan_out), dtype))
        self.bias = nnx.Param(jnp.zeros((fan_out,), dtype))

    def __call__(
        self, x: Float[Array, "b t h w c"], cache: Float[Array, "b k h w c"] | None = None
    ) -> tuple[Float[Array, "b t h w d"], Float[Array, "b k h w c"]]:
        """Returns the output and the cache for the frames that follow.

        Args:
          x: the video, or the next piece of it.
          cache: the kt-1 frames before x, as returned for the piece before; None at the start of a video, where the
            first frame is repeated.
        """
        kt, kh, kw, fan_in, fan_out = self.kernel.shape
        before = jnp.repeat(x[:, :1], kt - 1, axis=1) if cache is None else cache
        padded = jnp.concatenate([before, x], axis=1)
        # Time taps become channels: every output frame is then an independent image.
        kernel = jnp.moveaxis(self.kernel[...], 0, 2).reshape(kh, kw, kt * fan_in, fan_out)
        outputs = []
        for start, stop in _frame_groups(x.shape, kt):
            taps = jnp.concatenate([padded[:, start + k : stop + k] for k in range(kt)], axis=-1)
            outputs.append(_conv_frames(taps, kernel, self.bias[...], padding=((kh // 2,) * 2, (kw // 2,) * 2)))
        return jnp.concatenate(outputs, axis=1), padded[:, x.shape[1] :]


class FrameConv(nnx.Module):
    """A 2-D convolution of every frame.

    Source: `torch.nn.Conv2d`. Parameters: `kernel` [3, 3, in, out], `bias` [out]. `padding` is
    ((top, bottom), (left, right)).
    """

    def __init__(self, fan_in: int, fan_out: int, *, stride: int, padding, dtype=jnp.float32, rngs: nnx.Rngs):
        self.stride = stride
        self.padding = padding
        self.kernel = nnx.Param(_INIT(rngs.params(), (3, 3, fan_in, fan_out), dtype))
        self.bias = nnx.Param(jnp.zeros((fan_out,), dtype))

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t i j d"]:
        outputs = [
            _conv_frames(x[:, start:stop], self.kernel[...], self.bias[...], padding=self.padding, stride=self.stride)
            for start, stop in _frame_groups(x.shape, 1)
        ]
        return jnp.concatenate(outputs, axis=1)


class PointConv(nnx.Module):
    """A 1x1x1 convolution: one matrix for every pixel. Parameters: `kernel` [1, 1, 1, in, out], `bias` [out]."""

    def __init__(self, fan_in: int, fan_out: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_INIT(rngs.params(), (1, 1, 1, fan_in, fan_out), dtype))
        self.bias = nnx.Param(jnp.zeros((fan_out,), dtype))

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        return x @ self.kernel[0, 0, 0].astype(x.dtype) + self.bias[...].astype(x.dtype)


class TimeConv(nnx.Module):
    """A convolution over three frames, pixel by pixel and without padding: one matrix product on gathered taps.

    Source: `torch.nn.Conv3d` of kernel (3, 1, 1). Parameters: `kernel` [3, 1, 1, in, out], `bias` [out].
    """

    def __init__(self, fan_in: int, fan_out: int, *, stride: int, dtype=jnp.float32, rngs: nnx.Rngs):
        self.stride = stride
        self.kernel = nnx.Param(_INIT(rngs.params(), (3, 1, 1, fan_in, fan_out), dtype))
        self.bias = nnx.Param(jnp.zeros((fan_out,), dtype))

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s h w d"]:
        """Returns one frame for every `stride`-th of the windows of three; of fewer than three frames, none."""
        kernel = self.kernel[...].astype(x.dtype).reshape(-1, self.kernel.shape[-1])
        windows = max(x.shape[1] - 2, 0)
        taps = jnp.concatenate([x[:, k : windows + k : self.stride] for k in range(3)], axis=-1)
        return taps @ kernel + self.bias[...].astype(x.dtype)


def _frame_groups(shape: tuple[int, ...], taps: int) -> list[tuple[int, int]]:
    """(start, stop) of nearly equal groups of frames whose inputs stay within MAX_CONV_ELEMENTS."""
    frames = shape[1]
    groups = min(frames, max(1, math.ceil(math.prod(shape) * taps / MAX_CONV_ELEMENTS)))
    bounds = [frames * i // groups for i in range(groups + 1)]
    return list(itertools.pairwise(bounds))


def _conv_frames(x: Array, kernel: Array, bias: Array, *, padding, stride: int = 1) -> Array:
    """2-D convolution of [b, t, h, w, c] with time folded into the batch, in the dtype of x."""
    images = x.reshape(-1, *x.shape[2:])
    y = jax.lax.conv_general_dilated(
        images, kernel.astype(x.dtype), (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return (y + bias.astype(x.dtype)).reshape(*x.shape[:2], *y.shape[1:])
