"""Low-rank adapters: which layers get one, and what can be done with them once they have.

Targets are named as PEFT names them, by the suffix of the module's name in the diffusers checkpoint, because that is what
published adapters and training recipes list. Our own layer names are translated by `torch_name`.
"""

import dataclasses
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.errors import UserError
from sdv_jax.nn.linear import Linear, LoRA
from sdv_jax.sharding import dotted
from sdv_jax.typing import Key


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank, alpha (the update is scaled by alpha / rank), PEFT-style targets, dropout on the adapter's input while training."""

    rank: int = 128
    alpha: float = 64.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank must be at least 1, found {self.rank}")
        if not self.targets:
            raise UserError("lora.targets is empty: name at least one module suffix, such as to_q")


# Where our layer names differ from diffusers' (one row per difference, ours on the left).
_TORCH_NAMES = ((r"^blocks\.", "transformer_blocks."), (r"\.to_out$", ".to_out.0"), (r"\.ff\.up$", ".ff.net.0.proj"), (r"\.ff\.down$", ".ff.net.2"))


def torch_name(path: str) -> str:
    """The diffusers name of one of our layers, without the layer index: blocks.ff.up -> transformer_blocks.ff.net.0.proj."""
    for pattern, name in _TORCH_NAMES:
        path = re.sub(pattern, name, path)
    return path


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(path, layer) of every linear layer, in the order of the paths."""
    found = {dotted(path): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    yield from sorted(found.items())


def adapted(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(path, layer) of every linear layer whose slot is filled."""
    return ((path, layer) for path, layer in linears(model) if layer.lora is not None)


def add(model: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Fills the slot of every targeted layer; the model's outputs do not change until the adapter is trained.

    Raises `UserError` for a target that hits no layer.
    """
    missed = set(config.targets)
    for path, layer in linears(model):
        hits = {target for target in config.targets if is_hit(torch_name(path), target)}
        if hits:
            layer.lora = LoRA(layer.kernel[...], rank=config.rank, alpha=config.alpha, dropout=config.dropout, rngs=rngs)
            missed -= hits
    if missed:
        raise UserError(f"lora.targets: no layer is named {', '.join(sorted(missed))}; layers are {_names(model)}")


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


def set_dropout_key(model: nnx.Module, key: Key | None) -> None:
    """Arms dropout of every adapter with keys of its own, one per layer of a stack; None switches it off."""
    for index, (_, layer) in enumerate(adapted(model)):
        if key is None:
            layer.lora.key = nnx.data(None)
            continue
        own, lead = jax.random.fold_in(key, index), layer.kernel.shape[:-2]
        layer.lora.key = nnx.Variable(jax.random.split(own, lead) if lead else own)


def merge(model: nnx.Module) -> None:
    """Adds each adapter into its kernel and keeps the adapter in the slot's place removed: the model computes the same without one."""
    for _, layer in adapted(model):
        layer.kernel[...] = _shifted(layer, +1)
    remove(model)


def unmerge(model: nnx.Module, adapter: dict[str, LoRA]) -> None:
    """The inverse of `merge`: takes `adapter` (layer path -> LoRA, as `collect` returned before merging) out of the kernels and puts it back in the slots."""
    layers = dict(linears(model))
    unknown = sorted(set(adapter) - set(layers))
    if unknown:
        raise UserError(f"unmerge: the model has no layer {', '.join(unknown)}")
    for path, lora in adapter.items():
        layers[path].lora = lora
        layers[path].kernel[...] = _shifted(layers[path], -1)


def collect(model: nnx.Module) -> dict[str, LoRA]:
    """Layer path -> adapter, for `unmerge`."""
    return {path: layer.lora for path, layer in adapted(model)}


def _shifted(layer: Linear, sign: int) -> jax.Array:
    lora = layer.lora
    delta = jnp.matmul(lora.a[...], lora.b[...], precision="highest") * lora.scale
    return (layer.kernel[...].astype(jnp.float32) + sign * delta).astype(layer.kernel.dtype)


def _names(model: nnx.Module) -> str:
    return ", ".join(torch_name(path) for path, _ in linears(model))
