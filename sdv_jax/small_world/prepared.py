"""Small-world pools as prepared data: pixels through the VAE once, captions as token ids or embeddings."""

from collections.abc import Sequence

import numpy as np
from flax import nnx
from jaxtyping import UInt8
from tqdm import tqdm

from sdv_jax.data.encoding import EncodeText, VideoEncoder
from sdv_jax.data.latents import LatentDataset
from sdv_jax.models.contract import LatentScale

_AT_ONCE = 128  # frames per call of the encoder, which bounds memory


def encode(
    vae: nnx.Module, video: UInt8[np.ndarray, "n t h w 3"], *, desc: str = "encoding"
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, logvar) of every clip, each [n, t', h', w', c] float32, before scaling."""
    run, size = VideoEncoder(vae), max(1, _AT_ONCE // video.shape[1])
    starts = tqdm(range(0, len(video), size), desc=desc, unit="batch")
    found = [run(video[start : start + size], batch_size=size) for start in starts]
    mean, logvar = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return mean, logvar


def dataset(
    vae: nnx.Module,
    scale: LatentScale,
    video: UInt8[np.ndarray, "n t h w 3"],
    references: UInt8[np.ndarray, "n k h w 3"],
    captions: Sequence[str],
    encode_text: EncodeText,
) -> LatentDataset:
    """A prepared dataset: clips, and k reference images for each, encoded as single frames."""
    mean, logvar = encode(vae, video, desc="encoding clips" if video.shape[1] > 1 else "encoding images")
    n, k = references.shape[:2]
    images = encode(vae, references.reshape(n * k, 1, *references.shape[2:]), desc="encoding references")
    views = [moment.reshape(n, k, *moment.shape[2:]) for moment in images]
    text = np.asarray(encode_text([*captions, ""]))
    return LatentDataset(mean, logvar, *views, text[:-1], text[-1], tuple(captions), scale)
