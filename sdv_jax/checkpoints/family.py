"""The contract of a family: its components by folder name, how each is built and converted, and its traits."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
from flax import nnx

from sdv_jax.checkpoints.engine import Leaf, leaf_shapes, leaves_of
from sdv_jax.checkpoints.rules.table import Rules
from sdv_jax.errors import UserError, one_line
from sdv_jax.models.contract import Traits
from sdv_jax.sharding import REPLICATED, Table


@dataclasses.dataclass(frozen=True)
class Component:
    """One weight-holding part of a pipeline.

    `stem` is how its weight files are called on export, `config` the dataclass of its config.json (one with `from_json`
    reads the file's content itself), `module(config, dtype=, rngs=)` builds it, `rules(config)` converts it. Leaves
    whose path `exact` is found in stay float32 in a model of half precision. `sharding` is the table of a component
    that is no denoiser; those have their family's.
    """

    torch_class: str
    stem: str
    config: type
    module: Callable[..., nnx.Module]
    rules: Callable[[object], Rules]
    optional: bool = False
    exact: str | None = None
    sharding: Table = REPLICATED

    def dtype_of(self, path: str, dtype: np.dtype) -> np.dtype:
        """What the leaf at `path` is held in where the model as a whole is held in `dtype`."""
        stays = self.exact is not None and re.search(self.exact, path)
        return np.promote_types(dtype, np.float32) if stays else dtype

    def parse(self, raw: Mapping, where: Path) -> object:
        """The config that config.json at `where` holds; UserError for an unknown key or a bad value."""
        if hasattr(self.config, "from_json"):
            return _located(lambda: self.config.from_json(raw), where)
        values = {key: value for key, value in raw.items() if not key.startswith("_")}
        if unknown := sorted(values.keys() - self._keys):
            known = ", ".join(sorted(self._keys))
            raise UserError(f"{where}: unknown config key {', '.join(unknown)}; {raw.get('_class_name')} has {known}")
        return _located(lambda: self.config(**_hashable(values)), where)

    def make(self, table: Mapping, where: str) -> object:
        """The config of a new model: `table` holds the keys of its config.json that differ from the defaults."""
        values = {key: value for key, value in table.items() if not key.startswith("_")}
        if unknown := sorted(values.keys() - self._keys):
            known = ", ".join(sorted(self._keys))
            raise UserError(f"config key {where + '.' + unknown[0]!r} does not exist: known are {known}")
        return self.config(**_hashable(values))

    @property
    def _keys(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self.config)}

    def abstract(self, config, *, dtype) -> nnx.Module:
        """The module with shapes for weights."""
        graph, state = _traced(self.module, config, np.dtype(dtype))
        return nnx.merge(graph, jax.tree.map(lambda shape: shape, state))

    def but_optional(self) -> "Component":
        """The same kind of part, which a pipeline may lack."""
        return dataclasses.replace(self, optional=True)

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
    """A kind of pipeline.

    Attributes:
      name: as model.json has it.
      pipelines: the diffusers classes whose folders are read; the first is the one a new model is written for.
      components: by folder name: transformer, vae and text_encoder, and `optional` ones, which may be absent.
      denoisers: the components that predict, noisiest expert first.
      scheduler: parses scheduler_config.json; `schedulers`: names users have for the classes it knows.
      variants: published name -> config whose attributes are the component configs.
      sharding: the denoisers' table.
      lora_targets: default targets of an adapter.
      traits: (component configs, model.json) -> what pipeline and training must know; UserError for parts that do not
        fit one another.
      options: (streams of an adaLN adapter, placement of references) -> keywords of the transformer's call.
      original_names: module with `diffusers_name` and `original_name`, where the original release has names of its own.
      index: keys of model_index.json that say how the pipeline works, for models without a folder.
      peer: module that runs the same components in torch, for `--verify`.
    """

    name: str
    pipelines: tuple[str, ...]
    components: Mapping[str, Component]
    scheduler: Callable[[Mapping], object]
    schedulers: Mapping[str, str]
    variants: Mapping
    sharding: Table
    lora_targets: tuple[str, ...]
    traits: Callable[[Mapping[str, object], Mapping], Traits]
    options: Callable[[str, Mapping | None], dict]
    peer: str
    denoisers: tuple[str, ...] = ("transformer",)
    original_names: ModuleType | None = None
    index: tuple[str, ...] = ()

    def traits_at(self, where: Path, configs: Mapping[str, object], about: Mapping) -> Traits:
        """`traits`, with the place in front of what it complains about."""
        return _located(lambda: self.traits(configs, about), where)

    @property
    def denoiser(self) -> str:
        """The component that adapters and training are about."""
        return self.denoisers[0]

    def variant(self, configs: Mapping[str, object]) -> str:
        """The published model these component configs are those of, or "custom"."""
        for name, published in self.variants.items():
            own = {part: getattr(published, part, None) for part in self.components}
            if all(own[part] == configs.get(part) for part in self.components):
                return name
        return "custom"

    def placement(self, name: str) -> Table:
        """The sharding table of a component."""
        return self.sharding if name in self.denoisers else self.components[name].sharding


def _hashable(values: Mapping) -> dict:
    """Lists as tuples: configs are arguments of compiled functions."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _located(make: Callable, where: Path):
    """`make()`, with the place in front of what it complains about."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (TypeError, ArithmeticError, AttributeError) as error:  # of the wrong kind, such as a text for a size
        raise UserError(f"{where}: a value does not make sense ({one_line(error)})") from None
