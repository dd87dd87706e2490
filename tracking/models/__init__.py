"""A stored model: written, checked, read."""
