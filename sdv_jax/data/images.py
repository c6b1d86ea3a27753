"""Reference pictures: anything a user may hand over becomes uint8 RGB, then float32 in [-1, 1] of the wanted size.

What is accepted, and what becomes of it:

- files that Pillow reads (PNG, JPEG, WebP, GIF, TIFF, BMP, ...), Pillow images, numpy arrays;
- the EXIF orientation is applied; of an animation the first frame is taken;
- grey, palette and CMYK pictures become RGB; 16-bit ones are scaled to 8 bits;
- transparency is composited on white, the background of most product pictures.
"""

import io
import logging
import os
import pathlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from sdv_jax.errors import UserError, of_the_machine

SMALLEST_SIDE = 8  # pixels; below it a picture holds less than one latent cell of any published VAE
FITS = ("crop", "pad")


def silence_pillow() -> None:
    """Pillow's warnings are shown no more: of pictures with damaged EXIF or TIFF tags, several lines for each.

    Called once where a command starts: filters that a thread sets for itself (`warnings.catch_warnings`) hold for all.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def read_image(source, *, name: str = "reference image") -> UInt8[np.ndarray, "h w 3"]:
    """One picture as uint8 RGB.

    Args:
      source: a path, the bytes of such a file, a Pillow image, or an array [h,w], [h,w,1], [h,w,3] or [h,w,4], uint8
        or float in [0, 1].
      name: how messages call it; a path is added.

    Raises:
      UserError: a file that is missing, unreadable, truncated or empty; a side below 8 pixels; an array of another
        shape, type or range.
    """
    if isinstance(source, (str, os.PathLike)):
        name = f"{name} {source}"
    if isinstance(source, (str, os.PathLike, bytes)):
        with opened(source, name=name) as image:
            pixels = _to_rgb(image)
    elif isinstance(source, Image.Image):
        with _guarded(name):
            pixels = _to_rgb(source)
    elif isinstance(source, np.ndarray) or hasattr(source, "__array__"):
        pixels = _from_array(np.asarray(source), name)
    else:
        raise UserError(f"{name} is of type {type(source).__name__}; give a path, a Pillow image or a numpy array")
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(
            f"{name} has {width}x{height} pixels; both sides must have at least {SMALLEST_SIDE}: give a larger picture"
        )
    return pixels


@contextmanager
def opened(source: str | os.PathLike | bytes, *, name: str) -> Iterator[Image.Image]:
    """A picture of which no more than the header is read; `source` is a path, or the bytes of such a file.

    Raises UserError where it is missing, empty, no picture or of too many pixels, and for what Pillow raises inside the
    block.
    """
    if not isinstance(source, bytes):
        _check_file(pathlib.Path(source), name)
    with _guarded(name), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow warns, and raises above twice as many
            raise Image.DecompressionBombError
        yield image


def fit_image(
    pixels: UInt8[np.ndarray, "h w 3"], *, height: int, width: int, fit: str = "crop"
) -> Float[np.ndarray, "height width 3"]:
    """`pixels` resized without distortion to height x width, float32 in [-1, 1].

    `crop` fills the frame and cuts what overhangs, equally on both sides; `pad` shows the whole picture and fills the
    rest with white. Bicubic with antialiasing (Pillow).
    """
    if fit not in FITS:
        raise UserError(f"unknown reference fit {fit!r}; choose one of: {', '.join(FITS)}")
    image = Image.fromarray(pixels)
    if image.size != (width, height):
        if fit == "crop":
            image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
        else:
            image = ImageOps.pad(image, (width, height), method=Image.Resampling.BICUBIC, color=(255, 255, 255))
    return np.asarray(image, np.float32) / 127.5 - 1.0


def stretch_image(
    pixels: UInt8[np.ndarray, "h w 3"], *, height: int, width: int
) -> Float[np.ndarray, "height width 3"]:
    """`pixels` resized to height x width whatever their proportions, float32 in [-1, 1].

    What diffusers' image-to-video pipelines do to a first frame (`VideoProcessor.preprocess`, Lanczos).
    """
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 127.5 - 1.0


def _check_file(path: pathlib.Path, name: str) -> None:
    if not path.exists():
        raise UserError(f"{name} does not exist; check the path")
    if path.is_dir():
        raise UserError(f"{name} is a folder; give an image file")
    if path.stat().st_size == 0:
        raise UserError(f"{name} is an empty file; give an image file")


@contextmanager
def _guarded(name: str) -> Iterator[None]:
    """Raises UserError for everything that Pillow raises on a bad file inside the block."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name} is not an image that can be read (PNG, JPEG, WebP, GIF, TIFF, BMP); convert it"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller first") from error
    except PermissionError as error:
        raise UserError(f"{name} cannot be opened: no permission to read it") from error
    except (MemoryError, UserError):
        raise
    except Exception as error:
        if of_the_machine(error):
            raise
        # Pillow reports damage with whatever its decoder raised, in words that change with its version.
        raise UserError(f"{name} is damaged and cannot be read; replace the file") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return np.repeat(_eight_bits(np.asarray(image))[..., None], 3, axis=-1)
    if image.mode == "F":
        return _from_array(np.asarray(image), "floating-point image")
    if image.has_transparency_data:
        return on_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise UserError(f"{name} is an array of shape {array.shape}; expected [height, width, 1, 3 or 4 channels]")
    if array.size == 0:
        raise UserError(f"{name} is an empty array of shape {array.shape}; give pixels")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise UserError(f"{name} holds NaN or infinite values; expected floats in [0, 1]")
        if array.min() < 0 or array.max() > 1:
            raise UserError(
                f"{name} holds floats from {array.min():.3g} to {array.max():.3g}; expected [0, 1], or uint8 in 0..255"
            )
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = _eight_bits(array)
    elif array.dtype != np.uint8:
        raise UserError(f"{name} is an array of {array.dtype}; expected uint8 in 0..255 or floats in [0, 1]")
    if array.shape[-1] == 4:
        return on_white(array)
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else np.array(array)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit intensities (Pillow's modes I;16 and I, numpy uint16) to 8 bits."""
    return np.round(np.clip(values, 0, 65535) / 257.0).astype(np.uint8)


def on_white(rgba: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture with transparency as it looks on white."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
