"""Raw sets: the same numbers as prepared ones, without preparing."""

import numpy as np
import pytest

from sdv_jax.data import prepare, raw, records, samples
from sdv_jax.data.importers import Rejected, folder
from sdv_jax.data.loading import Mixture, Stream
from sdv_jax.errors import UserError
from sdv_jax.train import datasets
from tests.data import sets
from tests.train import tiny

SETTINGS = '''from configs import prepare


def get_config():
    config = prepare.get_config()
    config.source.format = "folder"
    config.source.path = {path!r}
    config.samples.buckets = ("9x32x48", "13x32x48")
    config.samples.fps = 8.0
    config.samples.frames = 3
    config.model.text_dtype = "float32"
    config.output.dtype = "float32"
    config.rejected.most = {most}
    return config
'''


PAIRS = '''from configs import prepare


def get_config():
    config = prepare.get_config()
    config.source.format = "folder"
    config.source.path = {path!r}
    config.source.options.subjects = True
    config.samples.buckets = ("1x32x48",)
    config.samples.references = "views"
    config.samples.crops = 3
    config.rejected.most = 0.5
    return config
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_pipeline_folder):
    """(folder of the set's config, model)."""
    root = tmp_path_factory.mktemp("raw")
    sets.make(root / "clips", good=5, bad=1)
    (root / "clips.py").write_text(SETTINGS.format(path=str(root / "clips"), most=0.5))
    (root / "strict.py").write_text(SETTINGS.format(path=str(root / "clips"), most=0.0))
    return root, tiny_pipeline_folder(True)


def test_raw_rows_are_those_of_the_prepared_set(place, capsys):
    root, model = place
    found = raw.load(root / "clips.py", model=str(model), embed=True)
    assert "1 of 6 items are left out" in capsys.readouterr().err
    from sdv_jax.data import settings

    config = settings.load(root / "clips.py", {"model.path": str(model), "output.path": str(root / "records")})
    prepare.prepare(config, progress=False)
    prepared = records.load(root / "records")
    assert found.scale == prepared.scale and {b.name for b in found.buckets} == {b.name for b in prepared.buckets}
    np.testing.assert_allclose(found.empty_text, prepared.empty_text, atol=1e-6)
    for theirs in prepared.buckets:
        ours = next(bucket for bucket in found.buckets if bucket.name == theirs.name)
        assert len(ours) == len(theirs) and ours.shapes == theirs.shapes
        for i in range(len(ours)):
            assert ours.describe(i)["key"] == theirs.describe(i)["key"]
            for name, array in theirs[i].items():
                np.testing.assert_allclose(ours[i][name], array, atol=2e-5, err_msg=name)
    assert ours[0]["mean"] is ours[0]["mean"]  # kept, not encoded again


def test_a_run_names_a_raw_set_by_its_file(place, tmp_path):
    root, model = place
    source = {"model.path": str(model), "data.motion": f"{root / 'clips.py'}=2"}
    config = tiny.config(**source, switch__motion_probability=1.0)
    mixture = datasets.load(config, tmp_path)["motion"]
    stream = Stream.of(mixture.parts(), 2, (0, 0), batches=4)
    assert {stream.batch(i, np.arange(2))["mean"].shape[0] for i in range(4)} == {2}
    assert isinstance(mixture, Mixture)


def test_an_error_that_nothing_foresees_costs_one_item(place, monkeypatch, capsys):
    root, model = place
    taken = folder.Importer.__getitem__

    def get(importer, index):
        if index == 2:
            raise ZeroDivisionError("by nought")
        return taken(importer, index)

    with monkeypatch.context() as patch:
        patch.setattr(folder.Importer, "__getitem__", get)
        found = raw.load(root / "clips.py", model=str(model), embed=False)
    assert sum(map(len, found.buckets)) == 4
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith("2 of 6 items are left out: unforeseen error 1, unreadable video 1")
    def lost(*_):
        raise Rejected("file missing", "it does not exist")

    monkeypatch.setattr(samples, "read", lost)
    with pytest.raises(UserError, match="clip.*could be read when the run began, and now not: file missing"):
        found.buckets[0][0]


def test_references_that_are_left_out_are_told(tmp_path, place, capsys):
    source = sets.make_pairs(tmp_path / "pairs", good=2)
    (source / "subject00" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "pairs.py").write_text(PAIRS.format(path=str(source)))
    found = raw.load(tmp_path / "pairs.py", model=str(place[1]), embed=False)
    assert sum(map(len, found.buckets)) == 4
    told = capsys.readouterr().err.splitlines()[-2:]
    assert told[0].endswith("1 of 5 items are left out: unreadable picture 1")
    assert told[1].endswith("2 references are left out: unreadable picture 2")


def test_what_a_raw_set_needs_is_told(place, tmp_path):
    root, model = place
    with pytest.raises(UserError, match="1 of 6 items cannot be used .*; mend the set, or raise rejected.most, now 0"):
        raw.load(root / "strict.py", model=str(model), embed=True)
    source = {"data.motion": str(root / "clips.py"), "switch.motion_probability": 1.0}
    with pytest.raises(UserError, match="is a raw set, encoded while training, and needs model.path"):
        datasets.load(tiny.config(**source), tmp_path)
    with pytest.raises(UserError, match="needs data.workers to be 0"):
        datasets.load(tiny.config(**source, **{"model.path": str(model), "data.workers": 2}), tmp_path)


@pytest.mark.parametrize("source", ["a=", "=2", "a=much", "a=0", "a=-1", "a=inf", "a,a", "a,,b"])
def test_a_mixture_that_is_not_understood_is_told(source, tmp_path):
    with pytest.raises(UserError, match="'data.motion': .* is not understood; expected FOLDER, or FOLDER="):
        datasets.load(tiny.config(data__motion=source, switch__motion_probability=1.0), tmp_path)
