"""What a training step minimises: pure functions from (model, batch, key) to (loss, metrics)."""
