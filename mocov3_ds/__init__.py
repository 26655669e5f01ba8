"""MoCo v3 pretraining of Vision Transformers at huge batch sizes on DeepSpeed."""

from typing import TYPE_CHECKING, Any

from mocov3_ds.version import __version__

if TYPE_CHECKING:
    from mocov3_ds.encoders.load import load_encoder

__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Import `load_encoder`, and with it torch and timm, when it is first used."""
    if name == "load_encoder":
        from mocov3_ds.encoders.load import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
