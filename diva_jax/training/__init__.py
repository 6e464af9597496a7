"""Training: the step, its state and sharding, checkpoints, several processes, metrics."""
