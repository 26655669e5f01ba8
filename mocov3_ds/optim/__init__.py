"""Optimizers that stay exact per tensor on any sharding, and the schedules."""
