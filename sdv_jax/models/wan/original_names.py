"""Names of Wan's tensors in its original release and in diffusers, as tables that are read in both directions.

The two sets of names stand for the same tensors, one to one and with equal shapes. The original modules are those of
`wan/modules/{model,vae2_1,vae2_2,t5}.py` of the Wan-Video/Wan2.2 repository; the other side are diffusers'
`WanTransformer3DModel` and `AutoencoderKLWan`, and transformers' `UMT5EncoderModel`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from sdv_jax.checkpoints.rules.table import Rule

_REST = r"{rest:(?:\.(?:weight|bias|gamma))?}"  # empty in the name of a module


@dataclass(frozen=True)
class Names:
    """One table. Both lookups take the name of a tensor or of the module that holds it; None: no such name."""

    rows: Sequence[Rule]

    def diffusers(self, original: str) -> str | None:
        """'blocks.3.self_attn.q.weight' -> 'blocks.3.attn1.to_q.weight'."""
        return next((found[0] for row in self.rows if (found := row.path(original))), None)

    def original(self, diffusers: str) -> str | None:
        """The inverse of `diffusers`."""
        return next((found for row in self.rows if (found := row.torch_name(diffusers))), None)


def _modules(pairs: dict[str, str]) -> list[Rule]:
    return [Rule(original + _REST, diffusers + _REST) for original, diffusers in pairs.items()]


TRANSFORMER = Names(
    (
        # Parameters that lie in no module of their own.
        Rule("head.modulation", "scale_shift_table"),
        Rule("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
        *_modules(
            {
                "patch_embedding": "patch_embedding",
                "text_embedding.0": "condition_embedder.text_embedder.linear_1",
                "text_embedding.2": "condition_embedder.text_embedder.linear_2",
                "time_embedding.0": "condition_embedder.time_embedder.linear_1",
                "time_embedding.2": "condition_embedder.time_embedder.linear_2",
                "time_projection.1": "condition_embedder.time_proj",
                "blocks.{i}.self_attn.{name:q|k|v}": "blocks.{i}.attn1.to_{name}",
                "blocks.{i}.self_attn.o": "blocks.{i}.attn1.to_out.0",
                "blocks.{i}.self_attn.{name:norm_q|norm_k}": "blocks.{i}.attn1.{name}",
                "blocks.{i}.cross_attn.{name:q|k|v}": "blocks.{i}.attn2.to_{name}",
                "blocks.{i}.cross_attn.o": "blocks.{i}.attn2.to_out.0",
                "blocks.{i}.cross_attn.{name:norm_q|norm_k}": "blocks.{i}.attn2.{name}",
                # The norm before the cross-attention, the only one with parameters, is counted differently.
                "blocks.{i}.norm3": "blocks.{i}.norm2",
                "blocks.{i}.ffn.0": "blocks.{i}.ffn.net.0.proj",
                "blocks.{i}.ffn.2": "blocks.{i}.ffn.net.2",
                "head.head": "proj_out",
            }
        ),
    )
)

UMT5 = Names(
    _modules(
        {
            "token_embedding": "shared",
            "blocks.{i}.norm1": "encoder.block.{i}.layer.0.layer_norm",
            "blocks.{i}.attn.{name:q|k|v|o}": "encoder.block.{i}.layer.0.SelfAttention.{name}",
            "blocks.{i}.pos_embedding.embedding": "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias",
            "blocks.{i}.norm2": "encoder.block.{i}.layer.1.layer_norm",
            "blocks.{i}.ffn.gate.0": "encoder.block.{i}.layer.1.DenseReluDense.wi_0",
            "blocks.{i}.ffn.fc1": "encoder.block.{i}.layer.1.DenseReluDense.wi_1",
            "blocks.{i}.ffn.fc2": "encoder.block.{i}.layer.1.DenseReluDense.wo",
            "norm": "encoder.final_layer_norm",
        }
    )
)

_SIDE = "{side:encoder|decoder}"
_VAE_OUTSIDE_STAGES = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    _SIDE + ".conv1": _SIDE + ".conv_in",
    _SIDE + ".head.0": _SIDE + ".norm_out",
    _SIDE + ".head.2": _SIDE + ".conv_out",
    _SIDE + ".middle.1.{name:norm|to_qkv|proj}": _SIDE + ".mid_block.attentions.0.{name}",
}
_VAE_MIDDLE = {_SIDE + ".middle.0": _SIDE + ".mid_block.resnets.0", _SIDE + ".middle.2": _SIDE + ".mid_block.resnets.1"}
_RESNET = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def _resnets(places: dict[str, str]) -> dict[str, str]:
    return {f"{o}.{name}": f"{d}.{other}" for o, d in places.items() for name, other in _RESNET.items()}


def _resamplers(places: dict[str, str]) -> dict[str, str]:
    return {f"{o}.{name}": f"{d}.{name}" for o, d in places.items() for name in (r"resample.1", "time_conv")}


@functools.cache
def vae21(res_blocks: int = 2, stages: int = 4) -> Names:
    """Wan2.1_VAE.pth, whose encoder and decoder are flat lists. `res_blocks`: `num_res_blocks` of the config."""
    per_stage = res_blocks + 2  # a decoder's stage has one resnet more than an encoder's, and its upsampler
    ups = {
        f"decoder.upsamples.{stage * per_stage + place}": f"decoder.up_blocks.{stage}.resnets.{place}"
        for stage in range(stages)
        for place in range(res_blocks + 1)
    }
    upsamplers = {
        f"decoder.upsamples.{stage * per_stage + per_stage - 1}": f"decoder.up_blocks.{stage}.upsamplers.0"
        for stage in range(stages)
    }
    downs = {"encoder.downsamples.{i}": "encoder.down_blocks.{i}"}  # flat in diffusers, too
    return Names(_modules(_VAE_OUTSIDE_STAGES | _resnets(_VAE_MIDDLE | downs | ups) | _resamplers(downs | upsamplers)))


@functools.cache
def vae22(res_blocks: int = 2) -> Names:
    """Wan2.2_VAE.pth, with a list of stages. `res_blocks`: `num_res_blocks` of the config."""
    resnets = {
        "encoder.downsamples.{i}.downsamples.{j}": "encoder.down_blocks.{i}.resnets.{j}",
        "decoder.upsamples.{i}.upsamples.{j}": "decoder.up_blocks.{i}.resnets.{j}",
    }
    resamplers = {
        f"encoder.downsamples.{{i}}.downsamples.{res_blocks}": "encoder.down_blocks.{i}.downsampler",
        f"decoder.upsamples.{{i}}.upsamples.{res_blocks + 1}": "decoder.up_blocks.{i}.upsampler",
    }
    return Names(_modules(_VAE_OUTSIDE_STAGES | _resnets(_VAE_MIDDLE | resnets) | _resamplers(resamplers)))


def diffusers_name(original: str) -> str | None:
    """The transformer's tensor or module `original` as diffusers calls it, or None if it has none of that name."""
    return TRANSFORMER.diffusers(original)


def original_name(diffusers: str) -> str | None:
    """The inverse of `diffusers_name`."""
    return TRANSFORMER.original(diffusers)
