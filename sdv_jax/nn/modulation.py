"""adaLN: layer norms whose shift, scale and gate are computed from the time step embedding."""

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.nn.linear import Linear
from sdv_jax.nn.norms import LayerNorm
from sdv_jax.nn.rearrange import by_example
from sdv_jax.sharding import like
from sdv_jax.typing import Array, Float, Int

STREAMS = ("all", "reference")  # the values of `adaln_lora`: what an adapter of the adaLN linears acts on


class AdaLayerNormZero(nnx.Module):
    """One linear makes (shift, scale, gate) for video tokens and (shift, scale, gate) for text tokens.

    Source: diffusers `CogVideoXLayerNormZero`. Reference tokens use the video's three chunks. An adapter on the linear
    acts on every stream when `adaln_lora` is "all" (what paper A's released runs did) and on the reference stream only
    when it is "reference" (what its code meant).
    """

    def __init__(self, time_width: int, width: int, *, eps: float, affine: bool, dtype=jnp.float32, rngs: nnx.Rngs):
        self.linear = Linear(time_width, 6 * width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, eps=eps, affine=affine, dtype=dtype)

    def __call__(self, x: Float[Array, "b n d"], time: Float[Array, "b e"], *, lengths: tuple[int, int],
                 adaln_lora: str) -> tuple[Float[Array, "b n d"], list[Float[Array, "b 1 d"]]]:
        """The modulated tokens, and one gate per segment for `gated`. `lengths` = (text tokens, reference tokens)."""
        time = jax.nn.silu(time)
        alone = adaln_lora == "reference" and lengths[1] > 0
        *video, text_shift, text_scale, text_gate = _chunks(self.linear(time, adapt=adaln_lora == "all"), 6)
        modulation = [(text_shift, text_scale, text_gate), tuple(video)]
        if alone:
            modulation.insert(1, tuple(_chunks(self.linear(time), 6)[:3]))
        parts = split_segments(self.norm(x), lengths, len(modulation))
        out = [part * (1 + scale) + shift for part, (shift, scale, _) in zip(parts, modulation, strict=True)]
        return jnp.concatenate(out, 1), [gate for _, _, gate in modulation]


def gated(x: Float[Array, "b n d"], update: Float[Array, "b n d"], gates: list[Float[Array, "b 1 d"]], *,
          lengths: tuple[int, int]) -> Float[Array, "b n d"]:
    """x + gate · update, segment by segment."""
    parts = split_segments(update, lengths, len(gates))
    return x + jnp.concatenate([part * gate for part, gate in zip(parts, gates, strict=True)], 1)


def split_segments(x: Float[Array, "b n d"], lengths: tuple[int, int], segments: int) -> list[Array]:
    """[text | rest] for two segments, [text | reference | video] for three."""
    cuts = (lengths[0],) if segments == 2 else (lengths[0], lengths[0] + lengths[1])
    return jnp.split(x, cuts, axis=1)


class AdaLayerNormOut(nnx.Module):
    """The shift and scale before the output projection (diffusers `AdaLayerNorm` with chunk_dim 1)."""

    def __init__(self, time_width: int, width: int, *, eps: float, affine: bool, dtype=jnp.float32, rngs: nnx.Rngs):
        self.linear = Linear(time_width, 2 * width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, eps=eps, affine=affine, dtype=dtype)

    def __call__(self, x: Float[Array, "b n d"], time: Float[Array, "b e"]) -> Float[Array, "b n d"]:
        shift, scale = _chunks(self.linear(jax.nn.silu(time)), 2)
        return self.norm(x) * (1 + scale) + shift


def _chunks(x: Float[Array, "b d"], count: int) -> list[Array]:
    return jnp.split(x[:, None], count, axis=-1)


def keep_tokens(tokens: Float[Array, "b n d"], table, index: Int[Array, "b r"], references: int):
    """Token drop: of the first `references` tokens only those that `index` names stay, in them and in their positions.

    `table` is any tree of position arrays [n, k]; the result's have a batch axis, since examples keep different ones.
    """

    def keep(index, x):
        x = jnp.broadcast_to(x, (len(index), *x.shape[-2:]))
        kept = jnp.take_along_axis(x[:, :references], index[..., None], axis=1)
        return jnp.concatenate([kept, x[:, references:]], axis=1)

    index = like(index, tokens)
    return by_example(keep, index, tokens), jax.tree.map(lambda x: by_example(keep, index, jnp.asarray(x)), table)
