"""A third family in a folder of its own and one line elsewhere; docs/adding_a_model.md shows the same files."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import tests.toy_family as toy
from sdv_jax import cli
from sdv_jax.adapters import lora
from sdv_jax.checkpoints import families, model_folder
from sdv_jax.checkpoints.family import Component
from sdv_jax.checkpoints.save import save_pipeline
from sdv_jax.data import latents, records
from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale
from sdv_jax.pipeline import load_pipeline
from sdv_jax.small_world.tokenizer import build_tokenizer
from sdv_jax.train import config as configs
from sdv_jax.train import setup
from tests import test_families

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
SIZES = dataclasses.asdict(toy.VARIANTS["Toy-1"].transformer)
TEXT = {"architectures": ["T5EncoderModel"], "model_type": "t5", "num_decoder_layers": 1, "tie_word_embeddings": False}
PARAMETERS = {"transformer": 20_880, "vae": 632, "text_encoder": 6_832}
REFERENCE = np.random.default_rng(5).integers(0, 256, (32, 48, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The one line elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "PACKAGES", [*families.PACKAGES, "tests.toy_family"])
        yield families.families()[-1]


@pytest.fixture(scope="module")
def folder(registered, tmp_path_factory):
    """A pipeline folder as diffusers would write it."""
    root, config = tmp_path_factory.mktemp("toy"), toy.VARIANTS["Toy-1"]
    build_tokenizer(root / "tokenizer")
    modules = {name: _random(part, getattr(config, name)) for name, part in registered.components.items()}
    text = TEXT | dataclasses.asdict(config.text_encoder)
    save_pipeline(
        root / "diffusers", registered, modules, {"text_encoder": text}, scheduler=SCHEDULER,
        tokenizer=root / "tokenizer",
    )  # fmt: skip
    return root / "diffusers"


@pytest.fixture(scope="module")
def model(folder):
    """The same, converted."""
    assert cli.main(["convert", str(folder), str(folder.parent / "model")]) == 0
    return folder.parent / "model"


@pytest.fixture(scope="module")
def trained(model):
    """The workdir of `sdv train` on random prepared data."""
    root = model.parent
    for name, frames, views in (("pairs", 1, 2), ("clips", 3, 3)):
        records.save(root / name, _random_data(frames, views))
    settings = {
        "model.path": model, "data.identity": root / "pairs", "data.motion": root / "clips", "train.steps": 4,
        "identity.batch_size": 2, "motion.batch_size": 2, "switch.motion_probability": 0.5, "lora.rank": 2,
        "lora.alpha": 2.0, "identity.view_drop": 0.0, "optimizer.warmup": 0, "optimizer.learning_rate": 0.1,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    base = str(ROOT / "configs" / "base.py")
    assert cli.main(["train", "--config", base, "--workdir", str(root / "run"), *words]) == 0
    return root / "run"


def _random(part: Component, config) -> nnx.Module:
    """The component with a value of its own in every weight, biases and norms too."""
    graph, state = nnx.split(part.abstract(config, dtype=jnp.float32))
    rng = np.random.default_rng(1)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state))


def _random_data(frames: int, views: int) -> latents.LatentDataset:
    rng = np.random.default_rng(frames)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return latents.LatentDataset(
        mean=normal(6, frames, 4, 6, 4), logvar=normal(6, frames, 4, 6, 4) - 4,
        reference_mean=normal(6, views, 4, 6, 4), reference_logvar=normal(6, views, 4, 6, 4) - 4,
        text=normal(6, 12, 16), empty_text=np.zeros((12, 16), np.float32),
        captions=tuple("abcdef"), scale=LatentScale.factor(0.5),
    )  # fmt: skip


def _sample(pipe, **options) -> np.ndarray:
    return pipe("a red ball", steps=2, num_frames=2, progress=False, **options)


def test_the_page_shows_the_files():
    """Every block of Python on the page stands in the file it names, and the page names every file of the folder."""
    page = (ROOT / "docs" / "adding_a_model.md").read_text()
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") > 4
    for name, shown in blocks:
        text = (ROOT / name).read_text()
        for part in shown.split("\n...\n"):
            assert part.strip("\n") in text, f"{name} does not read\n{part}"
    named = set(re.findall(r"^\| `(\w+\.py)` \|", page, re.MULTILINE))
    assert named == {path.name for path in pathlib.Path(toy.__file__).parent.glob("*.py")}


def test_conversion_there_and_back(folder, model, registered):
    about = model_folder.about(model)
    assert (about.family, about.raw["variant"]) == (registered, "Toy-1")
    assert cli.main(["export", str(model), str(model.parent / "exported")]) == 0
    for file in sorted(folder.rglob("*.safetensors")):
        before, after = load_file(file), load_file(model.parent / "exported" / file.relative_to(folder))
        assert before.keys() == after.keys()
        assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_the_walk_over_all_families_takes_it(registered, monkeypatch):
    """It wants the number of its parameters, and nothing else."""
    monkeypatch.setitem(test_families.FAMILIES, "toy", registered)
    for part, count in PARAMETERS.items():
        monkeypatch.setitem(test_families.PARAMETERS, ("Toy-1", part), count)
        test_families.test_parameters("toy", "Toy-1", part)
        test_families.test_every_leaf_has_a_place("toy", "Toy-1", part)
    test_families.test_lora_targets_resolve("toy", "Toy-1")
    test_families.test_traits_and_one_call_with_a_reference("toy", "Toy-1")


def test_sampling(folder, model):
    pipe = load_pipeline(model, progress=False)
    video = _sample(pipe)
    assert video.shape == (1, 2, 32, 48, 3) and np.isfinite(video).all()
    assert np.array_equal(video, _sample(load_pipeline(folder, progress=False)))
    assert not np.array_equal(video, _sample(pipe, reference=REFERENCE))
    with pytest.raises(UserError, match="this model's VAE has no tiles"):
        _sample(pipe, tiling=True)
    with pytest.raises(UserError, match="this is no image-to-video model"):
        _sample(pipe, image=REFERENCE)


def test_the_parts_of_the_pipeline(model):
    pipe = load_pipeline(model, progress=False)
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, 3, 16, 24, 3)).astype(np.float32)
    mean, logvar = pipe.encode(video)
    assert mean.shape == logvar.shape == (1, 3, 4, 6, 4)
    assert pipe.decode(mean).shape == video.shape
    text = pipe.encode_prompt(["a"])
    assert text.shape == (1, 12, 16)
    one, other = (pipe.denoise(mean, text, np.array([700]), x) for x in (mean[:, :2], mean[:, 1:]))
    assert one.shape == mean.shape and not np.allclose(one, other)


def test_training_and_its_adapter(model, trained):
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    pipe = load_pipeline(model, adapter=trained / "adapter", progress=False)
    graph, state = pipe.runtime.denoisers[0]
    layers = {path for path, _ in lora.adapted(nnx.merge(graph, state))}
    assert layers == {f"blocks.{name}" for name in toy.LORA_TARGETS}
    adapted = _sample(pipe, reference=REFERENCE)
    assert not np.array_equal(adapted, _sample(load_pipeline(model, progress=False), reference=REFERENCE))
    out = trained.parent / "adapter.safetensors"
    assert cli.main(["export", "--adapter", str(trained / "adapter"), str(out)]) == 0
    assert "transformer.layers.1.to_q.lora_A.weight" in load_file(out)
    again = _sample(load_pipeline(model, adapter=out, progress=False), reference=REFERENCE)
    np.testing.assert_allclose(again, adapted, atol=1e-5)


def test_a_new_model_is_one_line_of_config(registered, trained):
    """Of sizes from the config, abstractly and trained: on the data of the other run."""
    settings = {"model.family": "toy", "lora.rank": 2}
    settings |= {f"model.transformer.{key}": value for key, value in (SIZES | {"num_layers": 1}).items()}
    settings |= {f"model.text_encoder.{key}": value for key, value in (("num_layers", 1), ("d_model", 16))}
    settings |= {f"model.scheduler.{key}": value for key, value in SCHEDULER.items()}
    config = configs.load(ROOT / "configs" / "base.py", settings)
    base = setup.about(config)
    assert (base.family, base.configs["transformer"].num_layers) == (registered, 1)
    model = jax.eval_shape(lambda: nnx.state(setup.model(config, base, token_ids=False)))
    assert len(jax.tree.leaves(nnx.filter_state(model, nnx.LoRAParam))) == 2 * len(toy.LORA_TARGETS)
    assert setup.objective(config, base, base.traits.latents).schedule.config.flow_shift == 3.0
    data = {"data.identity": trained.parent / "pairs", "data.motion": trained.parent / "clips", "train.steps": 1,
            "identity.batch_size": 2, "motion.batch_size": 2}  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in (settings | data).items()]
    run = ["train", "--config", str(ROOT / "configs" / "base.py"), "--workdir", str(trained.parent / "new"), *words]
    assert cli.main(run) == 0 and (trained.parent / "new" / "adapter" / "adapter.json").is_file()


def test_verification(folder):
    assert cli.main(["convert", str(folder), str(folder.parent / "verified"), "--verify"]) == 0
