"""A finished encoder: load it, translate the names of other programs, export it."""
