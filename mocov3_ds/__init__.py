"""MoCo v3 pretraining of vision encoders at huge batch sizes on DeepSpeed."""

import importlib
from typing import TYPE_CHECKING, Any

from mocov3_ds.version import __version__

if TYPE_CHECKING:
    from mocov3_ds.data.own_images import OwnImages
    from mocov3_ds.encoders.load import load_encoder
    from mocov3_ds.model.own_backbones import register_backbone
    from mocov3_ds.pretraining import pretrain

__all__ = ["OwnImages", "__version__", "load_encoder", "pretrain", "register_backbone"]

_PLACES = {
    "OwnImages": "mocov3_ds.data.own_images",
    "load_encoder": "mocov3_ds.encoders.load",
    "pretrain": "mocov3_ds.pretraining",
    "register_backbone": "mocov3_ds.model.own_backbones",
}


def __getattr__(name: str) -> Any:
    """Import a name of the package, and with it torch and timm, when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public_object = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = public_object
    return public_object
