import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from sdv_jax.data.loading import Mixture
from sdv_jax.errors import NotWritten, UserError
from sdv_jax.train import checkpointing, loop, plan, setup, state, step
from sdv_jax.train.devices import Devices
from tests.train import tiny

SETTINGS = {"train.save_every": 2, "train.keep": 3}


def _run(workdir, data=None, **settings):
    return loop.run(tiny.config(**SETTINGS | settings), workdir, data=data or tiny.data(), shown=False)


def _model(scale=1.0):
    """The model of every run here, its first projection scaled."""
    config = tiny.config()
    model = setup.model(config, setup.about(config), token_ids=False)
    kernel = model.transformer.patch_embed.proj.kernel
    kernel.set_value(kernel[...] * scale)
    return model


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
    for steps in (2, 4, 6):
        (workdir / "checkpoints" / str(steps) / "state" / "_METADATA").unlink()
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


def test_other_shares_are_other_data():
    """Which batch comes when follows from the shares, of those that were read too; folders may move."""
    config = tiny.config()
    base = setup.about(config)
    objective, found = setup.objective(config, base, tiny.SCALE), []
    for shares in ({"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 3.0}, {"c": 6.0, "d": 2.0}, {"a": 1.0}):
        sets = {name: tiny.dataset(10, frames=2, views=5, seed=seed) for seed, name in enumerate(shares)}
        parts = {"identity": Mixture.of(tiny.data()["identity"], "pairs").parts()}
        parts["motion"] = Mixture(sets, shares).parts()
        found.append(plan.make(config, parts, objective, jax.random.key(0), Devices(None)).data_state(0)["sets"])
    three, one, moved, alone = found
    assert three["motion"] != one["motion"] and three == moved
    assert all(len(state["identity"]) == 1 for state in found) and len(alone["motion"]) == 1
    checkpointing._check_data("checkpoints/2", {"sets": three}, {"sets": moved})
    with pytest.raises(UserError, match="data.motion has changed since, in its content or its shares; restore it"):
        checkpointing._check_data("checkpoints/2", {"sets": three}, {"sets": one})


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


def test_a_changed_number_is_found(finished, workdir, capsys):
    """Bits that turned on the disk are no error to who reads them."""
    with ocp.StandardCheckpointer() as writer:
        folder = (workdir / "checkpoints" / "6" / "state").resolve()
        state = writer.restore(folder)
        leaf = state["trained"]["transformer"]["blocks"]["attn1"]["to_q"]["lora"]
        leaf["a"] = leaf["a"].at[0, 0, 0].add(1e-3)
        shutil.rmtree(folder)
        writer.save(folder, state)
    _run(workdir)
    assert "checkpoints/6 cannot be read (its numbers are not those that were written)" in capsys.readouterr().err
    assert _losses(workdir) == _losses(finished)


def test_damage_at_the_same_step_again_is_put_aside_again(workdir, capsys):
    for name in ("damaged-6", "damaged-6-2"):
        (workdir / "checkpoints" / "6" / "state" / "_METADATA").unlink()
        assert _run(workdir).finished and (workdir / "checkpoints" / name).is_dir()


def test_other_base_weights_are_refused(workdir):
    model = _model(1.3)
    with pytest.raises(UserError, match="checkpoints/6 was trained on other base weights: those in model.path"):
        loop.run(tiny.config(**SETTINGS | {"train.steps": 8}), workdir, data=tiny.data(), model=model, shown=False)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_a_refused_resume_changes_nothing(workdir, capsys):
    before = (workdir / "config.json").read_bytes()
    data = tiny.data() | {"motion": tiny.dataset(10, frames=2, views=5, seed=7)}
    with pytest.raises(UserError, match="data.motion has changed since"):
        _run(workdir, data=data, **{"train.steps": 8})
    assert (workdir / "config.json").read_bytes() == before and "goes on" not in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_those_before_stay(workdir, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device\n[more]")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(NotWritten, match="cannot be written .RESOURCE_EXHAUSTED: .*; make room") as error:
        _run(workdir, **{"train.steps": 8})
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert _run(workdir, **{"train.steps": 8}).finished


def test_loading_leaves_a_run_at_work_alone(workdir, capsys):
    """Also with a damaged newest checkpoint, one that is being written, and one that the run replaces meanwhile."""
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "6", folder / "8.orbax-checkpoint-tmp")
    (folder / "6" / "state" / "_METADATA").unlink()
    before = sorted(folder.rglob("*"))
    loop.load_trained(workdir, data=tiny.data())
    assert "checkpoints/6 cannot be read (" in capsys.readouterr().err and sorted(folder.rglob("*")) == before
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no checkpoint there; train first"):
        loop.load_trained(workdir, data=tiny.data())
    assert not folder.exists()


def test_a_checkpoint_that_a_run_at_work_has_replaced_is_not_damaged(workdir, monkeypatch, capsys):
    restore, folder = ocp.CheckpointManager.restore, workdir / "checkpoints"

    def late(manager, step, **options):
        for old in (2, 4, 6):
            if (folder / str(old)).exists() and step == 6:
                (folder / str(old)).rename(folder / str(old + 10))
        return restore(manager, step, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", late)
    loop.load_trained(workdir, data=tiny.data())
    assert "cannot be read" not in capsys.readouterr().err


def test_what_a_killed_writer_left_goes(workdir):
    left = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "6", left)
    assert _run(workdir).finished and not left.exists()


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(parts):
    """Of a loss without randomness; with it each part draws its own, as other examples would."""
    model = _model()
    graph, trained, frozen = state.split(model, mode="lora", train_encoder=False)
    rows = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)

    def loss(model, batch, empty_text, key):
        weights = nnx.state(model, nnx.LoRAParam)
        total = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(weights))
        return jnp.mean(jnp.square(batch["x"]["y"].sum(axis=-1) - total))

    tx = optax.sgd(0.1)
    one = step.make(graph, loss, tx, lambda _: 0.1, ema_decay=0.0)
    found = []
    for count in (1, parts):
        start = state.create(trained, tx, ema=False)
        batch = {"x": {"y": jnp.asarray(rows.reshape(count, -1, 3))}}
        found.append(one(start, frozen, jax.random.key(0), batch, jnp.zeros(()), jnp.zeros(1, jnp.int32)))
    (whole, told), (cut, also) = found
    np.testing.assert_allclose(also["loss"], told["loss"], rtol=1e-6)
    np.testing.assert_allclose(also["grad_norm"], told["grad_norm"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole.trained, cut.trained)
