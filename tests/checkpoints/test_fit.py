"""Parts of different models, and settings of a pipeline that make no sense, are refused before weights are read."""

import json
import shutil

import pytest

from sdv_jax.checkpoints import model_folder
from sdv_jax.checkpoints.convert import convert
from sdv_jax.errors import UserError
from sdv_jax.pipeline import load_pipeline
from tests import tiny_wan

CASES = {
    "another vae": (
        "t2v", "vae/config.json", {"z_dim": 6, "latents_mean": [0.0] * 6, "latents_std": [1.0] * 6},
        "transformer.in_channels is 4, expected 6 of vae.z_dim; transformer.out_channels is 4",
    ),
    "image to video by channels": (
        "a14b", "transformer/config.json", {"in_channels": 12}, "transformer.in_channels is 12, expected 4 of vae.z_dim"
    ),
    "another second expert": (
        "a14b", "transformer_2/config.json", {"text_dim": 24},
        "transformer_2.text_dim is 24, expected 16 of text_encoder.d_model",
    ),
    "another text encoder": (
        "t2v", "text_encoder/config.json", {"d_model": 24}, "transformer.text_dim is 16, expected 24"
    ),
    "boundary as a text": ("a14b", "model_index.json", {"boundary_ratio": "0.9"}, "boundary_ratio = '0.9'; expected"),
    "boundary too high": ("a14b", "model_index.json", {"boundary_ratio": 7}, "boundary_ratio = 7; expected null or a"),
    "boundary of one": (
        "t2v", "model_index.json", {"boundary_ratio": 0.9}, "boundary_ratio = 0.9; expected null, as there is no tra"
    ),
    "times as a text": (
        "ti2v", "model_index.json", {"expand_timesteps": "yes"}, "expand_timesteps = 'yes'; expected true or false"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_by_conversion_and_by_loading(tmp_path, case):
    kind, name, change, message = CASES[case]
    folder = tiny_wan.save_pipeline(tmp_path / "pipeline", kind)
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for action in (lambda: load_pipeline(folder, progress=False), lambda: convert(folder, tmp_path / "model")):
        with pytest.raises(UserError) as caught:
            action()
        line = str(caught.value)
        assert line.startswith(str(folder)) and message in line and "\n" not in line, line
    assert not (tmp_path / "model").exists()


def test_refused_in_a_converted_folder(tmp_path):
    convert(tiny_wan.save_pipeline(tmp_path / "pipeline", "a14b"), tmp_path / "model", progress=False)
    file = tmp_path / "model" / "model.json"
    raw = json.loads(file.read_text())
    raw["model_index"]["boundary_ratio"] = 1.5
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="model: model_index.json: boundary_ratio = 1.5; expected null or a number"):
        model_folder.about(tmp_path / "model")


def test_refused_in_cogvideox(tiny_pipeline_folder, tmp_path):
    folder = shutil.copytree(tiny_pipeline_folder(True), tmp_path / "pipeline")
    file = folder / "transformer" / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"in_channels": 3 * raw["out_channels"]}))
    with pytest.raises(UserError, match="parts of different models: transformer.in_channels is .* or twice that"):
        load_pipeline(folder, progress=False)
