"""Shards, their order, and the samples and views that come out of them."""
