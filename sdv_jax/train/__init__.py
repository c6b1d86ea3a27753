"""Training: configuration, state, optimiser, one step, one loop, checkpoints, logs."""
