"""Which particles of a store take part: queries, indexes, halves."""
