"""Pixels and captions to what training reads: a VAE's moments, text embeddings or token ids.

Batches have one shape each, the last one padded, so that there is one compilation per size. On several devices of this
host a batch is split over them; a device's part is computed as on one device, so that the numbers do not depend on it.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8

from sdv_jax.checkpoints import model_folder
from sdv_jax.errors import UserError
from sdv_jax.models.contract import Traits
from sdv_jax.models.text.encode import encode
from sdv_jax.models.text.tokenizer import Tokenizer

Moments = tuple[Float[np.ndarray, "n t h w c"], Float[np.ndarray, "n t h w c"]]
EncodeText = Callable[[Sequence[str]], np.ndarray]  # captions -> one row each; called with "" for the empty prompt too
_READ = 2**16  # bytes read at three places of a file for its digest
_DATA = "data"  # the mesh axis that batches are split along


class VideoEncoder:
    """Clips to the moments of their latents, in the VAE's own scale.

    Args:
      vae: any family's.
      devices: which share a batch; absent: all of this process.
    """

    def __init__(self, vae: nnx.Module, *, devices: Sequence[jax.Device] | None = None):
        graph, state = nnx.split(vae)
        dtype = jax.tree.leaves(state)[0].dtype

        def moments(state, pixels):
            found = nnx.merge(graph, state).encode((pixels.astype(jnp.float32) / 127.5 - 1).astype(dtype))
            return jax.tree.map(lambda moment: moment.astype(jnp.float32), found)

        self._state, self._place, self._run, self._devices = _spread(moments, state, devices)

    def whole(self, batch_size: int) -> int:
        """`batch_size` rounded up to a multiple of the devices: what is really encoded at once."""
        return _rounded(batch_size, self._devices)

    def __call__(self, pixels: UInt8[np.ndarray, "n t h w 3"], *, batch_size: int) -> Moments:
        """(mean, logvar), float32; `whole(batch_size)` clips at once."""
        parts = []
        for batch, count in batches(pixels, self.whole(batch_size)):
            parts.append([np.asarray(moment)[:count] for moment in self._run(self._state, self._place(batch))])
        mean, logvar = (np.concatenate(moment) for moment in zip(*parts, strict=True))
        return mean, logvar


class TextEncoder:
    """Captions, cleaned as the model's family does it, to embeddings, or to token ids without `embed`.

    Args:
      path: a model folder of any family.
      embed: False where the text encoder is trained along; its weights are then not read.
      batch_size: captions at once.
    """

    def __init__(
        self, path: str | Path, *, embed: bool, dtype: str = "float32", batch_size: int = 256,
        devices: Sequence[jax.Device] | None = None,
    ):  # fmt: skip
        self._tokenizer, self._traits = Tokenizer(Path(path) / "tokenizer"), model_folder.about(path).traits
        self._run = None
        if embed:
            encoder = model_folder.load_component(path, "text_encoder", dtype)
            self._vocabulary = encoder.config.vocab_size
            graph, state = nnx.split(encoder)
            masked = self._traits.text_masked

            def embeddings(state, ids):
                return encode(nnx.merge(graph, state), ids, masked=masked).astype(jnp.float32)

            self._state, self._place, self._run, count = _spread(embeddings, state, devices)
            self._batch_size = _rounded(batch_size, count)

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """[n, s, e] float32, or [n, s] int32. What is longer than the model's text length is cut."""
        ids = self.tokenise(captions)
        if self._run is None:
            return ids
        if (most := ids.max()) >= self._vocabulary:
            raise UserError(f"tokenizer: token {most} of {self._vocabulary} in the text encoder; use its own tokenizer")
        unique, rows = np.unique(ids, axis=0, return_inverse=True)
        parts = [
            np.asarray(self._run(self._state, self._place(batch)))[:count]
            for batch, count in batches(unique, self._batch_size)
        ]
        return np.concatenate(parts)[rows.reshape(-1)]

    def tokenise(self, captions: Sequence[str]) -> Int[np.ndarray, "n s"]:
        """The token ids of captions, padded to the model's text length."""
        return self._tokenizer.tokenize(self._cleaned(captions), max_length=self._traits.text_length)[0]

    def cuts(self, captions: Sequence[str]) -> int:
        """How many of the captions are longer than the model's text length."""
        return sum(length > self._traits.text_length for length in self._tokenizer.lengths(self._cleaned(captions)))

    def _cleaned(self, captions: Sequence[str]) -> list[str]:
        return [self._traits.clean_text(text) for text in captions]


@dataclasses.dataclass(frozen=True)
class Encoders:
    """Both encoders of a model folder, and what they belong to."""

    video: VideoEncoder
    text: TextEncoder
    traits: Traits

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: str = "float32", text_dtype: str = "float32", embed: bool = True,
        text_batch: int = 256, devices: Sequence[jax.Device] | None = None,
    ) -> "Encoders":  # fmt: skip
        """Reads the weights: `dtype` is the VAE's, `text_dtype` the text encoder's. Raises UserError as they do."""
        traits = model_folder.about(path).traits
        video = VideoEncoder(model_folder.load_component(path, "vae", dtype), devices=devices)
        text = TextEncoder(path, embed=embed, dtype=text_dtype, batch_size=text_batch, devices=devices)
        return cls(video, text, traits)


def digest(path: str | Path) -> str:
    """Of what encodes in a model folder, to tell another model: its small files, and parts of the large ones."""
    found, folder = hashlib.sha256(), Path(path)
    patterns = ("*.json", "vae/**/*", "text_encoder/**/*", "tokenizer/**/*")
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(files):
        size = file.stat().st_size
        found.update(f"{file.relative_to(folder)} {size}\n".encode())
        with open(file, "rb") as opened:
            for place in (0, size // 2, max(0, size - _READ)):
                opened.seek(place)
                found.update(opened.read(_READ))
    return found.hexdigest()


def batches(rows: np.ndarray, size: int):
    """(batch, how many of its rows are real): `size` rows at a time, the last batch filled up with its last row."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        missing = size - len(part)  # a full batch is not copied: clips are large
        yield np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part, len(part)


def _rounded(size: int, devices: int) -> int:
    return -(-size // devices) * devices


def _spread(function: Callable, state: nnx.State, devices: Sequence[jax.Device] | None) -> tuple:
    """(state in place, what places a batch, the compiled function, number of devices)."""
    devices = list(devices or jax.local_devices())
    mesh = jax.sharding.Mesh(np.asarray(devices), (_DATA,))
    rows = jax.P(_DATA)
    run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(jax.P(), rows), out_specs=rows, check_vma=False))
    place = partial(jax.device_put, device=jax.NamedSharding(mesh, rows))
    return jax.device_put(state, jax.NamedSharding(mesh, jax.P())), place, run, len(devices)
