"""Training of the small VAE: it learns, it resumes exactly, it refuses another run's checkpoint."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox.vae import VAE, VAEConfig
from sdv_jax.small_world import autoencoder
from sdv_jax.small_world.autoencoder import AutoencoderConfig, train

CONFIG = AutoencoderConfig(
    vae=VAEConfig(
        down_block_types=("CogVideoXDownBlock3D",),
        up_block_types=("CogVideoXUpBlock3D",),
        block_out_channels=(4,),
        temporal_compression_ratio=1,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ),
    steps=8,
    batch_size=2,
    images=2,
    learning_rate=0.02,
    warmup=1,
    save_every=3,
    log_every=1,
)


def sample(rng: np.random.Generator, n: int) -> np.ndarray:
    """Clips of one colour each, bright or dark."""
    colours = rng.choice([40, 220], size=(n, 1, 1, 1, 3)).astype(np.uint8)
    return np.broadcast_to(colours, (n, 3, 4, 4, 3))


def parts_of(config: AutoencoderConfig):
    return nnx.graphdef(nnx.eval_shape(lambda: VAE(config.vae, rngs=nnx.Rngs(0)))), autoencoder.make_optimizer(config)


def test_training(tmp_path, monkeypatch):
    step = autoencoder.make_step(CONFIG, *parts_of(CONFIG))
    monkeypatch.setattr(autoencoder, "make_step", lambda *_: step)  # compiled once: that is most of this test
    whole = train(CONFIG, sample, workdir=tmp_path / "whole")
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    calls = []

    def interrupted(rng, n):
        calls.append(n)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return sample(rng, n)

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, interrupted, workdir=tmp_path / "parts")
    again = []

    def resumed(rng, n):
        again.append(n)
        return sample(rng, n)

    parts = train(CONFIG, resumed, workdir=tmp_path / "parts")
    assert (calls, again) == ([4] * 6, [4] * 5)  # the checkpoint after step 3 is the last whole one
    for found, expected in zip(jax.tree.leaves(nnx.state(parts)), jax.tree.leaves(nnx.state(whole)), strict=True):
        np.testing.assert_array_equal(found, expected)
    finished = train(CONFIG, lambda rng, n: pytest.fail("a finished run samples nothing"), workdir=tmp_path / "parts")
    video = sample(np.random.default_rng(0), 1) / np.float32(127.5) - 1
    assert finished.encode(jnp.asarray(video))[0].shape == (1, 3, 4, 4, 4)
    with pytest.raises(UserError, match="another config"):
        train(dataclasses.replace(CONFIG, kl=1.0), sample, workdir=tmp_path / "parts")
