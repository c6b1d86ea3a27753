"""What a caller of the pipeline relies on: shapes, determinism, one compilation, references, checks before work."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sdv_jax
from sdv_jax import programs
from sdv_jax.adapters import lora
from sdv_jax.checkpoints import adapter_files
from sdv_jax.data.images import fit_image
from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox import rules
from sdv_jax.models.cogvideox.vae import Tiling
from sdv_jax.models.contract import Geometry, LatentScale, Traits
from sdv_jax.pipeline import load_pipeline
from sdv_jax.request import check_request
from tests.tiny_pipeline import save_pipeline

STEPS = 2
NAMES = rules.transformer(2).to_torch_module_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("diffusers") / "tiny")


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder, progress=False)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def run(pipe, prompt="a red ball", **options):
    return pipe(prompt, **{"steps": STEPS, "progress": False, "output": "latents"} | options)


@pytest.fixture
def compilations():
    """A list that grows by one entry per program that XLA compiles."""
    names, on = [], [True]
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: names.append(name) if on[0] and name.endswith("backend_compile_duration") else None
    )
    yield names
    on[0] = False


def test_importing_the_package_is_free():
    code = (
        "import sys, sdv_jax; assert sdv_jax.__version__; dir(sdv_jax);"
        "heavy = {'jax', 'torch', 'numpy', 'flax', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sampling_needs_no_torch(folder):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['diffusers'] = None; import sdv_jax;"
        f"pipe = sdv_jax.load_pipeline({str(folder)!r}, progress=False);"
        "assert pipe.encode_prompt(['a']).shape == (1, 12, 16)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert sdv_jax.load_pipeline is load_pipeline and issubclass(sdv_jax.UserError, ValueError)
    assert set(sdv_jax.__all__) == set(dir(sdv_jax))
    with pytest.raises(AttributeError):
        sdv_jax.nothing  # noqa: B018


def test_video_is_in_range_and_has_the_models_size(pipe):
    video = run(pipe, output="video")
    assert video.shape == (1, 9, 16, 24, 3) and video.dtype == np.float32
    assert video.min() >= 0 and video.max() <= 1 and video.std() > 0
    decoded = pipe.decode(pipe.traits.latents.to_vae(run(pipe)))
    np.testing.assert_allclose(video, np.clip(np.asarray(decoded) / 2 + 0.5, 0, 1), atol=1e-6)


def test_a_second_call_compiles_nothing_and_gives_the_same_bits(pipe, picture, compilations):
    first = run(pipe, reference=picture, output="video")
    before = len(compilations)
    again = run(pipe, reference=picture, output="video")
    np.testing.assert_array_equal(first, again)
    other = run(pipe, "a cat", reference=picture[::-1], seed=1, negative_prompt="ball", guidance=2.5, output="video")
    run(pipe, reference=picture, output="video", progress=True)
    assert len(compilations) == before and np.abs(other - first).max() > 1e-3
    run(pipe, steps=STEPS + 1)
    assert len(compilations) > before, "the count counts nothing"


def test_models_of_one_architecture_share_programs(pipe, folder, compilations):
    first = run(pipe)
    other = load_pipeline(folder, progress=False)
    before = len(compilations)
    np.testing.assert_array_equal(run(other), first)
    assert len(compilations) == before


def test_weights_are_arguments_of_the_program(pipe, monkeypatch):
    """As constants they would be compiled in, and held twice."""
    monkeypatch.setattr(programs.SAMPLE, "_compiled", {})  # other models' programs are there too
    run(pipe)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.runtime.denoisers[0][1]))
    assert programs.SAMPLE._compiled
    for program in programs.SAMPLE._compiled.values():
        assert program.memory_analysis().argument_size_in_bytes >= weights


def test_seeds_differ(pipe):
    assert np.abs(run(pipe, seed=0) - run(pipe, seed=1)).max() > 0.1


def test_a_batch_is_its_videos(pipe):
    """Each prompt of a batch is denoised as it would be alone."""
    noise = np.random.default_rng(0).normal(size=(2, 3, 4, 6, 4)).astype(np.float32)
    together = run(pipe, ["a red ball", "cat"], latents=noise, negative_prompt=["", "ball"])
    for i, (prompt, negative) in enumerate([("a red ball", ""), ("cat", "ball")]):
        alone = run(pipe, prompt, latents=noise[i : i + 1], negative_prompt=negative)
        np.testing.assert_allclose(together[i], alone[0], atol=1e-4)


def test_the_size_follows_given_latents(pipe):
    noise = np.zeros((1, 2, 6, 4, 4), np.float32)
    assert run(pipe, latents=noise).shape == noise.shape


def test_guidance_of_one_is_the_prompt_alone(pipe):
    noise = np.random.default_rng(0).normal(size=(1, 3, 4, 6, 4)).astype(np.float32)
    plain = run(pipe, latents=noise, guidance=1.0)
    np.testing.assert_array_equal(plain, run(pipe, latents=noise, guidance=0.5, negative_prompt="cat"))
    # just above 1 the doubled batch runs; with weight 1 on the prompt its result is the same
    np.testing.assert_allclose(run(pipe, latents=noise, guidance=1.0 + 1e-6), plain, atol=1e-4)


def test_step_noise_drives_the_stochastic_solver_only(pipe):
    noise = np.random.default_rng(0).normal(size=(STEPS, 1, 3, 4, 6, 4)).astype(np.float32)
    drawn = {name: run(pipe, scheduler=name) for name in ("ddim", "dpm")}
    given = {name: run(pipe, scheduler=name, step_noise=noise) for name in ("ddim", "dpm")}
    np.testing.assert_array_equal(drawn["ddim"], given["ddim"])
    assert np.abs(drawn["dpm"] - given["dpm"]).max() > 1e-4
    np.testing.assert_array_equal(given["dpm"], run(pipe, scheduler="dpm", step_noise=noise, latents=None))


def test_a_reference_is_its_latents(pipe, picture):
    """What `reference` does by hand: fit, encode, draw, scale."""
    fitted = fit_image(picture, height=16, width=24)[None, None]
    mean, logvar = pipe.encode(fitted)
    key = jax.random.fold_in(jax.random.key(5), 1)
    drawn = (mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)) * pipe.traits.latents.scale[0]
    by_hand = run(pipe, reference_latents=np.asarray(drawn), seed=5)
    np.testing.assert_allclose(run(pipe, reference=picture, seed=5), by_hand, atol=1e-5)
    assert np.abs(by_hand - run(pipe, seed=5)).max() > 1e-4


def test_several_references_in_every_form(pipe, picture):
    from PIL import Image

    other = picture[::-1]
    videos = [
        run(pipe, reference=form)
        for form in (
            [picture, other],
            np.stack([picture, other]),
            [Image.fromarray(picture), other.astype(np.float32) / 255],
        )
    ]
    for video in videos[1:]:
        np.testing.assert_allclose(video, videos[0], atol=1e-5)
    assert np.abs(videos[0] - run(pipe, reference=picture)).max() > 1e-5


def test_every_video_of_a_batch_sees_the_reference(pipe, picture):
    noise = np.repeat(np.random.default_rng(0).normal(size=(1, 3, 4, 6, 4)).astype(np.float32), 2, axis=0)
    both = run(pipe, ["a red ball"] * 2, latents=noise, reference=picture)
    np.testing.assert_allclose(both[0], both[1], atol=1e-5)


def test_adapter_changes_the_video_and_alpha_its_strength(folder, tmp_path, pipe):
    from sdv_jax.checkpoints import model_folder

    transformer = model_folder.load_component(folder, "transformer")
    lora.add(
        transformer, lora.LoraConfig(rank=2, alpha=2, targets=("to_q", "norm1.linear")), names=NAMES, rngs=nnx.Rngs(0)
    )
    for _, layer in lora.adapted(transformer):
        layer.lora.b[...] = jnp.ones_like(layer.lora.b[...])
    adapter_files.save(transformer, tmp_path / "adapter")
    adapter_files.export(tmp_path / "adapter", tmp_path / "a.safetensors", format="diffusers")
    adapted = load_pipeline(folder, adapter=tmp_path / "adapter", progress=False)
    assert np.abs(run(adapted) - run(pipe)).max() > 1e-3
    graph, state = adapted.runtime.denoisers[0]
    assert any("lora" in path for path, _ in nnx.to_flat_state(state))


def test_bfloat16_stays_close_to_float32(folder, pipe):
    narrow = load_pipeline(folder, dtype="bfloat16", progress=False)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(narrow.runtime.denoisers[0][1]))
    noise = np.random.default_rng(0).normal(size=(1, 3, 4, 6, 4)).astype(np.float32)
    ours, exact = run(narrow, latents=noise), run(pipe, latents=noise)
    assert ours.dtype == np.float32 and 0 < np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()


def test_streams_of_the_adaln_layers(folder, tmp_path, picture):
    """What is asked for wins over a file that says nothing, and equals a folder that says it."""
    from sdv_jax.checkpoints import model_folder

    transformer = model_folder.load_component(folder, "transformer")
    config = lora.LoraConfig(rank=2, alpha=2, targets=("norm1.linear",))
    lora.add(transformer, config, names=NAMES, rngs=nnx.Rngs(0))
    for _, layer in lora.adapted(transformer):
        layer.lora.b[...] = jnp.ones_like(layer.lora.b[...])
    for streams in ("all", "reference"):
        adapter_files.save(transformer, tmp_path / streams, adaln_lora=streams)
    all_streams, asked, stated = (
        run(load_pipeline(folder, adapter=tmp_path / name, adapter_adaln=option, progress=False), reference=picture)
        for name, option in (("all", None), ("all", "reference"), ("reference", None))
    )
    np.testing.assert_array_equal(asked, stated)
    assert np.abs(asked - all_streams).max() > 1e-3


def test_numbers_that_overflow_are_told(pipe):
    shape = (1, *pipe.geometry.latent_shape(9, 16, 24))
    with pytest.raises(UserError, match="denoised latents hold NaN"):
        run(pipe, latents=np.full(shape, 3e38))


def test_a_tokenizer_of_another_text_encoder(pipe, monkeypatch):
    monkeypatch.setattr(pipe.runtime, "_vocabulary", 1)
    with pytest.raises(UserError, match="use its own tokenizer"):
        run(pipe)


def test_no_negative_prompt_is_the_empty_one(pipe):
    options = {"output": "latents", "guidance": 3.0}
    np.testing.assert_array_equal(run(pipe, negative_prompt=None, **options), run(pipe, **options))


def test_tiles_change_little(pipe, monkeypatch):
    latents = np.random.default_rng(0).normal(size=(1, 1, 8, 12, 4)).astype(np.float32)
    whole = np.asarray(pipe.decode(latents))
    monkeypatch.setattr(pipe.runtime, "vae_tiling", Tiling(24, 40))
    tiled = np.asarray(pipe.decode(latents, tiling=True))
    assert whole.shape == tiled.shape == (1, 1, 32, 48, 3)
    assert 0 < np.abs(whole - tiled).mean() < 0.5 * np.abs(whole).mean()


@pytest.mark.parametrize("asked", [1, 5, 9, 13])
def test_the_length_of_the_video_is_as_told(pipe, asked, caplog):
    video = run(pipe, num_frames=asked, height=8, width=8, steps=1, output="video")
    assert video.shape[1] == pipe.geometry.decoded_frames(asked) == {5: 8, 13: 16}.get(asked, asked)
    told = (
        f"num_frames is {asked}, of which the VAE makes {video.shape[1]}; {asked - 4} and {asked + 4} come out as asked"
    )
    assert (told in caplog.text) == (asked in (5, 13))


def test_times_of_the_stages(pipe):
    run(pipe, output="video")
    assert {"encoding prompt", "denoising", "decoding"} <= set(pipe.seconds) and min(pipe.seconds.values()) >= 0


def test_config_says_what_the_folder_says(pipe, folder):
    assert pipe.config["family"] == "cogvideox" and pipe.config["config"]["transformer"]["num_layers"] == 2
    assert pipe.config["source"] == str(folder)


def test_a_long_prompt_is_cut_with_a_note(pipe, caplog):
    long = pipe.encode_prompt(["a red ball on sand a red ball on sand a red ball on sand"])
    assert "longer than 12 tokens and was cut" in caplog.text
    np.testing.assert_array_equal(long, pipe.encode_prompt(["a red ball on sand a red ball on sand a"]))


@pytest.mark.parametrize("count", [1, 5, 9, 49])
def test_latent_shape_and_pixel_sizes_are_inverse(count):
    geometry = Geometry(height=480, width=720, num_frames=49, spatial=8, temporal=4, patch=2, channels=16, period=8)
    shape = geometry.latent_shape(count, 480, 720)
    assert shape == ((count - 1) // 4 + 1, 60, 90, 16) and geometry.pixel_sizes((1, *shape)) == (count, 480, 720)


def test_defaults_of_a_request():
    geometry = Geometry(height=480, width=720, num_frames=49, spatial=8, temporal=4, patch=2, channels=16, period=8)
    request = check_request(
        Traits(geometry, LatentScale.factor(1.0), text_length=226, text_width=4096, steps=50, guidance=6.0, fps=8.0),
        prompt="x",
        negative_prompt="",
        size=(None, None, None),
        steps=None,
        guidance=None,
        seed=0,
        train_timesteps=1000,
    )
    assert (request.num_frames, request.height, request.width, request.steps, request.guidance) == (
        49,
        480,
        720,
        50,
        6.0,
    )
    assert request.guided and request.prompts == ["x"] and request.negatives == [""]


def test_on_a_mesh_the_video_is_the_same(folder, tmp_path):
    """Weights spread over 4 devices (a process of its own: the number of devices is fixed once jax has started)."""
    code = f"""
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
import sdv_jax
mesh = jax.make_mesh((1, 4, 1), ("data", "fsdp", "sp"), axis_types=(jax.sharding.AxisType.Explicit,) * 3)
videos = []
for mesh in (None, mesh):
    pipe = sdv_jax.load_pipeline({str(folder)!r}, mesh=mesh, progress=False)
    videos.append(pipe("a red ball", steps=2, guidance=2.0, output="latents", progress=False))
spread = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(pipe.runtime.denoisers[0][1])]
assert not all(spread), "nothing is spread"
assert np.abs(videos[0] - videos[1]).max() < 1e-4, np.abs(videos[0] - videos[1]).max()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
