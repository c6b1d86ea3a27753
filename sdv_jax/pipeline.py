"""From a prompt, and pictures of a subject if there are any, to a video.

    pipe = sdv_jax.load_pipeline("model", adapter="adapter")
    video = pipe("a <cls> subject drifting left over sand", reference="subject.png", seed=1)     # numpy [1, t, h, w, 3]

Scales. The VAE's own latents come out of `encode` and go into `decode`. Everything the transformer sees (`latents`,
`reference_latents`, `denoise`) is multiplied by the VAE's `scaling_factor`; `pipe.scaling_factor` is that number.

What users call checks its arguments itself and tells a mistake as a UserError, hence `no_type_check`: the shape checker
of the tests would be first.
"""

import dataclasses
import logging
import numbers
import os
import pathlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax import programs
from sdv_jax.adapters.reference import sample_latents
from sdv_jax.checkpoints import adapter_files, model_folder
from sdv_jax.checkpoints.diffusers_folder import parse_component
from sdv_jax.data.images import fit_image, read_image
from sdv_jax.diffusion import SchedulerConfig, dynamic_scale, make_solver
from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox.vae import Tiling
from sdv_jax.models.text.tokenizer import Tokenizer
from sdv_jax.nn.modulation import STREAMS
from sdv_jax.progress import Progress
from sdv_jax.request import (
    DTYPES,
    OUTPUTS,
    SCHEDULERS,
    Geometry,
    Request,
    check_array,
    check_choice,
    check_request,
    check_video_size,
)
from sdv_jax.typing import Array, Float, Int

logger = logging.getLogger(__name__)

COMPONENTS = ("transformer", "vae", "text_encoder")


