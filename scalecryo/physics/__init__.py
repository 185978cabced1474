"""Image formation as pure tensor functions: transforms, rotations, slices, CTF, masks, FSC."""
