import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.checkpoints import adapter_files
from sdv_jax.data import locks
from sdv_jax.data.loading import Mixture
from sdv_jax.errors import UserError
from sdv_jax.objectives import denoising
from sdv_jax.train import loop, plan, setup, state
from sdv_jax.train.devices import Devices
from tests.train import tiny


def _lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _without_time(lines):
    kept = ("step", "task", "reference", "loss", "grad_norm", "learning_rate")
    return [{key: line[key] for key in kept if key in line} for line in lines]


def _weights(model) -> dict:
    return {
        "/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def _assert_equal_weights(ours, theirs):
    ours, theirs = _weights(ours), _weights(theirs)
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def _fresh(config, *, token_ids):
    return setup.model(config, setup.about(config), token_ids=token_ids)


def _run(config, workdir, **options):
    return loop.run(config, workdir, data=options.pop("data", None) or tiny.data(), shown=False, **options)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    return workdir, _run(tiny.config(), workdir)


def test_a_run_leaves_what_it_promises(unbroken):
    workdir, result = unbroken
    lines = _lines(workdir)
    assert result.finished and result.steps == 6
    assert [line["step"] for line in lines] == list(range(6))
    assert all({"step", "task", "loss", "grad_norm", "learning_rate", "seconds"} <= line.keys() for line in lines)
    assert {line["task"] for line in lines} == {"identity", "motion"}
    assert {line["reference"] for line in lines if line["task"] == "identity"} == {True, False}
    assert json.loads((workdir / "config.json").read_text())["lora"]["rank"] == 2
    assert list((workdir / "tensorboard").iterdir()) and (workdir / "checkpoints" / "6").is_dir()


def test_only_the_adapter_is_trained(unbroken):
    _, result = unbroken
    fresh = _fresh(tiny.config(), token_ids=False)
    before, after = _weights(fresh), _weights(result.model)
    moved = {path for path in after if not np.array_equal(before[path], after[path])}
    assert moved and all("/lora/" in path for path in moved)
    assert any(path.endswith("/b") for path in moved) and any(path.endswith("/a") for path in moved)


def test_the_adapter_on_disk_is_the_one_trained(unbroken):
    workdir, result = unbroken
    fresh = _fresh(tiny.config(), token_ids=False).transformer
    lora.remove(fresh)
    adapter_files.load(fresh, workdir / "adapter")
    ours, theirs = _weights(fresh), _weights(result.model.transformer)
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-6, atol=1e-7, err_msg=path)


def test_a_resumed_run_equals_an_unbroken_one(unbroken, tmp_path):
    workdir, result = unbroken
    first = _run(tiny.config(), tmp_path, stop_after=3)
    assert not first.finished and first.steps == 3 and not (tmp_path / "adapter").exists()
    resumed = _run(tiny.config(), tmp_path)
    assert _without_time(_lines(tmp_path)) == _without_time(_lines(workdir))
    _assert_equal_weights(resumed.model, result.model)
    _assert_equal_weights(loop.load_trained(tmp_path, data=tiny.data()), result.model)


