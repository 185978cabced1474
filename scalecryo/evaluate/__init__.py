"""Alignment to a known truth, error measures and pictures."""
