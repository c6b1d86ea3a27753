"""The encoder of T5 v1.1, which reads the prompt for CogVideoX; the definition is transformers' `T5EncoderModel`.

Parameter paths (l: the leading layer axis of the stacked blocks):

    shared.embedding                    [vocab, d]
    relative_attention_bias.embedding   [buckets, heads]     one table for all layers (upstream keeps it in block 0)
    blocks.norm1.scale                  [l, d]
    blocks.attn.{q,k,v}.kernel          [l, d, heads*k]
    blocks.attn.o.kernel                [l, heads*k, d]
    blocks.norm2.scale                  [l, d]
    blocks.ff.{wi_0,wi_1}.kernel        [l, d, ff]
    blocks.ff.wo.kernel                 [l, ff, d]
    final_norm.scale                    [d]

There is no bias anywhere, the scores are not scaled, and there is no dropout: the encoder is only ever run frozen.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Self, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.errors import UserError
from sdv_jax.models.config_check import MOST_LAYERS, check_numbers
from sdv_jax.nn.attention import attention
from sdv_jax.nn.linear import Linear
from sdv_jax.nn.norms import RMSNorm
from sdv_jax.nn.rearrange import by_example
from sdv_jax.nn.stack import scan_blocks, stack
from sdv_jax.typing import Array, Bool, Float, Int


@no_type_check  # its own checks give the one line that a wrong value is due
@dataclasses.dataclass(frozen=True)
class T5Config:
    """The keys of transformers' T5 `config.json` that shape the encoder, by the same names; defaults: T5 v1.1 XXL.

    Raises `UserError` for values that no T5 v1.1 can have.
    """

    model_type: ClassVar[str] = "t5"
    # What transformers itself assumes when an older config.json leaves a key out.
    assumed: ClassVar[Mapping[str, object]] = {
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
    }

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self):
        label = f"{self.model_type.upper()} config"
        check_numbers(label, self, most={"num_layers": MOST_LAYERS})
        if self.feed_forward_proj != "gated-gelu":
            raise UserError(
                f"{label}: feed_forward_proj is {self.feed_forward_proj!r}, expected 'gated-gelu' (T5 v1.1 and UMT5); "
                "use such a text encoder"
            )
        half = self.relative_attention_num_buckets // 2
        if half < 2 or self.relative_attention_max_distance <= half // 2:
            raise UserError(
                f"{label}: relative_attention_num_buckets {self.relative_attention_num_buckets} and "
                f"relative_attention_max_distance {self.relative_attention_max_distance} make no position table; "
                "expected at least 4 buckets and a distance above a quarter of them"
            )

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> Self:
        """Reads transformers' `config.json`, whose other keys concern the decoder, training and the library.

        Raises `UserError` for a file of another `model_type`, or one that lacks a size.
        """
        if raw.get("model_type") != cls.model_type:
            raise UserError(
                f"text encoder config: model_type is {raw.get('model_type')!r}, expected {cls.model_type!r}"
            )
        known = dict(cls.assumed) | dict(raw)
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in known]:
            raise UserError(
                f"text encoder config: missing {', '.join(missing)}; expected a {cls.model_type.upper()} config.json"
            )
        return cls(**{name: known[name] for name in names})


# FSDP, of both kinds of encoder: each block matrix is cut along its input axis; the table of words is looked up whole.
SHARDING = (
    (r"^blocks\..*\.kernel$", jax.P(None, "fsdp", None)),
    (r"^(blocks|shared|relative_attention_bias|final_norm)\.", jax.P()),
)


class Embedding(nnx.Module):
    """A table of vectors, looked up by integer id; ids outside of the table are clipped to it."""

    def __init__(self, entries: int, width: int, *, std: float, dtype, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (entries, width), dtype))

    def __call__(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        def look_up(ids, table):
            return jnp.take(table, ids, axis=0, mode="clip")

        return by_example(look_up, ids, self.embedding[...])


class SelfAttention(nnx.Module):
    """Multi-head attention without scaling; heads * d_kv need not equal d_model."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q, self.k, self.v = (Linear(config.d_model, inner, bias=False, dtype=dtype, rngs=rngs) for _ in range(3))
        self.o = Linear(inner, config.d_model, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"], *, bias: Float[Array, "#b heads s s"]) -> Float[Array, "b s d"]:
        q, k, v = (f(x).reshape(*x.shape[:2], self.num_heads, -1) for f in (self.q, self.k, self.v))
        return self.o(attention(q, k, v, bias=bias, scale=1.0).reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """wo(gelu(wi_0 x) * wi_1 x), with the tanh form of gelu."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False, dtype=dtype, rngs=rngs)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False, dtype=dtype, rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)
        self.attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)
        self.ff = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"], *, bias: Float[Array, "#b heads s s"]) -> Float[Array, "b s d"]:
        x = x + self.attn(self.norm1(x), bias=bias)
        return x + self.ff(self.norm2(x))


class T5Encoder(nnx.Module):
    """Token ids to one vector per token, computed in `dtype` (float32 or bfloat16); scores and norms in float32."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, std=1.0, dtype=dtype, rngs=rngs)
        self.relative_attention_bias = position_table(config, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.num_layers, rngs=rngs)
        self.final_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(
        self, ids: Int[Array, "b s"], mask: Int[Array, "b s"] | Bool[Array, "b s"] | None = None
    ) -> Float[Array, "b s d"]:
        """Encodes; a token whose `mask` is zero is seen by none. CogVideoX gives no mask: it attends to its padding."""
        bias = position_bias(self.relative_attention_bias, position_buckets(self.config, ids.shape[1]), mask)
        x = scan_blocks(self.blocks, self.shared(ids), lambda block, x: block(x, bias=bias))
        return self.final_norm(x)


def position_table(config: T5Config, *, dtype, rngs: nnx.Rngs) -> Embedding:
    """What each head adds to a score, by the bucket of the distance: [buckets, heads]."""
    return Embedding(
        config.relative_attention_num_buckets, config.num_heads, std=config.d_model**-0.5, dtype=dtype, rngs=rngs
    )


def position_buckets(config: T5Config, length: int) -> Int[np.ndarray, "s s"]:
    """The row of the position table for each pair (query, key) of a text of `length` tokens."""
    places = np.arange(length)
    return relative_buckets(
        places[None, :] - places[:, None],
        buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )


def position_bias(
    table: Embedding, buckets: Int[np.ndarray, "s s"], mask: Int[Array, "b s"] | Bool[Array, "b s"] | None
) -> Float[Array, "#b heads s s"]:
    """What is added to the scores, in float32: the table's entries, and at masked keys the most negative number.

    That number is finite, so that a row with everything masked stays finite, as upstream.
    """
    bias = table(jnp.asarray(buckets)).astype(jnp.float32).transpose(2, 0, 1)[None]
    return bias if mask is None else bias + jnp.where(mask[:, None, None, :] != 0, 0.0, jnp.finfo(jnp.float32).min)


def relative_buckets(distance: np.ndarray, *, buckets: int, max_distance: int) -> np.ndarray:
    """The table row of each signed distance (key minus query), int32: exact if short, logarithmic up to `max_distance`.

    Half of the rows serve each direction. The arithmetic is float32 in transformers' order, since distances at a
    bucket's edge fall on either side of it by the last bit.
    """
    half = buckets // 2
    exact = half // 2
    size = np.abs(distance)
    octave = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    far = octave / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + far.astype(np.int64), half - 1)
    return (np.where(distance > 0, half, 0) + np.where(size < exact, size, far)).astype(np.int32)
