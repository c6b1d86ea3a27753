"""What a run writes while it runs: metrics.jsonl (a line per step), TensorBoard or W&B, a progress bar."""

import dataclasses
import importlib.util
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from sdv_jax.data.files import replacing
from sdv_jax.errors import UserError, one_line
from sdv_jax.train.throughput import Cost, Meter

METRICS, NOT_FINITE = "metrics.jsonl", "not_finite.json"
_READ = ("loss", "grad_norm", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Step:
    """What is known of a step on the host: its number, its task as logged, its cost, the seconds waited for its data,
    and whether its program was compiled for it.

    Data and program of a step are got while the one before is computed: the time they take is logged with that one.
    """

    number: int
    task: Mapping[str, object]
    cost: Cost
    waited: float = 0.0
    compiled: bool = False


class RunLog:
    """Takes a step's metrics while they are being computed and reads them one step later, so the device never waits.

    Every process reads them; the one with `writes` keeps files. `write` and `flush` raise UserError, one line, at the
    first loss or gradient norm that is not finite; `describe(step)`, which says what its batch was made of, then goes
    to `not_finite.json`.
    """

    def __init__(
        self, workdir: Path, *, start: int, steps: int, log_every: int, meter: Meter, describe: Callable[[int], object],
        writes: bool = True, shown: bool = True, boards: tuple = (),
    ):  # fmt: skip
        self.workdir, self.log_every, self.meter, self.describe = workdir, log_every, meter, describe
        self.boards = boards if writes else ()
        self.file = None
        if writes:
            truncate(workdir / METRICS, start)
            self.file = (workdir / METRICS).open("a", buffering=1)
        hidden = not (shown and writes)
        self.bar = tqdm(total=steps, initial=start, desc="train", unit="step", dynamic_ncols=True, disable=hidden)
        self.pending, self.stopping = None, False
        self.waited, self.compiled = 0.0, False  # since the clock was read
        self.clock = time.perf_counter()

    def write(self, step: Step, metrics: dict[str, jax.Array]) -> None:
        """Keeps this step's metrics and writes those of the step before; its own too, where they are there at once."""
        self.waited, self.compiled = self.waited + step.waited, self.compiled or step.compiled
        late, self.pending = self.pending, (step, metrics)
        self._write(late)
        # On a CPU a step may be done when its call returns. Several processes must see `stopping` at the same step.
        if jax.process_count() == 1 and metrics["loss"].is_ready():
            self.flush()

    def flush(self) -> None:
        """Writes what is kept, waiting for the device."""
        late, self.pending = self.pending, None
        self._write(late)

    def show(self, values: Mapping[str, float | Path], step: int) -> None:
        """Puts numbers, as points of curves, and pictures on the boards."""
        for board in self.boards:
            board.write(values, step)

    def restart_clock(self) -> None:
        """Leaves the time since the last step, spent on a checkpoint or samples, out of the next step's seconds."""
        self.clock = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        for board in self.boards:
            board.close()
        if self.file:
            self.file.close()

    def _write(self, late: tuple | None) -> None:
        if late is None:
            return
        step, metrics = late
        read = jax.device_get(metrics)
        values = {name: float(read[name]) for name in _READ}
        self.stopping = self.stopping or bool(read["stop"])
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        waited, compiled, self.waited, self.compiled = self.waited, self.compiled, 0.0, False
        if not all(math.isfinite(value) for value in values.values()):
            self._refuse(step, values)
        record = {"step": step.number} | dict(step.task) | values | {"seconds": round(seconds, 6)}
        rates = self.meter.read(step.cost, seconds, waited, counts=not compiled)
        record |= {name: float(f"{value:.5g}") for name, value in rates.items()}
        if compiled:
            record["compiled"] = True
        if self.file:
            self.file.write(json.dumps(record) + "\n")
        self.bar.update()
        if (step.number + 1) % self.log_every == 0:
            told = {"loss": f"{values['loss']:.4f}", "tok/s": f"{rates['tokens_per_second']:.0f}"}
            told |= {"mfu": f"{rates['mfu']:.1%}"} if "mfu" in rates else {}
            self.bar.set_postfix(task=step.task["task"], **told, refresh=False)
            names = (*values, "seconds", *rates)
            self.show({f"{step.task['task']}/{name}": record[name] for name in names}, step.number)

    def _refuse(self, step: Step, values: dict[str, float]) -> None:
        if self.file:
            batch = self.describe(step.number)
            told = {"step": step.number} | dict(step.task) | {name: str(value) for name, value in values.items()}
            (self.workdir / NOT_FINITE).write_text(json.dumps(told | {"batch": batch}, indent=1))
        raise UserError(
            f"training stopped at step {step.number} ({step.task['task']}): loss {values['loss']}, grad_norm "
            f"{values['grad_norm']}; earlier checkpoints are intact, {self.workdir / NOT_FINITE} names the examples of "
            "the step: check them, or start with a lower optimizer.learning_rate in a new --workdir"
        )


class TensorBoard:
    """Numbers and pictures as TensorBoard files in `folder`, from step `start` on."""

    def __init__(self, folder: Path, start: int):
        self.writer = SummaryWriter(str(folder), purge_step=start)

    def write(self, values: Mapping[str, float | Path], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, Path):
                with Image.open(value) as picture:
                    self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            else:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def check_boards(wandb_project: str) -> None:
    """Raises UserError where a board is asked for that is not installed."""
    if wandb_project and not importlib.util.find_spec("wandb"):
        raise UserError("config key 'log.wandb_project': wandb is not installed; pip install wandb, or leave it empty")


class WandB:
    """Numbers and pictures to a project of Weights & Biases; one run per workdir, which a restart goes on with.

    Raises UserError where the run there does not begin.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping):
        try:
            import wandb

            self.picture = wandb.Image
            self.run = wandb.init(
                project=project, name=workdir.resolve().name, id=_run_id(workdir / "wandb_id"), dir=str(workdir),
                config=dict(config), resume="allow",
            )  # fmt: skip
        except Exception as error:  # of the account, of the network, or of wandb itself
            raise UserError(
                f"config key 'log.wandb_project': Weights & Biases does not begin ({one_line(error)}); wandb login, or "
                "WANDB_MODE=offline, or leave it empty"
            ) from error

    def write(self, values: Mapping[str, float | Path], step: int) -> None:
        shown = {name: self.picture(str(value)) if isinstance(value, Path) else value for name, value in values.items()}
        self.run.log(shown, step=step)

    def close(self) -> None:
        self.run.finish()


def _run_id(path: Path) -> str:
    """Drawn once per workdir: folders of one name are not one run."""
    if not path.exists():
        with replacing(path, what="id") as fresh:
            fresh.write_text(secrets.token_hex(8))
    return path.read_text()


def since_first_start(workdir: Path, *, step: int, write: bool) -> tuple[float, float]:
    """(when the run was first started, in seconds since 1970, and how many seconds its steps before `step` took).

    Starts are written down in `starts.jsonl`; what a run did before there was one does not count.
    """
    path = workdir / "starts.jsonl"
    before = path.read_text().splitlines() if path.exists() else []
    counted = _spent(workdir / METRICS, step) if before else 0.0
    if write:
        about = {
            "time": time.time(), "step": step, "processes": jax.process_count(), "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind, "jax": jax.__version__, "python": sys.version.split()[0],
        }  # fmt: skip
        with path.open("a") as file:
            file.write(json.dumps(about) + "\n")
    return (json.loads(before[0])["time"] if before else time.time()), counted


def _spent(path: Path, step: int) -> float:
    """Seconds that the steps before `step` took, without compiling and waiting for data."""
    total = 0.0
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] < step and not record.get("compiled"):
            total += record["seconds"] * (1 - record.get("data_wait", 0.0))
    return total


def truncate(path: Path, step: int) -> dict | None:
    """Keeps the lines of steps before `step`: later ones will be written again. A half-written last line goes too.

    Returns what the last line kept says.
    """
    if not path.exists():
        return None
    kept, last = [], None
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] < step:
            kept.append(line + "\n")
            last = record
    fresh = path.with_suffix(".partial")
    fresh.write_text("".join(kept))
    os.replace(fresh, path)
    return last
