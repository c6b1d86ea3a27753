"""T5 encoder: transformers' tensor names and ours."""

from sdv_jax.checkpoints.rules.table import LINEAR, Rule, Rules

LAYER = "encoder.block.{l}.layer"
# All but the position biases, which T5 and UMT5 keep in different places.
ROWS = (
    Rule("shared.weight", "shared.embedding"),
    Rule(LAYER + ".0.layer_norm.weight", "blocks.norm1.scale"),
    Rule(LAYER + ".0.SelfAttention.{name:q|k|v|o}.weight", "blocks.attn.{name}.kernel", LINEAR),
    Rule(LAYER + ".1.layer_norm.weight", "blocks.norm2.scale"),
    Rule(LAYER + ".1.DenseReluDense.{name:wi_0|wi_1|wo}.weight", "blocks.ff.{name}.kernel", LINEAR),
    Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
)
ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}

ENCODER = Rules(
    table=(
        *ROWS,
        # Upstream keeps the one table of position biases inside its first block.
        Rule(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_attention_bias.embedding"
        ),
    ),
    aliases=ALIASES,
)
