"""What a pipeline and a training run must know of a model beyond its weights, the same questions for every family."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sdv_jax.errors import UserError
from sdv_jax.models.config_check import check_whole, refuse
from sdv_jax.typing import Array, Float, Key

Latents = Float[Array, "*b c"] | Float[np.ndarray, "*b c"]  # users hold them on the host
DEFAULTS = {
    "height": int, "width": int, "num_frames": int, "steps": int, "guidance": float, "fps": float, "text_length": int,
    "reference": Mapping,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LatentScale:
    """Between the VAE's latents z and the transformer's x = (z - shift) · scale; one number each, or one per channel.

    sampled: whether x is made of a draw from the VAE's posterior (CogVideoX) or of its mean (Wan).
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]
    sampled: bool = True

    @classmethod
    def factor(cls, scaling_factor: float) -> "LatentScale":
        """x = z · scaling_factor."""
        return cls((0.0,), (float(scaling_factor),))

    def to_model(self, z: Latents) -> Float[Array, "*b c"]:
        """The VAE's latents in the transformer's scale, in their dtype."""
        return ((z - self._row(self.shift)) * self._row(self.scale)).astype(z.dtype)

    def to_vae(self, x: Latents) -> Float[Array, "*b c"]:
        """The inverse of `to_model`."""
        return (x * (1 / self._row(self.scale)) + self._row(self.shift)).astype(x.dtype)

    def draw(self, mean: Float[Array, "*b c"], logvar: Float[Array, "*b c"], key: Key[Array, ""]) -> Array:
        """Latents in the transformer's scale from the VAE's moments; `key` is not read where the mean counts."""
        if not self.sampled:
            return self.to_model(mean)
        return self.to_model(mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32))

    @staticmethod
    def _row(values: tuple[float, ...]) -> Array:
        return jnp.asarray(values, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What sizes a model makes: its defaults in pixels and frames, and what they must divide by.

    spatial, temporal: pixels per latent cell, frames per latent frame; patch, frame_patch: latent cells per side of a
    token, latent frames per token; channels: of a latent; period: frames are best 1 + a multiple of this.
    """

    height: int
    width: int
    num_frames: int
    spatial: int
    temporal: int
    patch: int
    channels: int
    period: int
    frame_patch: int = 1

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[t, h, w, c] of the latents of a video of that size."""
        return (num_frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial, self.channels

    def surplus(self, latent_frames: int) -> int:
        """Latent frames that are denoised before the clip's own, so that tokens of several frames fit, and dropped."""
        return -latent_frames % self.frame_patch

    def decoded_frames(self, num_frames: int) -> int:
        """How many frames come out of the decoder for the latents of `num_frames`.

        diffusers' CogVideoX VAE, and so ours, knows the lone first frame by an odd number of latent frames; of an
        even number every latent frame, the first too, becomes `temporal` frames. It shows in a period of 2 · temporal.
        """
        latents = (num_frames - 1) // self.temporal + 1
        return latents * self.temporal if self.period > self.temporal and latents % 2 == 0 else num_frames

    def pixel_sizes(self, latents: tuple[int, ...]) -> tuple[int, int, int]:
        """(frames, height, width) of the video that latents [..., t, h, w, c] decode to."""
        t, h, w = latents[-4:-1]
        return (t - 1) * self.temporal + 1, h * self.spatial, w * self.spatial

    def frame_tokens(self, height: int, width: int) -> int:
        """Tokens of one latent frame (or of `frame_patch` of them) of height × width latent cells."""
        return (height // self.patch) * (width // self.patch)


@dataclasses.dataclass(frozen=True)
class Traits:
    """The answers for one model.

    Attributes:
      geometry: sizes.
      latents: the scale of what is denoised and of references.
      image_latents: the scale of a given first frame; None where the model takes none.
      clamps_image: a given first frame is part of the latents, and stays in the result.
      text_length, text_width: tokens a prompt is padded to, width of its embeddings.
      text_masked: padding is hidden from the text encoder and zero afterwards, instead of being attended to.
      clean_text: what is done to a prompt before it is tokenised.
      steps, guidance, fps: defaults of sampling.
      boundary: the timestep, as a share of all, from which on up the first of two experts denoises; None for one.
      second_guidance: default guidance of the second expert; None: as the first.
    """

    geometry: Geometry
    latents: LatentScale
    text_length: int
    text_width: int
    steps: int
    guidance: float
    fps: float
    image_latents: LatentScale | None = None
    clamps_image: bool = False
    text_masked: bool = False
    clean_text: Callable[[str], str] = str
    boundary: float | None = None
    second_guidance: float | None = None


def check_fit(*claims: tuple[str, object, str, object]) -> None:
    """Raises UserError where parts of a pipeline do not fit one another; a claim is (key, value, other key, value)."""
    wrong = [f"{key} is {value}, expected {other} of {at}" for key, value, at, other in claims if value != other]
    if wrong:
        raise UserError(f"parts of different models: {'; '.join(wrong)}")


def check_references_before(reference: Mapping | None, family: str) -> None:
    """For families whose references stand right before the clip, always. Raises UserError for settings that would move
    them: `shift` has to be 0, which says the same, or what it is in configs/base.py, which says nothing.
    """
    fixed = {"placement": ("before",), "offset": (1,), "shift": (1.0, 0.0)}
    for key, value in (reference or {}).items():
        if value not in fixed.get(key, ()):
            told, wanted = f"reference.{key} is {value!r}", " or ".join(map(repr, fixed.get(key, (None,))))
            raise UserError(f"{told}, expected {wanted}: {family} takes references before the clip only")


def check_reference(value, where: str) -> None:
    """Raises UserError unless `value` is None or a few texts and finite numbers by name."""
    kinds = (str, int, float)
    if value is not None and not (
        isinstance(value, Mapping)
        and all(isinstance(key, str) and type(item) in kinds for key, item in value.items())
        and all(math.isfinite(item) for item in value.values() if not isinstance(item, str))
    ):
        raise UserError(f"{where}: reference is {value!r}; expected texts and finite numbers by name, or nothing")


def check_defaults(raw: Mapping, where: str) -> dict:
    """The contents of a model's defaults.json: any of `DEFAULTS`. Raises UserError.

    `reference` is where references stand, if not where the family puts them: in models that an adapter was merged into.
    The others are numbers above 0.
    """
    if unknown := sorted(set(raw) - set(DEFAULTS)):
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
    for name, value in raw.items():
        if DEFAULTS[name] is Mapping:
            check_reference(value, where)
        elif DEFAULTS[name] is int:
            check_whole(where, name, value)
        elif type(value) not in (int, float) or not 0 < value < float("inf"):
            refuse(where, name, value, "a finite number > 0")
    return dict(raw)
