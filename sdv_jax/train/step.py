"""One optimiser step, compiled once per program (task and variant)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.objectives.switching import Purpose, step_key
from sdv_jax.train.state import TrainState, Tree, join
from sdv_jax.typing import Array


def make(
    graph: nnx.GraphDef, loss: Callable, tx: optax.GradientTransformation, learning_rate: optax.Schedule, *,
    ema_decay: float,
) -> Callable:  # fmt: skip
    """(state, frozen, run key, batch, empty_text) -> (state, metrics), jitted; the state is donated.

    `loss(model, batch, empty_text, key)` is an objective with its settings bound. Everything random in the step comes
    from (run key, state.step). Metrics are float32 scalars on the device: loss, grad_norm (before clipping),
    learning_rate.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen: Tree, key: Array, batch, empty_text: Array):
        def objective(trained):
            model = join(graph, trained, frozen)
            lora.set_dropout_key(model.transformer, step_key(key, state.step, Purpose.LORA_DROPOUT))
            return loss(model, batch, empty_text, step_key(key, state.step, Purpose.OBJECTIVE))

        value, gradients = jax.value_and_grad(objective)(state.trained)
        updates, optimizer = tx.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients), "learning_rate": learning_rate(state.step)}
        ema = None if state.ema is None else _average(state.ema, trained, state.step, ema_decay)
        return TrainState(state.step + 1, trained, optimizer, ema), metrics

    return step


def _average(ema: Tree, trained: Tree, step: Array, decay: float) -> Tree:
    """Shorter memory at the start, min(decay, (1 + step) / (10 + step)), so that the random start is forgotten."""
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: (kept * old + (1 - kept) * new).astype(old.dtype), ema, trained)
