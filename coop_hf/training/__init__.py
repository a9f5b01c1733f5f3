"""The Trainer, its arguments, checkpoints, objectives and metrics."""
