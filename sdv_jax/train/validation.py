"""The loss on held-out rows, per task and bin of noise levels, always with the same noise."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.train.state import Tree, join
from sdv_jax.typing import Array


def make(graph: nnx.GraphDef, loss: Callable, *, timesteps: np.ndarray, rows: int) -> Callable:
    """(trained, frozen, batches, empty_text, key) -> the mean loss in each bin, `timesteps` being the bins' middles.

    `loss` is one program's, without dropout of captions; `rows` is the batch size. The noise of batch i is that of
    fold_in(key, i).
    """

    @jax.jit
    def one(trained: Tree, frozen: Tree, batch, empty_text: Array, key: Array, timestep: Array):
        return loss(join(graph, trained, frozen), batch, empty_text, key, jnp.broadcast_to(timestep, (rows,)))

    def validate(trained: Tree, frozen: Tree, batches: Iterable[Mapping], empty_text: Array, key: Array) -> list[float]:
        sums, count = np.zeros(len(timesteps)), 0
        for batch in batches:
            own = jax.random.fold_in(key, count)
            found = [one(trained, frozen, batch, empty_text, own, jnp.asarray(timestep)) for timestep in timesteps]
            sums, count = sums + np.asarray(jax.device_get(found), np.float64), count + 1
        return (sums / count).tolist()

    return validate
