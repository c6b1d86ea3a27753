import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdv_jax.checkpoints import model_folder
from sdv_jax.data import encoding
from sdv_jax.data.encoding import Encoders, TextEncoder, VideoEncoder
from sdv_jax.errors import UserError
from sdv_jax.models.text.encode import PAD, encode
from sdv_jax.models.text.tokenizer import Tokenizer

ON_FOUR_DEVICES = """
import sys
import jax
import numpy as np
from sdv_jax.data.encoding import Encoders
pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 16, 24, 3)).astype(np.uint8)
texts = ["a red ball", "", "a cat on sand", "a red ball", "b"]
found = []
for devices in (jax.devices()[:1], jax.devices()):
    encoders = Encoders.load(sys.argv[1], devices=devices, text_batch=len(devices))
    found.append([*encoders.video(pixels, batch_size=len(devices)), encoders.text(texts)])
    assert encoders.video.whole(3) == {1: 3, 4: 4}[len(devices)]
for one, four in zip(*found):
    np.testing.assert_array_equal(one, four)
print(len(jax.devices()))
"""


class Squares(nnx.Module):
    """A stand-in for a VAE, whose latents say what they were made of."""

    traced = []  # shapes for which a program was made

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def encode(self, video):
        self.traced.append(video.shape)
        return video[:, ::4, ::8, ::8] * self.scale, video[:, ::4, ::8, ::8] ** 2


@pytest.fixture(scope="module")
def clips():
    return np.random.default_rng(0).integers(0, 256, (7, 5, 16, 24, 3)).astype(np.uint8)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_every_clip_is_encoded_whatever_the_batch(clips, batch_size):
    mean, logvar = VideoEncoder(Squares())(clips, batch_size=batch_size)
    pixels = clips[:, ::4, ::8, ::8].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(mean, pixels, atol=1e-6)
    np.testing.assert_allclose(logvar, pixels**2, atol=1e-6)
    assert mean.dtype == logvar.dtype == np.float32


def test_one_size_is_compiled_once(clips):
    encoder = VideoEncoder(Squares(), devices=jax.devices()[:1])
    Squares.traced.clear()
    for count in (7, 2, 3, 7):
        encoder(clips[:count], batch_size=3)
    assert Squares.traced == [(3, 5, 16, 24, 3)]
    encoder(clips[:, :1], batch_size=3)
    assert len(Squares.traced) == 2


def test_batches_have_one_size_and_are_filled_with_their_last_row():
    found = list(encoding.batches(np.arange(7), 3))
    assert [(batch.tolist(), count) for batch, count in found] == [([0, 1, 2], 3), ([3, 4, 5], 3), ([6, 6, 6], 1)]


def test_captions_become_what_the_model_reads(tiny_pipeline_folder):
    folder = tiny_pipeline_folder()
    traits = model_folder.about(folder).traits
    captions = ["a red ball", "", "a cat on sand", "a red ball"]
    ids, _ = Tokenizer(folder / "tokenizer").tokenize(captions, max_length=traits.text_length)
    np.testing.assert_array_equal(TextEncoder(folder, embed=False)(captions), ids)
    found = TextEncoder(folder, embed=True, batch_size=2)(captions)
    direct = encode(model_folder.load_component(folder, "text_encoder"), jnp.asarray(ids), masked=traits.text_masked)
    np.testing.assert_allclose(found, direct, atol=1e-5)
    assert found.dtype == np.float32 and found.shape == (4, traits.text_length, traits.text_width)


def test_captions_that_are_cut_are_counted_and_not_those_that_just_fit(tiny_pipeline_folder):
    folder = tiny_pipeline_folder()
    encoder, length = TextEncoder(folder, embed=False), model_folder.about(folder).traits.text_length
    texts = (" ".join(["ball"] * words) for words in range(1, 2 * length))
    fits = next(text for text in texts if encoder.tokenise([text])[0, -1] != PAD)
    assert encoder.cuts([fits]) == 0
    assert encoder.cuts(["ball", f"{fits} ball", fits, "d" * 10_000]) == 2


def test_half_precision_gives_float32(tiny_pipeline_folder, clips):
    encoders = Encoders.load(tiny_pipeline_folder(), dtype="bfloat16", text_dtype="bfloat16")
    exact = Encoders.load(tiny_pipeline_folder())
    for half, full in zip(encoders.video(clips, batch_size=7), exact.video(clips, batch_size=7), strict=True):
        assert half.dtype == np.float32
        assert 0 < np.abs(half - full).max() < 0.3


def test_a_tokenizer_of_another_model_is_refused(tiny_pipeline_folder, monkeypatch):
    encoder = TextEncoder(tiny_pipeline_folder(), embed=True)
    monkeypatch.setattr(encoder, "tokenise", lambda captions: np.full((1, 12), 128, np.int32))
    with pytest.raises(UserError, match="token 128 of 128 in the text encoder"):
        encoder(["a"])


def test_several_devices_give_the_numbers_of_one(tiny_pipeline_folder):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", ON_FOUR_DEVICES, str(tiny_pipeline_folder())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "4", done.stderr


def test_the_digest_is_of_what_encodes(tiny_pipeline_folder, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline_folder(), folder)
    before = encoding.digest(folder)
    assert before == encoding.digest(tiny_pipeline_folder())
    (weights,) = folder.glob("transformer/*.safetensors")
    weights.write_bytes(b"another")
    assert encoding.digest(folder) == before, "the denoiser is not used"
    for file in ("vae/config.json", "tokenizer/tokenizer.json", "text_encoder/model.safetensors"):
        path = folder / file
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + b"?")
        assert encoding.digest(folder) != before, file
        path.write_bytes(raw)
