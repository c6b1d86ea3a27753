"""The families there are. A new one is a folder with a `family.py` that holds `FAMILY`, and its line in `PACKAGES`."""

from importlib import import_module

from flax import nnx

from sdv_jax.checkpoints.family import Family
from sdv_jax.checkpoints.rules.table import Rules

PACKAGES = [
    "sdv_jax.models.cogvideox",
    "sdv_jax.models.wan",
]


def families() -> tuple[Family, ...]:
    """All of them."""
    return tuple(import_module(f"{package}.family").FAMILY for package in PACKAGES)


def family_of_module(denoiser: nnx.Module) -> Family:
    """The family whose denoiser this is. Raises TypeError for a module that is no family's."""
    for family in families():
        if isinstance(denoiser, family.components[family.denoiser].module):
            return family
    raise TypeError(f"{type(denoiser).__name__} is not the transformer of a known family")


def rules_of(denoiser: nnx.Module) -> tuple[str, Rules]:
    """(family, conversion rules) of a transformer. Raises TypeError for a module that is no family's."""
    family = family_of_module(denoiser)
    return family.name, family.components[family.denoiser].rules(denoiser.config)
