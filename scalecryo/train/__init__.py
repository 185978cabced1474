"""The training loop, its workers, checkpoints and monitoring."""
