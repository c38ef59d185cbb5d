"""Training: the loop, the update, the self-test, checkpoints."""
