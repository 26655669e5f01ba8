"""Shards, their order, and the samples and views that come out of them.

`OrderedSamples` is for pipelines of others; the rest of this room is what training is made of.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mocov3_ds.data.ordered_samples import OrderedSamples

__all__ = ["OrderedSamples"]


def __getattr__(name: str) -> Any:
    if name == "OrderedSamples":  # imported when it is asked for, as the sharder needs no torch
        from mocov3_ds.data.ordered_samples import OrderedSamples

        return OrderedSamples
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
