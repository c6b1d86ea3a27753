"""Wan's original release converts to the same model as its diffusers version; what is refused on the way."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from sdv_jax.checkpoints import original_wan  # noqa: E402
from sdv_jax.checkpoints.convert import convert, export  # noqa: E402
from sdv_jax.checkpoints.model_folder import check_sums, read_config  # noqa: E402
from sdv_jax.checkpoints.safetensors_io import Tensor, open_folder  # noqa: E402
from sdv_jax.errors import UserError  # noqa: E402
from sdv_jax.models.wan.family import FAMILY  # noqa: E402
from tests import published  # noqa: E402
from tests.checkpoints.original_release import KINDS, save_pipeline, save_release  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function: kind -> (diffusers pipeline folder, original release), made once. Copy them before changing them."""
    made = {}

    def both(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("wan")
            pipeline = save_pipeline(folder / "pipeline", kind)
            made[kind] = pipeline, save_release(pipeline, folder / "release", shard_size="20KB")
        return made[kind]

    return both


def files(folder) -> dict[str, bytes]:
    """All of them but those in which orbax notes the time."""
    dated = "_CHECKPOINT_METADATA", "commit_success.txt"
    found = [file for file in folder.rglob("*") if file.is_file() and file.name not in dated]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def parsed(config: dict) -> dict:
    return {name: FAMILY.components[name].parse(raw, name) for name, raw in config["config"].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_as_from_diffusers(folders, tmp_path, kind):
    pipeline, release = folders(kind)
    assert (release / "diffusion_pytorch_model.safetensors").exists() is False  # sharded
    models = [tmp_path / "from diffusers", tmp_path / "from release"]
    for source, model in zip((pipeline, release), models, strict=True):
        convert(source, model, progress=False)
    theirs, ours = map(files, models)
    about_theirs, about_ours = json.loads(theirs.pop("model.json")), json.loads(ours.pop("model.json"))
    assert ours == theirs and len(ours) > 50
    same = "format_version", "family", "variant", "dtype", "tied", "tensor_dtypes", "tokenizer", "checksums", "defaults"
    assert {key: about_ours[key] for key in same} == {key: about_theirs[key] for key in same}
    assert parsed(about_ours) == parsed(about_theirs)
    assert FAMILY.scheduler(about_ours["scheduler"]) == FAMILY.scheduler(about_theirs["scheduler"])
    named = "_diffusers_version", "tokenizer"  # whose class has another name in each version of transformers
    ours, theirs = ({k: v for k, v in a["model_index"].items() if k not in named} for a in (about_ours, about_theirs))
    assert ours == {key: theirs.get(key) for key in ours} and theirs.keys() - ours.keys() <= {"_name_or_path"}
    assert about_ours["source"] == str(release)
    check_sums(models[1])


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_what_is_exported(folders, tmp_path, kind):
    from diffusers import WanPipeline

    pipeline, release = folders(kind)
    convert(release, tmp_path / "model", progress=False)
    export(tmp_path / "model", tmp_path / "back", progress=False)
    ours, theirs = (WanPipeline.from_pretrained(folder) for folder in (tmp_path / "back", pipeline))
    for name in read_config(tmp_path / "model")["config"]:
        mine, other = getattr(ours, name).state_dict(), getattr(theirs, name).state_dict()
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in other)
    for key in ("boundary_ratio", "expand_timesteps"):
        assert ours.config[key] == theirs.config[key]
    assert ours.scheduler.config.flow_shift == theirs.scheduler.config.flow_shift == (5 if "TI2V" in kind else 3)
    assert (ours.transformer_2 is None) == (theirs.transformer_2 is None)


PUBLISHED = {
    "Wan2.1-T2V-1.3B": ("Wan2.1-T2V-1.3B.transformer", "Wan2.1_VAE.pth", {"num_heads": 12}),
    "Wan2.1-T2V-14B": ("Wan2.x-T2V-14B.transformer", "Wan2.1_VAE.pth", {"num_heads": 40}),
    "Wan2.2-TI2V-5B": ("Wan2.2-TI2V-5B.transformer", "Wan2.2_VAE.pth", {"num_heads": 24, "model_type": "ti2v"}),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_shapes_give_the_published_configs(tmp_path, monkeypatch, variant):
    """The lists of the released tensors are put in place of files."""
    transformer, vae, about = PUBLISHED[variant]
    kinds = {"transformer": np.float32, "vae": np.float32, "text_encoder": ml_dtypes.bfloat16}
    lists = {"transformer": transformer, "vae": vae, "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}

    def opened(folder, name):
        shapes = published.original(lists[name])
        return folder, {key: Tensor(folder, key, np.dtype(kinds[name]), shape, 0) for key, shape in shapes.items()}

    monkeypatch.setattr(original_wan, "_open", opened)
    monkeypatch.setattr(original_wan, "check_tokenizer", lambda folder: None)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", **about}))
    config = original_wan.read_config(tmp_path)
    assert config["variant"] == variant
    checkpoint = f"{variant}-Diffusers"
    for name, raw in config["config"].items():
        theirs = published.config(checkpoint, name)
        component = FAMILY.components[name]
        assert component.parse(raw, tmp_path) == component.parse(theirs, tmp_path)
        if name != "vae":  # whose file leaves out what diffusers assumes anyway
            surplus = raw.keys() - theirs.keys()
            assert all(raw[key] is None for key in surplus)
            skipped = {"_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype"}
            assert {k: v for k, v in theirs.items() if k not in skipped} == {
                k: v for k, v in raw.items() if k not in skipped | surplus
            }
        original_wan.open_component(tmp_path, FAMILY, name, raw)  # every tensor has its place
    theirs = published.config(checkpoint, "scheduler")
    ours = {key: value for key, value in config["scheduler"].items() if key in theirs}
    assert theirs | {"_diffusers_version": ours["_diffusers_version"]} == ours
    theirs = published.config(checkpoint, "model_index")
    assert {k: v for k, v in config["model_index"].items() if k in theirs and k[0] != "_"} == {
        k: v for k, v in theirs.items() if k[0] != "_"
    }


# ---------------------------------------------------------------- refusals


def rewrite_pth(name: str, change):
    def apply(release):
        state = torch.load(release / name, weights_only=True)
        change(state)
        torch.save(state, release / name)

    return apply


def rewrite_transformer(change):
    def apply(release):
        from safetensors.torch import save_file

        found = {name: torch.from_numpy(tensor.read()) for name, tensor in open_folder(release).items()}
        for file in release.glob("diffusion_pytorch_model*"):
            file.unlink()
        change(found)
        save_file(found, release / "diffusion_pytorch_model.safetensors")

    return apply


def edit(**changes):
    def apply(release):
        content = json.loads((release / "config.json").read_text()) | changes
        (release / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return apply


def remove(*names: str):
    def apply(release):
        for name in names:
            shutil.rmtree(release / name) if (release / name).is_dir() else (release / name).unlink()

    return apply


def truncate(name: str):
    return lambda release: (release / name).write_bytes((release / name).read_bytes()[:1000])


VAE, T5 = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
REFUSALS = {
    "no vae": (remove(VAE), "Wan2.1_VAE.pth or Wan2.2_VAE.pth: no such file"),
    "two vaes": (lambda r: shutil.copy(r / VAE, r / "Wan2.2_VAE.pth"), "several files (Wan2.1_VAE.pth, Wan2.2_VAE"),
    "no text encoder": (remove(T5), "models_t5_*.pth: no such file"),
    "no tokenizer": (remove("google"), "umt5-xxl: no tokenizer_config.json"),
    "no config": (remove("config.json"), "config.json: no such file"),
    "no transformer": (
        lambda r: [file.unlink() for file in r.glob("diffusion_pytorch_model*")],
        "no diffusion_pytorch_model.safetensors, the transformer",
    ),
    "all at once": (remove(VAE, T5), "VAE.pth: no such file; expected an original release of Wan | "),
    "truncated": (truncate(VAE), "Wan2.1_VAE.pth: not a zip archive"),
    "image encoder": (
        rewrite_transformer(lambda t: t.update({"img_emb.proj.1.weight": torch.zeros(3, 3)})),
        "inputs of its own; supported are t2v and ti2v",
    ),
    "image to video": (edit(model_type="i2v"), "a model of kind 'i2v'"),
    "another model": (edit(vace_layers=[0]), "config.json: unknown config key vace_layers; known: dim"),
    "wrong width": (edit(dim=37), "config.json: dim is 37, the tensors have 36"),
    "wrong depth": (edit(num_layers=3), "config.json: num_layers is 3, the tensors have 2"),
    "wrong heads": (edit(num_heads=5), "num_heads is 5; expected a divisor of the width 36"),
    "no heads": (edit(num_heads=...), "num_heads is 0"),
    "wrong eps": (edit(eps=-1), "eps = -1; expected a finite number > 0"),
    "wrong text length": (edit(text_len="long"), "text_len: text_length = 'long'"),
    "leftover in the transformer": (
        rewrite_transformer(lambda t: t.update({"surplus": torch.zeros(3)})),
        "unexpected surplus (3,)",
    ),
    "missing in the transformer": (
        rewrite_transformer(lambda t: t.pop("blocks.1.cross_attn.k.weight")),
        "missing blocks.1.cross_attn.k.weight (36, 36)",
    ),
    "another kind of transformer": (
        rewrite_transformer(lambda t: t.pop("time_embedding.0.weight")),
        "no tensor time_embedding.0.weight, which every Wan model has",
    ),
    "missing in the vae": (
        rewrite_pth(VAE, lambda t: t.pop("decoder.middle.0.residual.2.bias")),
        "missing decoder.middle.0.residual.2.bias",
    ),
    "leftover in the vae": (rewrite_pth(VAE, lambda t: t.update(mean=torch.zeros(16))), "unexpected mean (16,)"),
    "other latents": (
        rewrite_pth(VAE, lambda t: t.update({"conv2.weight": torch.zeros(4, 4, 1, 1, 1)})),
        "latents of 4 channels; expected 16",
    ),
    "wrong shape": (
        rewrite_pth(T5, lambda t: t.update({"blocks.1.attn.q.weight": torch.zeros(15, 17)})),
        "blocks.1.attn.q.weight has shape (15, 17), expected (15, 16)",
    ),
    "wrong rank": (
        rewrite_pth(T5, lambda t: t.update({"token_embedding.weight": torch.zeros(128)})),
        "tensor token_embedding.weight has shape (128,), expected 2 axes",
    ),
    "more than tensors": (rewrite_pth(T5, lambda t: t.update(step=3)), "'step' is no tensor"),
    "not a number": (
        rewrite_pth(VAE, lambda t: t["conv1.bias"].fill_(float("nan"))),
        "tensor conv1.bias holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(folders, tmp_path, case):
    change, message = REFUSALS[case]
    release = shutil.copytree(folders("Wan2.1-T2V")[1], tmp_path / "release")
    change(release)
    with pytest.raises(UserError) as caught:
        convert(release, tmp_path / "model", progress=False)
    line = str(caught.value)
    assert "\n" not in line and message in line, line
    assert [entry.name for entry in tmp_path.iterdir()] == ["release"]


def test_an_expert_is_missing(folders, tmp_path):
    release = shutil.copytree(folders("Wan2.2-A14B")[1], tmp_path / "release")
    shutil.rmtree(release / "low_noise_model")
    with pytest.raises(UserError, match="low_noise_model: no diffusion_pytorch_model.safetensors, the transformer_2"):
        convert(release, tmp_path / "model", progress=False)


@pytest.mark.parametrize("kind", ["Wan2.1-T2V", "Wan2.2-A14B"])
def test_a_release_is_verified_too(folders, tmp_path, capsys, kind):
    convert(folders(kind)[1], tmp_path / "model", verify=True, progress=False)
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
    parts = {"transformer", "first frame given", "vae encode", "vae decode", "text encoder"}
    if kind == "Wan2.2-A14B":
        parts |= {"transformer, expert 2", "first frame given, expert 2"}
    assert {name for name, *_ in rows} == parts and all(float(relative) <= 1e-4 for *_, relative in rows)


def test_another_text_length_is_kept(folders, tmp_path):
    release = shutil.copytree(folders("Wan2.1-T2V")[1], tmp_path / "release")
    edit(text_len=226)(release)
    assert original_wan.read_config(release)["defaults"] == {"text_length": 226}


def test_other_folders_are_not_taken_for_a_release(folders, tmp_path):
    assert original_wan.recognises(folders("Wan2.1-T2V")[1])
    assert not original_wan.recognises(folders("Wan2.1-T2V")[0])
    assert not original_wan.recognises(tmp_path)
