import json
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from sdv_jax.errors import UserError
from sdv_jax.train.logging import RunLog, Step, TensorBoard, WandB, since_first_start, truncate
from sdv_jax.train.throughput import Cost, Meter


def _metrics(loss, stop=0):
    found = {"loss": loss, "grad_norm": 1.0, "learning_rate": 0.1}
    return {name: jnp.float32(value) for name, value in found.items()} | {"stop": jnp.int32(stop)}


def _log(workdir, **options):
    meter = Meter(began=0.0, counted=0.0, peak=None)
    return RunLog(workdir, start=0, steps=3, log_every=1, meter=meter, describe=str, shown=False, **options)


def _step(number, **options):
    return Step(number, {"task": "motion"}, Cost(samples=4, tokens=80, flops=1e9), **options)


def _steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_that_are_computed_already_are_written_at_once(tmp_path):
    log = _log(tmp_path)
    for number in range(2):
        log.write(_step(number), _metrics(2.0))
        assert _steps(tmp_path) == list(range(number + 1))
    log.close()


def test_several_processes_write_metrics_one_step_late_and_on_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    log = _log(tmp_path)
    log.write(_step(0), _metrics(2.0))
    assert _steps(tmp_path) == []
    log.write(_step(1), _metrics(1.0))
    assert _steps(tmp_path) == [0]
    log.flush()
    log.flush()
    assert _steps(tmp_path) == [0, 1]
    log.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_waiting_and_compiling_are_logged_with_the_step_during_which_they_happen(tmp_path, monkeypatch, processes):
    """The batch and the program of a step are got while the one before is computed, unless that is done already."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    log = _log(tmp_path)
    for number in range(3):
        time.sleep(0.3 if number == 1 else 0.02)
        log.write(_step(number, waited=0.3 if number == 1 else 0.0, compiled=number == 1), _metrics(2.0))
    log.flush()
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    slow = 1 if processes == 1 else 0
    assert [line["seconds"] > 0.25 for line in lines] == [number == slow for number in range(3)]
    assert [line["data_wait"] > 0.8 for line in lines] == [number == slow for number in range(3)]
    assert [line.get("compiled", False) for line in lines] == [number == slow for number in range(3)]
    assert all(0 <= line["data_wait"] <= 1 for line in lines)


def test_not_finite_stops(tmp_path):
    log = _log(tmp_path)
    with pytest.raises(UserError, match="stopped at step 0 .motion.: loss inf.*in a new --workdir$"):
        log.write(_step(0), _metrics(float("inf")))
    assert _steps(tmp_path) == []
    log.close()


def test_truncation_keeps_the_past_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate(path, 3)
    assert not path.exists()
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(5)) + '{"step": 5, "lo')
    truncate(path, 3)
    assert _steps(tmp_path) == [0, 1, 2]


def test_scalars_go_to_every_board_at_log_every(tmp_path, monkeypatch):
    calls = []

    class Run:
        log, finish = staticmethod(lambda scalars, step: calls.append((step, scalars))), staticmethod(lambda: None)

    fake = SimpleNamespace(
        init=lambda **options: calls.append(options) or Run, Image=lambda path: ("picture", path)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    board = WandB("subjects", tmp_path, {"train": {"steps": 3}})
    log = _log(tmp_path, boards=(TensorBoard(tmp_path / "tensorboard", 0), board))
    Image.new("RGBA", (8, 4)).save(tmp_path / "sheet.png")
    log.show({"validation/motion": 0.5, "samples": tmp_path / "sheet.png"}, 0)
    for number in range(2):
        log.write(_step(number), _metrics(2.0))
    log.flush()
    log.close()
    options, shown, *points = calls
    assert shown == (0, {"validation/motion": 0.5, "samples": ("picture", str(tmp_path / "sheet.png"))})
    assert options["project"] == "subjects" and options["resume"] == "allow"
    assert [step for step, _ in points] == [0, 1]
    assert points[0][1]["motion/loss"] == 2.0 and "motion/tokens_per_second" in points[0][1]
    [written] = (tmp_path / "tensorboard").iterdir()
    assert all(tag in written.read_bytes() for tag in (b"validation/motion", b"samples", b"PNG"))


def test_a_workdir_is_one_run_of_wandb_whatever_its_name(tmp_path, monkeypatch):
    ids = []
    fake = SimpleNamespace(init=lambda **options: ids.append(options["id"]), Image=str)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder in ("a", "a", "b"):
        (tmp_path / folder / "run").mkdir(parents=True, exist_ok=True)
        WandB("subjects", tmp_path / folder / "run", {})
    assert ids[0] == ids[1] != ids[2]


def test_a_run_of_wandb_that_does_not_begin_is_one_line(tmp_path, monkeypatch):
    def fail(**_):
        raise RuntimeError("api_key not configured (no-tty)\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail, Image=str))
    with pytest.raises(UserError, match=r"'log.wandb_project': .* \(api_key not configured \(no-tty\)\); wandb lo"):
        WandB("subjects", tmp_path, {})


def test_a_stop_asked_for_on_any_device_is_heard_one_step_late(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    log = _log(tmp_path)
    log.write(_step(0), _metrics(1.0, stop=1))
    assert not log.stopping
    log.write(_step(1), _metrics(1.0))
    assert log.stopping
    log.close()


def test_a_process_that_does_not_write_leaves_nothing_but_stops_all_the_same(tmp_path):
    log = _log(tmp_path, writes=False)
    with pytest.raises(UserError, match="stopped at step 0"):
        log.write(_step(0), _metrics(float("nan")))
    log.close()
    assert not list(tmp_path.iterdir())


def test_goodput_begins_with_the_first_start_that_was_written_down(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "seconds": 5.0}\n')
    began, counted = since_first_start(tmp_path, step=1, write=True)
    assert counted == 0 and abs(began - time.time()) < 5
    lines = [{"step": 0, "seconds": 5.0, "data_wait": 0.2}, {"step": 1, "seconds": 9.0, "compiled": True},
             {"step": 2, "seconds": 1.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again, counted = since_first_start(tmp_path, step=2, write=True)
    assert again == pytest.approx(began, abs=1) and counted == 4.0
