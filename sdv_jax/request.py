"""What a user asks a pipeline for, checked against what the model can make, before anything is computed."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from sdv_jax.errors import UserError

STEPS, GUIDANCE = 50, 6.0  # the defaults of diffusers' CogVideoXPipeline
OUTPUTS = ("video", "latents")
DTYPES = ("float32", "bfloat16")
SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
_SEEDS = 2**32


@dataclass(frozen=True)
class Geometry:
    """What sizes a model makes: its defaults in pixels and frames, and what they must divide by.

    spatial, temporal: pixels per latent cell, frames per latent frame; patch: latent cells per token side.
    """

    height: int
    width: int
    num_frames: int
    spatial: int
    temporal: int
    patch: int
    channels: int

    @classmethod
    def of(cls, transformer, vae) -> "Geometry":
        """From a TransformerConfig and a VAEConfig, with the defaults that diffusers' pipeline takes from them."""
        spatial = 2 ** (len(vae.block_out_channels) - 1)
        return cls(
            height=transformer.sample_height * spatial,
            width=transformer.sample_width * spatial,
            num_frames=transformer.sample_frames,
            spatial=spatial,
            temporal=int(vae.temporal_compression_ratio),
            patch=transformer.patch_size,
            channels=transformer.in_channels,
        )

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[t, h, w, c] of the latents of a video of that size."""
        return (num_frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial, self.channels

    @property
    def period(self) -> int:
        """The VAE makes 1 + a multiple of this many frames exactly: see `decoded_frames`."""
        return 1 if self.temporal == 1 else 2 * self.temporal

    def decoded_frames(self, num_frames: int) -> int:
        """How many frames come out of the decoder for the latents of `num_frames`.

        diffusers' CogVideoX VAE, and so ours, knows the lone first frame by an odd number of latent frames; of an
        even number every latent frame, the first too, becomes `temporal` frames.
        """
        latents = (num_frames - 1) // self.temporal + 1
        return latents * self.temporal if latents % 2 == 0 else num_frames

    def pixel_sizes(self, latents: tuple[int, ...]) -> tuple[int, int, int]:
        """(frames, height, width) of the video that latents [..., t, h, w, c] decode to."""
        t, h, w = latents[-4:-1]
        return (t - 1) * self.temporal + 1, h * self.spatial, w * self.spatial


@dataclass(frozen=True)
class Request:
    """A checked call: every default filled in."""

    prompts: list[str]
    negatives: list[str]
    num_frames: int
    height: int
    width: int
    steps: int
    guidance: float
    seed: int

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance does anything, as diffusers decides it."""
        return self.guidance > 1.0


def check_request(
    geometry: Geometry,
    *,
    prompt,
    negative_prompt,
    size: tuple,
    steps,
    guidance,
    seed,
    train_timesteps: int,
    latents=None,
) -> Request:
    """The checked request. `size` is (num_frames, height, width); None is "as `latents` have it, else the model's own".

    Raises:
      UserError: one line for the first thing that is wrong.
    """
    prompts = _texts(prompt, "prompt")
    negative_prompt = "" if negative_prompt is None else negative_prompt
    negatives = (
        _texts(negative_prompt, "negative_prompt") * len(prompts)
        if isinstance(negative_prompt, str)
        else _texts(negative_prompt, "negative_prompt")
    )
    if len(negatives) != len(prompts):
        raise UserError(
            f"negative_prompt has {len(negatives)} texts for {len(prompts)} prompts; give one, or one per prompt"
        )
    own = geometry.num_frames, geometry.height, geometry.width
    if latents is not None and len(_shape(latents, "latents")) == 5:
        own = geometry.pixel_sizes(np.shape(latents))
    num_frames, height, width = (own[i] if value is None else value for i, value in enumerate(size))
    return Request(
        prompts=prompts,
        negatives=negatives,
        num_frames=_frames(num_frames, geometry.temporal, advised=geometry.period),
        height=_side(height, "height", geometry),
        width=_side(width, "width", geometry),
        steps=_steps(STEPS if steps is None else steps, train_timesteps),
        guidance=_guidance(GUIDANCE if guidance is None else guidance),
        seed=_seed(seed),
    )


