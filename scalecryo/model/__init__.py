"""The trainable parts: encoder, volume, auto-encoder, loss."""
