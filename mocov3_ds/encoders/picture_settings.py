"""What do timm and transformers read of how an image becomes the input of an exported encoder?

Both get what evaluation here does: the shorter side resized to 256/224 of the image size (bilinear,
antialiased), the centre cropped, RGB in [0, 1] normalised.
"""

import math
from collections.abc import Mapping
from typing import Any

from mocov3_ds.encoders.foreign_names import architecture_names
from mocov3_ds.encoders.owner_settings import OwnerSettings
from mocov3_ds.model.shapes import TimmShape, VitShape


def timm_config(
    shape: VitShape, settings: OwnerSettings, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of a folder that `timm.create_model("local-dir:FOLDER")` opens.

    Args:
        shape: sizes of the encoder, with the image size that it is exported for.
        settings: mean and deviation of the images.
        sizes: arguments that turn the named architecture into this one.
    """
    return {
        "architecture": architecture_names(shape)[0],
        "num_classes": 0,
        "num_features": shape.dim,
        "global_pool": "token",
        "model_args": dict(sizes),
        "pretrained_cfg": {
            "input_size": [shape.channels, *shape.size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": _crop_share(shape.image_size),
            "crop_mode": "center",
            "mean": list(settings.mean),
            "std": list(settings.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def any_timm_config(
    shape: TimmShape,
    width: int,
    own: Mapping[str, Any],
    settings: OwnerSettings,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """The same for a model of timm that is no plain Vision Transformer.

    Args:
        shape: model, with the image size that it is exported for.
        width: numbers of an image's features.
        own: the model's own `pretrained_cfg`, which knows its first layer and its classifier.
        settings: mean and deviation of the images.
        arguments: keywords that `timm.create_model` needs for it.
    """
    height, width_of_image = shape.size
    copied_settings = {key: own.get(key) for key in ("first_conv", "classifier", "pool_size")}
    return {
        "architecture": shape.name,
        "num_classes": 0,
        "num_features": width,
        "model_args": dict(arguments),
        "pretrained_cfg": {
            "input_size": [shape.channels, height, width_of_image],
            "interpolation": "bilinear",
            "crop_pct": _crop_share(height),
            "crop_mode": "center",
            "mean": list(settings.mean),
            "std": list(settings.std),
            "num_classes": 0,
            **copied_settings,
        },
    }


def transformers_preprocessor(size: int, settings: OwnerSettings) -> dict[str, Any]:
    """The preprocessor_config.json of a folder; ViT's own processor would squash images.

    Args:
        size: side of an image, pixels.
        settings: mean and deviation of the images.
    """
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(size * 256 / 224)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }


def _crop_share(size: int) -> float:
    """The share of the shorter side that timm crops, so that it resizes to the size meant here.

    timm divides by it and rounds down.
    """
    resized = round(size * 256 / 224)
    share = size / resized
    return share if math.floor(size / share) == resized else size / (resized + 0.5)
