import json
import shutil

import pytest

from sdv_jax.errors import UserError
from sdv_jax.train import config as configs
from sdv_jax.train import record, setup
from tests.train import tiny

BASE = "models/small-world-cogvideox"


def test_an_adapter_says_which_model_it_is_for(tmp_path):
    config = tiny.config(model__path=BASE)
    base = setup.about(config)
    record.save_adapter(tmp_path, setup.model(config, base, token_ids=False), config, base)
    about = json.loads((tmp_path / "adapter.json").read_text())
    assert (about["family"], about["variant"], about["base"]) == ("cogvideox", "custom", "small-world-cogvideox")


def test_an_adapter_of_a_random_model_has_no_base(tmp_path):
    config = tiny.config()
    base = setup.about(config)
    record.save_adapter(tmp_path, setup.model(config, base, token_ids=False), config, base)
    about = json.loads((tmp_path / "adapter.json").read_text())
    assert (about["variant"], about["base"]) == ("custom", "")


def test_stages_are_of_a_number_of_steps(tmp_path):
    """Another one would move the boundary between them, into steps that are done."""
    for order in ("mixed", "stages"):
        record.claim(tmp_path, tiny.config(switch__order=order), [])
        longer = tiny.config(switch__order=order, train__steps=20)
        if order == "mixed":
            assert record.check(tmp_path, longer) == ["train.steps 6 -> 20"]
            continue
        with pytest.raises(UserError, match=r"other settings \(train.steps 6 -> 20\); use a new --workdir, or the"):
            record.check(tmp_path, longer)


def test_the_shipped_run_is_resumed_by_its_config_with_any_guidance_of_samples(tmp_path):
    shutil.copy("models/small-world-subject/config.json", tmp_path)
    for guidance in (1.5, 3.0):
        config = configs.load("configs/small_world_cogvideox.py", {"sample.guidance": guidance})
        record.claim(tmp_path, config, record.check(tmp_path, config))
        assert record.read(tmp_path) == config
