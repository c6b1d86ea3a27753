"""A process that lives says so, whatever its file system does for a while."""

import time

from sdv_jax.train.heartbeat import Heartbeat


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
    assert (tmp_path / "beats/0").read_text() == "done"
    [told] = capsys.readouterr().err.splitlines()
    assert "Stale file handle" in told and "will try again" in told


def test_the_last_beat_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    with Heartbeat(tmp_path / "beats", index=0, count=2, timeout=60.0, lost=lambda _: None):
        (tmp_path / "beats/0").unlink()
        (tmp_path / "beats/0").mkdir()
    assert "heartbeat not written" in capsys.readouterr().err
