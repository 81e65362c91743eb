"""Training: optimiser, sharded step, evaluation, checkpoints, and the loop over them."""
