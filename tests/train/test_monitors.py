import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.diffusion import bin_middles, noise_schedule
from sdv_jax.errors import UserError
from sdv_jax.train import gradients, heldout, logging, loop, plan, setup, state
from sdv_jax.train.devices import Devices
from tests.train import tiny

SETTINGS = {
    "train.steps": 4, "validation.rows": 4, "validation.every": 2, "gradients.every": 2, "train.save_every": 2,
    "validation.bins": 3,
}  # fmt: skip


def _run(workdir, data=None, *, stop_after=None, **settings):
    config = tiny.config(**SETTINGS | settings)
    return loop.run(config, workdir, data=data or tiny.data(), shown=False, stop_after=stop_after)


def _lines(workdir, name):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    _run(workdir)
    return workdir


def test_records_begin_before_the_first_step_and_end_after_the_last(finished):
    for name in ("validation.jsonl", "gradients.jsonl"):
        assert [line["step"] for line in _lines(finished, name)] == [0, 2, 4]
    first = _lines(finished, "validation.jsonl")[0]
    assert len(first["identity"]["bins"]) == 3
    assert first["motion"]["loss"] == pytest.approx(np.mean(first["motion"]["bins"]))


def test_the_noise_is_the_same_at_every_validation_and_in_every_run(finished, tmp_path):
    """With weights that hardly move, losses hardly move; another seed of the run leaves them alone."""
    _run(tmp_path, **{"optimizer.learning_rate": 1e-12, "train.seed": 5})
    lines, reference = _lines(tmp_path, "validation.jsonl"), _lines(finished, "validation.jsonl")
    for task in ("identity", "motion"):
        np.testing.assert_allclose(lines[-1][task]["bins"], lines[0][task]["bins"], rtol=1e-6)
    assert lines[0]["identity"]["bins"] != reference[0]["identity"]["bins"]  # another seed: another fresh model


def test_a_resumed_run_leaves_the_same_records(finished, tmp_path):
    config = tiny.config(**SETTINGS)
    loop.run(config, tmp_path, data=tiny.data(), shown=False, stop_after=3)
    loop.run(config, tmp_path, data=tiny.data(), shown=False)
    for name in ("validation.jsonl", "gradients.jsonl"):
        assert _lines(tmp_path, name) == _lines(finished, name)


def test_each_due_step_has_one_record_whenever_the_run_was_ended(finished, tmp_path, monkeypatch):
    """Between the checkpoint of step 2 and its records; between the last records and their checkpoint; when done.

    TensorBoard forgets what is of the state a run goes on from and later, and is told it again.
    """
    shown = []
    monkeypatch.setattr(logging.TensorBoard, "write", lambda self, values, step: shown.append((step, values)))
    _run(tmp_path, stop_after=2)
    assert [line["step"] for line in _lines(tmp_path, "validation.jsonl")] == [0]
    for end, steps in (("between", [2, 4]), ("before the last checkpoint", [2, 4]), ("done", [4])):
        shown.clear()
        if end == "before the last checkpoint":
            shutil.rmtree(tmp_path / "checkpoints" / "4")
        _run(tmp_path)
        for name in ("validation.jsonl", "gradients.jsonl"):
            assert _lines(tmp_path, name) == _lines(finished, name), end
        for curve in ("validation/motion", "validation/identity/bin_2", "gradients/cosine", "gradients/norm_motion"):
            assert [step for step, values in shown if curve in values] == steps, (end, curve)
    last = {name: value for step, values in shown for name, value in values.items() if step == 4}
    assert last["validation/motion"] == _lines(finished, "validation.jsonl")[-1]["motion"]["loss"]


def test_gradients_are_those_of_the_two_losses(finished):
    """Cosine and norms at step 0, against plain jax.grad over the held-out rows."""
    config = tiny.config(**SETTINGS)
    base = setup.about(config)
    objective = setup.objective(config, base, tiny.SCALE)
    parts = {name: loop.Mixture.of(dataset, name).parts() for name, dataset in tiny.data().items()}
    _, held = heldout.split(config, parts, Devices(None))
    graph, trained, frozen = state.split(setup.model(config, base, token_ids=False), mode="lora", train_encoder=False)
    flat = []
    for task in gradients.TASKS:
        loss, [batch] = plan.losses(config, objective)[task], list(held.batches(task, Devices(None)))
        key = jax.random.fold_in(jax.random.key(0x5EED), 0)
        found = jax.grad(lambda w: loss(state.join(graph, w, frozen), batch, jnp.zeros((3, 8)), key))(trained)  # noqa: B023
        flat.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)]))
    told = _lines(finished, "gradients.jsonl")[0]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert told["cosine"] == pytest.approx(cosine, rel=1e-4)
    assert told["norm_identity"] == pytest.approx(np.linalg.norm(flat[0]), rel=1e-4)
    assert told["norm_motion"] == pytest.approx(np.linalg.norm(flat[1]), rel=1e-4)


