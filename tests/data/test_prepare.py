import dataclasses
import errno
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from sdv_jax import cli
from sdv_jax.checkpoints import model_folder
from sdv_jax.data import prepare, records
from sdv_jax.data.decode import Size, read_clip, read_picture
from sdv_jax.data.encoding import Encoders
from sdv_jax.data.importers import folder
from sdv_jax.data.importers.item import Clip, Picture
from sdv_jax.errors import UserError
from tests.data import sets


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sets.make(tmp_path_factory.mktemp("sets") / "clips", good=7, bad=2)


@pytest.fixture
def model(tiny_pipeline_folder):
    return tiny_pipeline_folder()


@pytest.fixture
def quick(monkeypatch, model):
    """Preparation of the test sets, with encoders that need no compiling; returns the encoders that were made."""
    made, traits = [], model_folder.about(model).traits

    def load(*_, **__):
        made.append(sets.fake_encoders(traits))
        return made[-1]

    monkeypatch.setattr(Encoders, "load", load)
    return made


def everything(folder):
    """Keys and records of a dataset, in order, with the sums of their files."""
    loaded = records.load(folder)
    found = [(b.name, b.describe(i)["key"], b[i]) for b in loaded.buckets for i in range(len(b))]
    return [(name, key, {n: a.tobytes() for n, a in arrays.items()}) for name, key, arrays in found]


def line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# MARK: what is in a record


@pytest.mark.parametrize("family", ["cogvideox", "wan"])
def test_records_are_what_the_models_encoders_make(tmp_path, monkeypatch, source, model, family):
    bucket, size = "9x32x64", Size(9, 32, 64)
    if family == "wan":
        from tests.tiny_wan import save_pipeline

        model = save_pipeline(tmp_path / "wan")
    config = sets.config(model, source, tmp_path / "out", samples__buckets=(bucket,), work__clips=2)
    result = prepare.prepare(config, progress=False)
    assert (result.finished, result.records, result.rejected, result.encoded) == (True, 7, 2, 7)
    loaded, traits = records.load(tmp_path / "out"), model_folder.about(model).traits
    assert loaded.scale == traits.latents
    graph, state = nnx.split(model_folder.load_component(model, "vae"))
    encode, text = jax.jit(lambda video: nnx.merge(graph, state).encode(video)), Encoders.load(model).text
    np.testing.assert_allclose(loaded.empty_text, text([""])[0], atol=1e-6)
    (found,) = loaded.buckets
    for i in (0, 6):
        pixels = read_clip(Clip(source / f"clip{i:02d}.mp4"), size, fps=sets.FPS)
        record = found[i]
        for frames, name in ((pixels, ""), (pixels[:, None], "reference_")):
            batch = jnp.asarray(frames if name else frames[None], jnp.float32) / 127.5 - 1
            mean, logvar = (np.asarray(moment) for moment in encode(batch))
            if not name:
                np.testing.assert_allclose(record["mean"], mean[0], atol=2e-5)
                np.testing.assert_allclose(record["logvar"], logvar[0], atol=2e-4)
                continue
            gaps = np.abs(record["reference_mean"][:, None] - mean[None, :, 0]).max(axis=(2, 3, 4))
            drawn = gaps.argmin(axis=1)
            assert gaps.min(axis=1).max() < 2e-5 and len(set(drawn)) == 3 and list(drawn) == sorted(drawn)
            np.testing.assert_allclose(record["reference_logvar"], logvar[drawn, 0], atol=2e-4)
        told = found.describe(i)
        assert told["key"] == f"clip{i:02d}.mp4" and told["caption"] == "a red ball on sand"
        assert told["provenance"] == {"set": "clips", "file": f"clip{i:02d}.mp4"}
        np.testing.assert_allclose(record["text"], text([told["caption"]])[0], atol=1e-6)


