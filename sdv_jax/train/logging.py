"""What a run writes while it runs: metrics.jsonl (a line per step), TensorBoard files, a progress bar."""

import json
import math
import os
import time
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from sdv_jax.errors import UserError

METRICS = "metrics.jsonl"


class RunLog:
    """Takes a step's metrics while they are being computed and reads them one step later, so the device never waits.

    `write` and `flush` raise UserError, one line, at the first loss or gradient norm that is not finite.
    """

    def __init__(self, workdir: Path, *, start: int, steps: int, log_every: int, shown: bool = True):
        truncate(workdir / METRICS, start)
        self.file = (workdir / METRICS).open("a", buffering=1)
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
        self.bar = tqdm(total=steps, initial=start, desc="train", unit="step", dynamic_ncols=True, disable=not shown)
        self.log_every = log_every
        self.pending = None
        self.clock = time.perf_counter()

    def write(self, step: int, task: dict[str, object], metrics: dict[str, jax.Array]) -> None:
        """Keeps this step's metrics and writes those of the step before."""
        late, self.pending = self.pending, (step, task, metrics)
        self._write(late)

    def flush(self) -> None:
        """Writes what is kept, waiting for the device."""
        late, self.pending = self.pending, None
        self._write(late)

    def restart_clock(self) -> None:
        """Leaves the time since the last step, spent on a checkpoint or samples, out of the next step's seconds."""
        self.clock = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        self.board.close()
        self.file.close()

    def _write(self, late: tuple | None) -> None:
        if late is None:
            return
        step, task, metrics = late
        read = jax.device_get(metrics)
        values = {name: float(read[name]) for name in ("loss", "grad_norm", "learning_rate")}
        now = time.perf_counter()
        record = {"step": step} | task | values | {"seconds": round(now - self.clock, 6)}
        self.clock = now
        if not all(math.isfinite(value) for value in values.values()):
            raise UserError(
                f"training stopped at step {step} ({task['task']}): loss {values['loss']}, "
                f"grad_norm {values['grad_norm']}; earlier checkpoints are intact: lower optimizer.learning_rate, "
                "or check the data, and start again"
            )
        self.file.write(json.dumps(record) + "\n")
        self.bar.update()
        if (step + 1) % self.log_every == 0:
            self.bar.set_postfix(task=task["task"], loss=f"{values['loss']:.4f}", refresh=False)
            for name in (*values, "seconds"):
                self.board.add_scalar(f"{task['task']}/{name}", record[name], step)


def truncate(path: Path, step: int) -> None:
    """Keeps the lines of steps before `step`: later ones will be written again. A half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] < step:
            kept.append(line + "\n")
    fresh = path.with_suffix(".partial")
    fresh.write_text("".join(kept))
    os.replace(fresh, path)
