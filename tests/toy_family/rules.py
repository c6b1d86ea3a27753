"""What the tensors are called in a diffusers folder, and here."""

from sdv_jax.checkpoints.rules.table import LINEAR, Rule, Rules


def _linear(torch: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{ours}.kernel", LINEAR), Rule(f"{torch}.bias", f"{ours}.bias")


def _norm(torch: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{ours}.scale"), Rule(f"{torch}.bias", f"{ours}.bias")


TRANSFORMER = Rules(
    table=(
        *_linear(r"{at:patch_embed|text_embed|time_embed\.linear_[12]|proj_out}", "{at}"),
        *_linear("layers.{l}.{at:to_q|to_k|to_v|to_out|up|down}", "blocks.{at}"),
        *_norm("layers.{l}.{at:norm[12]}", "blocks.{at}"),
        *_norm("norm_out", "norm_out"),
    )
)
VAE = Rules(table=_linear("{at:encoder|decoder}", "{at}"))
