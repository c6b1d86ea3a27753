"""Tiled encoding and decoding with blended seams, as diffusers does it for CogVideoX.

The result is not the untiled one: convolutions and group norms see one tile at a time.
"""

import dataclasses
from collections.abc import Callable

from sdv_jax.errors import UserError
from sdv_jax.nn import tiling
from sdv_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Size and overlap of tiles; the field names are those of diffusers' `enable_tiling`.

    Attributes:
      tile_sample_min_height, tile_sample_min_width: tile size in pixels; smaller videos are not tiled.
      tile_overlap_factor_height, tile_overlap_factor_width: the part of a tile shared with the next one, in [0, 1).
    """

    tile_sample_min_height: int
    tile_sample_min_width: int
    tile_overlap_factor_height: float = 1 / 6
    tile_overlap_factor_width: float = 1 / 5

    @classmethod
    def default(cls, config) -> "Tiling":
        """diffusers' defaults for a VAEConfig: tiles of half the sample size."""
        return cls(config.sample_height // 2, config.sample_width // 2)

    @property
    def sample_tile(self) -> tuple[int, int]:
        """Tile height and width in pixels."""
        return self.tile_sample_min_height, self.tile_sample_min_width

    def latent_tile(self, compression: int) -> tuple[int, int]:
        """Tile height and width in latents."""
        return tuple(int(size / compression) for size in self.sample_tile)

    @property
    def overlap(self) -> tuple[float, float]:
        """Shared part of a tile along height and width."""
        return self.tile_overlap_factor_height, self.tile_overlap_factor_width

    def check(self, compression: int) -> None:
        """Raises UserError where tiles do not overlap in whole latents, so that their seams would not meet."""
        for size, latents, overlap in zip(self.sample_tile, self.latent_tile(compression), self.overlap, strict=True):
            if int(latents * (1 - overlap)) * compression != size - int(size * overlap):
                tile = "x".join(map(str, reversed(self.sample_tile)))
                raise UserError(
                    f"tiling: this VAE's tiles of {tile} pixels do not overlap in whole latents; leave tiling off"
                )


def run_tiled(
    run: Callable[[Array], Array],
    x: Float[Array, "b t h w c"],
    *,
    tile: tuple[int, int],
    out_tile: tuple[int, int],
    overlap: tuple[float, float],
    smallest: int,
) -> Float[Array, "b s i j d"]:
    """Runs `run` on overlapping tiles of x, [b, t, h, w, c] -> [b, s, i, j, d], and blends the results.

    Args:
      run: encodes or decodes a whole clip of any size.
      x: the clip.
      tile: tile size (height, width) in x.
      out_tile: tile size in the output.
      overlap: shared part of a tile along height and width.
      smallest: the least height and width that `run` can take.

    Raises:
      UserError: when the tiles cannot advance, or one at the edge is too small.
    """
    stride = tuple(int(size * (1 - part)) for size, part in zip(tile, overlap, strict=True))
    if min(stride) < 1 or min(out_tile) < 1:
        raise UserError(f"VAE tiling: tiles of {tile} with overlap {overlap} cannot advance; use larger tiles")
    out_stride = tuple(size - int(size * part) for size, part in zip(out_tile, overlap, strict=True))
    return tiling.run_tiled(
        run, x, tile=tile, stride=stride, out_tile=out_tile, out_stride=out_stride, smallest=smallest
    )
