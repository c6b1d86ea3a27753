"""Image-to-video and CogVideoX 1.5 against diffusers' transformer, on random weights moved by the conversion rules.

`image` is a first frame's latent, which diffusers' pipeline pads with zeros and puts on further channels; 1.5 has
patches over two latent frames, of which its pipelines make the number even.
"""

import dataclasses

import numpy as np
import pytest
from diffusers import CogVideoXTransformer3DModel

from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox import VARIANTS
from sdv_jax.models.cogvideox.transformer import rotary as our_rotary
from tests.parity.compare import assert_close, relative_error
from tests.parity.weights import from_torch, inputs, rotary, run_ours, run_theirs, transformer_pair

ROPE = {"use_rotary_positional_embeddings": True}
IMAGE = {"in_channels": 8}
LEARNED = ROPE | IMAGE | {"use_learned_positional_embeddings": True}
IN_TIME = ROPE | {"patch_size_t": 2, "patch_bias": False}
CONFIGS = {
    "5b-I2V": LEARNED,
    "1.5": IN_TIME,
    "1.5-I2V": IN_TIME | IMAGE | {"ofs_embed_dim": 24},
    "image, sin-cos": IMAGE,
    "learned, no image, no biases": LEARNED | {"in_channels": 4, "patch_bias": False},
    "ofs, sine first, shifted": ROPE
    | {"ofs_embed_dim": 14, "time_embed_dim": 14, "flip_sin_to_cos": False, "freq_shift": 1},
    "1.5, patches of three frames": IN_TIME | {"patch_size_t": 3},
    "1.5, patches of one frame, four by four": IN_TIME | IMAGE | {"patch_size_t": 1, "patch_size": 4},
}


def picture(given, seed=1):
    """A first frame's latent for those inputs."""
    batch, _, *rest = given[0].shape
    return np.random.default_rng(seed).standard_normal((batch, 1, *rest)).astype(np.float32)


