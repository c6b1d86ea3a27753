"""From a prompt, and pictures of a subject if there are any, to a video.

    pipe = sdv_jax.load_pipeline("model", adapter="adapter")
    video = pipe("a <cls> subject drifting left over sand", reference="subject.png", seed=1)     # numpy [1, t, h, w, 3]

Scales. The VAE's own latents come out of `encode` and go into `decode`. Everything the transformer sees (`latents`,
`reference_latents`, `image_latents`, `denoise`) is in the transformer's scale; `pipe.traits.latents` goes from one to
the other (`to_model`, `to_vae`).

What users call checks its arguments itself and tells a mistake as a UserError, hence `no_type_check`: the shape checker
of the tests would be first.
"""

import dataclasses
import logging
import numbers
import os
import pathlib
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.checkpoints import adapter_files, model_folder
from sdv_jax.checkpoints.model_folder import About
from sdv_jax.data.images import fit_image, read_image, stretch_image
from sdv_jax.diffusion import dynamic_scale, make_solver, two_expert_scales, with_flow_shift
from sdv_jax.errors import UserError
from sdv_jax.models.text.tokenizer import Tokenizer
from sdv_jax.nn.modulation import STREAMS
from sdv_jax.progress import Progress
from sdv_jax.request import (
    DTYPES,
    OUTPUTS,
    Request,
    check_array,
    check_choice,
    check_request,
    check_takes_image,
    check_video_size,
)
from sdv_jax.runtime import Runtime
from sdv_jax.typing import Array, Float, Int

logger = logging.getLogger(__name__)


