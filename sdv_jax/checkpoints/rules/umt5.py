"""UMT5 encoder: transformers' tensor names and ours, T5's but for a table of position biases in every layer."""

from sdv_jax.checkpoints.rules.t5 import ALIASES, LAYER, ROWS
from sdv_jax.checkpoints.rules.table import Rule, Rules

ENCODER = Rules(
    table=(
        *ROWS,
        Rule(LAYER + ".0.SelfAttention.relative_attention_bias.weight", "blocks.relative_attention_bias.embedding"),
    ),
    aliases=ALIASES,
)
