import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sdv_jax.data.loading import Mixture
from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale
from sdv_jax.train import datasets, loop, setup
from tests.train import tiny

BASE = "models/small-world-cogvideox"


def _resized(dataset, *, moments=(), text=None):
    """The dataset with zeros of another (h, w, c), or of another (length, width) of text."""
    changes = {}
    if moments:
        for name in ("mean", "logvar", "reference_mean", "reference_logvar"):
            changes[name] = np.zeros((*getattr(dataset, name).shape[:2], *moments), np.float32)
    if text:
        changes |= {"text": np.zeros((len(dataset), *text), np.float32), "empty_text": np.zeros(text, np.float32)}
    return dataclasses.replace(dataset, **changes)


def _mixtures(data):
    return {name: Mixture.of(dataset, "clips") for name, dataset in data.items()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moments": (4, 4, 6)}, "latents have 6 channels, expected 4, the model's"),
        ({"moments": (5, 4, 4)}, "latents are 5 x 4 .*, expected multiples of 2"),
        ({"moments": (4, 7, 4)}, "latents are 4 x 7 .*, expected multiples of 2"),
        ({"text": (3, 9)}, "text embeddings have width 9, expected 8"),
        ({"text": (5, 8)}, "text has 5 tokens, expected 3"),
    ],
)
def test_data_of_another_model_are_refused_before_the_workdir_is_claimed(tmp_path, changes, expected):
    data = tiny.data()
    for wrong in ({"motion": _resized(data["motion"], **changes)},
                  {name: _resized(dataset, **changes) for name, dataset in data.items()}):  # fmt: skip
        with pytest.raises(UserError, match=expected) as error:
            loop.run(tiny.config(), tmp_path, data=data | wrong, shown=False)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "config.json").exists()


def test_the_scale_is_that_of_the_vae_of_the_model():
    config = tiny.config(model__path=BASE, data__motion="clips")
    traits = dataclasses.replace(setup.about(tiny.config()).traits, latents=LatentScale.factor(0.685671))
    dataset = tiny.data()["motion"]
    with pytest.raises(UserError, match=r"data.motion \(clips\): scale of its latents is 0.7, expected 0.68567"):
        datasets.check(config, _mixtures({"motion": dataset}), traits)
    per_channel = LatentScale((0.1,) * 4, (0.685671,) * 4)
    with pytest.raises(UserError, match=r"shift of its latents is \(0.1, 0.1, 0.1, 0.1\), expected 0.0"):
        datasets.check(config, _mixtures({"motion": dataclasses.replace(dataset, scale=per_channel)}), traits)
    own = dataclasses.replace(dataset, scale=LatentScale.factor(0.685671))
    datasets.check(config, _mixtures({"motion": own}), traits)


@pytest.mark.parametrize(
    ("settings", "transformer", "text_encoder"),
    [({}, "bfloat16", "bfloat16"), ({"train.mode": "full"}, "float32", "bfloat16"),
     ({"train.mode": "full", "text.train_encoder": True}, "float32", "float32")],
)  # fmt: skip
def test_weights_that_are_trained_are_float32(settings, transformer, text_encoder):
    """And with them their moments and average; frozen ones are of model.dtype."""
    config = tiny.config(**{"model.dtype": "bfloat16", **settings})
    model = setup.model(config, setup.about(config), token_ids=True)
    for part, dtype in ((model.transformer, transformer), (model.text_encoder, text_encoder)):
        weights = nnx.state(part, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(weights)} == {dtype}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))} <= {"float32"}


def test_token_ids_need_the_length_of_the_model():
    config, traits = tiny.config(), setup.about(tiny.config()).traits
    datasets.check(config, _mixtures(tiny.data(token_ids=True)), traits)
    with pytest.raises(UserError, match="text has 3 tokens, expected 4"):
        datasets.check(config, _mixtures(tiny.data(token_ids=True)), dataclasses.replace(traits, text_length=4))
