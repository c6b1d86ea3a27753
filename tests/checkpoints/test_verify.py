"""Verification finds equal models equal and different ones different; the scripts and their exit status."""

import builtins
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from sdv_jax.checkpoints.convert import convert
from sdv_jax.checkpoints.verify import verify
from sdv_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("rope, dtype", [(True, None), (False, "bfloat16")])
def test_converted_models_compute_the_same(tiny_pipeline_folder, tmp_path, capsys, rope, dtype):
    convert(tiny_pipeline_folder(rope), tmp_path / "model", dtype=dtype, progress=False)
    rows = verify(tiny_pipeline_folder(rope), tmp_path / "model", tolerance=1e-4)
    assert [row.part for row in rows] == ["transformer", "vae encode", "vae decode", "text encoder"]
    assert all(0 < row.relative <= 1e-4 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.fixture
def other(tiny_pipeline_folder, tmp_path):
    """A pipeline that differs in one matrix of the transformer."""
    folder = shutil.copytree(tiny_pipeline_folder(True), tmp_path / "other")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["proj_out.weight"] = tensors["proj_out.weight"] * np.float32(1.05)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_difference_is_an_error_and_the_script_says_so(tiny_pipeline_folder, other, tmp_path):
    convert(other, tmp_path / "model", progress=False)
    with pytest.raises(UserError, match="relative error transformer"):
        verify(tiny_pipeline_folder(True), tmp_path / "model")
    command = [
        sys.executable,
        str(ROOT / "convert" / "verify.py"),
        str(other),
        str(tmp_path / "model"),
        "--tolerance=1e-9",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "error:" in run.stderr.splitlines()[-1] and "vae encode" in run.stdout


def test_failed_verification_leaves_no_model(tiny_pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sdv_jax.checkpoints.verify.verify", lambda src, model: (_ for _ in ()).throw(UserError(f"{model}: differs"))
    )
    with pytest.raises(UserError, match="differs"):
        convert(tiny_pipeline_folder(True), tmp_path / "model", verify=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_torch_is_asked_for_before_work_begins(tiny_pipeline_folder, tmp_path, monkeypatch):
    real = builtins.__import__

    def without_diffusers(name, *args, **kwargs):
        if name == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_diffusers)
    with pytest.raises(UserError, match=r"pip install 'sdv_jax\[test\]'"):
        convert(tiny_pipeline_folder(True), tmp_path / "model", verify=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_scripts(tiny_pipeline_folder, tmp_path):
    def script(name, *arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "convert" / name), *map(str, arguments)], capture_output=True, text=True
        )

    assert script("from_pytorch.py", tiny_pipeline_folder(True), tmp_path / "model", "--dtype=bfloat16").returncode == 0
    assert json.loads((tmp_path / "model" / "model.json").read_text())["dtype"]["vae"] == "bfloat16"
    assert script("to_pytorch.py", tmp_path / "model", tmp_path / "back").returncode == 0
    assert (tmp_path / "back" / "model_index.json").is_file()
    again = script("to_pytorch.py", tmp_path / "model", tmp_path / "back")
    assert again.returncode == 2 and again.stderr.strip().endswith("remove it or choose another destination")
    assert script("to_pytorch.py", tmp_path / "model").returncode == 2
