"""The weights of a loaded model, and how each part of it is run: text, picture, denoising, decoding.

Nothing is checked here and no default is chosen; `pipeline.py` does both.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax import programs
from sdv_jax.errors import UserError
from sdv_jax.models.contract import Traits
from sdv_jax.models.text.tokenizer import Tokenizer
from sdv_jax.progress import Progress
from sdv_jax.sharding import Table, shardings
from sdv_jax.typing import Array


class Runtime:
    """Programs take the weights as arguments, so that models of one architecture share them.

    denoisers: the experts, noisiest first; most models have one. `options` are the family's keywords of their call.
    With `offload` the experts stay in host memory, and only the one at work is on the device.
    """

    def __init__(
        self, denoisers: Sequence[nnx.Module], vae: nnx.Module, text_encoder: nnx.Module, tokenizer: Tokenizer,
        traits: Traits, *, options: dict, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None, sharding: Table,
        offload: bool,
    ):  # fmt: skip
        self.traits, self.dtype = traits, dtype
        self.vae_tiling = vae.tiling
        self._tokenizer, self._vocabulary = tokenizer, text_encoder.config.vocab_size
        self._mesh, self._options = mesh, tuple(options.items())
        self.denoisers = [nnx.split(denoiser) for denoiser in denoisers]
        self.vae, self.text_encoder = nnx.split(vae), nnx.split(text_encoder)
        self._offload, self._sharding = offload, sharding
        if offload:
            self.denoisers = [(graph, jax.device_get(state)) for graph, state in self.denoisers]

    # MARK: parts

    def embed(self, prompts: Sequence[str], bars: Progress) -> Array:
        """[b, s, d]: cleaned, tokenised, encoded and padded as the family does it."""
        t = self.traits
        cleaned = [t.clean_text(text) for text in prompts] if all(isinstance(p, str) for p in prompts) else prompts
        ids, _ = self._tokenizer.tokenize(cleaned, max_length=t.text_length)
        if (most := ids.max()) >= self._vocabulary:
            raise UserError(f"tokenizer: token {most} of {self._vocabulary} in the text encoder; use its own tokenizer")
        graph, state = self.text_encoder
        ids = jax.device_put(jnp.asarray(ids), self.replicated)
        found = programs.TEXT(state, ids, graph=graph, masked=t.text_masked, stage="encoding prompt", progress=bars)
        return found.astype(self.dtype)

    def encode(self, video: Array, *, tiling, bars: Progress) -> tuple[Array, Array]:
        """(mean, logvar) of the VAE's posterior."""
        graph, state = self.vae
        return programs.ENCODE(state, video, graph=graph, tiling=tiling, stage="encoding picture", progress=bars)

    def decode(self, latents: Array, *, tiling, bars: Progress) -> Array:
        """Video from latents in the VAE's scale."""
        graph, state = self.vae
        return programs.DECODE(state, latents, graph=graph, tiling=tiling, stage="decoding", progress=bars)

    def predict(self, expert: int, latents: Array, text: Array, timesteps: Array, reference, image) -> Array:
        """One call of a denoiser."""
        graph, _ = self.denoisers[expert]
        return programs.PREDICT(
            self._weights(expert), latents, text, timesteps, reference, image, graph=graph, options=self._options,
            stage="denoising", progress=Progress(shown=False),
        )  # fmt: skip

    def denoise(self, solver, latents: Array, conditions: tuple, *, scales, key, step_noise, first_low: int,
                bars: Progress) -> Array:  # fmt: skip
        """The whole loop. `conditions` is (text, negative text or None, references or None, image or None).

        Steps before `first_low` are the first expert's, the rest the second's.
        """
        phases = [(0, 0, first_low), (1, first_low, solver.steps)]
        phases = [(expert, begin, end) for expert, begin, end in phases if begin < end]
        scales, key = jax.device_put((jnp.asarray(scales), key), self.replicated)
        memory, result = None, latents
        for expert, begin, end in phases:
            arguments = (self._weights(expert), memory, result, *conditions, scales, key, step_noise)
            static = {"graph": self.denoisers[expert][0], "solver": solver, "options": self._options}
            run = programs.SAMPLE.compiled(*arguments, progress=bars, **static, begin=begin, end=end)
            stage = "denoising" if len(phases) == 1 else f"denoising, expert {expert + 1}"
            with bars.stage(stage, total=end - begin) as advance, programs.reporting_to(advance):
                memory, result = jax.block_until_ready(run(*arguments))
                jax.effects_barrier()  # the last reports may still be on their way
            del arguments  # with offload, the only hold on this expert's weights
        return result

    def _weights(self, expert: int) -> nnx.State:
        _, state = self.denoisers[expert]
        if not self._offload:
            return state
        return jax.device_put(state, self._mesh and shardings(state, self._sharding, self._mesh))

    # MARK: places

    @property
    def replicated(self):
        """On every device of the mesh; None without one."""
        return None if self._mesh is None else jax.NamedSharding(self._mesh, jax.P())

    def put(self, array) -> Array:
        """An array of latents, pixels or embeddings in the pipeline's dtype, on the device."""
        return jax.device_put(jnp.asarray(array, self.dtype), self.replicated)

    def exactly(self, array: np.ndarray) -> Array:
        """An array in float32, on the device."""
        return jax.device_put(jnp.asarray(array, jnp.float32), self.replicated)

    def on_mesh(self):
        """The context in which all of this runs."""
        return nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
