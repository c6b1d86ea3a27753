import json
import pathlib

import pytest

from sdv_jax.errors import UserError
from sdv_jax.train import config as configs

FILES = sorted(path for path in pathlib.Path("configs").glob("*.py") if not path.name.startswith("prepare"))
KEPT = {  # what other tools set
    "train.steps", "train.seed", "train.save_every", "train.log_every", "switch.motion_probability",
    "identity.batch_size", "identity.view_drop", "motion.batch_size", "motion.token_drop", "lora.rank", "lora.alpha",
    "optimizer.learning_rate", "model.path", "data.identity", "data.motion",
}  # fmt: skip


def _line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_config_loads_and_survives_json(path):
    config = configs.load(path)
    assert configs.from_tree(json.loads(config.json())) == config
    for key in KEPT:
        configs.value(config, key)


def test_every_key_of_the_base_has_a_comment():
    for line in pathlib.Path("configs/base.py").read_text().splitlines():
        if "= " in line and line.startswith("    ") and "ConfigDict()" not in line and '"to_q"' not in line:
            assert "  # " in line, line


def test_paper_values_are_the_defaults():
    config = configs.load("configs/base.py")
    optimizer = config.optimizer
    assert (config.switch.motion_probability, config.motion.token_drop, config.identity.view_drop) == (0.2, 0.5, 0.5)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (128, 64.0, 0.2)
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (5e-5, 0.9, 0.95)
    assert (optimizer.warmup, optimizer.clip, config.train.steps) == (200, 1.0, 4000)


def test_overrides_from_the_command_line_and_from_python_agree():
    words = [
        "--config.train.steps=7", "--config.lora.alpha=3", "--config.model.path", "a/b", "--config.train.mode=full",
        "--config.text.train_encoder=true", "--config.lora.targets=('to_q',)",
        "--config.model.transformer.num_layers=2",
    ]  # fmt: skip
    by_words = configs.load("configs/base.py", words)
    by_value = configs.load(
        "configs/base.py",
        {"train.steps": 7, "lora.alpha": 3.0, "model.path": "a/b", "text.train_encoder": True, "train.mode": "full",
         "lora.targets": ("to_q",), "model.transformer.num_layers": 2},
    )  # fmt: skip
    assert by_words == by_value
    assert by_words.lora.alpha == 3.0 and by_words.model.transformer == {"num_layers": 2}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--config.train.stepz=3", "config key 'train.stepz' does not exist: did you mean train.steps"),
        ("--config.rank=3", "config key 'rank' does not exist: did you mean lora.rank?"),
        ("--config.quux.zzz=3", "config key 'quux.zzz' does not exist: configs/base.py holds every key"),
        ("--config.train=3", "config key 'train' is a table, found '3' for it as a whole; set train.KEY"),
        ("--config.model.transformer={}", "'model.transformer' is a table, found '{}' for it as a whole; set model.tr"),
        ("--config.train.seed=-1", "config key 'train.seed': expected 0 to 4294967295, found -1"),
        ("--config.train.seed=4294967296", "config key 'train.seed': expected 0 to 4294967295, found 4294967296"),
        ("--config.train.seed=9223372036854775808", "config key 'train.seed': expected 0 to 4294967295"),
        ("--config.small_world.seed=4294967296", "config key 'small_world.seed': expected 0 to 4294967295"),
        ("--config.sample.guidance=-1", "config key 'sample.guidance': expected 0 or more, found -1.0"),
        ("--config.optimizer.epsilon=0", "config key 'optimizer.epsilon': expected a number above 0, found 0.0"),
        ("--config.lora.targets=5", "config key 'lora.targets': expected tuple, found 5"),
        ("--config.lora.targets=None", "config key 'lora.targets': expected tuple, found None"),
        ("--config.lora.targets=3", "config key 'lora.targets': expected tuple, found 3"),
        ("--config.reference.offset=-1", "config key 'reference.offset': expected 0 or more, found -1"),
        ("--config.lora.targets={'to_q': 1}", "config key 'lora.targets': expected tuple, found {'to_q': 1}"),
        ("--config.train.steps=many", "config key 'train.steps': expected int, found 'many'"),
        ("--config.train.steps=1.5", "config key 'train.steps': expected int, found 1.5"),
        ("--config.train.steps=1e99", "config key 'train.steps': expected "),
        ("--config.train.steps=10000000000", "config key 'train.steps': expected at most 10000000, found 10000000000"),
        ("--config.text_to_video.first_frame=0.5", "needs train.objective='text_to_video'; leave it 0"),
        ("--config.train.steps=0", "config key 'train.steps': expected a number above 0, found 0"),
        ("--config.switch.motion_probability=1.2", "expected a number from 0 to 1, found 1.2"),
        ("--config.motion.token_drop=1", "expected a number from 0 to below 1, found 1.0"),
        ("--config.text.train_encoder=maybe", "config key 'text.train_encoder': expected bool, found 'maybe'"),
        ("--config.text.train_encoder=true", "'text.train_encoder': true needs train.mode='full', found 'lora'"),
        ("--config.train.mode=half", "config key 'train.mode': expected one of lora, full, found 'half'"),
        ("--config.train.accumulate=0", "config key 'train.accumulate': expected a number above 0, found 0"),
        ("--config.optimizer.name=muon", "'muon' is for train.mode='full'"),
        ("--config.lora.targets=to_q", "config key 'lora.targets': expected tuple, found 'to_q'"),
        ("--steps=3", "argument '--steps=3' is not understood"),
        ("--config.train.steps", "argument '--config.train.steps' is not understood"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(word, expected):
    with pytest.raises(UserError) as error:
        configs.load("configs/base.py", [word])
    assert expected in _line(error)


@pytest.mark.parametrize("objective", ["subject", "text_to_video"])
def test_muon_has_nothing_to_do_in_an_adapter(objective):
    settings = {"train.objective": objective, "optimizer.name": "muon"}
    with pytest.raises(UserError, match="'optimizer.name': 'muon' is for train.mode='full', found 'lora'; use 'adamw'"):
        configs.load("configs/base.py", settings)
    assert configs.load("configs/base.py", settings | {"train.mode": "full"}).optimizer.name == "muon"


def test_a_file_with_a_misspelt_key_is_told_apart(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import base\ndef get_config():\n    c = base.get_config()\n    c.train.stepz = 3\n    return c\n"
    )
    with pytest.raises(UserError, match="stepz"):
        configs.load(path)
    path.write_text(
        "from configs import base\ndef get_config():\n    c = base.get_config()\n    c.train.steps = 3\n    return c\n"
    )
    assert configs.load(path).train.steps == 3


@pytest.mark.parametrize(
    "body", ["raise OSError('no disk')", "1 / 0", "raise ValueError", "return None", "x =", "raise SystemExit(3)"]
)
def test_whatever_a_config_file_raises_is_one_line(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(f"def get_config():\n    {body}\n")
    with pytest.raises(UserError) as error:
        configs.load(path)
    assert _line(error).startswith(f"config {path}: ")
    assert "Error" in str(error.value) or "SystemExit: 3" in str(error.value)


def test_no_such_file():
    with pytest.raises(UserError, match="configs/nothing.py: no such file"):
        configs.load("configs/nothing.py")


def test_a_config_of_another_version_is_refused():
    tree = json.loads(configs.load("configs/base.py").json())
    del tree["train"]["keep"]
    with pytest.raises(UserError, match="'train.keep' is missing"):
        configs.from_tree(tree)
