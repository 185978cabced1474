"""Distributed, streaming trainer for cryo-EM ab initio reconstruction."""

__version__ = "0.1.0"
