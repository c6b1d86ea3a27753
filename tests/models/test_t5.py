"""The T5 encoder and the tokenizer on their own: sizes, configs, refusals."""

import functools
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdv_jax.errors import UserError
from sdv_jax.models.text.t5 import T5Config, T5Encoder
from sdv_jax.models.text.tokenizer import Tokenizer
from sdv_jax.small_world import build_tokenizer

XXL = {  # the keys of CogVideoX's text_encoder/config.json, in part of no use to an encoder
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-06,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "dropout_rate": 0.1,
    "tie_word_embeddings": False,
}
TINY = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)


@functools.cache
def build(dtype):
    return jax.jit(lambda: T5Encoder(TINY, rngs=nnx.Rngs(0), dtype=dtype))()


encode = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))


def test_the_published_encoder_has_the_published_size():
    config = T5Config.from_json(XXL)
    assert config == T5Config()
    encoder = nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(nnx.state(encoder, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == 4_762_310_656
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    out = nnx.eval_shape(lambda model, ids: model(ids), encoder, jax.ShapeDtypeStruct((2, 226), jnp.int32))
    assert out.shape == (2, 226, 4096) and out.dtype == jnp.bfloat16


def test_parameter_paths_are_the_documented_ones():
    encoder = nnx.eval_shape(lambda: T5Encoder(TINY, rngs=nnx.Rngs(0)))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(encoder, nnx.Param))}
    assert shapes == {
        "shared.embedding": (20, 16),
        "relative_attention_bias.embedding": (32, 2),
        "blocks.norm1.scale": (2, 16),
        "blocks.attn.q.kernel": (2, 16, 16),
        "blocks.attn.k.kernel": (2, 16, 16),
        "blocks.attn.v.kernel": (2, 16, 16),
        "blocks.attn.o.kernel": (2, 16, 16),
        "blocks.norm2.scale": (2, 16),
        "blocks.ff.wi_0.kernel": (2, 16, 24),
        "blocks.ff.wi_1.kernel": (2, 16, 24),
        "blocks.ff.wo.kernel": (2, 24, 16),
        "final_norm.scale": (16,),
    }


def test_layers_start_unequal():
    kernel = build(jnp.float32).blocks.attn.q.kernel[...]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_masked_tokens_are_seen_by_none(dtype):
    encoder = build(dtype)
    ids, other = jnp.array([[3, 4, 5, 6]]), jnp.array([[3, 4, 9, 9]])
    some, every = jnp.array([[1, 1, 0, 0]]), jnp.ones((1, 4), jnp.int32)
    np.testing.assert_array_equal(encode(encoder, ids, some)[0, :2], encode(encoder, other, some)[0, :2])
    assert not np.allclose(*(np.float32(encode(encoder, x, every))[0, :2] for x in (ids, other)))


def test_a_row_with_no_token_at_all_stays_finite():
    assert np.isfinite(encode(build(jnp.float32), jnp.array([[3, 4]]), jnp.zeros((1, 2), jnp.int32))).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ({"model_type": "clip_text_model"}, "model_type is 'clip_text_model'"),
        ({"d_model": None}, "missing d_model"),
        ({"feed_forward_proj": None}, "feed_forward_proj is 'relu'"),  # absent means relu upstream
        ({"d_model": 0}, "T5 config: d_model = 0; expected a whole number >= 1"),
        ({"d_kv": "64"}, "T5 config: d_kv = '64'; expected a whole number >= 1"),
        ({"d_ff": -1}, "T5 config: d_ff = -1; expected a whole number >= 1"),
        ({"num_layers": 1_000_000}, "T5 config: num_layers = 1000000; expected a whole number <= 10000"),
        ({"num_heads": 64.5}, "T5 config: num_heads = 64.5; expected a whole number >= 1"),
        ({"vocab_size": [1]}, r"T5 config: vocab_size = \[1\]; expected a whole number >= 1"),
        ({"vocab_size": 10**30}, r"T5 config: vocab_size = 10*; expected a whole number <= 16777216"),
        ({"relative_attention_num_buckets": 32.0}, "relative_attention_num_buckets = 32.0; expected a whole number"),
        ({"relative_attention_max_distance": True}, "relative_attention_max_distance = True; expected a whole number"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon = 0; expected a finite number > 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon = nan; expected a finite number > 0"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon = 'small'; expected a finite number > 0"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets 3"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance 8"),
    ],
)
def test_refused_configs(change, message):
    raw = {key: value for key, value in (XXL | change).items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        T5Config.from_json(raw)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A word-level tokenizer saved as transformers saves T5's: padding 0, end of text 1."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "cube", "drifting", "left", "over", "sand"]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=4
    )
    path = tmp_path_factory.mktemp("pipeline") / "tokenizer"
    fast.save_pretrained(path)
    return path