class Pipeline:
    """A loaded model. Made by `load_pipeline`; call it to make videos.

    Every program takes the weights as arguments and is compiled once for given shapes. Results depend on the arguments
    and the seed only: the same call gives the same bits.
    """

    def __init__(
        self,
        *,
        transformer,
        vae,
        text_encoder,
        tokenizer,
        scheduler,
        config: dict,
        adaln_lora: str = "all",
        dtype: str = "float32",
        mesh=None,
        seconds: dict | None = None,
    ):
        self.config = config
        self.scheduler = scheduler
        self.geometry = Geometry.of(transformer.config, vae.config)
        self.scaling_factor: float = vae.config.scaling_factor
        self.text_length: int = transformer.config.max_text_seq_length
        self.text_width: int = transformer.config.text_embed_dim
        self._tiling = Tiling.default(vae.config)
        self.dtype = jnp.dtype(dtype)
        # stage -> seconds it took, of the latest call; of loading before the first one
        self.seconds: dict[str, float] = seconds or {}
        self._tokenizer, self._vocabulary = tokenizer, text_encoder.config.vocab_size
        self._mesh, self._adaln_lora = mesh, adaln_lora
        self._transformer, self._vae, self._text_encoder = map(nnx.split, (transformer, vae, text_encoder))

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
        scheduler: str | None = None,
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
            num_frames is 1 + a multiple of 8 (of 4 compressed in time). Of 5, 13, 21, ... the VAE makes 8, 16, 24, ...,
            as diffusers has it, and a warning tells so.
          steps, guidance: 50 and 6.0 where absent. Guidance of 1 or less runs the model once per step instead of twice.
          seed: decides the initial noise, the draw of the reference's latents and the solver's noise.
          latents: [b, t', h', w', c], the initial noise instead of a drawn one.
          reference_latents: [b, k, h', w', c] or [k, h', w', c] instead of `reference`, in the transformer's scale.
          step_noise: [steps, b, t', h', w', c], what a stochastic solver adds in each step instead of drawing it.
          scheduler: "ddim" or "dpm" instead of the checkpoint's own.
          dynamic_guidance: CogVideoX's cosine law over the steps instead of a constant scale.
          reference_fit: "crop" fills the frame and cuts what overhangs, "pad" shows the whole picture on white.
          tiling: decode (and encode) in overlapping tiles: less memory, slightly different pixels.
          progress: show what is being done on stderr. `self.seconds` is filled either way.

        Raises:
          UserError: one line, before anything is computed; or after denoising, if the numbers overflowed.
        """
        check_choice(output, "output", OUTPUTS)
        request = check_request(
            self.geometry,
            prompt=prompt,
            negative_prompt=negative_prompt,
            size=(num_frames, height, width),
            steps=steps,
            guidance=guidance,
            seed=seed,
            train_timesteps=self.scheduler.num_train_timesteps,
            latents=latents,
        )
        if output == "video":
            self._tell_length(request.num_frames)
        solver = make_solver(self._scheduler(scheduler), request.steps)
        tiles, bars = self._tiles(tiling), Progress(shown=progress)
        with self._on_mesh():
            start, noise = self._noise(request, latents, step_noise)
            pictures = self._references(
                request, reference, reference_latents, fit=reference_fit, tiles=tiles, bars=bars
            )
            text = self._prompts(request, bars)
            scales = dynamic_scale(request.guidance, solver.timesteps) if dynamic_guidance else request.guidance
            scales = np.broadcast_to(np.asarray(scales, np.float32), (request.steps,))
            result = self._denoise_all(request, solver, start, text, pictures, scales, noise, bars)
            if not jnp.isfinite(result).all():
                advice = "lower the guidance, check the adapter, or use float32"
                raise UserError(f"the denoised latents hold NaN or infinite values; {advice}")
            if output == "video":
                result = self._decode(result * (1 / self.scaling_factor), tiles=tiles, bars=bars)
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
    ) -> Float[Array, "b t h w c"]:
        """One call of the transformer: its raw prediction. Latents are in the transformer's scale.

        Raises UserError for shapes that do not fit the model or each other.
        """
        g = self.geometry
        check_array(latents, "latents", ["b", "t", "h", "w", g.channels])
        batch, _, height, width, _ = np.shape(latents)
        if height % g.patch or width % g.patch:
            raise UserError(f"latents have shape {tuple(np.shape(latents))}; height and width must divide by {g.patch}")
        check_array(text_embeddings, "text_embeddings", [batch, "s", self.text_width])
        if np.shape(timesteps) != (batch,):
            raise UserError(f"timesteps has shape {np.shape(timesteps)}; expected [{batch}], one per example")
        check_array(timesteps, "timesteps", [batch])
        if reference_latents is not None:
            check_array(reference_latents, "reference_latents", [batch, "k", height, width, g.channels])
            reference_latents = self._put(reference_latents)
        graph, state = self._transformer
        with self._on_mesh():
            return programs.PREDICT(
                state,
                self._put(latents),
                self._put(text_embeddings),
                jax.device_put(jnp.asarray(timesteps), self._replicated),
                reference_latents,
                graph=graph,
                adaln_lora=self._adaln_lora,
                stage="denoising",
                progress=Progress(shown=False),
            )

    @no_type_check
    def encode(self, video: Float[Array, "b t h w 3"], *, tiling: bool = False) -> tuple[Array, Array]:
        """(mean, logvar) of the VAE's posterior, each [b, t', h', w', c], before scaling. `video` is in [-1, 1].

        Raises UserError for a length or a size that the VAE cannot encode.
        """
        check_video_size(np.shape(video), self.geometry)
        check_array(video, "video", ["b", "t", "h", "w", 3])
        with self._on_mesh():
            return self._encode(self._put(video), tiles=self._tiles(tiling), bars=Progress(shown=False))

    @no_type_check
    def decode(self, latents: Float[Array, "b t h w c"], *, tiling: bool = False) -> Float[Array, "b t h w 3"]:
        """Video in [-1, 1] (not clipped) from latents in the VAE's scale, as the mean that `encode` returns.

        For latents in the transformer's scale: `pipe.decode(latents / pipe.scaling_factor)`.
        """
        check_array(latents, "latents", ["b", "t", "h", "w", self.geometry.channels])
        with self._on_mesh():
            return self._decode(self._put(latents), tiles=self._tiles(tiling), bars=Progress(shown=False))

    @no_type_check
    def encode_prompt(self, prompts: Sequence[str]) -> Float[Array, "b s d"]:
        """Text embeddings, padded to the model's text length; padding is attended to, as CogVideoX was trained."""
        with self._on_mesh():
            return self._encode_prompt(prompts, Progress(shown=False))

    # MARK: stages of a call

    def _tell_length(self, asked: int) -> None:
        made, below = self.geometry.decoded_frames(asked), asked - self.geometry.temporal
        if made != asked:
            logger.warning(
                "num_frames is %d, of which the VAE makes %d; %d and %d come out as asked",
                asked, made, below, below + self.geometry.period,
            )  # fmt: skip

    def _references(
        self, request: Request, reference, reference_latents, *, fit: str, tiles: Tiling | None, bars: Progress
    ) -> Array | None:
        """[b, k, h', w', c] in the transformer's scale, or None."""
        batch, (_, *shape) = len(request.prompts), self.geometry.latent_shape(1, request.height, request.width)
        if reference is not None and reference_latents is not None:
            raise UserError("reference and reference_latents are both given; give one of them")
        if reference_latents is not None:
            lead = ["k"] if np.ndim(reference_latents) == 4 else [batch, "k"]
            check_array(reference_latents, "reference_latents", [*lead, *shape])
            given = self._put(reference_latents)
            return jnp.broadcast_to(given, (batch, *given.shape[-4:]))
        if reference is None:
            return None
        pictures = [read_image(picture) for picture in _pictures(reference)]
        frames = np.stack([fit_image(p, height=request.height, width=request.width, fit=fit) for p in pictures])
        mean, logvar = self._encode(self._put(frames[:, None]), tiles=tiles, bars=bars)
        drawn = sample_latents(mean, logvar, self.scaling_factor, _keys(request.seed)[1])
        return jnp.broadcast_to(drawn.astype(self.dtype)[None, :, 0], (batch, len(pictures), *shape))

    def _noise(self, request: Request, latents, step_noise) -> tuple[Array, Array | None]:
        """(initial latents, noise per step or None) in the pipeline's dtype."""
        shape = (len(request.prompts), *self.geometry.latent_shape(request.num_frames, request.height, request.width))
        if step_noise is not None:
            check_array(step_noise, "step_noise", [request.steps, *shape])
            step_noise = jax.device_put(jnp.asarray(step_noise, jnp.float32), self._replicated)
        if latents is None:
            return self._put(jax.random.normal(_keys(request.seed)[0], shape, jnp.float32)), step_noise
        check_array(latents, "latents", shape)
        return self._put(latents), step_noise

    def _prompts(self, request: Request, bars: Progress) -> tuple[Array, Array | None]:
        """(embeddings, embeddings of the negative prompts or None without guidance)."""
        count = len(request.prompts)
        both = self._encode_prompt(request.prompts + (request.negatives if request.guided else []), bars)
        return both[:count], both[count:] if request.guided else None

    def _denoise_all(self, request, solver, start, text, pictures, scales, noise, bars: Progress) -> Array:
        graph, state = self._transformer
        conditions, negative = text
        arguments = (
            state,
            start,
            conditions,
            negative,
            pictures,
            jax.device_put(jnp.asarray(scales), self._replicated),
            jax.device_put(_keys(request.seed)[2], self._replicated),
            noise,
        )
        static = {"graph": graph, "solver": solver, "adaln_lora": self._adaln_lora}
        run = programs.SAMPLE.compiled(*arguments, progress=bars, **static)
        with bars.stage("denoising", total=request.steps) as advance, programs.reporting_to(advance):
            result = jax.block_until_ready(run(*arguments))
            jax.effects_barrier()  # the last reports may still be on their way
        return result

    def _encode_prompt(self, prompts, bars: Progress) -> Array:
        ids, _ = self._tokenizer.tokenize(prompts, max_length=self.text_length)
        if (most := ids.max()) >= self._vocabulary:
            raise UserError(f"tokenizer: token {most} of {self._vocabulary} in the text encoder; use its own tokenizer")
        graph, state = self._text_encoder
        return programs.TEXT(
            state,
            jax.device_put(jnp.asarray(ids), self._replicated),
            graph=graph,
            stage="encoding prompt",
            progress=bars,
        )

    def _encode(self, video: Array, *, tiles: Tiling | None, bars: Progress) -> tuple[Array, Array]:
        graph, state = self._vae
        return programs.ENCODE(state, video, graph=graph, tiling=tiles, stage="encoding picture", progress=bars)

    def _decode(self, latents: Array, *, tiles: Tiling | None, bars: Progress) -> Array:
        graph, state = self._vae
        return programs.DECODE(state, latents, graph=graph, tiling=tiles, stage="decoding", progress=bars)

    def _tiles(self, wanted: bool) -> Tiling | None:
        """The VAE's tiles, if they are wanted. Raises UserError where their seams would not meet."""
        if not wanted:
            return None
        scale, tiling = self.geometry.spatial, self._tiling
        for size, latents, overlap in zip(tiling.sample_tile, tiling.latent_tile(scale), tiling.overlap, strict=True):
            if int(latents * (1 - overlap)) * scale != size - int(size * overlap):
                tile = "x".join(map(str, reversed(tiling.sample_tile)))
                raise UserError(
                    f"tiling: this VAE's tiles of {tile} pixels do not overlap in whole latents; leave tiling off"
                )
        return tiling

    def _scheduler(self, name: str | None):
        if name is None:
            return self.scheduler
        return dataclasses.replace(
            self.scheduler, class_name=SCHEDULERS[check_choice(name, "scheduler", tuple(SCHEDULERS))]
        )

    @property
    def _replicated(self):
        return None if self._mesh is None else jax.NamedSharding(self._mesh, jax.P())

    def _put(self, array) -> Array:
        return jax.device_put(jnp.asarray(array, self.dtype), self._replicated)

    def _on_mesh(self):
        return nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


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
    progress: bool = True,
) -> Pipeline:
    """The model in `path`, a converted folder or a diffusers pipeline folder, ready to be called.

    Args:
      adapter: a LoRA: a folder that training left, or a .safetensors file of diffusers or PEFT.
      adapter_alpha: for files that do not say; absent means alpha = rank.
      adapter_adaln: which tokens an adapter of the adaLN linears acts on, "all" or "reference" (the reference's only);
        absent: as the adapter says, "all" where it says nothing, which is how paper A's released runs were trained.
      dtype: of weights and computation, "float32" or "bfloat16".
      mesh: where to spread the weights, with the axes that the family's sharding table names; None is one device.

    Raises:
      UserError: one line, for anything that is wrong with the folder, the adapter or how the two fit.
    """
    check_choice(dtype, "dtype", DTYPES)
    for name, value in (("path", path), ("adapter", adapter)):
        if not isinstance(value, (str, os.PathLike)) and (name == "path" or value is not None):
            raise UserError(f"{name} is of type {type(value).__name__}; expected a path")
    if adapter_alpha is not None and not isinstance(adapter_alpha, numbers.Real):
        raise UserError(f"adapter_alpha is {adapter_alpha!r}; expected a number")
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise UserError(f"mesh is of type {type(mesh).__name__}; expected a jax.sharding.Mesh")
    for name, value in (("adapter_alpha", adapter_alpha), ("adapter_adaln", adapter_adaln)):
        if adapter is None and value is not None:
            raise UserError(f"{name} is given without an adapter; give both, or neither")
    if adapter_adaln is not None:
        check_choice(adapter_adaln, "adapter_adaln", STREAMS)
    bars = Progress(shown=progress)
    config = model_folder.read_config(path)
    file = None if adapter is None else adapter_files.find_file(adapter)  # missed before gigabytes are read
    with bars.stage("loading model", total=len(COMPONENTS)) as advance:
        tokenizer, parts = Tokenizer(pathlib.Path(path) / "tokenizer"), {}
        for name in COMPONENTS:
            parts[name] = model_folder.load_component(path, name, dtype, mesh)
            advance()
    adaln_lora = "all"
    if file is not None:
        with bars.stage("loading adapter"):
            stated = adapter_files.load(parts["transformer"], file, alpha=adapter_alpha).adaln_lora
            adaln_lora = adapter_adaln or stated
            _replicate_adapter(parts["transformer"], mesh)
    return Pipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=SchedulerConfig.from_dict(config["scheduler"]),
        config=config,
        adaln_lora=adaln_lora,
        dtype=dtype,
        mesh=mesh,
        seconds=bars.seconds,
    )


