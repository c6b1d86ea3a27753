"""T5 encoder: transformers' tensor names and ours."""

from sdv_jax.checkpoints.rules.table import LINEAR, Rule, Rules

_LAYER = "encoder.block.{l}.layer"

ENCODER = Rules(
    table=(
        Rule("shared.weight", "shared.embedding"),
        # Upstream keeps the one table of position biases inside its first block.
        Rule(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_attention_bias.embedding"
        ),
        Rule(_LAYER + ".0.layer_norm.weight", "blocks.norm1.scale"),
        Rule(_LAYER + ".0.SelfAttention.{name:q|k|v|o}.weight", "blocks.attn.{name}.kernel", LINEAR),
        Rule(_LAYER + ".1.layer_norm.weight", "blocks.norm2.scale"),
        Rule(_LAYER + ".1.DenseReluDense.{name:wi_0|wi_1|wo}.weight", "blocks.ff.{name}.kernel", LINEAR),
        Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
    ),
    aliases={"encoder.embed_tokens.weight": "shared.weight"},
)