def test_pairs_are_a_target_and_jittered_crops_of_the_other_view(tmp_path, quick, model):
    source = sets.make_pairs(tmp_path / "pairs")
    config = sets.config(
        model, source, tmp_path / "out", source__options__subjects=True, samples__buckets=("1x32x48",),
        samples__references="views", samples__crops=3, samples__jitter=0.2,
    )  # fmt: skip
    prepare.prepare(config, progress=False)
    (bucket,) = records.load(tmp_path / "out").buckets
    assert bucket.shapes["mean"][0] == 1 and bucket.shapes["reference_mean"][0] == 3
    record, encode = bucket[0], sets.FakeVideo()
    whole = [read_picture(Picture(source / "subject00" / f"{v}.png"), height=32, width=48) for v in "ab"]
    plain, other = (encode(pixels[None, None], batch_size=1)[0][0] for pixels in whole)
    assert 0 < np.abs(record["mean"] - plain).mean() < np.abs(record["mean"] - other).mean()
    crops = record["reference_mean"]
    assert all(np.abs(crop - other[0]).mean() < np.abs(crop - plain[0]).mean() for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 3
    still = dataclasses.replace(config, samples=dataclasses.replace(config.samples, jitter=0.0))
    still = dataclasses.replace(still, output=dataclasses.replace(still.output, path=str(tmp_path / "still")))
    prepare.prepare(still, progress=False)
    np.testing.assert_array_equal(records.load(tmp_path / "still").buckets[0][0]["mean"], plain)


def test_token_ids_and_half_precision(tmp_path, monkeypatch, source, model):
    config = sets.config(
        model, source, tmp_path / "out", output__text="token_ids", output__dtype="bfloat16", samples__frames=0
    )
    prepare.prepare(config, progress=False)
    loaded = records.load(tmp_path / "out")
    (bucket,) = loaded.buckets
    assert bucket.has_token_ids and loaded.empty_text.dtype == np.int32 and bucket.shapes["reference_mean"][0] == 9
    record = bucket[3]
    assert record["mean"].dtype == jnp.bfloat16 and record["text"].dtype == np.int32
    ids = Encoders.load(model, embed=False).text(["a red ball on sand", ""])
    np.testing.assert_array_equal(record["text"], ids[0])
    np.testing.assert_array_equal(loaded.empty_text, ids[1])


def test_clips_are_encoded_in_full_batches(tmp_path, quick, model, source):
    prepare.prepare(sets.config(model, source, tmp_path / "out", work__unit=9, work__clips=3), progress=False)
    shapes = [shape for shape, _ in quick[0].video.calls if shape[1] == 9]
    assert [shape[0] for shape in shapes] == [3, 3, 1]


# MARK: interrupted, in parts, again


@pytest.mark.parametrize(("how", "processes"), [("random", 1), ("random", 2), ("replace", 1), ("replace", 2)])
def test_killed_at_any_moment_nothing_is_lost_or_doubled(tmp_path, quick, model, source, how, processes):
    prepare.prepare(sets.config(model, source, tmp_path / "unbroken"), progress=False)
    command = [sys.executable, "-m", "tests.data.killing", how, "5", model, source, tmp_path / "broken", str(processes)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    found = everything(tmp_path / "broken")
    assert found == everything(tmp_path / "unbroken")
    assert sorted(key for _, key, _ in found) == [f"clip{i:02d}.mp4" for i in range(7)]
    one, other = (records.load(tmp_path / name) for name in ("broken", "unbroken"))
    assert one.fingerprint == other.fingerprint
    for file in ("rejected.jsonl", "empty_text.npy"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "unbroken" / file).read_bytes()
    assert not list((tmp_path / "broken" / "9x32x48").rglob(".writing.*array_record*"))


def test_processes_share_the_work_and_the_last_one_describes_it(tmp_path, quick, model, source):
    prepare.prepare(sets.config(model, source, tmp_path / "one"), progress=False)
    config = sets.config(model, source, tmp_path / "two")
    first = prepare.prepare(config, process=(1, 2), progress=False)
    assert not first.finished and first.encoded == 3 and not (tmp_path / "two" / "manifest.json").exists()
    assert "units of other processes are not finished" in prepare.tell(first, config)
    with pytest.raises(UserError, match="run the same sdv prepare again to finish it"):
        records.load(tmp_path / "two")
    second = prepare.prepare(config, process=(0, 2), progress=False)
    assert second.finished and second.encoded == 4 and second.records == 7
    assert everything(tmp_path / "two") == everything(tmp_path / "one")
    assert sum(len(encoders.video.calls) for encoders in quick) > 0
    before = {f: f.read_bytes() for f in (tmp_path / "two").rglob("*") if f.is_file()}
    again = prepare.prepare(config, process=(1, 2), progress=False)
    assert again.finished and again.encoded == 0 and len(quick) == 3, "nothing is left to do: no weights are read"
    assert before == {f: f.read_bytes() for f in (tmp_path / "two").rglob("*") if f.is_file()}


def test_the_same_command_twice_at_once_is_one_line_and_the_first_goes_on(tmp_path, quick, model, source, monkeypatch):
    config, load, others = sets.config(model, source, tmp_path / "out"), Encoders.load, []

    def meanwhile(*args, **options):
        monkeypatch.setattr(Encoders, "load", load)
        for place in ((0, 2), (0, 1)):
            with pytest.raises(UserError, match=r"out is being prepared by another process \(0/2\); wait") as error:
                prepare.prepare(config, process=place, progress=False)
            assert line(error)
        others.append(prepare.prepare(config, process=(1, 2), progress=False))
        return load(*args, **options)

    monkeypatch.setattr(Encoders, "load", meanwhile)
    result = prepare.prepare(config, process=(0, 2), progress=False)
    assert [other.encoded for other in others] == [3] and (result.finished, result.encoded) == (True, 4)
    assert not list((tmp_path / "out").glob(".*"))
    prepare.prepare(sets.config(model, source, tmp_path / "one"), progress=False)
    assert everything(tmp_path / "out") == everything(tmp_path / "one")


def test_progress_and_speed_are_told(tmp_path, quick, model, source, capsys):
    config = sets.config(model, source, tmp_path / "out")
    told = prepare.tell(prepare.prepare(config), config)
    assert "item/s" in capsys.readouterr().err
    assert told.startswith(f"{tmp_path / 'out'}  7 records, 2 items rejected; 7 of them now, ") and "samples/s" in told


CHANGES = {
    "samples__fps": (4.0, "samples.fps was 8.0, is 4.0"),
    "samples__buckets": (("5x32x48",), r"samples.buckets was \['9x32x48'\], is \['5x32x48'\]"),
    "output__dtype": ("float16", "output.dtype was 'float32', is 'float16'"),
    "work__unit": (3, "work.unit was 2, is 3"),
    "source__options__kind": ("video", r"source.options was \{\}, is \{'kind': 'video'\}"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_going_on_with_other_settings_is_refused(tmp_path, quick, model, source, key):
    prepare.prepare(sets.config(model, source, tmp_path / "out"), process=(0, 2), progress=False)
    new, expected = CHANGES[key]
    with pytest.raises(UserError, match=expected) as error:
        prepare.prepare(sets.config(model, source, tmp_path / "out", **{key: new}), progress=False)
    assert "restore them, or use another output.path" in line(error)


def test_settings_of_how_may_change(tmp_path, quick, model, source):
    prepare.prepare(sets.config(model, source, tmp_path / "out"), process=(0, 2), progress=False)
    changes = dict(work__clips=4, work__workers=1, rejected__most=0.9, page__thumbnails=0, work__captions=3)
    assert prepare.prepare(sets.config(model, source, tmp_path / "out", **changes), progress=False).finished


def test_another_source_or_model_is_refused(tmp_path, quick, model, source):
    mine, other = tmp_path / "source", tmp_path / "model"
    shutil.copytree(source, mine)
    shutil.copytree(model, other)
    config = sets.config(other, mine, tmp_path / "out")
    prepare.prepare(config, process=(0, 2), progress=False)
    (mine / "clip00.mp4").rename(mine / "clip0x.mp4")
    with pytest.raises(UserError, match="items of the source was") as error:
        prepare.prepare(config, progress=False)
    line(error)
    (mine / "clip0x.mp4").unlink()
    with pytest.raises(UserError, match="number of items was 9, is 8"):
        prepare.prepare(config, progress=False)
    shutil.copy(source / "clip00.mp4", mine)
    (weights,) = other.glob("vae/*.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(UserError, match=r"model \(its files\) was"):
        prepare.prepare(config, progress=False)


# MARK: bad items, bad places


def test_items_that_cannot_be_used_are_set_aside_with_their_reason(tmp_path, quick, model, source):
    mine = tmp_path / "source"
    shutil.copytree(source, mine)
    (mine / "clip01.txt").unlink()
    (mine / "clip02.txt").write_text("  \n")
    (mine / "clip03.txt").write_text("a very long caption " * 500)
    sets.clips.write(mine / "clip04.mp4", sets.moving(4, 5), fps=sets.FPS)
    prepare.prepare(sets.config(model, mine, tmp_path / "out", rejected__most=0.9), progress=False)
    told = [json.loads(row) for row in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {item["key"]: item["reason"] for item in told}
    assert reasons == {
        "clip01.mp4": "no caption", "clip02.mp4": "no caption", "clip04.mp4": "too short",
        "nothing00.mp4": "unreadable video", "nothing01.mp4": "unreadable video",
    }  # fmt: skip
    assert all(item["detail"] and "\n" not in item["detail"] for item in told)
    loaded = records.load(tmp_path / "out")
    assert loaded.about["rejected"] == {"no caption": 2, "unreadable video": 2, "too short": 1}
    assert list(loaded.about["rejected"].values()) == sorted(loaded.about["rejected"].values(), reverse=True)
    assert loaded.about["captions_cut"] == len(loaded) == 4 and loaded.about["seconds_of_video"] == 4 * 9 / 8
    long = next(b for i in range(4) if (b := loaded.buckets[0].describe(i))["key"] == "clip03.mp4")
    assert len(long["caption"]) == 9_999


def test_a_broken_picture_costs_its_own_item_and_not_those_that_refer_to_it(tmp_path, quick, model):
    source = sets.make_pairs(tmp_path / "pairs", good=2)
    (source / "subject00" / "aa.png").write_bytes(b"no picture")
    (source / "subject01" / "a.png").write_bytes(b"no picture")
    config = sets.config(
        model, source, tmp_path / "out", source__options__subjects=True, samples__buckets=("1x32x48",),
        samples__references="views", samples__crops=3, rejected__most=0.9,
    )  # fmt: skip
    result = prepare.prepare(config, progress=False)
    told = [json.loads(row) for row in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {item["key"]: item["reason"] for item in told} == {
        "subject00/aa.png": "unreadable picture", "subject01/a.png": "unreadable picture",
        "subject01/b.png": "unreadable picture",
    }  # fmt: skip
    assert [key for _, key, _ in everything(tmp_path / "out")] == ["subject00/a.png", "subject00/b.png"]
    assert records.load(tmp_path / "out").about["references_left_out"] == {"unreadable picture": 2}
    assert "2 records, 3 items rejected, 2 references left out" in prepare.tell(result, config)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "References left out" in page and "subject00/aa.png is not an image" in page
    (tmp_path / "out" / "shards" / "00000.json").unlink()
    assert prepare.prepare(config, progress=False).left_out == 2


def test_pictures_with_damaged_tags_are_taken_and_pillow_says_nothing(tmp_path, quick, model, recwarn):
    tags = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x12\x01\x03\0\x01\0\0\0\x01\0\0\0" + b"cut"
    (tmp_path / "set").mkdir()
    for i in range(6):
        Image.fromarray(sets.moving(i, 1)[0]).save(tmp_path / "set" / f"{i}.jpg", exif=tags)
        (tmp_path / "set" / f"{i}.txt").write_text("a ball")
    config = sets.config(model, tmp_path / "set", tmp_path / "out", samples__buckets=("1x32x48",))
    assert prepare.prepare(config, progress=False).records == 6
    assert not [warning for warning in recwarn if "PIL" in warning.filename]


def raising_at(item, error):
    """A folder's `__getitem__` that raises an error at one item."""
    taken = folder.Importer.__getitem__

    def get(importer, index):
        if index == item:
            raise error
        return taken(importer, index)

    return get


def test_an_error_that_nothing_foresees_costs_one_item(tmp_path, quick, model, source, monkeypatch):
    monkeypatch.setattr(folder.Importer, "__getitem__", raising_at(2, ZeroDivisionError("by nought")))
    config = sets.config(model, source, tmp_path / "out", rejected__most=0.9)
    assert prepare.prepare(config, progress=False).records == 6
    told = [json.loads(row) for row in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert told[0] == {"key": "clip02.mp4", "reason": "unforeseen error", "detail": "ZeroDivisionError: by nought"}
    config = sets.config(model, source, tmp_path / "strict", rejected__most=0.1, rejected__judged_after=4)
    with pytest.raises(UserError, match=r"could not be used \(unforeseen error: 1\)"):
        prepare.prepare(config, progress=False)


def test_an_error_of_the_machine_is_one_line_and_the_same_command_goes_on(tmp_path, quick, model, source, monkeypatch):
    config = sets.config(model, source, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(folder.Importer, "__getitem__", raising_at(4, OSError(errno.ENFILE, "Too many open files")))
        with pytest.raises(UserError, match="item clip04.mp4 cannot be read: Too many open files") as error:
            prepare.prepare(config, progress=False)
    assert line(error)
    result = prepare.prepare(config, progress=False)
    assert (result.finished, result.records, result.encoded) == (True, 7, 3)


def test_a_key_that_is_there_twice_counts_once(tmp_path, quick, model, source, monkeypatch):
    monkeypatch.setattr(folder.Importer, "key", lambda _, index: "abacdbaef"[index])
    prepare.prepare(sets.config(model, source, tmp_path / "out", rejected__most=0.9), progress=False)
    told = [json.loads(row) for row in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [item["detail"] for item in told if item["reason"] == "duplicate key"] == [
        "item 2 has the key of item 0", "item 5 has the key of item 1", "item 6 has the key of item 0",
    ]  # fmt: skip
    assert [key for _, key, _ in everything(tmp_path / "out")] == ["a", "b", "c", "d"]


def test_of_items_with_one_key_the_first_that_can_be_used_counts(tmp_path, quick, model, source, monkeypatch):
    mine = tmp_path / "source"
    shutil.copytree(source, mine)
    (mine / "clip00.txt").unlink()
    (mine / "clip02.mp4").write_bytes(b"no video")
    monkeypatch.setattr(folder.Importer, "key", lambda _, index: "abacaabef"[index])
    config = sets.config(model, mine, tmp_path / "out", rejected__most=0.9)
    for process in (1, 0):  # each finds out on its own
        prepare.prepare(config, process=(process, 2), progress=False)
    told = [json.loads(row) for row in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(item["key"], item["reason"]) for item in told[:4]] == [
        ("a", "no caption"), ("a", "unreadable video"), ("a", "duplicate key"), ("b", "duplicate key"),
    ]  # fmt: skip
    assert [item["detail"] for item in told[2:4]] == ["item 5 has the key of item 4", "item 6 has the key of item 1"]
    assert [key for _, key, _ in everything(tmp_path / "out")] == ["b", "c", "a"]


def test_too_many_bad_items_stop_the_run_and_a_higher_limit_goes_on(tmp_path, quick, model):
    source = sets.make(tmp_path / "source", good=4, bad=6)
    config = sets.config(model, source, tmp_path / "out", rejected__most=0.3)
    for attempt in range(2):
        with pytest.raises(UserError, match="of 6 items could not be used") as error:
            prepare.prepare(config, progress=False)
        assert "unreadable video: 2), more than rejected.most=0.3 allows" in line(error)
        assert len(quick) == 1, f"attempt {attempt}: the second time no weights are read"
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 2
    config = dataclasses.replace(config, rejected=dataclasses.replace(config.rejected, most=0.9))
    result = prepare.prepare(config, progress=False)
    assert (result.finished, result.records, result.rejected, result.encoded) == (True, 4, 6, 0)


def test_a_small_set_is_judged_at_its_end(tmp_path, quick, model):
    source = sets.make(tmp_path / "source", good=1, bad=1)
    config = sets.config(model, source, tmp_path / "out", rejected__most=0.3, rejected__judged_after=100)
    with pytest.raises(UserError, match="1 of 2 items could not be used"):
        prepare.prepare(config, progress=False)


def test_nothing_usable_and_nothing_at_all_are_refused(tmp_path, quick, model):
    source = sets.make(tmp_path / "bad", good=0, bad=3)
    with pytest.raises(UserError, match="none of 3 items could be used; see .*rejected.jsonl"):
        prepare.prepare(sets.config(model, source, tmp_path / "out", rejected__most=1.0), progress=False)
    source = sets.make(tmp_path / "empty", good=0)
    with pytest.raises(UserError, match="holds no"):
        prepare.prepare(sets.config(model, source, tmp_path / "out2"), progress=False)
    assert not (tmp_path / "out2").exists()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, quick, model, source):
    prepare.prepare(sets.config(model, source, tmp_path / "whole"), progress=False)
    config = sets.config(model, source, tmp_path / "out")
    prepare.prepare(config, process=(0, 3), progress=False)
    kept = {f: f.read_bytes() for f in (tmp_path / "out").rglob("train.*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (60_000, 4_000):  # of a file in bytes: refuses records, and the manifest and page as well
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match="cannot be written") as error:
                prepare.prepare(config, progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "too large" in line(error).lower()
        assert kept == {f: f.read_bytes() for f in kept}
        assert not list((tmp_path / "out").rglob(".writing*"))
    assert prepare.prepare(config, progress=False).finished
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_place_that_takes_no_files_is_told_before_weights_are_read(tmp_path, quick, model, source, monkeypatch):
    def refuse(**_):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="no permission to write there") as error:
        prepare.prepare(sets.config(model, source, tmp_path / "out"), progress=False)
    assert line(error) and not quick


def test_a_folder_of_something_else_is_left_alone(tmp_path, quick, model, source):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(UserError, match=r"holds other files \(letters.txt, ...\)"):
        prepare.prepare(sets.config(model, source, tmp_path / "home"), progress=False)
    assert [f.name for f in (tmp_path / "home").iterdir()] == ["letters.txt"]


def test_whatever_file_is_damaged_loading_tells_it_or_the_same_command_mends_it(tmp_path, quick, model, source):
    config = sets.config(model, source, tmp_path / "out")
    prepare.prepare(config, progress=False)
    whole = everything(tmp_path / "out")
    files = sorted(f.relative_to(tmp_path / "out") for f in (tmp_path / "out").rglob("*") if f.is_file())
    needed = {"manifest.json", "empty_text.npy", "dataset_info.json", "features.json"}
    for number, file in enumerate(files):
        for damage in (None, b"", (tmp_path / "out" / file).read_bytes()[:30]):
            copy = tmp_path / "copies" / f"c{number}"
            shutil.copytree(tmp_path / "out", copy)
            (copy / file).unlink() if damage is None else (copy / file).write_bytes(damage)
            if file.name in needed or "array_record" in file.name:
                with pytest.raises(UserError, match=f"prepared data {copy}") as error:
                    records.load(copy)
                line(error)
            else:
                assert everything(copy) == whole
            mend(dataclasses.replace(config, output=dataclasses.replace(config.output, path=str(copy))), file, whole)
            shutil.rmtree(copy)


def test_a_changed_byte_of_a_finished_set_is_mended_by_the_same_command(tmp_path, quick, model, source):
    config = sets.config(model, source, tmp_path / "out")
    prepare.prepare(config, progress=False)
    whole, fingerprint = everything(tmp_path / "out"), records.load(tmp_path / "out").fingerprint
    file = sorted((tmp_path / "out").rglob("train.*"))[1]
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=f"is damaged, in {file} .*; prepare it again") as error:
        everything(tmp_path / "out")
    assert line(error)
    assert prepare.prepare(config, process=(0, 2), progress=False).encoded == 0, "its unit is another process's"
    assert prepare.prepare(config, process=(1, 2), progress=False).encoded == 2, "one unit of two items"
    assert everything(tmp_path / "out") == whole and records.load(tmp_path / "out").fingerprint == fingerprint


def mend(config, file, whole):
    """Runs the same command on a damaged folder: it mends it, or says in one line what to remove."""
    copy = Path(config.output.path)
    for _ in range(2):
        try:
            prepare.prepare(config, progress=False)
            assert everything(copy) == whole
            return
        except UserError as error:
            assert "\n" not in str(error) and ("remove" in str(error) or "choose a new" in str(error)), error
            if file.name == "prepare.json":
                return
            (copy / file).unlink()
    raise AssertionError(f"{file} was not mended")


# MARK: processes


@pytest.mark.parametrize(
    ("told", "environment", "expected"),
    [
        ("2/5", {}, (2, 5)),
        (None, {}, (0, 1)),
        (None, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        (None, {"SLURM_PROCID": "3"}, (0, 1)),
        (None, {"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}, (1, 2)),
        ("0/1", {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (0, 1)),
    ],
)
def test_which_process_this_is(told, environment, expected):
    assert prepare.this_process(told, environment) == expected


@pytest.mark.parametrize("told", ["1", "2/2", "-1/2", "a/b", "0/0", "1/2/3", ""])
def test_a_process_that_cannot_be(told):
    with pytest.raises(UserError, match="expected I/N with I from 0 to N - 1"):
        prepare.this_process(told, {})


# MARK: command line


def test_the_command_tells_its_result_in_one_line(tmp_path, quick, model, source, capsys):
    words = [f"--config.{key}={new}" for key, new in {
        "model.path": model, "source.path": source, "output.path": tmp_path / "out", "work.unit": 4,
        "samples.buckets": ("9x32x48",), "rejected.most": 0.3,
    }.items()]  # fmt: skip
    command = ["prepare", "--config", "configs/prepare_folder.py", *words]
    assert cli.main([*command, "--process", "1/2"]) == 0
    assert capsys.readouterr().out.endswith("units of other processes are not finished yet\n")
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'out'}  7 records, 2 items rejected; 4 of them now") and "item/s" in err
    assert cli.main([*command, "--config.samples.fps=4"]) == 2
    begun = f"sdv: error: {tmp_path / 'out'} was begun with other settings: samples.fps was 8.0, is 4.0"
    assert capsys.readouterr().err.startswith(begun)
    assert cli.main([*command, "--process", "2/2"]) == 2
    assert capsys.readouterr().err == (
        "sdv: error: process '2/2' is not understood; expected I/N with I from 0 to N - 1, such as 0/4\n"
    )
