"""The encoder of UMT5, which reads the prompt for Wan; the definition is transformers' `UMT5EncoderModel`.

It is T5 v1.1 but for the table of position biases, which every layer has to itself:

    shared.embedding                            [vocab, d]
    blocks.relative_attention_bias.embedding    [l, buckets, heads]
    blocks.{norm1,attn,norm2,ff}, final_norm    as in `t5.py`
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, no_type_check

import jax.numpy as jnp
from flax import nnx

from sdv_jax.models.text.t5 import Block, Embedding, T5Config, position_bias, position_buckets, position_table
from sdv_jax.nn.norms import RMSNorm
from sdv_jax.nn.stack import scan_blocks, stack
from sdv_jax.typing import Array, Bool, Float, Int


@no_type_check  # as the class it derives from
@dataclasses.dataclass(frozen=True)
class UMT5Config(T5Config):
    """The keys of transformers' UMT5 `config.json` that shape the encoder; defaults: UMT5 XXL.

    Raises `UserError` for values that no UMT5 can have.
    """

    model_type: ClassVar[str] = "umt5"
    assumed: ClassVar[Mapping[str, object]] = dict(T5Config.assumed) | {"feed_forward_proj": "gated-gelu"}

    vocab_size: int = 256384


class UMT5Block(Block):
    """T5's block with a position table of its own."""

    def __init__(self, config: UMT5Config, *, dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.relative_attention_bias: Embedding = position_table(config, dtype=dtype, rngs=rngs)


class UMT5Encoder(nnx.Module):
    """Token ids to one vector per token, computed in `dtype` (float32 or bfloat16); scores and norms in float32."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, std=1.0, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: UMT5Block(config, dtype=dtype, rngs=rngs), config.num_layers, rngs=rngs)
        self.final_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(
        self, ids: Int[Array, "b s"], mask: Int[Array, "b s"] | Bool[Array, "b s"] | None = None
    ) -> Float[Array, "b s d"]:
        """Encodes; a token whose `mask` is zero is seen by none. The vectors of such tokens mean nothing."""
        buckets = position_buckets(self.config, ids.shape[1])

        def apply(block: UMT5Block, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
            return block(x, bias=position_bias(block.relative_attention_bias, buckets, mask))

        return self.final_norm(scan_blocks(self.blocks, self.shared(ids), apply))
