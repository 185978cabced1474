"""From tables and stacks to a store."""
