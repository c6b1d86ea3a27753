"""`sdv analyse`: what is read, told and drawn of a run's gradients, and what is refused."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sdv_jax import cli
from sdv_jax.errors import UserError
from sdv_jax.train import analysis

STEPS = range(0, 81, 10)
GROUPS = ("block 0", "block 10", "block 2", "blocks.attn1.to_q")


def record(step: int, cosine: float) -> dict:
    def told(value: float) -> dict:
        return {"cosine": value, "norm_identity": 2.0 / (1 + step), "norm_motion": 0.5}

    groups = {name: told(cosine + number / 10) for number, name in enumerate(GROUPS)}
    return {"step": step} | told(cosine) | {"groups": groups}


def changed(**values) -> str:
    """A line of gradients.jsonl with other values."""
    return json.dumps(record(0, 0.4) | values) + "\n"


LINE = changed()


def write(folder, *, validation: bool = True):
    folder.mkdir(parents=True)
    lines = [json.dumps(record(step, 0.4 - step / 200)) + "\n" for step in STEPS]
    (folder / "gradients.jsonl").write_text("".join(lines))
    if validation:
        loss = {"loss": 1.0, "bins": [0.5, 1.5]}
        lines = [json.dumps({"step": step, "identity": loss, "motion": loss}) + "\n" for step in (0, 40, 80)]
        (folder / "validation.jsonl").write_text("".join(lines))
    return folder


def test_the_table_tells_the_first_value_and_the_last_quarter(tmp_path):
    run = analysis.read(write(tmp_path / "mixed"))
    assert [one["step"] for one in analysis.last_quarter(run.gradients)] == [60, 70, 80]
    assert analysis.late(run.gradients, "cosine") == pytest.approx(0.05)
    line = analysis.table([run]).splitlines()[1]
    for cell in ("mixed", "0-80", "0.400 -> 0.050", "2.0000 -> 0.0282", "block 0 0.050", "blocks.attn1.to_q 0.350"):
        assert cell in line


def test_one_record_is_enough(tmp_path):
    folder = write(tmp_path / "young", validation=False)
    (folder / "gradients.jsonl").write_text(json.dumps(record(0, 0.3)) + "\n")
    run = analysis.read(folder)
    analysis.plot([run], tmp_path / "one.png", maps=[run])
    assert "0.300 -> 0.300" in analysis.table([run])


def test_a_half_written_last_line_is_no_record_yet(tmp_path):
    folder = write(tmp_path / "killed")
    with (folder / "gradients.jsonl").open("a") as file:
        file.write('{"step": 90, "cos')
    assert analysis.read(folder).gradients[-1]["step"] == 80


def test_blocks_come_in_order_before_layers():
    assert sorted(GROUPS, key=analysis._place) == ["block 0", "block 2", "block 10", "blocks.attn1.to_q"]


def test_the_command_leaves_a_picture_with_a_map_of_one_run(tmp_path, capsys):
    write(tmp_path / "a" / "run")
    write(tmp_path / "b" / "run", validation=False)
    one, both = tmp_path / "a" / "run", tmp_path / "both.png"
    assert cli.main(["analyse", str(one)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(one / "gradients.png")
    assert cli.main(["analyse", str(one), str(tmp_path / "b" / "run"), "--out", str(both)]) == 0
    assert f"{tmp_path}/b/run" in capsys.readouterr().out  # folders of one name are told apart by their paths
    with_map, without = (Image.open(path) for path in (one / "gradients.png", both))
    assert with_map.width == without.width and with_map.height > without.height
    coloured = np.ptp(np.asarray(with_map.convert("RGB"))[without.height + 100 :].astype(int), axis=-1) > 30
    assert coloured.mean() > 0.1  # the map of cosines far above and below zero


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "has no gradients.jsonl; train with --config.gradients.every"),
        ("", "has no record yet"),
        ("nonsense\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 has no 'step'"),
        ('{"step": 0, "cosine": 0.1}\n', "line 1 has no 'norm_identity'"),
        (b'{"step": 0, "\xff": 1}\n', "gradients.jsonl, line 1 is not JSON"),
        (LINE + changed(cosine=None), "gradients.jsonl, line 2: 'cosine' is null, expected a number"),
        (changed(norm_motion="0.5"), "line 1: 'norm_motion' is \"0.5\", expected a number"),
        (changed(step=True), "line 1: 'step' is true, expected a number"),
        (changed(groups={}), "line 1: 'groups' is {}, expected groups of layers"),
        (changed(groups={"a": {"cosine": []}}), "line 1, group 'a': 'cosine' is .., expected a number"),
        (changed(groups={"a": {"cosine": 0.1}}) + LINE, "line 1 has other 'groups' than the last line"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, text, complaint):
    if text is not None:
        (tmp_path / "gradients.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=complaint) as caught:
        analysis.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        (None, "validation.jsonl, line 1, 'motion' has no 'loss'"),
        ({"loss": "1", "bins": []}, "line 1, 'motion': 'loss' is \"1\", expected a number"),
        ({"loss": 1, "bins": [None]}, "line 1, 'motion': 'bins' is .null., expected a list of numbers"),
    ],
)
def test_a_record_of_losses_that_is_none_is_refused_in_one_line(tmp_path, told, complaint):
    folder = write(tmp_path / "run")
    (folder / "validation.jsonl").write_text(json.dumps({"step": 0, "motion": told}) + "\n")
    with pytest.raises(UserError, match=complaint):
        analysis.read(folder)


def test_bins_whose_number_was_changed_are_drawn_from_there_on(tmp_path):
    folder = write(tmp_path / "run")
    with (folder / "validation.jsonl").open("a") as file:
        for step in (100, 120):
            file.write(json.dumps({"step": step, "motion": {"loss": 1.0, "bins": [0.5, 1.0, 1.5]}}) + "\n")
    run = analysis.read(folder)
    axes = Figure().subplots()
    analysis._bins(axes, run, "motion")
    assert [list(line.get_xdata()) for line in axes.lines] == [[100, 120]] * 3
    assert axes.get_legend().get_title().get_text() == "3 bins, from step 100"
    analysis.plot([run], tmp_path / "run.png", maps=[run])


def test_a_run_that_diverged_is_drawn(tmp_path):
    folder = write(tmp_path / "run")
    with (folder / "gradients.jsonl").open("a") as file:
        file.write(json.dumps(record(90, float("nan"))) + "\n")
    run = analysis.read(folder)
    analysis.plot([run], tmp_path / "run.png", maps=[run])
    assert "nan" in analysis.table([run])


def test_the_picture_is_a_png(tmp_path, capsys):
    write(tmp_path / "run")
    assert cli.main(["analyse", str(tmp_path / "run"), "--out", str(tmp_path / "x.pdf")]) == 2
    assert "does not end in .png; name it x.png" in capsys.readouterr().err
