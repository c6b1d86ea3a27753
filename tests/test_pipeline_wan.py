"""Wan through the five public names: defaults, references, first frames, two experts, and what is refused."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from sdv_jax import cli
from sdv_jax.adapters import lora
from sdv_jax.checkpoints import adapter_files, model_folder
from sdv_jax.checkpoints.convert import convert, export
from sdv_jax.checkpoints.families import rules_of
from sdv_jax.checkpoints.model_folder import check_sums, read_config
from sdv_jax.checkpoints.safetensors_io import open_folder
from sdv_jax.data.video import read_video
from sdv_jax.errors import UserError
from sdv_jax.models.wan.family import FAMILY
from sdv_jax.pipeline import load_pipeline
from tests.tiny_pipeline import save_pipeline as save_cogvideox
from tests.tiny_wan import DEFAULTS, save_pipeline

KINDS = ("t2v", "ti2v", "a14b")
NOISE = np.random.default_rng(0).normal(size=(1, 2, 4, 6, 4)).astype(np.float32)
PICTURE = np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a diffusers folder of it."""
    return {kind: save_pipeline(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pipes(folders):
    return {kind: load_pipeline(folder, progress=False) for kind, folder in folders.items()}


def run(pipe, prompt="a red ball", **options):
    settings = dict(latents=NOISE, steps=2, output="latents", progress=False) | options
    return pipe(prompt, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bit_equal(folders, tmp_path, kind):
    folder = folders[kind]
    convert(folder, tmp_path / "ours", progress=False)
    config = read_config(tmp_path / "ours")
    assert config["family"] == "wan" and config["defaults"] == DEFAULTS
    check_sums(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", progress=False)
    for part in config["config"]:
        before, after = (open_folder(where / part) for where in (folder, tmp_path / "back"))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.read().tobytes() == after[name].read().tobytes() and tensor.dtype == after[name].dtype
    for file in ("model_index.json", "defaults.json", "scheduler/scheduler_config.json", "transformer/config.json"):
        assert json.loads((folder / file).read_text()) == json.loads((tmp_path / "back" / file).read_text())
    np.testing.assert_array_equal(
        run(load_pipeline(tmp_path / "ours", progress=False)), run(load_pipeline(folder, progress=False))
    )


def test_half_precision_keeps_time_and_modulation_exact(folders, tmp_path):
    convert(folders["t2v"], tmp_path / "ours", dtype="bfloat16", progress=False)
    config = read_config(tmp_path / "ours")
    assert config["dtype"] == {"transformer": "bfloat16+float32", "vae": "bfloat16", "text_encoder": "bfloat16"}
    module = model_folder.load_component(tmp_path / "ours", "transformer", "bfloat16")
    assert module.scale_shift_table.dtype == module.condition_embedder.time_embedder.linear_1.kernel.dtype == "float32"
    assert module.proj_out.kernel.dtype == "bfloat16"


def test_verification_compares_every_part(folders, tmp_path, capsys):
    convert(folders["a14b"], tmp_path / "ours", verify=True, progress=False)
    told = capsys.readouterr().out
    parts = ("transformer ", "first frame given", "vae encode", "vae decode", "text encoder", "transformer, expert 2")
    for part in parts:
        assert part in told


def test_defaults_are_those_of_the_folder(pipes):
    video = pipes["t2v"]("a red ball", progress=False)
    assert video.shape == (1, DEFAULTS["num_frames"], DEFAULTS["height"], DEFAULTS["width"], 3)
    assert pipes["t2v"].encode_prompt(["a"]).shape == (1, DEFAULTS["text_length"], 16)
    np.testing.assert_array_equal(
        video, pipes["t2v"]("a red ball", steps=4, guidance=5.0, height=32, width=48, num_frames=9, progress=False)
    )


def test_references_reach_every_expert(pipes):
    pipe = pipes["a14b"]
    alone, one, two = (run(pipe, reference=given) for given in (None, PICTURE, [PICTURE, PICTURE[::-1]]))
    assert np.abs(one - alone).max() > 1e-3 and np.abs(two - one).max() > 1e-3
    mean, _ = pipe.encode(PICTURE[None, None].astype(np.float32) / 127.5 - 1)
    again = run(pipe, reference_latents=np.asarray(pipe.traits.latents.to_model(mean))[0])
    np.testing.assert_allclose(again, one, atol=1e-5)


def test_a_reference_and_a_first_frame_at_once(pipes):
    pipe, noise = pipes["ti2v"], np.random.default_rng(0).normal(size=(1, 2, 2, 4, 4)).astype(np.float32)
    options = dict(latents=noise, reference=PICTURE)
    both, one = run(pipe, image=PICTURE, **options), run(pipe, **options)
    mean, _ = pipe.encode(_frame(pipe, 32, 64))
    np.testing.assert_allclose(both[:, :1], pipe.traits.latents.to_model(mean), atol=1e-5)
    assert np.abs(both[:, 1:] - one[:, 1:]).max() > 1e-3
    given = run(pipe, image_latents=both[:, :1], **options)
    np.testing.assert_allclose(given, both, atol=1e-5)


def _frame(pipe, height, width):
    from sdv_jax.data.images import read_image, stretch_image

    return stretch_image(read_image(PICTURE), height=height, width=width)[None, None]


def test_two_adapters_have_to_agree_on_where_references_stand(folders, tmp_path):
    model = model_folder.load_component(folders["a14b"], "transformer")
    settings = lora.LoraConfig(rank=2, alpha=2.0, targets=FAMILY.lora_targets)
    lora.add(model, settings, names=rules_of(model)[1].to_torch_module_name, rngs=nnx.Rngs(0))
    for name, shift in (("aside", 1.0), ("behind", 0.0), ("also_behind", 0.0)):
        placement = {"placement": "after", "offset": 1, "shift": shift}
        adapter_files.save(model, tmp_path / name, targets=FAMILY.lora_targets, reference=placement)
    with pytest.raises(UserError, match="the adapters differ in reference: .*1.0.* in .*aside.*0.0.* in .*behind"):
        load_pipeline(folders["a14b"], adapter=tmp_path / "aside", adapter_2=tmp_path / "behind", progress=False)
    pair = dict(adapter=tmp_path / "behind", adapter_2=tmp_path / "also_behind")
    run(load_pipeline(folders["a14b"], **pair, progress=False), reference=PICTURE)


def test_on_a_mesh_the_video_is_the_same(folders):
    """Weights, the text encoder's too, spread over 4 devices (in a process of its own, which has that many)."""
    code = f"""
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
import sdv_jax
mesh = jax.make_mesh((1, 4, 1), ("data", "fsdp", "sp"), axis_types=(jax.sharding.AxisType.Explicit,) * 3)
picture, videos = np.full((32, 48, 3), 90, np.uint8), []
for mesh in (None, mesh):
    pipe = sdv_jax.load_pipeline({str(folders["ti2v"])!r}, mesh=mesh, progress=False)
    options = dict(height=32, width=64, steps=2, num_frames=5, guidance=2.0, output="latents", progress=False)
    videos.append(pipe("a red ball", reference=picture, image=picture, **options))
for part in (pipe.runtime.denoisers[0][1], pipe.runtime.text_encoder[1]):
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(part)), "nothing is spread"
assert np.abs(videos[0] - videos[1]).max() < 1e-4, np.abs(videos[0] - videos[1]).max()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_adapter_brings_its_placement_along(folders, tmp_path):
    """Two adapters of the same numbers that stand elsewhere give other videos."""
    found = {}
    for name, placement in (("own", {"placement": "after", "offset": 1, "shift": 1.0}),
                            ("before", {"placement": "before", "offset": 1, "shift": 0.0})):  # fmt: skip
        model = model_folder.load_component(folders["t2v"], "transformer")
        settings = lora.LoraConfig(rank=2, alpha=2.0, targets=FAMILY.lora_targets)
        lora.add(model, settings, names=rules_of(model)[1].to_torch_module_name, rngs=nnx.Rngs(0))
        for _, layer in lora.adapted(model):
            layer.lora.b[...] = 0.2 * jax.random.normal(jax.random.key(1), layer.lora.b.shape)
        adapter_files.save(model, tmp_path / name, targets=FAMILY.lora_targets, reference=placement)
        found[name] = run(load_pipeline(folders["t2v"], adapter=tmp_path / name, progress=False), reference=PICTURE)
        exported = tmp_path / f"{name}.safetensors"
        adapter_files.export(tmp_path / name, exported, format="comfyui")
        again = run(load_pipeline(folders["t2v"], adapter=exported, progress=False), reference=PICTURE)
        np.testing.assert_allclose(again, found[name], atol=1e-4)
    assert np.abs(found["own"] - found["before"]).max() > 1e-3
    plain = run(load_pipeline(folders["t2v"], progress=False), reference=PICTURE)
    assert np.abs(found["own"] - plain).max() > 1e-3
    second = run(load_pipeline(folders["a14b"], adapter_2=tmp_path / "own", progress=False), reference=PICTURE)
    assert np.abs(second - run(load_pipeline(folders["a14b"], progress=False), reference=PICTURE)).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("t2v", {"image": PICTURE}, "no image-to-video model"),
        ("ti2v", {"image": PICTURE, "image_latents": NOISE[:, :1]}, "both given"),
        ("ti2v", {"image": [PICTURE] * 3}, "image holds 3 pictures for 1 prompts"),
        ("ti2v", {"image": []}, "image is an empty list"),
        ("t2v", {"guidance_2": 3.0}, "guidance_2 is for models of two experts"),
        ("a14b", {"guidance_2": -1.0}, "guidance_2 is -1.0"),
        ("t2v", {"flow_shift": 0.0}, "shift"),
        ("t2v", {"scheduler": "ddim"}, "unknown scheduler 'ddim'; choose one of: unipc, euler"),
        ("t2v", {"dynamic_guidance": True}, "dynamic_guidance is CogVideoX's"),
        ("t2v", {"num_frames": 6, "latents": None}, "num_frames is 6; expected 1 + a multiple of 4"),
        ("ti2v", {"height": 48, "latents": None}, "height is 48; expected a multiple of 32"),
        ("t2v", {"latents": NOISE[:, :, :3]}, "height is 24; expected a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_one_line(pipes, kind, options, told):
    if kind == "ti2v" and "latents" not in options:
        options = options | {"latents": NOISE[:, :, :2, :4]}
    with pytest.raises(UserError) as error:
        run(pipes[kind], **options)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_what_a_model_has_not_is_told_when_it_is_loaded(folders, tmp_path):
    with pytest.raises(UserError, match="adapter_2 is for the second expert"):
        load_pipeline(folders["t2v"], adapter_2=tmp_path, progress=False)
    cogvideox = load_pipeline(save_cogvideox(tmp_path / "cogvideox"), progress=False)
    with pytest.raises(UserError, match="CogVideoXDDIMScheduler has no shift"):
        cogvideox("a", flow_shift=3.0, steps=1, progress=False)
    with pytest.raises(UserError, match="expert is 1; this model has 1"):
        cogvideox.denoise(np.zeros((1, 1, 4, 6, 4)), np.zeros((1, 2, 16)), np.zeros(1), expert=1)


def test_an_expert_that_is_missing_or_too_many(folders, tmp_path):
    import shutil

    spoiled = shutil.copytree(folders["a14b"], tmp_path / "spoiled")
    shutil.rmtree(spoiled / "transformer_2")
    with pytest.raises(UserError, match="transformer_2"):
        load_pipeline(spoiled, progress=False)
    index = json.loads((spoiled / "model_index.json").read_text())
    index |= {"transformer_2": [None, None], "boundary_ratio": None}
    (spoiled / "model_index.json").write_text(json.dumps(index))
    assert len(load_pipeline(spoiled, progress=False).runtime.denoisers) == 1
    (spoiled / "defaults.json").write_text('{"hight": 3}')
    with pytest.raises(UserError, match="defaults.json: unknown key hight"):
        load_pipeline(spoiled, progress=False)


def test_flow_shift_and_solver_change_the_video(pipes):
    results = [run(pipes["t2v"], steps=3, **given) for given in ({}, {"flow_shift": 1.0}, {"scheduler": "euler"})]
    assert np.abs(results[0] - results[1]).max() > 1e-3 and np.abs(results[0] - results[2]).max() > 1e-4


def test_from_the_command_line(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PICTURE).save("first.png")
    Image.fromarray(PICTURE[::-1]).save("subject.png")
    size = "--height 32 --width 64 --num-frames 5 --steps 2 --flow-shift 3 --scheduler euler"
    pictures = "--image first.png --reference subject.png"
    arguments = f"sample --model {folders['ti2v']} --prompt ball {pictures} {size} --out v.mp4"
    assert cli.main(arguments.split()) == 0
    assert "5 frames of 64x32" in capsys.readouterr().out
    frames, fps = read_video("v.mp4")
    assert frames.shape == (5, 32, 64, 3) and fps == pytest.approx(DEFAULTS["fps"])
    assert cli.main(f"sample --model {folders['t2v']} --prompt ball --image first.png --out w.mp4".split()) == 2
    assert "no image-to-video model" in capsys.readouterr().err


def test_variants_that_name_their_experts(folders):
    """The dataclass of a family has what its folders have."""
    about = model_folder.about(folders["a14b"])
    assert set(about.configs) == {field.name for field in dataclasses.fields(next(iter(FAMILY.variants.values())))}
