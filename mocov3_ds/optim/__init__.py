"""Optimizers that stay exact per tensor on any sharding, and the schedules."""

from mocov3_ds.optim.adamw import AdamW
from mocov3_ds.optim.lamb import Lamb
from mocov3_ds.optim.lars import Lars
from mocov3_ds.optim.muon import Muon
from mocov3_ds.optim.rules import Rule

__all__ = ["AdamW", "Lamb", "Lars", "Muon", "Rule"]
