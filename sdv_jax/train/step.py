"""One optimiser step, compiled once per program (task and variant)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.nn.stack import remat as keeping
from sdv_jax.objectives.switching import Purpose, step_key
from sdv_jax.sharding import under_mesh
from sdv_jax.train.state import TrainState, Tree, join
from sdv_jax.typing import Array


def make(
    graph: nnx.GraphDef, loss: Callable, tx: optax.GradientTransformation, learning_rate: optax.Schedule, *,
    ema_decay: float, remat: str = "all",
) -> Callable:  # fmt: skip
    """(state, frozen, run key, batch, empty_text, flags) -> (state, metrics), jitted; the state is donated.

    `loss(model, batch, empty_text, key)` is an objective with its settings bound. The arrays of `batch` are
    [parts, rows, ...]: parts are computed one after the other and their gradients averaged. Everything random in the
    step comes from (run key, state.step, part). `flags` [devices] are not 0 where a process was asked to stop. Metrics
    are scalars on the device: loss, grad_norm (before clipping), learning_rate, stop (the largest flag). `remat` is a
    policy of `nn.stack`.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen: Tree, key: Array, batch, empty_text: Array, flags: Array):
        def objective(trained, rows, part):
            def own(purpose: Purpose) -> Array:
                return jax.random.fold_in(step_key(key, state.step, purpose), part)

            model = join(graph, trained, frozen)
            lora.set_dropout_key(model.transformer, own(Purpose.LORA_DROPOUT))
            return loss(model, rows, empty_text, own(Purpose.OBJECTIVE))

        def add(sums, rows_and_part):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(objective)(state.trained, *rows_and_part)), None

        parts = jax.tree.leaves(batch)[0].shape[0]
        nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trained)
        with keeping(remat):
            sums, _ = jax.lax.scan(add, nothing, (batch, jnp.arange(parts)))
        value, gradients = jax.tree.map(lambda total: total / parts, sums)
        updates, optimizer = _update(tx, gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients), "learning_rate": learning_rate(state.step)}
        metrics |= {"stop": jnp.max(flags)}
        ema = None if state.ema is None else _average(state.ema, trained, state.step, ema_decay)
        return TrainState(state.step + 1, trained, optimizer, ema), metrics

    return step


def _update(tx: optax.GradientTransformation, gradients: Tree, optimizer: optax.OptState, trained: Tree):
    """`tx.update`, whose results are cut over the mesh as what it was given; in between the compiler may choose."""
    if not under_mesh():
        return tx.update(gradients, optimizer, trained)
    cuts = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, (gradients, optimizer))
    return jax.sharding.auto_axes(tx.update, out_sharding=cuts)(gradients, optimizer, trained)


def _average(ema: Tree, trained: Tree, step: Array, decay: float) -> Tree:
    """Shorter memory at the start, min(decay, (1 + step) / (10 + step)), so that the random start is forgotten."""
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: (kept * old + (1 - kept) * new).astype(old.dtype), ema, trained)
