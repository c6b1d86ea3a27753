"""A run killed again and again against an unbroken one: adapter, optimiser state and logged losses must be bit-equal.

    python -m tests.train.torture [--kills 30] [--processes 1] [--workdir runs/torture]       (make torture runs both)

SIGKILL comes at random moments, every other time while a checkpoint is being written; of two processes one or both are
killed, and one that is left alone must end by itself.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from sdv_jax.train.heartbeat import PEER_LOST

ROOT = Path(__file__).parents[2]
TINY = {
    "train.steps": 40, "train.save_every": 2, "identity.batch_size": 8, "motion.batch_size": 8, "mesh.fsdp": 2,
    "lora.dropout": 0.1, "train.ema_decay": 0.9, "train.heartbeat": 12.0,
}  # fmt: skip
SMALL_WORLD = {
    "train.steps": 120, "train.save_every": 3, "identity.batch_size": 8, "motion.batch_size": 8, "mesh.fsdp": 2,
    "lora.dropout": 0.1, "small_world.pairs": 128, "small_world.clips": 64, "train.heartbeat": 20.0,
    "optimizer.cycles": 1,
}  # fmt: skip
_ENDED = (0, -signal.SIGKILL, PEER_LOST)
_PATIENCE = 600  # seconds for anything to happen


def start(workdir: Path, settings: dict, processes: int, devices: int, source: str) -> list[subprocess.Popen]:
    """The processes of one job; their output goes to WORKDIR.log."""
    log = workdir.with_suffix(".log").open("a")
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"), "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # a busy machine is not a dead one
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=300",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.train.worker", str(workdir), json.dumps(settings), str(devices), source]
    port = _free_port()
    jobs = [[str(port), str(processes), str(index)] for index in range(processes)] if processes > 1 else [[]]
    return [
        subprocess.Popen([*command, *job], cwd=ROOT, env=environment, stdout=log, stderr=log) for job in jobs
    ]


def unbroken(workdir: Path, settings: dict, processes: int, devices: int, source: str) -> None:
    """Runs to the end, however long that takes, as long as there is a step now and then."""
    job = start(workdir, settings, processes, devices, source)
    while _progress(workdir, job):
        pass
    found = wait(job)
    assert found == [0] * processes, f"the unbroken run ended with {found}: {workdir.with_suffix('.log').read_text()}"


def killed(
    workdir: Path, settings: dict, processes: int, devices: int, source: str, *, kills: int, seed: int = 0
) -> tuple[int, int]:
    """Runs to the end with up to `kills` kills on the way: how many there were, and how many in a checkpoint's writing.

    Each comes some steps after the last one, so that checkpoints are reached in between.
    """
    rng, done, in_writing = random.Random(seed), 0, 0
    while done < kills:
        job = start(workdir, settings, processes, devices, source)
        if not all(_progress(workdir, job) for _ in range(rng.randint(1, 6))):
            if PEER_LOST in wait(job):  # on a busy machine: processes that were not ready within gloo's 30 seconds
                continue
            break
        in_writing += _strike_time(workdir, job, rng, writing=done % 2 == 1)
        victims = job if processes == 1 or rng.random() < 0.5 else [rng.choice(job)]
        for victim in victims:
            victim.kill()
        found = wait(job)
        assert set(found) <= set(_ENDED), f"after a kill: {found}: {workdir.with_suffix('.log').read_text()[-3000:]}"
        done += 1
    unbroken(workdir, settings, processes, devices, source)
    return done, in_writing


def difference(ours: Path, theirs: Path) -> str | None:
    """What differs between two finished runs, bit by bit, or None."""
    for name in ("pytorch_lora_weights.safetensors",):
        if (ours / "adapter" / name).read_bytes() != (theirs / "adapter" / name).read_bytes():
            return f"adapter/{name}"
    ours_lines, theirs_lines = ([_counted(line) for line in _lines(run)] for run in (ours, theirs))
    if ours_lines != theirs_lines:
        pairs = zip(ours_lines, theirs_lines, strict=False)
        return f"metrics.jsonl: {next((pair for pair in pairs if pair[0] != pair[1]), 'lengths')}"
    for name in ("validation.jsonl", "gradients.jsonl"):
        if (theirs / name).exists() and (ours / name).read_bytes() != (theirs / name).read_bytes():
            return name
    last = str(max(int(folder.name) for folder in (theirs / "checkpoints").iterdir() if folder.name.isdecimal()))
    return _leaf_difference(*(_state(run / "checkpoints" / last / "state") for run in (ours, theirs)))


def _state(folder: Path):
    """The arrays of a checkpoint on this process's device, however they were spread."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        stored = reader.metadata(folder.resolve()).item_metadata.tree
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), stored)
        return reader.restore(folder.resolve(), like)


