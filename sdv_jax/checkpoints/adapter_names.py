"""What files call the layers that an adapter acts on, in every style in circulation, and what is written for whom.

A key is a prefix, a module and a half. Prefixes and halves are the tools'; the module's name is that of the diffusers
checkpoint or, where a family's original release has names of its own, that one, as it is or with every dot turned into
an underscore. Underscores cannot be turned back by looking at the name (`self_attn`), so the layers that the model has
are spelled the same way and compared.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from types import ModuleType

import numpy as np
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.checkpoints.families import families, family_of_module
from sdv_jax.checkpoints.family import Family
from sdv_jax.checkpoints.rules.table import Rules

FORMATS = ("diffusers", "comfyui", "peft")

# Longer ones first: a name is stripped of the first that fits, again and again.
_PREFIXES = (
    "base_model.model.",  # PEFT
    "model.diffusion_model.",  # single-file checkpoints
    "diffusion_model.",  # ComfyUI, diffusion-pipe
    "pipe.dit.",  # DiffSynth
    "transformer.",  # diffusers
    "lora_unet__",  # VideoX-Fun
    "lora_unet_",  # kohya, musubi
)
_HALF = re.compile(r"(?P<module>.+?)\.lora[_.](?P<half>A|B|down|up)(\.(?!weight$)[^.]+)?\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_DELTA = re.compile(r".+\.(diff|diff_b|lora_[AB](\.[^.]+)?\.bias)")
_PROBE = 990099  # a block number that occurs in no name


def parse(key: str) -> tuple[str, str] | None:
    """(module without prefixes, "A", "B" or "alpha") of a tensor's name; None for what is no part of a LoRA."""
    if found := _HALF.fullmatch(key):
        return _bare(found["module"]), "B" if found["half"] in ("B", "up") else "A"
    if found := _ALPHA.fullmatch(key):
        return _bare(found["module"]), "alpha"
    return None


def is_delta(key: str) -> bool:
    """Whether the tensor is added to a weight or a bias, so that zeros in it do nothing."""
    return _DELTA.fullmatch(key) is not None


def _bare(module: str) -> str:
    while prefix := next((p for p in _PREFIXES if module.startswith(p)), None):
        module = module.removeprefix(prefix)
    return module


class LayerNames:
    """How the linear layers of one model are called.

    family, rules: the model's; rules' torch names are diffusers'. original: the family's table of original names.
    layers: gives (path, kernel's shape) of the model's linear layers.
    """

    def __init__(self, family: str, rules: Rules, original: ModuleType | None,
                 layers: Callable[[], Iterable[tuple[str, tuple[int, ...]]]]):
        self.family, self.rules, self._original, self.layers = family, rules, original, layers

    @classmethod
    def of_model(cls, denoiser: nnx.Module) -> "LayerNames":
        """The names for a transformer of a known family."""
        return cls._of(family_of_module(denoiser), denoiser.config, lambda: denoiser)

    @classmethod
    def of_published(cls, family: str = "") -> Iterator["LayerNames"]:
        """The names for every published model, of `family` if that is given."""
        for known in families():
            if family in ("", known.name):
                for variant in known.variants.values():
                    config = getattr(variant, known.denoiser)
                    build = known.components[known.denoiser].abstract
                    yield cls._of(known, config, lambda build=build, config=config: build(config, dtype=np.float32))

    @classmethod
    def _of(cls, family: Family, config, model: Callable[[], nnx.Module]) -> "LayerNames":
        rules = family.components[family.denoiser].rules(config)
        return cls(family.name, rules, family.original_names,
                   lambda: ((path, layer.kernel.shape) for path, layer in lora.linears(model())))

    def find(self, module: str) -> tuple[str, int | None] | None:
        """(our layer path, block) of a module as `parse` gives it, in any spelling; None if there is no such layer."""
        for name in (module, self._original and self._original.diffusers_name(module)):
            try:
                if name:
                    return self.rules.from_torch_module_name(name)
            except KeyError:
                pass
        for pattern, path in self._flat if "." not in module else ():
            if found := pattern.fullmatch(module):
                return path, int(found[1]) if pattern.groups else None
        return None

    def published(self, path: str, block: int | None) -> str:
        """The layer's name in the diffusers checkpoint, the inverse of `find`."""
        return self.rules.to_torch_module_name(path, block)

    def key(self, module: str, half: str, format: str) -> str:
        """The tensor's name in a file for `format`; `module` is the published name."""
        if format == "comfyui" and self._original is not None:
            # ComfyUI and diffusers both read this form, and both take its missing alpha for the rank. With an alpha
            # beside it, diffusers would refuse the layers outside the blocks.
            return f"diffusion_model.{self._original.original_name(module)}.lora_{half}.weight"
        # Of families without original names ComfyUI's wrappers hand the file to diffusers.
        return f"{'base_model.model' if format == 'peft' else 'transformer'}.{module}.lora_{half}.weight"

    def renames(self, format: str) -> bool:
        """Whether files for `format` have other module names than diffusers, whose config would not fit them."""
        return format == "comfyui" and self._original is not None

    @cached_property
    def _flat(self) -> tuple[tuple[re.Pattern, str], ...]:
        """(pattern of the name with underscores for dots, path); the block is the pattern's group."""
        found = []
        for path, shape in self.layers():
            name = self.published(path, _PROBE if len(shape) == 3 else None)
            for spelled in {name, self._original and self._original.original_name(name)} - {None}:
                flat = re.escape(spelled.replace(".", "_")).replace(str(_PROBE), r"(\d+)")
                found.append((re.compile(flat), path))
        return tuple(found)
