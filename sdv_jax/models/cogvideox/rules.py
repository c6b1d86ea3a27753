"""CogVideoX transformer and VAE: diffusers' tensor names and ours."""

from sdv_jax.checkpoints.rules.table import CONV2D, CONV3D, LINEAR, Rule, Rules, Transform, patches

_BLOCK = "transformer_blocks.{l}."


def _linear(torch: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{ours}.kernel", LINEAR), Rule(f"{torch}.bias", f"{ours}.bias")


def _norm(torch: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{ours}.scale"), Rule(f"{torch}.bias", f"{ours}.bias")


def transformer(patch_size: int = 2) -> Rules:
    """The transformer's table; only the patch embedding's layout depends on the configuration."""
    return Rules(
        table=(
            Rule("patch_embed.proj.weight", "patch_embed.proj.kernel", patches(patch_size)),
            Rule("patch_embed.proj.bias", "patch_embed.proj.bias"),
            *_linear("patch_embed.text_proj", "patch_embed.text_proj"),
            *_linear("time_embedding.{part:linear_1|linear_2}", "time_embedding.{part}"),
            *_linear(_BLOCK + "{norm:norm1|norm2}.linear", "blocks.{norm}.linear"),
            *_norm(_BLOCK + "{norm:norm1|norm2}.norm", "blocks.{norm}.norm"),
            *_norm(_BLOCK + "attn1.{norm:norm_q|norm_k}", "blocks.attn1.{norm}"),
            *_linear(_BLOCK + "attn1.{part:to_q|to_k|to_v}", "blocks.attn1.{part}"),
            *_linear(_BLOCK + "attn1.to_out.0", "blocks.attn1.to_out"),
            *_linear(_BLOCK + "ff.net.0.proj", "blocks.ff.up"),
            *_linear(_BLOCK + "ff.net.2", "blocks.ff.down"),
            *_norm("norm_final", "norm_final"),
            *_linear("norm_out.linear", "norm_out.linear"),
            *_norm("norm_out.norm", "norm_out.norm"),
            *_linear("proj_out", "proj_out"),
        )
    )


def _module(at: str, transform: Transform, *, inner: str = "") -> tuple[Rule, Rule]:
    return (Rule(f"{{at:{at}}}{inner}.weight", "{at}.kernel", transform), Rule(f"{{at:{at}}}{inner}.bias", "{at}.bias"))


VAE = Rules(
    table=(
        # Causal convolutions wrap the convolution proper, which is called `conv`.
        *_module(r".*\bconv(?:_in|_out|1|2|_y|_b)", CONV3D, inner=".conv"),
        *_module(r".*\b(?:down|up)samplers\.\d+\.conv", CONV2D),
        *_module(r".*\bconv_shortcut|quant_conv|post_quant_conv", CONV3D),
        *_norm(r"{at:.*\bnorm(?:1|2|_out|_layer)}", "{at}"),
    )
)
