"""A process that lives says so, whatever its file system does for a while."""

import time
from types import SimpleNamespace

import pytest

from sdv_jax import training
from sdv_jax.train import heartbeat, processes
from sdv_jax.train.heartbeat import Heartbeat
from tests.train import tiny


def test_a_passing_error_of_the_file_system_ends_no_heartbeat(tmp_path, monkeypatch, capsys):
    beating = Heartbeat(tmp_path / "beats", index=0, count=2, timeout=0.4, lost=lambda _: None)
    monkeypatch.setattr(beating, "silent", lambda *_: [])
    write, refused = beating._write, []

    def failing(said: str) -> None:
        if len(refused) < 3:
            refused.append(said)
            raise OSError(116, "Stale file handle")
        write(said)

    with beating:
        beating._write = failing
        deadline = time.monotonic() + 10
        while int((tmp_path / "beats/0").read_text().split()[1]) < 4:
            assert beating.thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
    assert len(refused) == 3
    assert (tmp_path / "beats/0").read_text().startswith("done ")
    [told] = capsys.readouterr().err.splitlines()
    assert "Stale file handle" in told and "will try again" in told


def test_the_last_beat_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    with Heartbeat(tmp_path / "beats", index=0, count=2, timeout=60.0, lost=lambda _: None):
        (tmp_path / "beats/0").unlink()
        (tmp_path / "beats/0").mkdir()
    assert "heartbeat not written" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["", "done", "done 17", "4711 12 n1"])
def test_what_an_earlier_start_left_is_no_sign_of_life(tmp_path, left):
    (tmp_path / "1").write_text(left)
    seen = {}
    with Heartbeat(tmp_path, index=0, count=2, timeout=60.0) as beating:
        assert beating.silent(seen, 0.0) == [] and beating.silent(seen, 61.0) == [1]
        with Heartbeat(tmp_path, index=1, count=2, timeout=60.0):
            assert beating.silent(seen, 62.0) == []
        assert beating.silent(seen, 63.0) == [] and beating.silent(seen, 999.0) == []  # it is done


def test_the_heartbeat_begins_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "global_state", SimpleNamespace(process_id=1, num_processes=2))
    monkeypatch.setattr(processes, "join", lambda *_, **__: None)
    found = []

    def load(*_):
        found.extend((tmp_path / "heartbeats/1").read_text().split())
        raise processes.Stopped

    monkeypatch.setattr(training.datasets, "load", load)
    assert training.run_job(tiny.config(), tmp_path, coordinator="auto") == processes.PREEMPTED
    assert len(found) == 3 and found[1] == "0"
