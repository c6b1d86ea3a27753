"""Wan transformer: diffusers' tensor names and ours."""

from sdv_jax.checkpoints.rules.table import LINEAR, Rule, Rules, patches_3d

_BLOCK = "blocks.{l}."


def _linear(torch: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{ours}.kernel", LINEAR), Rule(f"{torch}.bias", f"{ours}.bias")


def transformer(patch_size: tuple[int, int, int] = (1, 2, 2)) -> Rules:
    """The transformer's table; only the patch embedding's layout depends on the configuration."""
    return Rules(
        table=(
            Rule("patch_embedding.weight", "patch_embedding.kernel", patches_3d(patch_size)),
            Rule("patch_embedding.bias", "patch_embedding.bias"),
            *_linear(
                "condition_embedder.{at:(?:time|text)_embedder.linear_[12]|time_proj}", "condition_embedder.{at}"
            ),
            Rule(_BLOCK + "scale_shift_table", "blocks.scale_shift_table"),
            *_linear(_BLOCK + "{at:attn[12].to_[qkv]}", "blocks.{at}"),
            *_linear(_BLOCK + "{at:attn[12].to_out}.0", "blocks.{at}"),
            Rule(_BLOCK + "{at:attn[12].norm_[qk]}.weight", "blocks.{at}.scale"),
            Rule(_BLOCK + "norm2.weight", "blocks.norm2.scale"),
            Rule(_BLOCK + "norm2.bias", "blocks.norm2.bias"),
            *_linear(_BLOCK + "ffn.net.0.proj", "blocks.ffn.up"),
            *_linear(_BLOCK + "ffn.net.2", "blocks.ffn.down"),
            Rule("scale_shift_table", "scale_shift_table"),
            *_linear("proj_out", "proj_out"),
        )
    )
