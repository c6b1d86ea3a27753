"""One job of several processes: joining them, agreeing on the end, and who writes what they share."""

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from sdv_jax.errors import UserError, one_line
from sdv_jax.train.heartbeat import explain_aborts

IO_ERROR = 74  # exit status: the disk did not take or give a file; the same command goes on (sysexits' IOERR)
PREEMPTED = 75  # exit status: stopped by a signal after a checkpoint; the same command goes on (sysexits' TEMPFAIL)
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_DAY = 24 * 3600 * 1000  # milliseconds
_PATIENCE = 10  # how many times longer JAX itself waits for a silent process than our own watch, which says more


def simulate_devices() -> None:
    """Lets several simulated CPU devices of this process, if it has any, wait for each other without a deadlock.

    XLA's threads wait inside collectives: with one thread per device, the work of the last device to arrive can be
    queued behind those that wait for it, and so can a second program. Call it before any device is touched.
    """
    if jax.config.jax_num_cpu_devices > 1 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("NPROC", "32")  # XLA's name for the number of threads
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def join(coordinator: str, count: int | None, index: int | None, *, timeout: float) -> None:
    """Makes this process number `index` of `count`, found through `coordinator` ("host:port").

    "auto" reads all three from the cluster (Slurm, Open MPI, Kubernetes, GKE and Cloud TPU). Call it before any device
    is touched. Raises UserError when the others do not come.
    """
    given = {}
    if coordinator != "auto":
        if count is None or index is None:
            raise UserError("--coordinator HOST:PORT needs --processes N and --process I; on a cluster give auto")
        if not 0 <= index < count:
            raise UserError(f"--process is {index}, expected 0 to {count - 1} (--processes {count})")
        given = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
    explain_aborts()
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=int(timeout), heartbeat_timeout_seconds=int(_PATIENCE * timeout)
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes did not find each other through {coordinator} within {timeout:g} s ({one_line(error)}); "
            "check that all were started, and that the port is free and reachable"
        ) from error


def compile_together(program, *arguments) -> None:
    """Compiles a jitted function on every process before any of them runs it.

    Compilers differ by minutes, above all where one process finds the result of an earlier run in a cache. Inside a
    collective there is less patience: gloo gives the others 30 seconds to come. Who waits here has its heartbeat.
    """
    if jax.process_count() > 1:
        program.lower(*arguments).compile()
        multihost.get_barrier_sync_fn()(key="compiled", timeout_ms=_DAY)


def is_writer() -> bool:
    """Whether this process writes the files that all share."""
    return jax.process_index() == 0


def wait_for(path: Path) -> None:
    """Waits until the process that writes has made `path`; should it die, our heartbeat ends the waiting."""
    while not path.exists():
        time.sleep(0.2)


def on_host(tree):
    """Arrays of any sharding whole, as numpy arrays, on every process. All processes call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: np.asarray(multihost_utils.process_allgather(leaf, tiled=True)), tree)


def ignore_stop_requests() -> None:
    """For a process whose exit status is settled: a signal while Python shuts down would replace it."""
    if threading.current_thread() is threading.main_thread():
        _handle_with(lambda *_: None)  # SIG_IGN would be inherited by programs that are started
        # Python gives up its own handlers before the process is gone; what it ignores stays ignored.
        atexit.register(_handle_with, signal.SIG_IGN)


def _handle_with(handler) -> None:
    for number in _STOPPING:
        signal.signal(number, handler)


class Stopped(KeyboardInterrupt):
    """A signal that came before there was anything to save."""


class StopRequests(list[int]):
    """The signals that came. Until `patient` is set, the first one raises Stopped where it finds the program."""

    patient = False


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """The SIGTERMs and SIGINTs that come; outside the main thread Python allows no handlers: always empty."""
    received = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, _) -> None:
        received.append(number)
        if not received.patient:
            raise Stopped(f"signal {number}")

    before = {number: signal.signal(number, handle) for number in _STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