class Pipeline:
    """A loaded model. Made by `load_pipeline`; call it to make videos.

    Every program takes the weights as arguments and is compiled once for given shapes. Results depend on the arguments
    and the seed only: the same call gives the same bits.
    """

    def __init__(
        self, about: About, modules: dict[str, nnx.Module], tokenizer: Tokenizer, *, options: dict,
        dtype: str = "float32", mesh=None, offload: bool = False, seconds: dict | None = None,
    ):  # fmt: skip
        self.config, self.traits, self.geometry = about.raw, about.traits, about.traits.geometry
        self.scheduler = about.family.scheduler(about.raw["scheduler"])
        self._schedulers = about.family.schedulers
        denoisers = [modules[name] for name in about.family.denoisers if name in modules]
        self.runtime = Runtime(
            denoisers, modules["vae"], modules["text_encoder"], tokenizer, about.traits, options=options,
            dtype=jnp.dtype(dtype), mesh=mesh, sharding=about.family.sharding, offload=offload,
        )  # fmt: skip
        # stage -> seconds it took, of the latest call; of loading before the first one
        self.seconds: dict[str, float] = seconds or {}

    @no_type_check
    def __call__(
        self,
        prompt: str | Sequence[str],
        reference=None,
        negative_prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        latents=None,
        reference_latents=None,
        step_noise=None,
        output: str = "video",
        *,
        image=None,
        image_latents=None,
        guidance_2: float | None = None,
        scheduler: str | None = None,
        flow_shift: float | None = None,
        dynamic_guidance: bool = False,
        reference_fit: str = "crop",
        tiling: bool = False,
        progress: bool = True,
    ) -> np.ndarray:
        """Videos, one per prompt: float32 [b, t, h, w, 3] in [0, 1]; output="latents" gives latents [b, t', h', w', c].

        Args:
          prompt: a text or a list of them. A text of more tokens than the model reads is cut, with a warning.
          reference: a picture of the subject (path, Pillow image, array [h, w, 3] of uint8 or of floats in [0, 1]),
            several as a list or as [k, h, w, 3]; every video of the batch sees all of them.
          negative_prompt: what to steer away from; one text, or one per prompt; None is "".
          height, width, num_frames: in pixels and frames. Where absent: as `latents` have them, else the model's own.
            num_frames is 1 + a multiple of the frames that the VAE compresses into one (4). CogVideoX makes 8, 16, ...
            of 5, 13, ..., as diffusers has it, and a warning tells so.
          steps, guidance: the model's own where absent. Guidance of 1 or less runs the model once per step, not twice.
          seed: decides the initial noise, the draw of the reference's latents and the solver's noise.
          latents: [b, t', h', w', c], the initial noise instead of a drawn one. CogVideoX 1.5 wants, and returns, an
            even number of latent frames; the first of one too many is dropped before decoding.
          reference_latents: [b, k, h', w', c] or [k, h', w', c] instead of `reference`, in the transformer's scale.
          step_noise: [steps, b, t', h', w', c], what a stochastic solver adds in each step instead of drawing it.
          image: the first frame, for image-to-video models; one picture, as `reference`, for all videos or a list of
            one per prompt; resized to the video's shape as diffusers does it, not cut: give one of its proportions.
          image_latents: [b, 1, h', w', c] instead of `image`, in the scale the model wants of it.
          guidance_2: of the second expert, where there are two; absent: `guidance` if that is given, else the model's.
          scheduler: a solver instead of the checkpoint's own: "ddim" or "dpm" (CogVideoX), "unipc" or "euler" (Wan).
          flow_shift: Wan: shift of the noise levels instead of the scheduler file's.
          dynamic_guidance: CogVideoX's cosine law over the steps instead of a constant scale.
          reference_fit: "crop" fills the frame and cuts what overhangs, "pad" shows the whole picture on white.
          tiling: decode (and encode) in overlapping tiles: less memory, slightly different pixels.
          progress: show what is being done on stderr. `self.seconds` is filled either way.

        Raises:
          UserError: one line, before anything is computed; or after denoising, if the numbers overflowed.
        """
        check_choice(output, "output", OUTPUTS)
        request = check_request(
            self.traits,
            prompt=prompt,
            negative_prompt=negative_prompt,
            size=(num_frames, height, width),
            steps=steps,
            guidance=guidance,
            guidance_2=guidance_2,
            seed=seed,
            train_timesteps=self.scheduler.num_train_timesteps,
            latents=latents,
        )
        if output == "video":
            self._tell_length(request.num_frames)
        solver = make_solver(self._scheduler(scheduler, flow_shift), request.steps)
        scales, first_low = self._scales(request, solver, dynamic_guidance)
        tiles, bars = self._tiles(tiling), Progress(shown=progress)
        with self.runtime.on_mesh():
            start, noise = self._noise(request, latents, step_noise)
            pictures = self._references(
                request, reference, reference_latents, fit=reference_fit, tiles=tiles, bars=bars
            )
            first_frame = self._first_frame(request, image, image_latents, tiles=tiles, bars=bars)
            conditions = (*self._prompts(request, bars), pictures, first_frame)
            result = self.runtime.denoise(
                solver, start, conditions, scales=scales, key=_keys(request.seed)[2], step_noise=noise,
                first_low=first_low, bars=bars,
            )  # fmt: skip
            if first_frame is not None and self.traits.clamps_image:
                result = jnp.concatenate([first_frame.astype(result.dtype), result[:, 1:]], axis=1)
            if not jnp.isfinite(result).all():
                advice = "lower the guidance, check the adapter, or use float32"
                raise UserError(f"the denoised latents hold NaN or infinite values; {advice}")
            if output == "video":
                own = result[:, start.shape[1] - self._latent_frames(request) :]
                result = self.runtime.decode(self.traits.latents.to_vae(own), tiling=tiles, bars=bars)
                result = np.clip(np.asarray(result, np.float32) / 2 + 0.5, 0, 1)
        self.seconds = bars.seconds
        return np.asarray(result, np.float32)

    @no_type_check
    def denoise(
        self,
        latents: Float[Array, "b t h w c"],
        text_embeddings: Float[Array, "b s d"],
        timesteps: Int[Array, " b"] | Float[Array, " b"],
        reference_latents: Float[Array, "b k h w c"] | None = None,
        *,
        image_latents: Float[Array, "b 1 h w c"] | None = None,
        expert: int = 0,
    ) -> Float[Array, "b t h w c"]:
        """One call of the transformer: its raw prediction. Latents are in the transformer's scale.

        `expert` is 0 or 1 where there are two, the high-noise one first. Raises UserError for shapes that do not fit
        the model or each other.
        """
        g, put = self.geometry, self.runtime.put
        check_array(latents, "latents", ["b", "t", "h", "w", g.channels])
        batch, frames, height, width, _ = np.shape(latents)
        if height % g.patch or width % g.patch or frames % g.frame_patch:
            rule = f"height and width must divide by {g.patch}" + (f", t by {g.frame_patch}" * (g.frame_patch > 1))
            raise UserError(f"latents have shape {tuple(np.shape(latents))}; {rule}")
        check_array(text_embeddings, "text_embeddings", [batch, "s", self.traits.text_width])
        if np.shape(timesteps) != (batch,):
            raise UserError(f"timesteps has shape {np.shape(timesteps)}; expected [{batch}], one per example")
        check_array(timesteps, "timesteps", [batch])
        if reference_latents is not None:
            check_array(reference_latents, "reference_latents", [batch, "k", height, width, g.channels])
            reference_latents = put(reference_latents)
        if image_latents is not None:
            check_takes_image(self.traits)
            check_array(image_latents, "image_latents", [batch, 1, height, width, g.channels])
            image_latents = put(image_latents)
        if expert not in range(len(self.runtime.denoisers)):
            raise UserError(f"expert is {expert!r}; this model has {len(self.runtime.denoisers)}, counted from 0")
        times = jax.device_put(jnp.asarray(timesteps), self.runtime.replicated)
        with self.runtime.on_mesh():
            return self.runtime.predict(
                expert, put(latents), put(text_embeddings), times, reference_latents, image_latents
            )

    @no_type_check
    def encode(self, video: Float[Array, "b t h w 3"], *, tiling: bool = False) -> tuple[Array, Array]:
        """(mean, logvar) of the VAE's posterior, each [b, t', h', w', c], before scaling. `video` is in [-1, 1].

        Raises UserError for a length or a size that the VAE cannot encode.
        """
        check_video_size(np.shape(video), self.geometry)
        check_array(video, "video", ["b", "t", "h", "w", 3])
        with self.runtime.on_mesh():
            return self.runtime.encode(self.runtime.put(video), tiling=self._tiles(tiling), bars=Progress(shown=False))

    @no_type_check
    def decode(self, latents: Float[Array, "b t h w c"], *, tiling: bool = False) -> Float[Array, "b t h w 3"]:
        """Video in [-1, 1] (CogVideoX: not clipped) from latents in the VAE's scale, as the mean that `encode` returns.

        For latents in the transformer's scale: `pipe.decode(pipe.traits.latents.to_vae(latents))`.
        """
        check_array(latents, "latents", ["b", "t", "h", "w", self.geometry.channels])
        with self.runtime.on_mesh():
            return self.runtime.decode(
                self.runtime.put(latents), tiling=self._tiles(tiling), bars=Progress(shown=False)
            )

    @no_type_check
    def encode_prompt(self, prompts: Sequence[str]) -> Float[Array, "b s d"]:
        """Text embeddings, padded to the model's text length; CogVideoX attends to padding, Wan's padding is zero."""
        with self.runtime.on_mesh():
            return self.runtime.embed(prompts, Progress(shown=False))

    # MARK: stages of a call

    def _tell_length(self, asked: int) -> None:
        made, below = self.geometry.decoded_frames(asked), asked - self.geometry.temporal
        if made != asked:
            logger.warning(
                "num_frames is %d, of which the VAE makes %d; %d and %d come out as asked",
                asked, made, below, below + self.geometry.period,
            )  # fmt: skip

    def _scheduler(self, name: str | None, flow_shift: float | None):
        config = self.scheduler
        if name is not None:
            known = self._schedulers
            config = dataclasses.replace(config, class_name=known[check_choice(name, "scheduler", tuple(known))])
        return config if flow_shift is None else with_flow_shift(config, flow_shift)

    def _scales(self, request: Request, solver, dynamic: bool) -> tuple[np.ndarray, int]:
        """(guidance of each step, the second expert's first step)."""
        if self.traits.boundary is not None:
            boundary = self.traits.boundary * self.scheduler.num_train_timesteps
            scales, first_low = two_expert_scales(request.guidance, request.second_guidance, solver.timesteps, boundary)
        else:
            scales, first_low = request.guidance, request.steps
        if dynamic:
            if "dpm" not in self._schedulers:
                raise UserError("dynamic_guidance is CogVideoX's; this is another family, leave it away")
            scales = dynamic_scale(request.guidance, solver.timesteps)
        return np.broadcast_to(np.asarray(scales, np.float32), (request.steps,)), first_low

    def _latent_frames(self, request: Request) -> int:
        return self.geometry.latent_shape(request.num_frames, request.height, request.width)[0]

    def _references(
        self, request: Request, reference, reference_latents, *, fit: str, tiles, bars: Progress
    ) -> Array | None:
        """[b, k, h', w', c] in the transformer's scale, or None."""
        batch, (_, *shape) = len(request.prompts), self.geometry.latent_shape(1, request.height, request.width)
        if reference is not None and reference_latents is not None:
            raise UserError("reference and reference_latents are both given; give one of them")
        if reference_latents is not None:
            lead = ["k"] if np.ndim(reference_latents) == 4 else [batch, "k"]
            check_array(reference_latents, "reference_latents", [*lead, *shape])
            given = self.runtime.put(reference_latents)
            return jnp.broadcast_to(given, (batch, *given.shape[-4:]))
        if reference is None:
            return None
        size = {"height": request.height, "width": request.width}
        pictures = [fit_image(read_image(one), **size, fit=fit) for one in _pictures(reference, "reference")]
        mean, logvar = self._encode_pictures(pictures, tiles=tiles, bars=bars)
        drawn = self.traits.latents.draw(mean, logvar, _keys(request.seed)[1])
        return jnp.broadcast_to(drawn.astype(self.runtime.dtype)[None, :, 0], (batch, len(pictures), *shape))

    def _first_frame(self, request: Request, image, image_latents, *, tiles, bars: Progress) -> Array | None:
        """[b, 1, h', w', c] in the scale that the model wants of it, or None."""
        batch, shape = len(request.prompts), self.geometry.latent_shape(1, request.height, request.width)
        if image is None and image_latents is None:
            return None
        check_takes_image(self.traits)
        if image is not None and image_latents is not None:
            raise UserError("image and image_latents are both given; give one of them")
        if image_latents is not None:
            check_array(image_latents, "image_latents", [batch, *shape])
            return self.runtime.put(image_latents)
        size = {"height": request.height, "width": request.width}
        pictures = [stretch_image(read_image(one, name="image"), **size) for one in _pictures(image, "image")]
        if len(pictures) not in (1, batch):
            raise UserError(f"image holds {len(pictures)} pictures for {batch} prompts; give one, or one per prompt")
        mean, logvar = self._encode_pictures(pictures, tiles=tiles, bars=bars)
        drawn = self.traits.image_latents.draw(mean, logvar, _keys(request.seed)[3])
        return jnp.broadcast_to(drawn.astype(self.runtime.dtype), (batch, *shape))

    def _encode_pictures(self, pictures: list[np.ndarray], *, tiles, bars: Progress):
        return self.runtime.encode(self.runtime.put(np.stack(pictures)[:, None]), tiling=tiles, bars=bars)

    def _noise(self, request: Request, latents, step_noise) -> tuple[Array, Array | None]:
        """(initial latents in the pipeline's dtype, noise per step or None)."""
        frames, *rest = self.geometry.latent_shape(request.num_frames, request.height, request.width)
        shape = (len(request.prompts), frames + self.geometry.surplus(frames), *rest)
        if step_noise is not None:
            check_array(step_noise, "step_noise", [request.steps, *shape])
            step_noise = self.runtime.exactly(step_noise)
        if latents is None:
            return self.runtime.put(jax.random.normal(_keys(request.seed)[0], shape, jnp.float32)), step_noise
        check_array(latents, "latents", shape)
        return self.runtime.put(latents), step_noise

    def _prompts(self, request: Request, bars: Progress) -> tuple[Array, Array | None]:
        """(embeddings, embeddings of the negative prompts or None without guidance)."""
        count = len(request.prompts)
        both = self.runtime.embed(request.prompts + (request.negatives if request.guided else []), bars)
        return both[:count], both[count:] if request.guided else None

    def _tiles(self, wanted: bool):
        """The VAE's tiles, if they are wanted. Raises UserError where their seams would not meet."""
        if not wanted:
            return None
        if self.runtime.vae_tiling is None:
            raise UserError("tiling: this model's VAE has no tiles; leave tiling off")
        self.runtime.vae_tiling.check(self.geometry.spatial)
        return self.runtime.vae_tiling


