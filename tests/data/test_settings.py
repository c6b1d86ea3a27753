import dataclasses
import json
import pathlib

import pytest

from sdv_jax.data import settings
from sdv_jax.data.decode import Size
from sdv_jax.errors import UserError
from sdv_jax.models.contract import Geometry

NEEDED = {
    "model.path": "m", "source.format": "folder", "source.path": "s", "output.path": "data/my_set",
    "samples.buckets": ("9x32x48",),
}  # fmt: skip
FILES = sorted(pathlib.Path("configs").glob("prepare_*.py"))


def load(**changes):
    given = NEEDED | {key.replace("__", "."): new for key, new in changes.items()}
    return settings.load("configs/prepare.py", given)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_example_is_complete_but_for_paths(path):
    given = {key: NEEDED[key] for key in ("model.path", "source.path", "output.path")}
    config = settings.load(path, given)
    assert config.recipe().buckets
    assert settings.load(path, {**given, "samples.buckets": ("5x32x32",)}).samples.buckets == ("5x32x32",)


def test_every_key_has_a_comment():
    for line in pathlib.Path("configs/prepare.py").read_text().splitlines():
        if "= " in line and line.startswith("    ") and not line.endswith("= ConfigDict()"):
            assert "  # " in line, line


@pytest.mark.parametrize(
    ("key", "new", "expected"),
    [
        ("model.path", "", "'model.path' is empty: this preparation needs it, for example models/CogVideoX-5b"),
        ("samples.buckets", (), "'samples.buckets' is empty"),
        ("samples.buckets", ("9x32",), "'9x32' is not understood; expected FRAMESxHEIGHTxWIDTH"),
        ("samples.buckets", ("0x32x48",), "'0x32x48' is not understood"),
        ("samples.buckets", ("9x32x48", "9x32x48"), "'9x32x48' is there twice"),
        ("samples.buckets", "9x32x48", "found '9x32x48'; one text alone is written with a comma, ('9x32x48',)"),
        ("samples.references", "all", "expected one of target, views, found 'all'"),
        ("samples.jitter", 1.0, "expected a number from 0 to below 1, found 1.0"),
        ("samples.fps", -1, "expected 0 or more"),
        ("samples.crops", 0, "expected a number above 0"),
        ("rejected.most", 1.5, "expected a number from 0 to 1"),
        ("output.dtype", "int8", "expected one of float32, bfloat16, float16"),
        ("output.path", "data/my-set", "the folder is named 'my-set', which is the dataset's name as well"),
        ("output.path", "data/4", "expected a letter and then letters, digits and _"),
        ("work.units", 3, "does not exist: did you mean work.unit"),
        ("samples.framez", 3, "does not exist: did you mean samples.frames"),
        ("page.hight", 3, "does not exist: did you mean page.height"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(key, new, expected):
    with pytest.raises(UserError) as error:
        load(**{key: new})
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_what_decides_the_contents_is_all_but_how():
    found = load().decides()
    assert json.loads(json.dumps(found))["samples.buckets"] == ["9x32x48"]
    assert not set(found) & set(settings.HOW) and {"samples.seed", "source.path", "work.unit"} <= set(found)
    assert load(work__clips=9, page__height=7, output__path="x/other").decides() == found
    assert load(samples__seed=9).decides() != found
    every = {f"{section}.{name}" for section, names in dataclasses.asdict(load()).items() for name in names}
    assert every == set(found) | set(settings.HOW), "no key is forgotten"


@pytest.mark.parametrize(
    ("bucket", "geometry", "expected"),
    [
        (Size(9, 30, 48), {}, "9x30x48: height and width must be multiples of 16 for this model"),
        (Size(8, 32, 48), {}, "frames must be 1 \\+ a multiple of 4"),
        (Size(9, 32, 48), {"frame_patch": 2}, "3 latent frames, expected a multiple of 2 for this model; take 13 "),
    ],
)
def test_sizes_that_the_model_cannot_take(bucket, geometry, expected):
    own = dict(height=32, width=48, num_frames=9, spatial=8, temporal=4, patch=2, channels=4, period=4)
    with pytest.raises(UserError, match=expected):
        settings.check_sizes([Size(9, 32, 48) if not geometry else bucket, bucket], Geometry(**own | geometry))
    settings.check_sizes([Size(9, 32, 48), Size(1, 16, 16)], Geometry(**own))
