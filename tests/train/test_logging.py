import json

import jax.numpy as jnp
import pytest

from sdv_jax.errors import UserError
from sdv_jax.train.logging import RunLog, Step, truncate
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


def test_metrics_are_written_one_step_late_and_on_flush(tmp_path):
    log = _log(tmp_path)
    log.write(_step(0), _metrics(2.0))
    assert _steps(tmp_path) == []
    log.write(_step(1), _metrics(1.0))
    assert _steps(tmp_path) == [0]
    log.flush()
    log.flush()
    assert _steps(tmp_path) == [0, 1]
    log.close()


def test_not_finite_stops(tmp_path):
    log = _log(tmp_path)
    log.write(_step(0), _metrics(float("inf")))
    with pytest.raises(UserError, match="stopped at step 0 .motion.: loss inf"):
        log.flush()
    assert _steps(tmp_path) == []
    log.close()


def test_truncation_keeps_the_past_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate(path, 3)
    assert not path.exists()
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(5)) + '{"step": 5, "lo')
    truncate(path, 3)
    assert _steps(tmp_path) == [0, 1, 2]
