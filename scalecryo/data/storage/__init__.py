"""The Zarr store: its layout, its shards, and how they are read and checked."""
