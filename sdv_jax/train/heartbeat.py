"""Processes of one job tell each other that they live, so that a dead one ends the job instead of hanging it.

Each writes a counter to a file of its own in the workdir, which all share, and watches the others' files. One that has
not changed for `timeout` seconds is dead or cut off: a line says which, and this process ends with `PEER_LOST`.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jax._src.distributed import global_state

from sdv_jax.data.files import make_folder

PEER_LOST = 76  # exit status: another process is gone; start all of them again
_DONE = "done"
_ABORTED = (
    "JAX ended this process, as the lines above say: not all processes of the job came within train.heartbeat, or one "
    "of them, its host or the network died; start all processes again, they go on from the newest checkpoint, if any"
)
_on_abort = None  # ctypes does not keep what C may still call
_BEATS = 8  # per timeout


class Heartbeat:
    """`with Heartbeat(folder, index, count, timeout):` beats and watches in a thread; nothing with one process.

    `lost(message)` is called when a process is missed; it must not return. It defaults to ending this process.
    """

    def __init__(
        self, folder: Path, *, index: int, count: int, timeout: float, lost: Callable[[str], None] | None = None
    ):
        self.folder, self.index, self.count, self.timeout = folder, index, count, timeout
        self.lost = lost or end
        self.before: dict[int, str] = {}  # what an earlier start had left
        self.stopped = threading.Event()
        self.failed = False  # whether a beat could not be written yet
        self.thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    @classmethod
    def of(cls, workdir: Path, timeout: float) -> "Heartbeat":
        """That of this process of this job. Enter it once all have joined, and before any waits for another."""
        # jax.process_index() would start the devices first, for which the processes wait for each other.
        index, count = global_state.process_id, global_state.num_processes
        return cls(workdir / "heartbeats", index=index, count=count, timeout=timeout)

    def __enter__(self) -> "Heartbeat":
        if self.count > 1:
            make_folder(self.folder, what="workdir")
            self.before = {other: self._read(other) for other in self._others()}
            self._write(self._alive(0))
            self.thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        if self.count > 1:
            self.stopped.set()
            self.thread.join()
            if kind is None:
                self._beat(f"{_DONE} {time.time_ns()}")  # the time tells it from that of an earlier start

    def silent(self, seen: dict[int, tuple[str, float]], now: float) -> list[int]:
        """The processes that have not been heard of for `timeout` seconds; `seen` is what was last read, and when."""
        for other in self._others():
            said = self._read(other)
            done = said.startswith(_DONE) and said != self.before.get(other)
            if done or other not in seen or seen[other][0] != said:
                seen[other] = (said, now)
        return [other for other, (_, when) in sorted(seen.items()) if now - when > self.timeout]

    def _watch(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        beats = 0
        while not self.stopped.wait(self.timeout / _BEATS):
            beats += 1
            self._beat(self._alive(beats))
            if missed := self.silent(seen, time.monotonic()):
                names = ", ".join(f"{other} ({self._host(seen[other][0])})" for other in missed)
                self.lost(
                    f"process {names} of {self.count} has not been heard of for {self.timeout:g} s: it died, or its "
                    "host or network did; start all processes again, they go on from the newest checkpoint"
                )
                return

    def _others(self) -> set[int]:
        return set(range(self.count)) - {self.index}

    @staticmethod
    def _alive(beats: int) -> str:
        return f"{os.getpid()} {beats} {socket.gethostname()}"

    def _beat(self, said: str) -> None:
        """An error of the file system may pass before the others miss this process: it is told once, and no more."""
        try:
            self._write(said)
        except OSError as error:
            if not self.failed:
                print(f"sdv: note: {self.folder}: heartbeat not written, will try again: {error}", file=sys.stderr)
            self.failed = True

    def _write(self, said: str) -> None:
        path = self.folder / str(self.index)
        fresh = path.with_suffix(".new")
        fresh.write_text(said)
        os.replace(fresh, path)

    def _read(self, other: int) -> str:
        try:
            return (self.folder / str(other)).read_text()
        except OSError:
            return ""

    @staticmethod
    def _host(said: str) -> str:
        words = said.split()
        return f"host {words[2]}" if len(words) > 2 else "never seen"


def explain_aborts() -> None:
    """Makes an abort of this process end with a line and `PEER_LOST` instead of a signal.

    When the first process is gone, JAX's runtime calls abort() in a thread of its own, where no Python code is asked.
    """
    global _on_abort
    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: end(_ABORTED))
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def end(message: str) -> None:
    """Says it and ends this process at once: others may be waiting in a collective that never comes back."""
    print(f"sdv: error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(PEER_LOST)
