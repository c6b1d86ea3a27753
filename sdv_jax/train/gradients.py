"""The two tasks' gradients against each other: cosine and norms, in all and per group of layers (paper A's analysis).

Both are gradients of the trained weights on fixed held-out batches with fixed noise, at the noise levels that training
draws, without dropout of the adapter; every device's share is in them.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.train.state import Tree, join
from sdv_jax.typing import Array

TASKS = ("identity", "motion")


def make(graph: nnx.GraphDef, losses: Mapping[str, Callable]) -> Callable:
    """(trained, frozen, {task: batches}, empty_text, key) -> record, see `compare`. `losses` has the two tasks'.

    The record says for each task too, as "halves_TASK", the cosine between the gradients of the two halves of its
    batches: where that is near 0, so is every other cosine, for want of rows. None with one batch.
    """

    def gradient(loss):
        def of(trained: Tree, frozen: Tree, batch, empty_text: Array, key: Array) -> Tree:
            return jax.grad(lambda weights: loss(join(graph, weights, frozen), batch, empty_text, key))(trained)

        return jax.jit(of)

    programs = {task: gradient(losses[task]) for task in TASKS}

    def measure(trained: Tree, frozen: Tree, batches: Mapping[str, Iterable], empty_text: Array, key: Array) -> dict:
        means, agreement = [], {}
        for task in TASKS:
            halves, count = [jax.tree.map(jnp.zeros_like, trained)] * 2, 0
            for count, batch in enumerate(batches[task], start=1):
                found = programs[task](trained, frozen, batch, empty_text, jax.random.fold_in(key, count - 1))
                halves[count % 2] = _add(halves[count % 2], found)
            means.append(_scaled(_add(*halves), 1 / count))
            agreement[f"halves_{task}"] = compare(*halves)["cosine"] if count > 1 else None
        return compare(*means) | agreement

    return measure


def compare(identity: Tree, motion: Tree) -> dict:
    """{"cosine", "norm_identity", "norm_motion", "groups": {group: the same three}}.

    A group is a layer by its path, all blocks together ("blocks.attn1.to_q"), or one block of all layers ("block 0").
    """
    products = jax.device_get(_products(identity, motion))
    groups: dict[str, np.ndarray] = {}
    total = np.zeros(3)
    for path, product in _leaves(products):
        layer = ".".join(name for name in path[:-1] if name not in ("lora", "transformer"))
        summed = product.reshape(3, -1).astype(np.float64)
        total += summed.sum(axis=1)
        groups[layer] = groups.get(layer, np.zeros(3)) + summed.sum(axis=1)
        if product.ndim == 2:
            for block in range(product.shape[1]):
                name = f"block {block}"
                groups[name] = groups.get(name, np.zeros(3)) + summed[:, block]
    return _told(total) | {"groups": {name: _told(sums) for name, sums in sorted(groups.items())}}


@jax.jit
def _add(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(jnp.add, total, more)


@jax.jit
def _scaled(total: Tree, factor: float) -> Tree:
    return jax.tree.map(lambda leaf: leaf * factor, total)


@jax.jit
def _products(identity: Tree, motion: Tree) -> Tree:
    """[3] or, of stacked layers, [3, l] per leaf: <i, m>, <i, i>, <m, m>."""

    def of(i: Array, m: Array) -> Array:
        i, m = i.astype(jnp.float32), m.astype(jnp.float32)
        axes = tuple(range(1, i.ndim)) if i.ndim == 3 else tuple(range(i.ndim))
        return jnp.stack([jnp.sum(a * b, axis=axes) for a, b in ((i, m), (i, i), (m, m))])

    return jax.tree.map(of, identity, motion)


def _leaves(tree: Tree, path: tuple[str, ...] = ()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


def _told(sums: np.ndarray) -> dict[str, float]:
    inner, identity, motion = sums
    scale = float(np.sqrt(identity * motion))
    cosine = float(inner) / scale if scale else 0.0
    return {"cosine": cosine, "norm_identity": float(np.sqrt(identity)), "norm_motion": float(np.sqrt(motion))}