def whole(frames, patch):
    """The next multiple of the patch size in time."""
    return frames + -frames % (patch or 1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_output(config):
    theirs, ours = transformer_pair(**config)
    given = inputs(ours.config, frames=whole(3, config.get("patch_size_t")), height=8, width=12)
    image = picture(given) if ours.config.takes_image else None
    found = run_ours(ours, *given, image=image)
    assert_close(found, run_theirs(theirs, *given, image=image))
    if image is not None:
        assert relative_error(found, run_theirs(theirs, *given)) > 0.01  # it depends on the image


# Clips of 1, 5 and 17 latent frames. Learned positions exist for one size only, and for the trained length of 3 frames.
SIZES = [(1, 6, 10), (5, 8, 4), (17, 4, 6), (3, 2, 2)]


@pytest.fixture(scope="module", params=["5b-I2V", "1.5", "1.5-I2V"])
def pair(request):
    return transformer_pair(**CONFIGS[request.param])


@pytest.mark.parametrize("frames, height, width", SIZES)
def test_odd_sizes(pair, frames, height, width):
    theirs, ours = pair
    c = ours.config
    if c.use_learned_positional_embeddings:
        height, width = c.sample_height, c.sample_width
    given = inputs(c, frames=whole(frames, c.patch_size_t), height=height, width=width, batch=1)
    image = picture(given) if c.takes_image else None
    assert_close(run_ours(ours, *given, image=image), run_theirs(theirs, *given, image=image))


def test_no_image_is_an_empty_one(pair):
    theirs, ours = pair
    given = inputs(ours.config, frames=2, height=8, width=12)
    found = run_ours(ours, *given)
    assert_close(found, run_theirs(theirs, *given))
    if ours.config.takes_image:
        np.testing.assert_array_equal(found, run_ours(ours, *given, image=np.zeros_like(picture(given))))


def test_bfloat16_is_as_good_as_diffusers(pair):
    theirs, ours = pair
    given = inputs(ours.config, frames=6, height=8, width=12)
    image = picture(given) if ours.config.takes_image else None
    exact = run_theirs(theirs, *given, image=image)
    half = CogVideoXTransformer3DModel.from_config(theirs.config).eval()
    half.load_state_dict(theirs.state_dict())
    our_half = from_torch(theirs, ours.config, "bfloat16")
    error = relative_error(run_ours(our_half, *given, image=image, dtype="bfloat16"), exact)
    their_error = relative_error(run_theirs(half.bfloat16(), *given, image=image), exact)
    assert 0 < error <= 2 * their_error, (error, their_error)


def test_learned_positions_are_the_checkpoints_own():
    """They count for clips of the trained length; for others diffusers, and so ours, computes sin-cos ones."""
    theirs, ours = transformer_pair(**LEARNED)
    trained, other = (inputs(ours.config, frames=frames, height=8, width=12) for frames in (3, 5))
    before = [run_ours(ours, *given) for given in (trained, other)]
    ours.patch_embed.pos_embedding[...] *= -1
    after = [run_ours(ours, *given) for given in (trained, other)]
    assert relative_error(after[0], before[0]) > 0.01
    np.testing.assert_array_equal(after[1], before[1])


@pytest.mark.parametrize("sample", [(96, 170), (300, 300)])
@pytest.mark.parametrize("grid", [(48, 85), (30, 45), (1, 1), (17, 60)])
def test_rotary_table_of_1_5(grid, sample):
    """The published size, which was stated in two ways: the table is the same."""
    height, width = sample
    published = VARIANTS["CogVideoX1.5-5B"].transformer
    config = dataclasses.replace(
        published, num_attention_heads=1, num_layers=1, sample_height=height, sample_width=width
    )
    theirs = CogVideoXTransformer3DModel(**dataclasses.asdict(config))
    expected = rotary(theirs, 24, *(2 * n for n in grid))
    for found, table in zip(our_rotary(config, (11, *grid), references=1), expected, strict=True):
        assert_close(found, table, relative=2e-5)


def test_the_table_of_1_5_goes_on_beyond_the_trained_size():
    """Portrait at a config made for landscape, where diffusers' table is too short: the values of a longer one."""
    config = dataclasses.replace(VARIANTS["CogVideoX1.5-5B"].transformer, num_attention_heads=1, num_layers=1)
    larger = dataclasses.replace(config, sample_height=300, sample_width=300)
    theirs = CogVideoXTransformer3DModel(**dataclasses.asdict(larger))
    for found, table in zip(our_rotary(config, (3, 85, 48)), rotary(theirs, 6, 170, 96), strict=True):
        assert_close(found, table, relative=2e-5)


REFUSED = {
    "frames": (IN_TIME, {"frames": 3}, None, "latents have 3 frames; expected a multiple of 2, the patch size"),
    "rows": (ROPE, {"height": 7}, None, "latents have 7 rows; expected a multiple of 2, the patch size"),
    "size": (LEARNED, {"height": 6}, None, r"latents are 6 x 12 \(height x width\); expected 8 x 12, the only size"),
    "image": (ROPE, {}, 4, "this model takes no image: in_channels = 4, out_channels = 4; use an image-to-video model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_are_refused(case):
    config, size, image, message = REFUSED[case]
    _, ours = transformer_pair(num_layers=1, **config)
    given = inputs(ours.config, **{"frames": 4, "height": 8, "width": 12} | size)
    with pytest.raises(UserError, match=f"^{message}") as error:
        run_ours(ours, *given, image=picture(given) if image else None)
    assert "\n" not in str(error.value)


def test_texts_and_latents_that_are_refused():
    _, ours = transformer_pair(num_layers=1, **LEARNED)
    latents, text, timesteps = inputs(ours.config, frames=3, height=8, width=12)
    with pytest.raises(UserError, match="^the text has 5 tokens; expected 7 "):
        run_ours(ours, latents, text[:, :5], timesteps)
    with pytest.raises(UserError, match="^latents have 8 channels; expected 4"):
        run_ours(ours, np.concatenate([latents, latents], -1), text, timesteps)