def wait(job: list[subprocess.Popen]) -> list[int]:
    """Exit statuses."""
    end = time.monotonic() + _PATIENCE
    try:
        return [process.wait(max(1.0, end - time.monotonic())) for process in job]
    finally:
        for process in job:
            process.kill()


def _progress(workdir: Path, job: list[subprocess.Popen]) -> bool:
    """Waits for a new step; False when the job ended before, done or because its processes lost each other."""
    before, end = _size(workdir), time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if any(process.poll() is not None for process in job):
            found = wait(job)
            told = workdir.with_suffix(".log").read_text()[-3000:]
            assert set(found) <= {0, PEER_LOST}, f"ended by itself with {found}: {told}"
            return False
        if _size(workdir) != before:
            return True
        time.sleep(0.02)
    raise TimeoutError(f"no step within {_PATIENCE} s: {workdir.with_suffix('.log').read_text()[-3000:]}")


def _strike_time(workdir: Path, job: list[subprocess.Popen], rng: random.Random, *, writing: bool) -> bool:
    """Waits for the moment of a kill; returns whether a checkpoint is being written."""
    end = time.monotonic() + (20 if writing else rng.uniform(0, 1))
    while time.monotonic() < end and all(process.poll() is None for process in job):
        if writing and any("tmp" in path.name for path in (workdir / "checkpoints").glob("*")):
            return True
        time.sleep(0.001)
    return False


def _size(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def _lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _counted(line: dict) -> dict:
    """What must not depend on time."""
    kept = ("step", "task", "reference", "loss", "grad_norm", "learning_rate")
    return {key: line[key] for key in kept if key in line}


def _leaf_difference(ours, theirs, path: str = "state") -> str | None:
    if isinstance(ours, dict | list | tuple):
        keys = ours.keys() if isinstance(ours, dict) else range(len(ours))
        found = (_leaf_difference(ours[key], theirs[key], f"{path}/{key}") for key in keys)
        return next((each for each in found if each), None)
    same = ours is theirs is None or np.array_equal(np.asarray(ours), np.asarray(theirs))
    return None if same else path


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workdir", type=Path, default=Path("runs/torture"))
    arguments = parser.parse_args()
    workdir = arguments.workdir.resolve() / f"{arguments.processes}"
    workdir.mkdir(parents=True, exist_ok=True)
    began, shape = time.perf_counter(), (arguments.processes, 8 // arguments.processes, "small_world")
    unbroken(workdir / "unbroken", SMALL_WORLD, *shape)
    kills, in_writing = killed(workdir / "killed", SMALL_WORLD, *shape, kills=arguments.kills)
    found = difference(workdir / "killed", workdir / "unbroken")
    minutes = (time.perf_counter() - began) / 60
    print(
        f"{arguments.processes} processes: {kills} kills, {in_writing} of them while a checkpoint was written, "
        f"{minutes:.1f} minutes: " + (f"{found} DIFFERS" if found else "bit-equal to the unbroken run")
    )
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
