"""Places of processes in a folder."""

import errno
import fcntl
import signal
import subprocess
import sys

import pytest

from sdv_jax.data.locks import claimed, whole
from sdv_jax.errors import UserError

HOLD = """
import sys
from pathlib import Path
from sdv_jax.data.locks import claimed, whole
folder, *place = sys.argv[1:]
with claimed(Path(folder), tuple(map(int, place))) if place else whole(Path(folder), key=""):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts processes that hold places in tmp_path."""
    started = []

    def start(*place):
        command = [sys.executable, "-c", HOLD, str(tmp_path), *map(str, place)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def refused(folder, process, told):
    with pytest.raises(UserError, match=told) as error, claimed(folder, process):
        pass
    assert "\n" not in str(error.value)


def test_a_place_is_held_by_one_process_until_it_ends_or_is_killed(tmp_path, holder):
    with claimed(tmp_path, (1, 4)):
        first, second = holder(0, 4), holder(2, 4)
        for place in (0, 2, 1):
            refused(tmp_path, (place, 4), rf"is being prepared by another process \({place}/4\); wait for it, or")
    with claimed(tmp_path, (1, 4)):
        pass
    first.communicate("")
    assert first.returncode == 0
    with claimed(tmp_path, (0, 4)):
        pass
    second.send_signal(signal.SIGKILL)
    second.wait()
    with claimed(tmp_path, (2, 4)):
        pass
    assert not list(tmp_path.iterdir())


def test_processes_of_another_number_are_refused_and_what_killed_ones_left_is_removed(tmp_path, holder):
    one, two = holder(0, 2), holder(1, 2)
    refused(tmp_path, (0, 1), r"by another process \([01]/2\); wait for it, or start this one \(0/1\) with its N")
    one.kill()
    one.wait()
    refused(tmp_path, (0, 1), r"by another process \(1/2\)")
    two.kill()
    two.wait()
    (tmp_path / ".process-of-something").touch()
    with claimed(tmp_path, (0, 1)):
        assert sorted(file.name for file in tmp_path.iterdir()) == [".process-0-of-1", ".process-of-something"]
        refused(tmp_path, (1, 2), r"by another process \(0/1\)")
    assert [file.name for file in tmp_path.iterdir()] == [".process-of-something"]


def test_a_whole_folder_is_held_until_its_process_is_killed(tmp_path, holder):
    other = holder()
    with whole(tmp_path, key="--workdir") as free:
        assert not free
    other.kill()
    other.wait()
    with whole(tmp_path, key="--workdir") as free, whole(tmp_path, key="--workdir") as again:
        assert free and not again
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_removed_before_it_was_locked_holds_nothing(tmp_path, monkeypatch):
    lock, calls = fcntl.flock, []

    def late(handle, how):
        if not calls:
            (tmp_path / ".process-0-of-1").unlink()
        calls.append(handle)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(tmp_path, (0, 1)):
        assert len(calls) == 2
        refused(tmp_path, (0, 1), "another process")


def test_where_there_are_no_locks_there_is_a_note(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path, (0, 1)):
        assert "on a file system without locks" in caplog.text and not list(tmp_path.iterdir())


def test_a_place_that_takes_no_files(tmp_path):
    refused(tmp_path / "nowhere", (0, 1), "cannot be locked .No such file or directory.; choose another output.path")
    message = "cannot be locked .No such file or directory.; choose another --workdir"
    with pytest.raises(UserError, match=message), whole(tmp_path / "nowhere", key="--workdir"):
        pass
