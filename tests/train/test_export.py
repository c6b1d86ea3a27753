"""What a finished run leaves for other tools: `train.export`, with one process and with two."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from sdv_jax.adapters import lora
from sdv_jax.checkpoints import adapter_files, staging
from sdv_jax.errors import NotWritten, UserError
from sdv_jax.train import config as configs
from sdv_jax.train import loop, record, setup
from tests.train import tiny, tiny_wan, torture

FILES = {
    "diffusers": "pytorch_lora_weights.safetensors", "comfyui": "pytorch_lora_weights.safetensors",
    "peft": "adapter_model.safetensors",
}  # fmt: skip
SETTINGS = torture.TINY | {
    "train.steps": 3, "train.save_every": 3, "train.heartbeat": 60.0,
    "switch.motion_probability": 1.0, "lora.dropout": 0.0,  # one program to compile
}  # fmt: skip


def notes(file) -> dict:
    with safe_open(file, "numpy") as found:
        return found.metadata()


@pytest.mark.parametrize("source", ["tiny", "tiny_wan"])
def test_two_processes_leave_the_files_of_one(tmp_path, source):
    torture.unbroken(tmp_path / "two", SETTINGS | {"train.export": list(FILES)}, 2, 1, source)
    family = {"tiny": tiny, "tiny_wan": tiny_wan}[source]
    config = family.config(**SETTINGS | {"mesh.fsdp": 1})
    assert loop.run(config, tmp_path / "one", data=family.rows(config), shown=False).finished
    assert not (tmp_path / "one" / "adapter" / "exports").exists()
    exports = tmp_path / "two" / "adapter" / "exports"
    assert sorted(path.name for path in exports.iterdir()) == sorted(FILES)
    for style, name in FILES.items():
        for run in ("one", "two"):
            adapter_files.export(tmp_path / run / "adapter", tmp_path / run / style / name, format=style)
        left, own, one = exports / style, tmp_path / "two" / style, tmp_path / "one" / style
        assert {file.name for file in left.iterdir()} == {file.name for file in one.iterdir()}
        assert all((left / file.name).read_bytes() == file.read_bytes() for file in own.iterdir())
        ours, theirs = load_file(left / name), load_file(one / name)
        assert ours.keys() == theirs.keys() and notes(left / name) == notes(one / name)
        assert max(np.abs(value).max() for value in ours.values()) > 0.01
        for key, value in ours.items():
            np.testing.assert_allclose(value, theirs[key], rtol=0, atol=1e-5, err_msg=f"{style} {key}")


@pytest.fixture(scope="module", params=["cogvideox", "wan"])
def trained(request):
    """A function that leaves the adapter of a run with this `train.export` in a folder; and the transformer."""
    family = {"cogvideox": tiny, "wan": tiny_wan}[request.param]
    base = setup.about(family.config())
    model = setup.model(family.config(), base, token_ids=False)

    def save(folder, *styles) -> None:
        record.save_adapter(folder, model, family.config(**{"train.export": styles}), base)

    return save, model.transformer


def test_the_folder_with_exports_is_still_the_adapter(trained, tmp_path):
    save, transformer = trained
    save(tmp_path, *FILES)
    info = adapter_files.load(transformer, tmp_path)
    assert (info.rank, info.targets != ()) == (2, True)
    for style in FILES:
        assert adapter_files.load(transformer, tmp_path / "exports" / style).reference == info.reference


def test_files_of_an_earlier_end_are_replaced_or_gone(trained, tmp_path):
    save, transformer = trained
    save(tmp_path, "peft", "diffusers")
    file = tmp_path / "exports" / "peft" / FILES["peft"]
    before = file.read_bytes()
    for _, layer in lora.adapted(transformer):
        layer.lora.b[...] += 1.0
    save(tmp_path, "peft", "peft")
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["peft"]
    assert {path.name for path in file.parent.iterdir()} == {FILES["peft"], "adapter_config.json"}
    assert file.read_bytes() != before
    save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", FILES["diffusers"]]


def test_an_adapter_that_the_disk_does_not_take_is_no_wrong_input(trained, tmp_path, monkeypatch):
    save, _ = trained
    with pytest.raises(NotWritten, match="/proc/run: cannot write the adapter"):
        save(Path("/proc/run"))
    monkeypatch.setattr(staging, "_SLACK", 1 << 60)
    with pytest.raises(NotWritten, match="not enough disk"):
        save(tmp_path, "peft")


def test_what_may_be_asked_for():
    assert configs.EXPORTS == adapter_files.FORMATS
    with pytest.raises(UserError, match="'train.export': expected some of diffusers, comfyui, peft, found 'kohya'"):
        tiny.config(**{"train.export": ("peft", "kohya")})
    with pytest.raises(UserError, match="'train.export': needs train.mode='lora', found 'full'"):
        tiny.config(**{"train.export": ("peft",), "train.mode": "full"})
    assert "train.export" in record.FREE
