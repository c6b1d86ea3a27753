"""What a user asks a pipeline for, checked against what the model can make, before anything is computed."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from sdv_jax.errors import UserError
from sdv_jax.models.contract import Geometry, Traits

OUTPUTS = ("video", "latents")
DTYPES = ("float32", "bfloat16")
_SEEDS = 2**32


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
    second_guidance: float
    seed: int

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance does anything, as diffusers decides it."""
        return self.guidance > 1.0


def check_request(
    traits: Traits,
    *,
    prompt,
    negative_prompt,
    size: tuple,
    steps,
    guidance,
    seed,
    train_timesteps: int,
    guidance_2=None,
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
    geometry = traits.geometry
    own = geometry.num_frames, geometry.height, geometry.width
    if latents is not None and len(_shape(latents, "latents")) == 5:
        own = geometry.pixel_sizes(np.shape(latents))
    num_frames, height, width = (own[i] if value is None else value for i, value in enumerate(size))
    if guidance_2 is not None and traits.boundary is None:
        raise UserError("guidance_2 is for models of two experts, and this one has one; leave it away")
    first = _guidance(traits.guidance if guidance is None else guidance)
    # Whoever sets the first guidance means both; diffusers has it so.
    own_second = first if guidance is not None or traits.second_guidance is None else traits.second_guidance
    return Request(
        prompts=prompts,
        negatives=negatives,
        num_frames=_frames(num_frames, geometry.temporal, advised=geometry.period),
        height=_side(height, "height", geometry),
        width=_side(width, "width", geometry),
        steps=_steps(traits.steps if steps is None else steps, train_timesteps),
        guidance=first,
        second_guidance=own_second if guidance_2 is None else _guidance(guidance_2, "guidance_2"),
        seed=_seed(seed),
    )


def check_takes_image(traits: Traits) -> None:
    """Raises UserError for a model that cannot be given its first frame."""
    if traits.image_latents is None:
        raise UserError(
            "image: this is no image-to-video model (CogVideoX-5b-I2V, CogVideoX1.5-5B-I2V and Wan2.2-TI2V-5B are); "
            "leave it away, or give a picture of the subject as reference"
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


def _guidance(value, name: str = "guidance") -> float:
    # finite also as the float32 that the model computes with
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= np.finfo(np.float32).max:
        raise UserError(f"{name} is {value!r}; expected a finite number of at least 0 (1 and below switch it off)")
    return float(value)


def _seed(value) -> int:
    seed = _whole(value, "seed")
    if not 0 <= seed < _SEEDS:
        raise UserError(f"seed is {seed}; expected 0 to {_SEEDS - 1}")
    return seed
