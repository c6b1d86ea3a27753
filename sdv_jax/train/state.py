"""What a step changes, and how a model is taken apart for it.

States are nested dicts of arrays, not NNX states: `jax.jit` flattens dicts in C++, which keeps the host's cost of a
step well below a millisecond, and checkpoints and optimisers see plain names.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sdv_jax.objectives.denoising import Denoiser
from sdv_jax.sharding import reshard
from sdv_jax.typing import Array, Int

Tree = dict[str, Any]


class TrainState(NamedTuple):
    """Donated to every step. `ema` is None when no average is kept."""

    step: Int[Array, ""]
    trained: Tree
    optimizer: optax.OptState
    ema: Tree | None


def split(model: Denoiser, *, mode: str, train_encoder: bool) -> tuple[nnx.GraphDef, Tree, Tree]:
    """(graph, trained, frozen) for `join`.

    mode "lora": the adapter is trained; "full": every parameter of the transformer, and of the text encoder with
    `train_encoder`. The trees share the model's arrays.
    """
    parts = ("transformer", "text_encoder") if train_encoder else ("transformer",)
    chosen = nnx.LoRAParam if mode == "lora" else nnx.All(nnx.Param, _InPart(*parts))
    graph, trained, frozen = nnx.split(model, chosen, ...)
    return graph, nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)


def join(graph: nnx.GraphDef, trained: Tree, frozen: Tree) -> Denoiser:
    """The inverse of `split`. Under a mesh the weights outside the stacks of blocks, which gather their own, are
    gathered here.
    """
    return nnx.merge(graph, *(jax.tree_util.tree_map_with_path(_gathered, tree) for tree in (trained, frozen)))


def create(trained: Tree, tx: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first step. Leaves are copied, so that donation leaves the caller's arrays alone."""
    trained = jax.tree.map(jnp.copy, trained)
    average = jax.tree.map(jnp.copy, trained) if ema else None
    return TrainState(step=jnp.zeros((), jnp.int32), trained=trained, optimizer=tx.init(trained), ema=average)


def result(state: TrainState) -> Tree:
    """The trained weights a run hands out: the moving average where one is kept."""
    return state.trained if state.ema is None else state.ema


def _gathered(path, leaf):
    return leaf if any(getattr(key, "key", None) == "blocks" for key in path) else reshard(leaf, jax.P())


class _InPart:
    """An nnx filter: parameters whose path starts with one of the names."""

    def __init__(self, *names: str):
        self.names = names

    def __call__(self, path, _) -> bool:
        return path[0] in self.names
