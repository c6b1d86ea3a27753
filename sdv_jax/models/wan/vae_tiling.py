"""The tiles in which a Wan VAE works on large frames, as diffusers does it.

The result is not the untiled one: convolutions and attention see one tile at a time.
"""

import dataclasses

from sdv_jax.errors import UserError
from sdv_jax.models.config_check import check_numbers


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Size and distance of tiles; the fields are those of diffusers' `enable_tiling`.

    They count pixels, except where a VAE with patches encodes: there upstream's tiles have as many patches.

    Attributes:
      tile_sample_min_height, tile_sample_min_width: tile size; smaller videos are not tiled.
      tile_sample_stride_height, tile_sample_stride_width: from one tile to the next.

    Raises:
      UserError: for tiles that leave gaps.
    """

    tile_sample_min_height: int = 256
    tile_sample_min_width: int = 256
    tile_sample_stride_height: int = 192
    tile_sample_stride_width: int = 192

    def __post_init__(self):
        check_numbers("VAE tiling", self)
        if any(step > size for size, step in zip(self.sample_tile, self.sample_stride, strict=True)):
            raise UserError(f"VAE tiling: tiles of {self.sample_tile} in steps of {self.sample_stride} leave gaps")

    @classmethod
    def default(cls, config) -> "Tiling":
        """diffusers' defaults, the same for every VAEConfig."""
        return cls()

    @property
    def sample_tile(self) -> tuple[int, int]:
        """Tile height and width."""
        return self.tile_sample_min_height, self.tile_sample_min_width

    @property
    def sample_stride(self) -> tuple[int, int]:
        """From one tile to the next, down and right."""
        return self.tile_sample_stride_height, self.tile_sample_stride_width

    def latent_tile(self, compression: int) -> tuple[int, int]:
        """Tile height and width in latents."""
        return tuple(size // compression for size in self.sample_tile)

    def latent_stride(self, compression: int) -> tuple[int, int]:
        """From one tile to the next in latents."""
        return tuple(step // compression for step in self.sample_stride)

    @property
    def overlap(self) -> tuple[float, float]:
        """Shared part of a tile along height and width."""
        return tuple(1 - step / size for size, step in zip(self.sample_tile, self.sample_stride, strict=True))

    def check(self, compression: int) -> None:
        """Raises UserError unless tiles and steps are whole latents: the seams would not meet."""
        if any(number % compression for number in (*self.sample_tile, *self.sample_stride)):
            raise UserError(
                f"VAE tiling: tiles of {self.sample_tile} in steps of {self.sample_stride} are no whole latents; "
                f"expected multiples of {compression}"
            )
