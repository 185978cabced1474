"""Collectives between workers, and the timer that counts what they cost."""
