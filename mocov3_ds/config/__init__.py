"""Settings of a run: their parts, the whole, and what cannot be."""
