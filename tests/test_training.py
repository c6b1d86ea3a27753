"""Sample sheets: the size of the data, the guidance of the config."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from sdv_jax import training
from sdv_jax.checkpoints import model_folder
from sdv_jax.data.loading import Mixture
from sdv_jax.objectives.denoising import Denoiser
from sdv_jax.train import config as configs
from tests.tiny_wan import TEXT_LENGTH, save_pipeline
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
    sheets = training.Sheets(config, {"motion": Mixture.of(data, "motion")})
    sheets(Denoiser(model_folder.load_component(BASE, "transformer"), None), 7, tmp_path / "samples")
    assert seen[0]["guidance"] == 1.5
    assert [seen[0][name] for name in ("num_frames", "height", "width")] == [4 * (frames - 1) + 1, 48, 40]
    width, height = Image.open(tmp_path / "samples" / "step_000007.png").size
    assert height >= 2 * 48 and width >= (2 + 4 * (frames - 1)) * 40


def test_a_sheet_of_two_experts_is_drawn_by_the_trained_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "STEPS", 2)
    base = save_pipeline(tmp_path / "base", "a14b")
    config = configs.load("configs/base.py", {"model.path": str(base), "sample.guidance": 1.0})
    text = np.zeros((10, TEXT_LENGTH, 16), np.float32)
    data = dataclasses.replace(tiny.data()["motion"], text=text, empty_text=text[0])
    sheets = training.Sheets(config, {"motion": Mixture.of(data, "motion")})
    sheets(Denoiser(model_folder.load_component(base, "transformer"), text_masked=True), 1, tmp_path / "samples")
    assert Image.open(tmp_path / "samples" / "step_000001.png").size[0] >= 6 * 32
