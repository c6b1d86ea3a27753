"""Files of torch.save, read without torch: every tensor as torch has it, and nothing else."""

import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sdv_jax.checkpoints.torch_files import open_file  # noqa: E402
from sdv_jax.errors import UserError  # noqa: E402


def bits(tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state() -> dict:
    torch.manual_seed(0)
    base = torch.randn(10, 6)
    return {
        "float32": torch.randn(3, 4),
        "bfloat16": torch.randn(5, 2).bfloat16(),
        "float16": torch.randn(7).half(),
        "float64": torch.randn(2, 3, 4).double(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "rows of another": base[4:7],
        "the other": base,
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "axes of length 1": torch.randn(4, 1, 3).transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_every_tensor_is_found(tmp_path, kind):
    file = tmp_path / "model.pth"
    torch.save(kind(state()), file)
    found = open_file(file)
    assert list(found) == list(state())
    for name, tensor in torch.load(file, weights_only=True).items():
        mine = found[name].read()
        assert mine.shape == tuple(tensor.shape) and mine.tobytes() == bits(tensor), name
    assert found["bfloat16"].dtype == ml_dtypes.bfloat16 and found["float64"].dtype == np.float64


def test_a_module_s_state_dict(tmp_path):
    """It carries metadata beside the tensors."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).bfloat16()
    torch.save(module.state_dict(), tmp_path / "model.pth")
    found = open_file(tmp_path / "model.pth")
    assert {name: found[name].read().tobytes() for name in found} == {
        name: bits(tensor) for name, tensor in module.state_dict().items()
    }


def test_torch_is_not_needed_and_the_tensors_are_not_read(tmp_path):
    """An archive of 400 MB, of which only the pickle is looked at until a tensor is asked for."""
    file = tmp_path / "model.pth"
    torch.save({"large": torch.zeros(100_000_000), "small": torch.arange(4.0)}, file)
    code = """
import sys
from pathlib import Path
from sdv_jax.checkpoints.torch_files import open_file
def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
found = open_file(Path(sys.argv[1]))
print(found["small"].read().tolist(), found["large"].shape, peak() - before < 20e6, "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code, str(file)], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[0.0, 1.0, 2.0, 3.0] (100000000,) True False"


class Evil:
    def __reduce__(self):
        return os.system, ("touch stolen",)


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda: {"weight": torch.zeros(2), "run": Evil()}, "holds posix.system, expected a dict of tensors only"),
        (lambda: Evil(), "holds posix.system"),
        (lambda: torch.nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear"),
        (lambda: torch.zeros(2), "holds _View, expected a dict"),
        (lambda: {}, "holds dict, expected a dict of tensors"),
        (lambda: {"state_dict": {"weight": torch.zeros(2)}}, "'state_dict' is no tensor"),
        (lambda: {"weight": torch.zeros(2), "epoch": 3}, "'epoch' is no tensor"),
        (lambda: {"count": torch.zeros(2, dtype=torch.int64)}, "numbers of kind LongStorage; supported are F64, F32"),
        (lambda: {"weight": torch.zeros(3, 4).T}, r"tensor weight is stored with strides \(1, 4\)"),
        (lambda: {"weight": torch.zeros(1).expand(5)}, r"tensor weight is stored with strides \(0,\)"),
        (lambda: {"weight": torch.zeros(2).to_sparse()}, "holds torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_refused_contents(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content(), "model.pth")
    with pytest.raises(UserError, match=message) as caught:
        open_file(tmp_path / "model.pth")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]


def test_refused_files(tmp_path):
    file = tmp_path / "model.pth"
    with pytest.raises(UserError, match="no such file"):
        open_file(file)
    torch.save(state(), file)
    whole = file.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.pth: not a zip archive .*truncated"):
            open_file(file)
    torch.save(state(), file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="before 1.6"):
        open_file(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no tensors")
    with pytest.raises(UserError, match="no data.pkl"):
        open_file(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps([1, 2])[:-3])
    with pytest.raises(UserError, match="its pickle cannot be read"):
        open_file(file)


def test_numbers_that_are_not_there(tmp_path):
    file = tmp_path / "model.pth"
    torch.save({"weight": torch.randn(64)}, file)
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    for change in (lambda content: content[:-1], lambda content: None):
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in records.items():
                kept = change(content) if "/data/" in name else content
                if kept is not None:
                    archive.writestr(name, kept)
        with pytest.raises(UserError, match="tensor weight has no numbers in the file, or too few"):
            open_file(file)
