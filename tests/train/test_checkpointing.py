import json
import shutil

import numpy as np
import pytest

from sdv_jax.errors import UserError
from sdv_jax.train import loop
from tests.train import tiny

SETTINGS = {"train.save_every": 2, "train.keep": 3}


def _run(workdir, data=None, **settings):
    return loop.run(tiny.config(**SETTINGS | settings), workdir, data=data or tiny.data(), shown=False)


def _losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    _run(workdir)
    return workdir


@pytest.fixture()
def workdir(finished, tmp_path):
    """A copy of the run, whose newest checkpoint is that of step 6."""
    return shutil.copytree(finished, tmp_path / "run")


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: [_cut(path) for path in state.rglob("*") if path.is_file() and path.parent.name == "d"],
        lambda state: (state / "manifest.ocdbt").unlink(),
        lambda state: (state / "_METADATA").write_text("{"),
        lambda state: [path.unlink() for path in state.rglob("*") if path.is_file()],
        lambda state: (state.parent / "run" / "metadata").write_text("{"),
        lambda state: (state.parent / "run" / "metadata").write_text("{}"),
        lambda state: shutil.rmtree(state),
    ],
)
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(finished, workdir, damage, capsys):
    damage(workdir / "checkpoints" / "6" / "state")
    result = _run(workdir)
    told = capsys.readouterr().err
    assert result.finished and "checkpoints/6 cannot be read (" in told and "going on from the one before" in told
    assert (workdir / "checkpoints" / "damaged-6").is_dir() and (workdir / "checkpoints" / "6").is_dir()
    assert _losses(workdir) == _losses(finished)
    assert _run(workdir).steps == 6 and "cannot be read" not in capsys.readouterr().err  # and the new one is whole


def test_when_all_are_damaged_the_run_is_refused_and_nothing_is_lost(workdir):
    for step in (2, 4, 6):
        (workdir / "checkpoints" / str(step) / "state" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read \(.*\), and there is no older one") as error:
        _run(workdir)
    assert "\n" not in str(error.value) and len(list((workdir / "checkpoints").iterdir())) == 3


def test_a_half_written_checkpoint_is_ignored(finished, workdir):
    shutil.copytree(workdir / "checkpoints" / "6", workdir / "checkpoints" / "8.orbax-checkpoint-tmp-1")
    assert _run(workdir).finished and _losses(workdir) == _losses(finished)


def test_the_newest_and_every_nth_are_kept(tmp_path):
    _run(tmp_path, **{"train.keep": 1, "train.keep_every": 4})
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 6]


def test_what_a_checkpoint_says_of_its_run(finished):
    run = json.loads((finished / "checkpoints" / "4" / "run" / "metadata").read_text())
    assert sum(run["data"]["position"].values()) == 4 and run["key"] == [0, 0]
    assert run["config"] == json.loads((finished / "config.json").read_text())
    assert set(run["data"]["sets"]) == {"identity", "motion"}


def test_data_that_changed_under_the_run_are_refused(workdir):
    data = tiny.data() | {"motion": tiny.dataset(10, frames=2, views=5, seed=7)}
    with pytest.raises(UserError, match="data.motion has changed since"):
        _run(workdir, data=data, **{"train.steps": 8})


def test_changed_settings_are_named_and_only_harmless_ones_are_taken(workdir, capsys):
    _run(workdir, **{"train.steps": 8, "train.log_every": 3})
    told = capsys.readouterr().err
    assert "goes on with changed settings: train.steps 6 -> 8, train.log_every 10 -> 3" in told
    with pytest.raises(UserError, match="lora.dropout 0.0 -> 0.1, optimizer.learning_rate 0.01 -> 0.5"):
        _run(workdir, **{"train.steps": 8, "optimizer.learning_rate": 0.5, "lora.dropout": 0.1})


@pytest.mark.parametrize("policy", ["attention", "offload"])
def test_what_is_recomputed_does_not_change_the_numbers(finished, tmp_path, policy):
    _run(tmp_path, **{"train.remat": policy})
    np.testing.assert_allclose(_losses(tmp_path), _losses(finished), rtol=1e-6)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    """Without noise that differs from part to part there is nothing to see: the norm is that of an average."""
    _run(tmp_path / "whole", **{"train.steps": 2})
    _run(tmp_path / "parts", **{"train.steps": 2, "train.accumulate": 2})
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [line["tokens_per_second"] > 0 for line in parts] == [True, True]
    assert abs(whole[0]["loss"] - parts[0]["loss"]) < 0.5 and whole[0]["loss"] != parts[0]["loss"]