def test_a_killed_run_repeats_the_steps_after_its_checkpoint_once(unbroken, tmp_path):
    workdir, result = unbroken
    _run(tiny.config(), tmp_path, stop_after=3)
    lost = json.dumps({"step": 3, "task": "motion", "loss": 0.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:  # what a kill leaves: steps past the checkpoint, half a line
        file.write(lost + "\n" + lost[:7])
    resumed = _run(tiny.config(), tmp_path)
    assert _without_time(_lines(tmp_path)) == _without_time(_lines(workdir))
    _assert_equal_weights(resumed.model, result.model)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(unbroken, tmp_path, number):
    calls = []

    def interrupt(model, steps, folder):
        calls.append(steps)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    stopped = _run(tiny.config(train__sample_every=2), tmp_path, sampler=interrupt)
    assert not stopped.finished and stopped.steps == 2 and calls == [2] and stopped.signal == number
    assert signal.getsignal(number) is before
    resumed = _run(tiny.config(), tmp_path)
    _assert_equal_weights(resumed.model, unbroken[1].model)


def test_another_seed_gives_another_run(unbroken, tmp_path):
    other = _run(tiny.config(train__seed=1), tmp_path, stop_after=2)
    assert other.steps == 2
    assert _lines(tmp_path)[0]["loss"] != _lines(unbroken[0])[0]["loss"]


def test_a_workdir_in_which_a_run_is_at_work_is_refused_and_left_as_it_is(tmp_path):
    with locks.whole(tmp_path, key="--workdir"):
        with pytest.raises(UserError, match="a run is at work there; wait for its end, or use a new --workdir"):
            _run(tiny.config(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".in-use"]
    assert not list(tmp_path.iterdir())


def test_a_workdir_of_other_settings_is_refused(unbroken):
    with pytest.raises(UserError, match=r"other settings \(lora.alpha 2.0 -> 3.0\)"):
        _run(tiny.config(lora__alpha=3.0), unbroken[0])


def test_a_workdir_of_a_longer_run_is_refused_and_left_as_it_is(unbroken):
    workdir, _ = unbroken
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match=r"holds a run of 6 steps, past train.steps=5; use a new --workdir, or"):
        _run(tiny.config(train__steps=5), workdir)
    assert (workdir / "config.json").read_text() == before


def test_a_loss_that_is_not_finite_stops_the_run_with_one_line(tmp_path):
    data = tiny.data()
    poisoned = dataclasses.replace(data["identity"], mean=np.full_like(data["identity"].mean, np.nan))
    with pytest.raises(UserError, match="training stopped at step 0 .identity.: loss nan") as error:
        _run(tiny.config(switch__motion_probability=0.0), tmp_path, data=data | {"identity": poisoned})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints" / "1").exists()
    told = json.loads((tmp_path / "not_finite.json").read_text())
    assert told["step"] == 0 and len(told["batch"]["identity"]) == 4
    rows = [row["row"] for row in told["batch"]["identity"]]
    assert len(set(rows)) == 4
    assert [row["caption"] for row in told["batch"]["identity"]] == [f"caption {row}" for row in rows]


def test_missing_data_are_named(tmp_path):
    with pytest.raises(UserError, match="'data.motion' is empty"):
        loop.run(tiny.config(), tmp_path, data={"identity": tiny.data()["identity"]}, shown=False)
    with pytest.raises(UserError, match="'data.identity' is empty"):
        loop.run(tiny.config(), tmp_path, shown=False)


def test_full_training_with_text_encoder_average_and_images(tmp_path):
    settings = dict(
        train__objective="text_to_video", train__mode="full", text__train_encoder=True, train__ema_decay=0.9,
        text_to_video__image_batch_size=2, train__steps=4,
    )  # fmt: skip
    config, data = tiny.config(**settings), tiny.data(token_ids=True)
    fresh = _weights(_fresh(config, token_ids=True))
    _run(config, tmp_path, data=data, stop_after=2)
    result = _run(config, tmp_path, data=data)
    moved = {
        path.partition("/")[0] for path, leaf in _weights(result.model).items() if not np.array_equal(leaf, fresh[path])
    }
    assert result.finished and moved == {"transformer", "text_encoder"}
    latest = _weights(loop.load_trained(tmp_path, averaged=False, data=data))
    averaged = _weights(loop.load_trained(tmp_path, data=data))
    assert any(not np.array_equal(latest[path], averaged[path]) for path in latest)
    _assert_equal_weights(result.model, loop.load_trained(tmp_path, data=data))


def test_a_first_frame_fills_the_image_channels(tmp_path):
    """CogVideoX-I2V: twice the input channels, and a loss on every frame."""
    settings = {"train.objective": "text_to_video", "train.mode": "full", "train.steps": 2,
                "model.transformer.in_channels": 8}  # fmt: skip
    found = {}
    for share in (0.0, 0.5):
        _run(tiny.config(**settings, **{"text_to_video.first_frame": share}), tmp_path / str(share))
        found[share] = [line["loss"] for line in _lines(tmp_path / str(share))]
    assert np.isfinite(found[0.5]).all() and found[0.0] != found[0.5]
    config = tiny.config(**settings)
    objective, latents = setup.objective(config, setup.about(config), tiny.SCALE), jnp.ones((1, 2, 4, 4, 4))
    model = _fresh(config, token_ids=False)
    given, plain = (
        denoising.loss(model, latents, jnp.ones((1, 3, 8)), jax.random.key(0), objective=objective, first_frame=given)
        for given in (True, False)
    )
    assert not objective.clamps_image and given != plain


def test_frozen_text_encoder_stays(tmp_path):
    config = tiny.config(train__objective="text_to_video", train__mode="full", train__steps=2)
    data = tiny.data(token_ids=True)
    model = _fresh(config, token_ids=True)
    graph, trained, frozen = state.split(model, mode="full", train_encoder=False)
    assert set(trained) == {"transformer"} and "text_encoder" in frozen
    before = _weights(model.text_encoder)
    result = _run(config, tmp_path, data=data, model=model)
    after = _weights(result.model.text_encoder)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_tasks_are_those_of_the_schedule(unbroken):
    config = tiny.config()
    objective = setup.objective(config, setup.about(config), tiny.SCALE)
    parts = {name: Mixture.of(dataset, name).parts() for name, dataset in tiny.data().items()}
    schedule = plan.make(config, parts, objective, jax.random.key(0), Devices.of(config.mesh))
    assert [line["task"] for line in _lines(unbroken[0])] == [schedule.task(i)["task"] for i in range(6)]
    counts = schedule.data_state(6)["position"]
    assert (
        counts["motion"] == sum(line["task"] == "motion" for line in _lines(unbroken[0])) and sum(counts.values()) == 6
    )