def test_each_task_is_held_against_itself(finished, tmp_path):
    """Two batches per task: two halves; of one batch there are none."""
    assert _lines(finished, "gradients.jsonl")[0]["halves_motion"] is None
    _run(tmp_path, **{"validation.rows": 4, "identity.batch_size": 2, "motion.batch_size": 2, "train.steps": 1})
    told = _lines(tmp_path, "gradients.jsonl")[0]
    assert -1 <= told["halves_identity"] <= 1 and told["halves_identity"] != told["halves_motion"]


def test_groups_add_up_to_the_whole():
    rng = np.random.default_rng(0)

    def tree():
        return {"transformer": {"blocks": {"to_q": {"lora": {"a": jnp.asarray(rng.normal(size=(2, 3, 4)))}}},
                                "proj": {"lora": {"b": jnp.asarray(rng.normal(size=(3, 5)))}}}}  # fmt: skip

    found = gradients.compare(one := tree(), other := tree())
    groups = found["groups"]
    assert set(groups) == {"block 0", "block 1", "blocks.to_q", "proj"}
    squares = [groups[name]["norm_identity"] ** 2 for name in ("blocks.to_q", "proj")]
    assert found["norm_identity"] ** 2 == pytest.approx(sum(squares), rel=1e-5)
    blocks = [groups[name]["norm_motion"] ** 2 for name in ("block 0", "block 1")]
    assert groups["blocks.to_q"]["norm_motion"] ** 2 == pytest.approx(sum(blocks), rel=1e-5)
    a, b = (np.ravel(t["transformer"]["proj"]["lora"]["b"]) for t in (one, other))
    assert groups["proj"]["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)


def test_bins_are_the_middles_of_the_noise_levels():
    config = tiny.config()
    base = setup.about(config)
    schedule = noise_schedule(base.family.scheduler(base.raw["scheduler"]))
    assert bin_middles(5, schedule=schedule).tolist() == [100, 300, 500, 700, 900]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"validation.rows": 0}, "'validation.rows' is 0: validation and gradients are measured on held-out rows"),
        ({"validation.rows": 3}, "3 rows fill no batch of (identity|motion) .4 rows.; give more"),
        ({"validation.rows": 10}, "10 of the 10 rows of data.(identity|motion) leave none to train on"),
    ],
)
def test_rows_that_cannot_be_held_out_are_told(tmp_path, settings, expected):
    with pytest.raises(UserError, match=expected):
        _run(tmp_path, **settings)


def test_held_out_batches_are_as_large_as_the_parts_of_a_step(capsys):
    """More rows at once could be more than the devices have room for; those that are left over are told."""
    config = tiny.config(**SETTINGS | {"train.accumulate": 2, "validation.rows": 5})
    parts = {name: loop.Mixture.of(dataset, name).parts() for name, dataset in tiny.data().items()}
    _, held = heldout.split(config, parts, Devices(None))
    assert "'validation.rows': 1 of 5 rows of motion fill no batch of 2 and are not" in capsys.readouterr().err
    for name in ("identity", "motion"):
        assert [batch[name]["mean"].shape[0] for batch in held.batches(name, Devices(None))] == [2, 2]
    with pytest.raises(UserError, match="4 rows cannot be cut evenly into train.accumulate = 8 parts"):
        heldout.split(tiny.config(**SETTINGS | {"train.accumulate": 8}), parts, Devices(None))


def test_one_task_alone_has_nothing_to_compare(tmp_path):
    with pytest.raises(UserError, match=r"'gradients.every': compares the gradients of two tasks.*leave it 0"):
        _run(tmp_path, **{"train.objective": "text_to_video"})


@pytest.mark.parametrize(("p", "missing"), [(0.0, "motion"), (1.0, "identity")])
def test_a_comparison_needs_the_data_of_both_tasks(tmp_path, p, missing):
    data = {name: rows for name, rows in tiny.data().items() if name != missing}
    with pytest.raises(UserError, match=f"'data.{missing}' is empty: this run needs it"):
        _run(tmp_path, data, **{"switch.motion_probability": p})


def test_only_what_is_measured_needs_data(tmp_path):
    """Image-only training compares gradients on clips it does not train on."""
    _run(tmp_path, **{"switch.motion_probability": 0.0})
    assert {line["task"] for line in _lines(tmp_path, "metrics.jsonl")} == {"identity"}
    assert all("motion" in line for line in _lines(tmp_path, "validation.jsonl"))
