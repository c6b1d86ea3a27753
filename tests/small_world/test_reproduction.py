"""The reproduction: rows are configs, scores and statistics are right on known things, the page says what is in."""

import json

import numpy as np
import pytest
from PIL import Image

from sdv_jax.errors import UserError
from sdv_jax.small_world import World, demo, reproduction, reproduction_report, trials
from sdv_jax.small_world.reproduction import COMMON, RESULTS, ROWS, SAMPLING
from sdv_jax.small_world.reproduction_measures import MEASURES, Family, read

COUNT = SAMPLING.subjects
TRIAL = trials(World(), SAMPLING.pool_seed, COUNT)
MOVING = [scene.motion != "resting" for scene in TRIAL.scenes]


def scores(rng, *, identity: float, moves: bool = True, copies: bool = False) -> dict[str, list]:
    """Raw scores of clips with this identity error that follow the prompt but for what is asked."""
    speeds = [1.2 * moves if moving else 0.0 for moving in MOVING]
    shown = TRIAL.reference_scenes if copies else TRIAL.scenes
    return {
        "identity": (identity + rng.normal(0, 0.004, COUNT)).tolist(), "given": [identity] * COUNT,
        "motion": [moves or not moving for moving in MOVING], "speed": speeds,
        "background": [scene.background for scene in shown], "background_correct": [not copies] * COUNT,
        "clean": [True] * COUNT, "whole": [True] * COUNT, "change": [0.001] * COUNT,
        "copied": [0.02 if copies else 0.2] * COUNT,
    }  # fmt: skip


def record(family: str, row: str, seed: int) -> dict:
    rng = np.random.default_rng((seed, list(ROWS).index(row)))
    adapted = scores(rng, identity=0.05 + 0.002 * seed, moves=row != "image-only", copies=row == "first-frame-no-drop")
    found = {
        "base": scores(np.random.default_rng(1), identity=0.09),
        "truth": scores(np.random.default_rng(2), identity=0.01),
        "adapted": adapted, "wrong": scores(rng, identity=0.09) | {"given": [0.05] * COUNT},
    }  # fmt: skip
    told = {"norm_identity": 0.1, "norm_motion": 0.2, "cosine": 0.5 if row == "image-only" else 0.01}
    told |= {"halves_identity": 0.3, "halves_motion": 0.4}
    groups = {"block 0": told, "blocks.to_q": told}
    gradients = [{"step": step, **told, "groups": groups} for step in range(0, 601, 200)]
    loss = {"loss": 0.2, "bins": [0.1, 0.3]}
    return {
        "family": family, "row": row, "seed": seed, "settings": COMMON | ROWS[row].settings, "scores": found,
        "validation": [{"step": step, "identity": loss, "motion": loss} for step in (0, 800)], "gradients": gradients,
    }  # fmt: skip


def write(results, family: str, runs) -> None:
    (results / family).mkdir(parents=True, exist_ok=True)
    for row, seed in runs:
        (results / family / f"{row}-{seed}.json").write_text(json.dumps(record(family, row, seed)))


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """Several rows of CogVideoX with two seeds or one, nothing of Wan."""
    results = tmp_path_factory.mktemp("results")
    several = [(row, seed) for row in ("full", "image-only", "first-frame-no-drop") for seed in (0, 1)]
    write(results, "cogvideox", [*several, ("rank-4", 0)])
    return results


@pytest.mark.parametrize("family", tuple(demo.SHIPPED))
def test_every_row_is_a_config(family):
    for row, (settings, seeds) in ROWS.items():
        config = reproduction._config(family, row, seeds - 1)
        assert config.train.seed == seeds - 1 and config.train.steps == COMMON["train.steps"]
        for key, value in settings.items():
            section, name = key.split(".")
            assert getattr(getattr(config, section), name) == value


def test_first_seeds_of_all_rows_come_first():
    order = list(reproduction._order(tuple(demo.SHIPPED), tuple(ROWS)))
    assert len(order) == len(set(order)) == 42
    assert [seed for _, _, seed in order] == sorted(seed for _, _, seed in order)


def test_raw_scores_of_true_clips():
    few = trials(World(), SAMPLING.pool_seed, 6)
    truth = few.video / 255.0
    own = reproduction.raw_scores(few, truth)
    assert max(own["identity"]) < 0.004 and own["given"] == own["identity"]
    assert all(own["motion"]) and all(own["background_correct"]) and all(own["clean"]) and all(own["whole"])
    assert own["background"] == [scene.background for scene in few.scenes]
    assert [speed > 0.6 for speed in own["speed"]] == [scene.motion != "resting" for scene in few.scenes]
    shifted = reproduction.raw_scores(few, truth, shift=True)
    assert min(shifted["given"]) > 0.02 and shifted["identity"] == own["identity"]
    still = np.repeat(few.reference[:, None], 9, axis=1) / 255.0
    assert max(reproduction.raw_scores(few, still)["copied"]) == 0 < min(own["copied"])
    blank = reproduction.raw_scores(few, np.full_like(truth, 0.5))
    assert blank["speed"] == [None] * 6 and json.loads(json.dumps(blank)) == blank