# MARK: loading


@no_type_check
def load_pipeline(
    path: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    adapter_alpha: float | None = None,
    dtype: str = "float32",
    mesh=None,
    *,
    adapter_adaln: str | None = None,
    adapter_2: str | os.PathLike | None = None,
    offload: bool = False,
    progress: bool = True,
) -> Pipeline:
    """The model in `path`, a converted folder or a diffusers pipeline folder, ready to be called.

    Args:
      adapter: a LoRA: a folder that training left, or a .safetensors file of diffusers, PEFT, ComfyUI or kohya.
      adapter_alpha: for files that do not say; absent means alpha = rank.
      adapter_adaln: CogVideoX: which tokens an adapter of the adaLN linears acts on, "all" or "reference" (the
        reference's only); absent: as the adapter says, "all" where it says nothing, which is how paper A's released
        runs were trained.
      adapter_2: a LoRA for the second expert of a model of two (Wan2.2-T2V-A14B), whose first gets `adapter`.
      dtype: of weights and computation, "float32" or "bfloat16".
      mesh: where to spread the weights, with the axes that the family's sharding table names; None is one device.
      offload: keep denoisers in host memory and only the one at work on the device: for models of two experts.

    Raises:
      UserError: one line, for anything that is wrong with the folder, the adapter or how the two fit.
    """
    check_choice(dtype, "dtype", DTYPES)
    for name, value in (("path", path), ("adapter", adapter), ("adapter_2", adapter_2)):
        if not isinstance(value, (str, os.PathLike)) and (name == "path" or value is not None):
            raise UserError(f"{name} is of type {type(value).__name__}; expected a path")
    if adapter_alpha is not None and not isinstance(adapter_alpha, numbers.Real):
        raise UserError(f"adapter_alpha is {adapter_alpha!r}; expected a number")
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise UserError(f"mesh is of type {type(mesh).__name__}; expected a jax.sharding.Mesh")
    for name, value in (("adapter_alpha", adapter_alpha), ("adapter_adaln", adapter_adaln)):
        if adapter is None and adapter_2 is None and value is not None:
            raise UserError(f"{name} is given without an adapter; give both, or neither")
    if adapter_adaln is not None:
        check_choice(adapter_adaln, "adapter_adaln", STREAMS)
    bars = Progress(shown=progress)
    about = model_folder.about(path)
    files = _adapters(about, adapter, adapter_2)
    with bars.stage("loading model", total=len(about.configs)) as advance:
        tokenizer, parts = Tokenizer(pathlib.Path(path) / "tokenizer"), {}
        for name in about.configs:
            parts[name] = model_folder.load_component(path, name, dtype, mesh)
            if offload and name in about.family.denoisers:  # before the next one is read
                nnx.update(parts[name], jax.device_get(nnx.state(parts[name])))
            advance()
    found = {}
    for name, file in files.items():
        with bars.stage("loading adapter"):
            found[file] = adapter_files.load(parts[name], file, alpha=adapter_alpha)
            _replicate_adapter(parts[name], mesh)
    adaln, reference = adapter_files.agreed(found, "adaln_lora"), adapter_files.agreed(found, "reference")
    options = about.family.options(adapter_adaln or adaln or "all", reference or about.raw["defaults"].get("reference"))
    return Pipeline(
        about, parts, tokenizer, options=options, dtype=dtype, mesh=mesh, offload=offload, seconds=bars.seconds
    )


