"""The families that can be converted: for each component of a pipeline, its class there, its class here, its rules."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from sdv_jax.checkpoints.engine import Leaf, leaf_shapes, leaves_of
from sdv_jax.checkpoints.rules import t5
from sdv_jax.checkpoints.rules.table import Rules
from sdv_jax.diffusion.schedules import SchedulerConfig
from sdv_jax.errors import UserError
from sdv_jax.models import cogvideox as models
from sdv_jax.models.cogvideox import rules as cogvideox
from sdv_jax.models.cogvideox.transformer import Transformer, TransformerConfig
from sdv_jax.models.cogvideox.vae import VAE, VAEConfig
from sdv_jax.models.text.t5 import T5Config, T5Encoder
from sdv_jax.sharding import Table


@dataclasses.dataclass(frozen=True)
class Component:
    """One weight-holding part of a pipeline. `stem` is how its weight files are called on export."""

    torch_class: str
    stem: str
    parse: Callable[[Mapping, Path], object]
    module: Callable[..., nnx.Module]
    rules: Callable[[object], Rules]

    def abstract(self, config, *, dtype) -> nnx.Module:
        """The module with shapes for weights."""
        graph, state = _traced(self.module, config, np.dtype(dtype))
        return nnx.merge(graph, jax.tree.map(lambda shape: shape, state))

    def leaves(self, config) -> tuple[Leaf, ...]:
        """What has to be filled."""
        _, state = _traced(self.module, config, np.dtype(np.float32))
        return leaves_of(leaf_shapes(state), self.rules(config))


@functools.lru_cache(maxsize=16)
def _traced(module: Callable[..., nnx.Module], config, dtype: np.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """Tracing the constructor of a deep VAE takes a second, and a model's shapes are asked for several times."""
    return nnx.split(nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=nnx.Rngs(0))))


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of pipeline: its diffusers class and its components by folder name."""

    name: str
    pipeline: str
    components: Mapping[str, Component]
    scheduler: Callable[[Mapping], object]
    variants: Mapping
    sharding: Table
    denoiser: str = "transformer"

    def variant(self, configs: Mapping[str, object]) -> str:
        """The published model these component configs are those of, or "custom"."""
        for name, published in self.variants.items():
            if all(getattr(published, component) == config for component, config in configs.items()):
                return name
        return "custom"

    def placement(self, name: str) -> Table:
        """The sharding table of a component. What the denoiser's table does not name elsewhere is replicated."""
        return self.sharding if name == self.denoiser else (*self.sharding, (r"", jax.P()))


def _fields(cls) -> Callable[[Mapping, Path], object]:
    """Reads a diffusers config.json: its keys are the fields of `cls`; those that start with "_" are only notes."""

    def parse(raw: Mapping, where: Path):
        values = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in raw.items()
            if not key.startswith("_")
        }
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            known = ", ".join(sorted(known))
            raise UserError(f"{where}: unknown config key {', '.join(unknown)}; {raw.get('_class_name')} has {known}")
        return _located(lambda: cls(**values), where)

    return parse


def _located(make: Callable, where: Path):
    try:
        return make()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (
        TypeError,
        ArithmeticError,
        AttributeError,
    ) as error:  # a value of the wrong kind, such as a text for a size
        raise UserError(f"{where}: a value does not make sense ({str(error).splitlines()[0]})") from None


COGVIDEOX = Family(
    name="cogvideox",
    pipeline="CogVideoXPipeline",
    components={
        "transformer": Component(
            "CogVideoXTransformer3DModel",
            "diffusion_pytorch_model",
            _fields(TransformerConfig),
            Transformer,
            lambda config: cogvideox.transformer(config.patch_size),
        ),
        "vae": Component(
            "AutoencoderKLCogVideoX", "diffusion_pytorch_model", _fields(VAEConfig), VAE, lambda config: cogvideox.VAE
        ),
        "text_encoder": Component(
            "T5EncoderModel",
            "model",
            lambda raw, where: _located(lambda: T5Config.from_json(raw), where),
            T5Encoder,
            lambda config: t5.ENCODER,
        ),
    },
    scheduler=SchedulerConfig.from_dict,
    variants=models.VARIANTS,
    sharding=models.SHARDING,
)

FAMILIES = (COGVIDEOX,)


def rules_of(denoiser: nnx.Module) -> tuple[str, Rules]:
    """(family, conversion rules) of a transformer. Raises TypeError for a module that is no family's."""
    for family in FAMILIES:
        component = family.components[family.denoiser]
        if isinstance(denoiser, component.module):
            return family.name, component.rules(denoiser.config)
    raise TypeError(f"{type(denoiser).__name__} is not the transformer of a known family")
