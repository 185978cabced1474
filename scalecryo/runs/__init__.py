"""What a run leaves: folder, checkpoints, curves, results."""
