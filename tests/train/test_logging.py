import json

import jax.numpy as jnp
import pytest

from sdv_jax.errors import UserError
from sdv_jax.train.logging import RunLog, truncate


def _metrics(loss):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1.0), "learning_rate": jnp.float32(0.1)}


def _steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_written_one_step_late_and_on_flush(tmp_path):
    log = RunLog(tmp_path, start=0, steps=3, log_every=1, shown=False)
    log.write(0, {"task": "motion"}, _metrics(2.0))
    assert _steps(tmp_path) == []
    log.write(1, {"task": "motion"}, _metrics(1.0))
    assert _steps(tmp_path) == [0]
    log.flush()
    log.flush()
    assert _steps(tmp_path) == [0, 1]
    log.close()


def test_not_finite_stops(tmp_path):
    log = RunLog(tmp_path, start=0, steps=3, log_every=1, shown=False)
    log.write(0, {"task": "motion"}, _metrics(float("inf")))
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
