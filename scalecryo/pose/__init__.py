"""The posterior over poses, given a map."""