def test_measures_on_known_clips(some):
    family = Family(read(some, "cogvideox"))

    def value(row: str, measure: str) -> float:
        return family.estimate(row, measure).value

    assert value("base", "identity") == 0 and value("truth", "identity") == 100
    assert value("full", "identity") == pytest.approx(100 * (0.09 - 0.051) / 0.08, abs=2)
    assert value("full", "moves") == value("full", "prompt") == value("full", "wrong") == 100
    assert value("full", "owed") == pytest.approx(100 * (0.09 - 0.051) / 0.08, abs=2)
    assert value("image-only", "moves") == value("image-only", "speed") == 0
    assert value("image-only", "motion") == pytest.approx(100 * (1 - np.mean(MOVING)))
    assert value("first-frame-no-drop", "ground") == 100 and value("first-frame-no-drop", "nearer") == pytest.approx(90)
    assert family.estimate("base", "wrong") is None and family.estimate("two-stage", "identity") is None
    told = {row: family.difference(row, "moves").told for row in ("image-only", "first-frame-no-drop")}
    assert told == {"image-only": "lower", "first-frame-no-drop": "within noise"}


def test_errors_are_over_seeds_or_over_clips(some):
    family = Family(read(some, "cogvideox"))
    two, one = family.estimate("full", "identity"), family.estimate("rank-4", "identity")
    assert two.error == pytest.approx(abs(two.seeds[0] - two.seeds[1]) / 2)
    scores = record("cogvideox", "rank-4", 0)["scores"]
    base, truth, adapted = (np.array(scores[name]["identity"]) for name in ("base", "truth", "adapted"))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, COUNT, (4000, COUNT))
    resampled = 100 * (base - adapted)[drawn].sum(axis=1) / (base - truth)[drawn].sum(axis=1)
    assert len(one.seeds) == 1 and one.error == pytest.approx(resampled.std(), rel=0.1)
    difference = family.difference("rank-4", "identity")
    assert difference.value == pytest.approx(one.value - two.value)
    assert difference.error > family.seed_spread("identity") * np.sqrt(1 + 1 / 2)


def test_one_seed_each_has_no_spread_between_seeds(tmp_path):
    write(tmp_path, "wan", [("full", 0), ("image-only", 0)])
    family = Family(read(tmp_path, "wan"))
    assert family.seed_spread("identity") is None
    assert family.difference("image-only", "moves").value == -100


def test_the_report_says_what_is_in_and_what_is_not(some, tmp_path):
    page, clips = tmp_path / "reproduction.md", tmp_path / "clips" / "cogvideox" / "full-0"
    page.write_text((RESULTS.parent / "reproduction.md").read_text())
    clips.mkdir(parents=True)
    np.savez(clips / "clips.npz", adapted=TRIAL.video, wrong=TRIAL.video)
    written = reproduction_report.report(some, tmp_path / "clips", tmp_path / "reproduction")
    names = {path.name for path in written}
    assert names == {"table.md", "summary.json", "reproduction.md", "dynamics.png", "ablations.png",
                     "gradients_cogvideox.png", "sheet_cogvideox.png"}  # fmt: skip
    for path in written:
        assert path.suffix != ".png" or Image.open(path).width > 1000
    text = page.read_text()
    assert "**7 of 42 runs are in** (CogVideoX 7 of 21, Wan 0 of 21)" in text and "two-stage 3" in text
    assert "| CogVideoX | moves | 100.0 ± 0.0 | 0.0 ± 0.0 | -100.0 ± 0.0 | lower |" in text
    assert "| Wan | moves | – | – | – | not in yet |" in text
    assert "| CogVideoX | image-only | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.50 … 0.50 |" in text
    assert "reproduction/sheet_cogvideox.png" in text and "sheet_wan" not in text
    line = next(line for line in text.splitlines() if line.startswith("| image-only | 2/3 |"))
    assert "| **0.0 ± 0.0** | *0.84* |" in line
    told = json.loads((tmp_path / "reproduction" / "summary.json").read_text())
    assert told["families"]["cogvideox"]["rows"]["image-only"]["moves"]["difference"] == -100


def test_without_a_run_the_page_is_that_of_the_repository_or_newer(tmp_path):
    (tmp_path / "reproduction.md").write_text((RESULTS.parent / "reproduction.md").read_text())
    written = reproduction_report.report(tmp_path / "none", tmp_path, tmp_path / "reproduction")
    assert {path.name for path in written} == {"table.md", "summary.json", "reproduction.md"}
    assert "**0 of 42 runs are in**" in (tmp_path / "reproduction.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:100], "is not a run's record"),
        (lambda text: "[]", "is not a run's record"),
        (lambda text: text.replace('"train.steps": ', '"train.steps": 9'), "was trained with train.steps=9"),
        (lambda text: text.replace('"wrong"', '"other"'), "lacks clips"),
        (lambda text: text.replace("motion_probability", "p"), "motion_probability"),
    ],
)
def test_records_that_do_not_belong_are_refused(tmp_path, change, message):
    write(tmp_path, "wan", [("full", 0), ("image-only", 0)])
    path = tmp_path / "wan" / "image-only-0.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, "wan")
    assert "\n" not in str(caught.value) and "image-only-0.json" in str(caught.value)


@pytest.mark.parametrize("page", ["nothing", "<!-- begin a -->\n<!-- begin b -->", "<!-- end a -->\n<!-- begin a -->"])
def test_a_page_without_its_markers_is_left_alone(page, tmp_path):
    with pytest.raises(UserError, match="<!-- (begin|end) [ab] -->"):
        reproduction_report.filled(page, {"a": "text"}, where=tmp_path)


def test_parts_are_replaced_and_nothing_else():
    page = "before\n<!-- begin a -->\nold\n<!-- end a -->\nafter"
    once = reproduction_report.filled(page, {"a": "new"}, where=RESULTS)
    assert once == page.replace("old", "new")
    assert reproduction_report.filled(once, {"a": "new"}, where=RESULTS) == once


def test_all_measures_have_a_place_in_the_table():
    assert set(reproduction_report.BESIDE) | set(reproduction_report.OURS) == set(MEASURES)
