"""Benchmarks: `python -m mocov3_ds.bench` lists them; each prints tables for BENCHMARKS.md."""
