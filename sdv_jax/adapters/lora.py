"""Low-rank adapters: which layers get one, and what can be done with them once they have.

Targets are named as PEFT names them, by the end of the module's name in the published checkpoint, because that is what
published adapters and training recipes list. How our layers are called there, the caller says: it is a column of the
conversion table, which this module, being below it, does not know.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.errors import UserError
from sdv_jax.nn.linear import Linear, LoRA
from sdv_jax.sharding import dotted
from sdv_jax.typing import Array, Key


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank, alpha (the update is scaled by alpha / rank), PEFT-style targets, dropout on the adapter's input."""

    rank: int = 128
    alpha: float = 64.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank must be at least 1, found {self.rank}")
        if not self.targets:
            raise UserError("lora.targets is empty: name at least one module suffix, such as to_q")


# (path of a layer, block or None for a layer outside the stack) -> its name in the published checkpoint.
Names = Callable[[str, int | None], str]


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(path, layer) of every linear layer, in the order of the paths."""
    found = {dotted(path): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    yield from sorted(found.items())


def adapted(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(path, layer) of every linear layer whose slot is filled."""
    return ((path, layer) for path, layer in linears(model) if layer.lora is not None)


def add(model: nnx.Module, config: LoraConfig, *, names: Names, rngs: nnx.Rngs) -> None:
    """Fills the slot of every targeted layer; the model's outputs do not change until the adapter is trained.

    `names` is the `to_torch_module_name` of the model's conversion rules. Raises `UserError` for a target that hits no
    layer, or a layer of some blocks only.
    """
    known = {path: _published(path, layer, names) for path, layer in linears(model)}
    every = [name for found in known.values() for name in found]
    missed = [target for target in config.targets if not any(is_hit(name, target) for name in every)]
    if missed:
        layers = ", ".join(found[0] for found in known.values())
        raise UserError(f"lora.targets: no layer is named {', '.join(missed)}; there are (block 0 for all) {layers}")
    targeted = [path for path, found in known.items() if _hits_all(found, config.targets)]
    for path, layer in linears(model):
        if path in targeted:
            rank, alpha, dropout = config.rank, config.alpha, config.dropout
            layer.lora = LoRA(layer.kernel[...], rank=rank, alpha=alpha, dropout=dropout, rngs=rngs)


def is_hit(name: str, target: str) -> bool:
    """PEFT's rule: the module's name is the target, or ends in "." + target."""
    return name == target or name.endswith("." + target)


def remove(model: nnx.Module) -> None:
    """Empties every slot."""
    for _, layer in linears(model):
        layer.lora = nnx.data(None)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, adapter, everything else), for `nnx.merge`; differentiate with respect to the second."""
    return nnx.split(model, nnx.LoRAParam, ...)


def set_dropout_key(model: nnx.Module, key: Key[Array, ""] | None) -> None:
    """Arms dropout of every adapter with keys of its own, one per layer of a stack; None switches it off."""
    for index, (_, layer) in enumerate(adapted(model)):
        if key is None:
            layer.lora.key = nnx.data(None)
            continue
        own, lead = jax.random.fold_in(key, index), layer.kernel.shape[:-2]
        layer.lora.key = nnx.Variable(jax.random.split(own, lead) if lead else own)


def merge(model: nnx.Module) -> dict[str, LoRA]:
    """Adds each adapter into its kernel and empties the slots: the model computes the same without an adapter.

    Returns layer path -> adapter, for `unmerge`. Kernels keep their dtype: in bfloat16 the sum is rounded, and
    `unmerge` gives the kernels back within that (2**-8 of the larger of kernel and sum). An adapter used with
    adaln_lora = "reference" cannot be merged, because a merged kernel acts on every stream.
    """
    adapter = {path: layer.lora for path, layer in adapted(model)}
    for _, layer in adapted(model):
        layer.kernel[...] = _shifted(layer, +1)
    remove(model)
    return adapter


def unmerge(model: nnx.Module, adapter: dict[str, LoRA]) -> None:
    """The inverse of `merge`: takes what it returned out of the kernels again, and puts it back into the slots."""
    layers = dict(linears(model))
    unknown = sorted(set(adapter) - set(layers))
    if unknown:
        raise UserError(f"unmerge: the model has no layer {', '.join(unknown)}")
    for path, lora in adapter.items():
        layers[path].lora = lora
        layers[path].kernel[...] = _shifted(layers[path], -1)


def _shifted(layer: Linear, sign: int) -> jax.Array:
    lora = layer.lora
    delta = jnp.matmul(lora.a[...], lora.b[...], precision="highest") * lora.scale
    return (layer.kernel[...].astype(jnp.float32) + sign * delta).astype(layer.kernel.dtype)


def _published(path: str, layer: Linear, names: Names) -> list[str]:
    """The names of a layer: one per block if it is stacked."""
    stacked = layer.kernel.ndim == 3
    return [names(path, block) for block in (range(layer.kernel.shape[0]) if stacked else (None,))]


def _hits_all(found: list[str], targets: tuple[str, ...]) -> bool:
    """Whether the blocks of one layer are targeted, which has to be all of them or none."""
    hits = [name for name in found if any(is_hit(name, target) for target in targets)]
    if hits and len(hits) < len(found):
        raise UserError(f"lora.targets: {hits[0]} is hit, but not that layer of every block; leave the number away")
    return bool(hits)