def read_limits(path: str | os.PathLike) -> tuple[Geometry, SchedulerConfig]:
    """What the model in `path` can make, and its solver's settings, from its json files: for checks before loading."""
    config = model_folder.read_config(path)
    family = model_folder.family_of(config, pathlib.Path(path))
    transformer, vae = (
        parse_component(family, name, config["config"][name], pathlib.Path(path) / name)
        for name in ("transformer", "vae")
    )
    return Geometry.of(transformer, vae), SchedulerConfig.from_dict(config["scheduler"])


def _replicate_adapter(transformer: nnx.Module, mesh) -> None:
    if mesh is not None:
        state = nnx.state(transformer, nnx.LoRAParam)
        nnx.update(transformer, jax.device_put(state, jax.NamedSharding(mesh, jax.P())))


def _pictures(reference) -> list:
    """One entry per picture: a list as it is, an array [k, h, w, c] taken apart, anything else alone."""
    if isinstance(reference, (list, tuple)):
        if not reference:
            raise UserError("reference is an empty list; give at least one picture, or none at all")
        return list(reference)
    return list(reference) if getattr(reference, "ndim", None) == 4 else [reference]


def _keys(seed: int) -> tuple[Array, Array, Array]:
    """Independent keys for the initial noise, the reference's latents and the solver."""
    return tuple(jax.random.fold_in(jax.random.key(seed), use) for use in range(3))
