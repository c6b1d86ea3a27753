"""Sample sheets: the size of the data, the guidance of the config."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from sdv_jax import training
from sdv_jax.checkpoints import model_folder
from sdv_jax.objectives.denoising import Denoiser
from sdv_jax.train import config as configs
from tests.train import tiny

BASE = "models/small-world-cogvideox"


@pytest.mark.parametrize("frames", [1, 3])
def test_a_sheet_has_the_size_of_the_data_and_the_guidance_of_the_config(tmp_path, monkeypatch, frames):
    monkeypatch.setattr(training, "STEPS", 2)
    seen, call = [], training.Pipeline.__call__

    def recorded(pipe, *arguments, **options):
        seen.append(options)
        return call(pipe, *arguments, **options)

    monkeypatch.setattr(training.Pipeline, "__call__", recorded)
    config = configs.load("configs/small_world_cogvideox.py", {"model.path": BASE})
    rng = np.random.default_rng(0)
    moments = {
        name: rng.normal(size=(2, 1 if "reference" in name else frames, 12, 10, 8)).astype(np.float32) - 2
        for name in ("mean", "logvar", "reference_mean", "reference_logvar")
    }
    data = dataclasses.replace(tiny.dataset(2, frames=1, views=1), **moments)
    sheets = training.Sheets(config, {"motion": data})
    sheets(Denoiser(model_folder.load_component(BASE, "transformer"), None), 7, tmp_path / "samples")
    assert seen[0]["guidance"] == 1.5
    assert [seen[0][name] for name in ("num_frames", "height", "width")] == [4 * (frames - 1) + 1, 48, 40]
    width, height = Image.open(tmp_path / "samples" / "step_000007.png").size
    assert height >= 2 * 48 and width >= (2 + 4 * (frames - 1)) * 40
