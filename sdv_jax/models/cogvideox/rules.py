"""CogVideoX transformer and VAE: diffusers' tensor names and ours."""

from sdv_jax.checkpoints.rules.table import CONV2D, CONV3D, LINEAR, Rule, Rules, Transform, patches, patches_3d
from sdv_jax.models.cogvideox.transformer import TransformerConfig

_BLOCK = "transformer_blocks.{l}."
_WITHOUT_BATCH = Transform(lambda a: a[0], lambda a: a[None])  # [1, n, d] <-> [n, d]


def _linear(torch: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{ours}.kernel", LINEAR), Rule(f"{torch}.bias", f"{ours}.bias")


def _norm(torch: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{ours}.scale"), Rule(f"{torch}.bias", f"{ours}.bias")


def _flat_patches(sizes: tuple[int, int, int]) -> Transform:
    """The same as `patches_3d` where torch, too, has a matrix: [d, c·t·p·q]."""
    unfolded = patches_3d(sizes)
    return Transform(
        lambda a: unfolded.to_ours(a.reshape(a.shape[0], -1, *sizes)),
        lambda a: unfolded.to_torch(a).reshape(a.shape[-1], -1),
    )


def transformer(patch_size: int = 2, patch_size_t: int | None = None) -> Rules:
    """The transformer's table; only the patch embedding's layout depends on the configuration.

    It is a convolution over frames in 1.0 and a linear layer on patches of `patch_size_t` frames in 1.5.
    """
    p, t = patch_size, patch_size_t
    return Rules(
        table=(
            Rule("patch_embed.proj.weight", "patch_embed.proj.kernel", _flat_patches((t, p, p)) if t else patches(p)),
            Rule("patch_embed.proj.bias", "patch_embed.proj.bias"),
            Rule("patch_embed.pos_embedding", "patch_embed.pos_embedding", _WITHOUT_BATCH),
            *_linear("patch_embed.text_proj", "patch_embed.text_proj"),
            *_linear("{at:time_embedding|ofs_embedding}.{part:linear_1|linear_2}", "{at}.{part}"),
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


def of_transformer(config: TransformerConfig) -> Rules:
    """The table of a transformer with that config."""
    return transformer(config.patch_size, config.patch_size_t)


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