def _adapters(about: About, *given) -> dict[str, pathlib.Path]:
    """Which file belongs to which denoiser; a missing file is told before gigabytes are read."""
    found = {}
    for name, path in zip(("transformer", "transformer_2"), given, strict=True):
        if path is None:
            continue
        if name not in about.configs:
            raise UserError("adapter_2 is for the second expert, and this model has one; give it as adapter")
        found[name] = adapter_files.find_file(path)
    return found


def _replicate_adapter(transformer: nnx.Module, mesh) -> None:
    if mesh is not None:
        state = nnx.state(transformer, nnx.LoRAParam)
        nnx.update(transformer, jax.device_put(state, jax.NamedSharding(mesh, jax.P())))


def _pictures(given, name: str) -> list:
    """One entry per picture: a list as it is, an array [k, h, w, c] taken apart, anything else alone."""
    if isinstance(given, (list, tuple)):
        if not given:
            raise UserError(f"{name} is an empty list; give at least one picture, or none at all")
        return list(given)
    return list(given) if getattr(given, "ndim", None) == 4 else [given]


def _keys(seed: int) -> tuple[Array, Array, Array, Array]:
    """Independent keys for the initial noise, the reference's latents, the solver and the first frame's latents."""
    return tuple(jax.random.fold_in(jax.random.key(seed), use) for use in range(4))