def check_array(array, name: str, shape: Sequence[int | str]) -> None:
    """Raises UserError unless `array` holds finite numbers in `shape`, where a text is any size of 1 or more."""
    found = _shape(array, name)
    fits = len(found) == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, found, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise UserError(f"{name} has shape {tuple(found)}; expected [{wanted}]")
    if 0 in found:
        raise UserError(f"{name} has shape {tuple(found)}: it is empty; give at least one value per axis")
    array = np.asarray(array)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise UserError(f"{name} holds {array.dtype} values; expected floating-point numbers")
    if not np.isfinite(array.astype(np.float32)).all():
        raise UserError(f"{name} holds NaN or infinite values; expected finite numbers")


def check_choice(value, name: str, choices: Sequence[str]) -> str:
    """`value`, which must be one of `choices`."""
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}; choose one of: {', '.join(choices)}")
    return value


def check_video_size(shape: tuple[int, ...], geometry: Geometry) -> None:
    """Raises UserError unless a video [b,t,h,w,3] has a length and a size that the VAE can encode."""
    if len(shape) != 5 or shape[-1] != 3:
        raise UserError(f"video has shape {tuple(shape)}; expected [b, t, h, w, 3] in [-1, 1]")
    _frames(shape[1], geometry.temporal, advised=geometry.temporal)
    for name, value in (("height", shape[2]), ("width", shape[3])):
        _multiple(value, name, geometry.spatial)


def _shape(array, name: str) -> tuple[int, ...]:
    try:
        return np.shape(array)
    except ValueError as error:
        raise UserError(f"{name} is not an array: its rows have different lengths") from error


def _texts(value, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name} is of type {type(value).__name__}; expected a text or a list of texts")
    if not texts:
        raise UserError(f"{name} is an empty list; give at least one text")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name} {ascii(text)} is not valid UTF-8; type it anew") from error
    return list(texts)


def _whole(value, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UserError(f"{name} is {value!r}; expected a whole number")
    return int(value)


def _frames(value, temporal: int, *, advised: int) -> int:
    """The count, which must be 1 + a multiple of `temporal`; the message names multiples of `advised`."""
    count = _whole(value, "num_frames")
    if count < 1:
        raise UserError(f"num_frames is {count}; expected at least 1")
    if (count - 1) % temporal:
        below = (count - 1) // advised * advised + 1
        rule = f"expected 1 + a multiple of {advised}"
        raise UserError(f"num_frames is {count}; {rule}: the nearest are {below} and {below + advised}")
    return count


def _side(value, name: str, geometry: Geometry) -> int:
    return _multiple(_whole(value, name), name, geometry.spatial * geometry.patch)


def _multiple(pixels: int, name: str, multiple: int) -> int:
    if pixels < multiple:
        raise UserError(f"{name} is {pixels}; expected a multiple of {multiple}, the smallest is {multiple}")
    if pixels % multiple:
        below = pixels // multiple * multiple
        raise UserError(
            f"{name} is {pixels}; expected a multiple of {multiple}: the nearest are {below} and {below + multiple}"
        )
    return pixels


def _steps(value, train_timesteps: int) -> int:
    steps = _whole(value, "steps")
    if not 1 <= steps <= train_timesteps:
        raise UserError(f"steps is {steps}; expected 1 to {train_timesteps}, the timesteps the model was trained with")
    return steps


def _guidance(value) -> float:
    # finite also as the float32 that the model computes with
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= np.finfo(np.float32).max:
        raise UserError(f"guidance is {value!r}; expected a finite number of at least 0 (1 and below switch it off)")
    return float(value)


def _seed(value) -> int:
    seed = _whole(value, "seed")
    if not 0 <= seed < _SEEDS:
        raise UserError(f"seed is {seed}; expected 0 to {_SEEDS - 1}")
    return seed
