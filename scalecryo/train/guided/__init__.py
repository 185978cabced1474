"""The guided method: from random poses to a map by bootstrap, ladder and a taught encoder."""
