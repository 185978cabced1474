"""From images and poses to maps."""
