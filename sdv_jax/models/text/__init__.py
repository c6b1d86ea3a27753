"""Text encoders and the tokenizer that feeds them."""
