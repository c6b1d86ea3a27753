"""The `sdv` command: what it calls, what it leaves, how it ends."""

import filecmp
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sdv_jax import cli
from sdv_jax.data.video import read_video
from sdv_jax.errors import NotWritten
from tests.bad_inputs import ROOT
from tests.tiny_pipeline import save_pipeline

ADAPTER_KEY = "transformer.transformer_blocks.0.attn1.to_q.lora_{}.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("diffusers") / "tiny")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom sdv_jax import cli\n"
        "try:\n    cli.main([{}'--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {{'jax', 'numpy', 'torch', 'transformers', 'av', 'PIL'}} & set(sys.modules)\nassert not heavy, heavy"
    )
    names = ("convert", "export", "sample", "prepare", "train", "analyse", "demo")
    for command in ["", *(f"{name!r}, " for name in names)]:
        done = subprocess.run([sys.executable, "-c", code.format(command)], check=True, capture_output=True, text=True)
        assert done.stdout.startswith("usage: sdv")


def test_sample_leaves_a_video_and_a_contact_sheet(model, here, capsys):
    for name, size in (("a.png", (40, 30)), ("b.jpg", (9, 50))):
        Image.effect_noise(size, 90).convert("RGB").save(name)
    arguments = f"sample --model {model} --prompt ball --steps 1 --seed 3 --fps 12 --out v.MP4"
    assert cli.main([*arguments.split(), "--reference", "a.png", "b.jpg"]) == 0
    out, err = capsys.readouterr()
    assert out == "v.MP4  9 frames of 24x16, contact sheet v.png\n"
    for stage in ("loading model", "encoding picture", "encoding prompt", "denoising", "decoding"):
        assert stage in err
    frames, fps = read_video("v.MP4")
    assert frames.shape == (9, 16, 24, 3) and fps == 12
    sheet = np.asarray(Image.open("v.png"))
    assert sheet.shape == (16 + 4, 2 + 11 * 26, 3)  # two references, then nine frames
    assert sorted(path.name for path in here.iterdir()) == ["a.png", "b.jpg", "v.MP4", "v.png"]


def test_convert_sample_export_come_back_to_the_start(model, here, capsys):
    assert cli.main(["convert", str(model), "ours"]) == 0
    asked = "--prompt ball --steps 1 --num-frames 1 --quiet"
    for name, folder in (("theirs", model), ("ours", "ours")):
        assert cli.main(f"sample --model {folder} {asked} --out {name}.mp4".split()) == 0
    assert filecmp.cmp("theirs.png", "ours.png", shallow=False)
    assert cli.main(["export", "ours", "back"]) == 0
    weights = "transformer/diffusion_pytorch_model.safetensors"
    from safetensors.numpy import load_file

    before, after = load_file(model / weights), load_file(here / "back" / weights)
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)


def test_an_adapter_is_used_and_exported(model, here, capsys):
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    halves = {"A": rng.normal(size=(2, 32)), "B": rng.normal(size=(32, 2))}
    save_file({ADAPTER_KEY.format(half): value.astype(np.float32) for half, value in halves.items()}, "a.safetensors")
    asked = f"sample --model {model} --prompt ball --steps 1 --num-frames 1 --quiet"
    for name, more in (
        ("plain", ""),
        ("weak", "--adapter a.safetensors --adapter-alpha 0.5"),
        ("full", "--adapter a.safetensors"),
    ):
        assert cli.main(f"{asked} --out {name}.mp4 {more}".split()) == 0
    assert len({(here / f"{name}.png").read_bytes() for name in ("plain", "weak", "full")}) == 3
    assert cli.main(["export", "--adapter", "a.safetensors", "b.safetensors", "--format", "peft"]) == 0
    assert len(load_file("b.safetensors")) == 2


def test_train_forwards_overrides_in_any_place(here, monkeypatch, capsys):
    from sdv_jax import training

    seen = []

    def train(config, workdir):
        seen.append((config.train.steps, config.train.seed, workdir))
        return training.loop.Result(7, True, None)

    monkeypatch.setattr(training, "train", train)
    base = str(ROOT / "configs" / "base.py")
    assert (
        cli.main(["train", "--config.train.steps=7", "--config", base, "--workdir", "run", "--config.train.seed=5"])
        == 0
    )
    assert seen == [(7, 5, "run")]
    assert capsys.readouterr().out == "run/adapter  7 steps done\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_says_so_and_how_to_go_on(here, monkeypatch, capsys, number):
    from sdv_jax import training

    monkeypatch.setattr(training, "train", lambda config, workdir: training.loop.Result(3, False, None, number))
    arguments = ["train", "--config", str(ROOT / "configs" / "base.py"), "--workdir", "run", "--config.train.steps=7"]
    assert cli.main(arguments) == 75
    assert capsys.readouterr().err == "sdv: stopped at step 3 of 7; the same command resumes\n"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (OSError(28, "No space left on device", "run/metrics.jsonl"), "run/metrics.jsonl: No space left on device"),
        (NotWritten("a checkpoint cannot be written"), "a checkpoint cannot be written"),
    ],
)
def test_a_disk_that_fails_a_training_is_one_line_and_no_wrong_input(
    here, monkeypatch, capsys, raised, line, processes
):
    from sdv_jax import training

    def leave(status):
        raise SystemExit(status)

    def train(config, workdir):
        raise raised

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training.jax, "process_count", lambda: processes)
    monkeypatch.setattr(training.os, "_exit", leave)
    command = ["train", "--config", str(ROOT / "configs" / "base.py"), "--workdir", "run"]
    try:
        status = cli.main(command)
    except SystemExit as end:
        status = end.code
    assert status == 74 and capsys.readouterr().err == f"sdv: error: {line}\n"


@pytest.mark.parametrize(
    ("name", "option"), [("train", "--workdir"), ("sample", "--reference"), ("prepare", "--process")]
)
def test_launchers_run_from_a_checkout_that_is_not_installed(here, name, option):
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), "--help"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "ModuleNotFoundError" not in done.stderr
    assert option in done.stdout


def test_demo_runs_in_its_workdir(here, monkeypatch):
    from sdv_jax.small_world import demo

    seen = []
    monkeypatch.setattr(demo, "run", lambda workdir, family: seen.append((str(workdir), family)))
    assert cli.main(["demo", "--workdir", "somewhere"]) == 0 and cli.main(["demo"]) == 0
    assert cli.main(["demo", "--family", "wan"]) == 0 and cli.main(["demo", "--family", "other"]) == 2
    assert seen == [("somewhere", "cogvideox"), ("runs/demo", "cogvideox"), ("runs/demo-wan", "wan")]


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "sdv: interrupted"),
        (MemoryError(), 2, "sdv: error: out of memory; try a smaller video"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), 2, "sdv: error: out of memory; try a smaller video"),
        (OSError(28, "No space left on device", "x/y"), 2, "sdv: error: x/y: No space left on device"),
    ],
)
def test_every_end_is_one_line(here, monkeypatch, capsys, raised, status, line):
    from sdv_jax.small_world import demo

    def fail(*_):
        raise raised

    monkeypatch.setattr(demo, "run", fail)
    assert cli.main(["demo"]) == status
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1


def test_a_mistake_in_the_program_is_not_hidden(here, monkeypatch):
    from sdv_jax.small_world import demo

    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(demo, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo"])


def test_the_script_is_the_command():
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "sample.py"], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and done.stderr.startswith("sdv: error: the following arguments are required: --model")
