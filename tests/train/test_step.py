import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdv_jax.data.loading import Mixture
from sdv_jax.train import plan, setup, state, step
from sdv_jax.train.devices import Devices
from tests.train import tiny

KEY, GO = jax.random.key(0), jnp.zeros(1, jnp.int32)


def _setup(**settings):
    config, data = tiny.config(**settings), tiny.data()
    base = setup.about(config)
    parts = {name: Mixture.of(dataset, name).parts() for name, dataset in data.items()}
    planned = plan.make(config, parts, setup.objective(config, base, tiny.SCALE), KEY, Devices(None))
    graph, trained, frozen = state.split(setup.model(config, base, token_ids=False), mode="lora", train_encoder=False)
    tx = optax.sgd(0.1)
    run = step.make(graph, planned.losses["identity"], tx, lambda _: 0.1, ema_decay=0.9)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, trained)  # B starts at zero, where dropout would not show
    rows = {"identity": planned.batches.streams["identity"].batch(0, np.arange(4))}
    batch = Devices(None).put_batch(rows, parts=1)
    return run, lambda at: state.create(trained, tx, ema=True)._replace(step=jnp.int32(at)), frozen, batch


def test_a_step_is_a_function_of_key_and_step_and_dropout_takes_part():
    run, start, frozen, batch = _setup(lora__dropout=0.5)
    empty = jnp.zeros((3, 8))
    losses = {at: float(run(start(at), frozen, KEY, batch, empty, GO)[1]["loss"]) for at in (0, 1)}
    assert float(run(start(0), frozen, KEY, batch, empty, GO)[1]["loss"]) == losses[0] != losses[1]
    without, start, frozen, batch = _setup(lora__dropout=0.0)
    before = start(0)
    old = jax.tree.map(np.asarray, before.trained)
    after, metrics = without(before, frozen, KEY, batch, empty, GO)
    assert float(metrics["loss"]) != losses[0]
    assert int(after.step) == 1
    # The first average is 9/10 new: min(0.9, (1 + 0) / (10 + 0)) of the old one stays.
    for average, new, first in zip(*map(jax.tree.leaves, (after.ema, after.trained, old)), strict=True):
        np.testing.assert_allclose(average, 0.1 * first + 0.9 * new, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_parts_is_the_average_of_theirs():
    """A loss that knows no chance: the same update, whether a batch comes whole or in parts."""
    config = tiny.config()
    graph, trained, frozen = state.split(_model(config), mode="lora", train_encoder=False)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, trained)
    tx = optax.sgd(0.1)

    def loss(model, batch, empty_text, key):
        rows, text = batch["identity"]["mean"], batch["identity"]["text"]
        return jnp.mean(jnp.square(model.transformer(rows, text, jnp.full((rows.shape[0],), 500))))

    run, rows = step.make(graph, loss, tx, lambda _: 0.1, ema_decay=0.9), tiny.dataset(4, frames=1, views=1)
    found = []
    for parts in (1, 2, 4):
        batch = Devices(None).put_batch({"identity": {"mean": rows.mean, "text": rows.text}}, parts=parts)
        after, metrics = run(state.create(trained, tx, ema=False), frozen, KEY, batch, jnp.zeros((3, 8)), GO)
        found.append((after.trained, metrics["loss"], metrics["grad_norm"]))
    for other in found[1:]:
        for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(found[0]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


def _model(config):
    return setup.model(config, setup.about(config), token_ids=False)
