"""Several processes on one machine, over loopback; and processes that are killed. Short forms of `make torture`."""

import json
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from sdv_jax.train.heartbeat import PEER_LOST
from sdv_jax.train.processes import PREEMPTED
from tests.train import torture

# What these tests cost is compiling, so they share their programs: the learning rate falls over as many steps in all of
# them, no pair loses its reference, and gradients and held-out losses are measured where they are compared.
SETTINGS = torture.TINY | {
    "train.steps": 12, "train.save_every": 2, "optimizer.decay_steps": 12, "identity.view_drop": 0.0, "mesh.fsdp": 4,
    "train.heartbeat": 20.0, "validation.rows": 8, "validation.every": 6, "gradients.every": 6,
}  # fmt: skip
UNWATCHED = SETTINGS | {"validation.every": 0, "gradients.every": 0}
ENDLESS = UNWATCHED | {"train.steps": 100000, "train.save_every": 100000}
ALONE = {"mesh.fsdp": 1}


def _lines(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def two(place):
    """Two processes of four devices."""
    torture.unbroken(place / "two", SETTINGS, 2, 4, "tiny")
    return place / "two"


@pytest.fixture(scope="module")
def one(place):
    """One process of one device."""
    torture.unbroken(place / "one", SETTINGS | ALONE, 1, 1, "tiny")
    return place / "one"


def test_two_processes_train_as_one_and_as_one_device(place, two, one):
    torture.unbroken(place / "eight", SETTINGS, 1, 8, "tiny")
    for name in ("eight", "one"):
        for file, keys in (("metrics.jsonl", ("loss", "grad_norm")), ("gradients.jsonl", ("cosine", "norm_motion"))):
            for ours, theirs in zip(_lines(two, file), _lines(place / name, file), strict=True):
                for key in keys:
                    np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, err_msg=f"{name} {file} {key}")
        adapters = [load_file(run / "adapter/pytorch_lora_weights.safetensors") for run in (two, place / name)]
        for key, value in adapters[0].items():
            np.testing.assert_allclose(value, adapters[1][key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_a_checkpoint_of_two_processes_goes_on_on_one_device(place, two):
    """Another mesh, another number of processes: the same run to float tolerance."""
    workdir = place / "moved"
    job = torture.start(workdir, UNWATCHED, 2, 4, "tiny")
    while not (workdir / "checkpoints" / "4").is_dir():
        assert all(process.poll() in (None, 0) for process in job)
        time.sleep(0.02)
    for process in job:
        process.kill()
    torture.wait(job)
    torture.unbroken(workdir, UNWATCHED | ALONE, 1, 1, "tiny")
    assert "goes on with changed settings: mesh.fsdp 4 -> 1" in workdir.with_suffix(".log").read_text()
    for ours, theirs in zip(_lines(workdir), _lines(two), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


def test_a_signal_to_one_process_stops_both_at_one_step_with_a_checkpoint(place):
    workdir = place / "preempted"
    job = torture.start(workdir, ENDLESS, 2, 4, "tiny")
    while torture._size(workdir) == 0:
        assert all(process.poll() is None for process in job), workdir.with_suffix(".log").read_text()
        time.sleep(0.02)
    job[1].send_signal(signal.SIGTERM)
    assert torture.wait(job) == [PREEMPTED, PREEMPTED]
    steps = [int(folder.name) for folder in (workdir / "checkpoints").iterdir()]
    assert steps == [len(_lines(workdir))]
    assert f"stopped at step {steps[0]} of 100000; the same command resumes" in workdir.with_suffix(".log").read_text()


def test_signals_that_do_not_stop_coming_leave_a_checkpoint(place):
    """Also while the last one is written."""
    workdir = place / "hurried"
    job = torture.start(workdir, ENDLESS | ALONE, 1, 1, "tiny")
    while job[0].poll() is None:
        if torture._size(workdir):
            job[0].send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert torture.wait(job) == [PREEMPTED], workdir.with_suffix(".log").read_text()
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(len(_lines(workdir)))]


def test_a_signal_before_the_first_step_stops_at_once(place):
    workdir = place / "early"
    job = torture.start(workdir, ENDLESS | ALONE, 1, 1, "tiny")
    while not workdir.is_dir():
        assert job[0].poll() is None, workdir.with_suffix(".log").read_text()
        time.sleep(0.01)
    job[0].send_signal(signal.SIGINT)
    assert torture.wait(job) == [PREEMPTED]
    assert "sdv: stopped before the first step; the same command" in workdir.with_suffix(".log").read_text()


def test_a_dead_process_ends_the_job_with_a_line(place):
    workdir = place / "dead"
    job = torture.start(workdir, ENDLESS | {"train.heartbeat": 5.0}, 2, 4, "tiny")
    while torture._size(workdir) == 0:
        assert all(process.poll() is None for process in job), workdir.with_suffix(".log").read_text()
        time.sleep(0.02)
    job[1].send_signal(signal.SIGSTOP)  # alive for the system, silent for the others: the hardest kind of dead
    began = time.monotonic()
    status = job[0].wait(60)
    assert status == PEER_LOST and time.monotonic() - began < 30
    job[1].kill()
    torture.wait(job)
    told = workdir.with_suffix(".log").read_text()
    assert "process 1 (host " in told and "has not been heard of for 5 s" in told and "start all processes" in told


def test_kills_change_nothing(place, one):
    assert torture.killed(place / "killed", SETTINGS | ALONE, 1, 1, "tiny", kills=2, seed=1)[0] > 0
    assert torture.difference(place / "killed", one) is None


def test_kills_of_two_processes_change_nothing(place, two):
    assert torture.killed(place / "killed two", SETTINGS, 2, 4, "tiny", kills=2, seed=2)[0] > 0
    assert torture.difference(place / "killed two", two) is None
