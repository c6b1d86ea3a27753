"""Every row of docs/errors.md, run as it stands there and compared letter by letter."""

import contextlib
import re

import numpy as np
import pytest

from sdv_jax import UserError, cli
from sdv_jax.pipeline import load_pipeline
from tests import bad_inputs

ROWS = bad_inputs.rows()
PYTHON = ("pipe", "load_pipeline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    bad_inputs.make_files(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder / "model", progress=False)


@pytest.mark.parametrize(("typed", "line"), [row for row in ROWS if not row[0].startswith(PYTHON)])
def test_command_line(folder, monkeypatch, capsys, typed, line):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    try:
        status = cli.main(bad_inputs.arguments(typed))
        out, err = (text.replace(str(folder), "/here").splitlines() for text in capsys.readouterr())
        if line.startswith("sdv: error: "):
            assert (err, out, status) == ([line], [], 2)
            assert sorted(folder.iterdir()) == before, "something was left behind"
        else:
            made = re.compile(r"video\.mp4  \d frames? of 24x16, contact sheet video\.png")
            assert line in err + out and len(out) == 1 and made.fullmatch(out[0]) and status == 0
    finally:
        for name in ("video.mp4", "video.png"):
            with contextlib.suppress(FileNotFoundError):
                (folder / name).unlink()


@pytest.mark.parametrize(("typed", "line"), [row for row in ROWS if row[0].startswith(PYTHON)])
def test_python(folder, monkeypatch, pipe, typed, line):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as caught:
        eval(typed, {"pipe": pipe, "load_pipeline": load_pipeline, "np": np})
    assert str(caught.value) == line


def test_the_page_is_read():
    assert len(ROWS) > 90 and sum(row[0].startswith(PYTHON) for row in ROWS) > 20
    table_lines = [line for line in bad_inputs.PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(table_lines) == len(ROWS), "a row is not written as `input` | `line` | remark"