def test_tokens_are_padded_and_masked(folder, caplog):
    ids, mask = Tokenizer(folder).tokenize(["a red cube", ""], max_length=6)
    assert ids.dtype == mask.dtype == np.int32
    assert ids.tolist() == [[3, 4, 5, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert not caplog.records


def test_a_long_prompt_is_cut_and_one_line_says_what_went(folder, caplog):
    with caplog.at_level(logging.WARNING):
        ids, mask = Tokenizer(folder).tokenize(["a red cube drifting left over sand", "a cube"], max_length=5)
    assert ids.tolist() == [[3, 4, 5, 6, 1], [3, 5, 1, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    (record,) = [r for r in caplog.records if r.name.startswith("sdv_jax")]
    assert "left over sand" in record.getMessage() and "drifting" not in record.getMessage()


def test_a_prompt_that_just_fits_is_not_cut(folder, caplog):
    ids, _ = Tokenizer(folder).tokenize(["a red cube"], max_length=4)
    assert ids.tolist() == [[3, 4, 5, 1]] and not caplog.records


@pytest.mark.parametrize("texts, message", [([], "empty"), ([3], "found int"), ([None], "found NoneType")])
def test_refused_prompts(folder, texts, message):
    with pytest.raises(UserError, match=message):
        Tokenizer(folder).tokenize(texts, max_length=4)


def test_refused_folders(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer_config.json"):
        Tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer_config.json").write_text("{")
    build_tokenizer(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "spiece.model", tmp_path)
    with pytest.raises(UserError, match="cannot read") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


NO_VOCABULARY = {
    "nothing": ({"spiece.model": None}, "no vocabulary, neither spiece.model nor tokenizer.json"),
    "empty": ({"spiece.model": b""}, r"spiece\.model: damaged \("),
    "cut in a piece": ({"spiece.model": 500}, r"spiece\.model: damaged \("),
    "cut between two pieces": ({"spiece.model": 213}, r"spiece\.model: damaged \(it ends before"),
    "no protobuf": ({"spiece.model": b"\xff" * 99}, r"spiece\.model: damaged \("),
    "no json": ({"spiece.model": None, "tokenizer.json": b"{"}, r"tokenizer\.json: damaged \("),
    "no model": ({"spiece.model": None, "tokenizer.json": b"{}"}, r"tokenizer\.json: damaged \(no model"),
    "no tokens": (
        {"spiece.model": None, "tokenizer.json": b'{"model": {"vocab": []}}'},
        r"tokenizer\.json: damaged \(no vocabulary",
    ),
    "deep json": ({"tokenizer.json": b"[" * 100_000}, r"tokenizer\.json: damaged \("),
}


@pytest.mark.parametrize("case", NO_VOCABULARY)
def test_a_tokenizer_without_a_whole_vocabulary(tmp_path, capfd, case):
    """Every prompt would be unknown tokens, or the reason a package that has nothing to do with it."""
    files, message = NO_VOCABULARY[case]
    build_tokenizer(tmp_path)
    whole = (tmp_path / "spiece.model").read_bytes()
    for name, content in files.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(whole[:content] if isinstance(content, int) else content)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}.*{message}") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
