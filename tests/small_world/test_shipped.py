"""What the repository ships for the demo: small enough, of the configs that are here, and run by diffusers as it is."""

import json

import diffusers
import numpy as np
import pytest
import torch

from sdv_jax.pipeline import load_pipeline
from sdv_jax.small_world.demo import SHIPPED
from sdv_jax.small_world.tokenizer import MAX_LENGTH
from sdv_jax.train import config as configs
from tests.parity.compare import assert_close

CALL = {
    "cogvideox": (diffusers.CogVideoXPipeline, "tchw"),
    "wan": (diffusers.WanPipeline, "cthw"),
}  # fmt: skip
PROMPT, STEPS = "a subject drifting left over sand", 5


@pytest.mark.parametrize("family", sorted(SHIPPED))
def test_diffusers_runs_the_base_as_it_is(family):
    kind, layout = CALL[family]
    theirs, ours = kind.from_pretrained(SHIPPED[family].base), load_pipeline(SHIPPED[family].base)
    theirs.set_progress_bar_config(disable=True)
    shape = ours.geometry.latent_shape(9, 32, 32)
    latents = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    order = [0, *(1 + "thwc".index(axis) for axis in layout)]
    expected = theirs(
        PROMPT, height=32, width=32, num_frames=9, num_inference_steps=STEPS, guidance_scale=1.5, output_type="np",
        max_sequence_length=MAX_LENGTH, latents=torch.from_numpy(latents.transpose(order).copy()),
    ).frames  # fmt: skip
    found = ours(PROMPT, steps=STEPS, guidance=1.5, latents=latents, progress=False)  # its own size, by defaults
    assert found.shape == (1, 9, 32, 32, 3)
    assert_close(found, expected, relative=1e-3)


@pytest.mark.parametrize("family", sorted(SHIPPED))
def test_the_started_run_is_one_of_the_config(family):
    """Else the demo would stop at a changed config."""
    shipped = SHIPPED[family]
    ours = json.loads(configs.load(shipped.config).json())
    stored = json.loads((shipped.started / "config.json").read_text())
    assert stored["model"].pop("path") == f"models/{shipped.base.name}"
    differing = [
        f"{table}.{key}" for table, values in stored.items() for key, value in values.items()
        if ours[table][key] != value
    ]  # fmt: skip
    assert not differing
    steps = [int(folder.name) for folder in (shipped.started / "checkpoints").iterdir()]
    assert len(steps) == 1 and 0 < ours["train"]["steps"] - steps[0] <= ours["train"]["steps"] // 10


@pytest.mark.parametrize("family", sorted(SHIPPED))
def test_the_base_is_small(family):
    assert sum(file.stat().st_size for file in SHIPPED[family].base.rglob("*") if file.is_file()) <= 24e6
