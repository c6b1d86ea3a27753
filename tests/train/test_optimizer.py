import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.train import config as configs
from sdv_jax.train import optimizer

BASE = configs.load("configs/base.py").optimizer


def _config(**changes):
    return dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize("cycles", [1, 3])
def test_the_learning_rate_is_that_of_transformers(cycles):
    torch = pytest.importorskip("torch")
    from transformers import get_cosine_with_hard_restarts_schedule_with_warmup as theirs

    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-5)
    peer = theirs(sgd, num_warmup_steps=20, num_training_steps=100, num_cycles=cycles)
    rate = optimizer.learning_rate(_config(warmup=20, cycles=cycles), 100)
    for step in range(101):
        np.testing.assert_allclose(rate(step), peer.get_last_lr()[0], rtol=2e-5, atol=1e-11, err_msg=str(step))
        sgd.step()
        peer.step()


def test_a_constant_rate_and_another_end():
    constant = optimizer.learning_rate(_config(schedule="constant", warmup=4), 10)
    np.testing.assert_allclose([constant(s) for s in (0, 2, 4, 50)], [0, 2.5e-5, 5e-5, 5e-5], rtol=1e-6)
    early = optimizer.learning_rate(_config(warmup=0, decay_steps=10), 100)
    assert early(10) == 0 and early(9) > 0


def test_adamw_is_that_of_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=(3,))}
    ours = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    theirs = {name: torch.tensor(value, dtype=torch.float32, requires_grad=True) for name, value in start.items()}
    config = _config(learning_rate=1e-2, weight_decay=0.1, schedule="constant", warmup=0)
    groups = [{"params": [theirs["kernel"]], "weight_decay": 0.1}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    tx = optimizer.make(config, 10)
    state = tx.init(ours)
    for _ in range(5):
        gradients = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in start.items()}
        updates, state = tx.update(jax.tree.map(jnp.asarray, gradients), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        for name, tensor in theirs.items():
            tensor.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        peer.step()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_only_matrices_decay():
    layer = {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3)), "lora": {"a": jnp.ones((2, 3, 1))}}
    leaves = {"blocks": {"q": layer}, "norm": {"scale": jnp.ones(3)}}
    tx = optimizer.make(_config(weight_decay=0.5, schedule="constant", warmup=0), 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, leaves), tx.init(leaves), leaves)
    block = updates["blocks"]["q"]
    assert (block["kernel"] < 0).all() and (block["lora"]["a"] < 0).all()
    assert not block["bias"].any() and not updates["norm"]["scale"].any()


def test_muon_makes_each_layers_update_orthogonal():
    rng = np.random.default_rng(0)
    leaves = {
        "blocks": {"q": {"kernel": jnp.zeros((2, 8, 6)), "bias": jnp.zeros((2, 6))}},
        "out": {"kernel": jnp.zeros((8, 6))},
    }
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), leaves)
    tx = optimizer.make(
        _config(name="muon", learning_rate=1.0, weight_decay=0.0, schedule="constant", warmup=0, clip=1e9), 10
    )
    updates, _ = tx.update(gradients, tx.init(leaves), leaves)
    for layer in range(2):
        update = np.asarray(updates["blocks"]["q"]["kernel"][layer])
        singular = np.linalg.svd(update, compute_uv=False) / (0.2 * np.sqrt(8))
        assert singular.min() > 0.6 and singular.max() < 1.3  # Newton-Schulz reaches about 1
        assert np.sum(update * np.asarray(gradients["blocks"]["q"]["kernel"][layer])) < 0
    np.testing.assert_allclose(np.abs(updates["out"]["kernel"]), 1.0, rtol=1e-3)  # Adam's first step is the sign
    np.testing.assert_allclose(np.abs(updates["blocks"]["q"]["bias"]), 1.0, rtol=1e-3)
