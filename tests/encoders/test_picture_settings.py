"""timm and transformers make of an image exactly what evaluation here makes of it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from mocov3_ds.data.views import decode
from mocov3_ds.encoders.export import check_format, export_encoder
from mocov3_ds.encoders.foreign_names import timm_sizes
from mocov3_ds.encoders.load import load_encoder
from mocov3_ds.encoders.owner_settings import OwnerSettings
from mocov3_ds.encoders.picture_settings import timm_config, transformers_preprocessor
from mocov3_ds.encoders.weights import Weights
from mocov3_ds.evaluation.features import make_inputs
from mocov3_ds.model.vit import VitShape
from tests.evaluation.runs import SIZE, make_run

OWNER = OwnerSettings(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def picture() -> tuple[Image.Image, bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 131, 3)).astype(np.uint8)
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.save(buffer, "PNG")
    return image, buffer.getvalue()


@pytest.mark.parametrize("size", [16, 32, 56, 60])
def test_the_inputs_of_timm_and_transformers(tmp_path: Path, size: int) -> None:
    import transformers

    image, image_bytes = picture()
    crop = torch.from_numpy(decode.centre_crop(image_bytes, size, round(size * 256 / 224)))[None]
    ours = make_inputs(crop, mean=OWNER.mean, std=OWNER.std)
    config = timm_config(VitShape(image_size=size), OWNER, {})["pretrained_cfg"]
    transform = create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    torch.testing.assert_close(transform(image)[None], ours, atol=1e-5, rtol=0)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    preprocessor = transformers_preprocessor(size, OWNER)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    assert (theirs - ours).abs().max() < 1.01 / 255 / min(OWNER.std)  # it rounds in between
    assert (theirs - ours).abs().mean() < 1e-3


def test_a_folder_that_timm_opens_by_itself(tmp_path: Path) -> None:
    run, image = make_run(tmp_path / "run"), picture()[0]
    export_encoder(run, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    settings = resolve_model_data_config(model)
    assert settings["input_size"] == (3, SIZE, SIZE)
    assert settings["interpolation"] == "bilinear"
    inputs = create_transform(**settings)(image)[None]
    with torch.no_grad():
        crop = torch.from_numpy(decode.centre_crop(picture()[1], SIZE, 18))[None]
        torch.testing.assert_close(model(inputs), load_encoder(run)(make_inputs(crop)))


def test_images_that_a_format_cannot_describe_are_refused() -> None:
    def weights_of(shape: VitShape) -> Weights:
        return Weights(
            path=Path("run"), kind="", role="base", tensors={}, backbone=shape, width=shape.dim
        )

    check_format(weights_of(VitShape()), "hf")
    for shape in (VitShape(image_width=256), VitShape(channels=4)):
        check_format(weights_of(shape), "timm")
        with pytest.raises(ValueError, match="--to hf describes square images in RGB"):
            check_format(weights_of(shape), "hf")


def test_timm_is_told_of_form_channels_mean_and_deviation() -> None:
    sizes = {"patch_size": 8, "dim": 24, "heads": 2, "depth": 1}
    shape = VitShape(image_size=32, image_width=64, channels=2, **sizes)
    settings = OwnerSettings(mean=(0.1, 0.2), std=(0.3, 0.4))
    told = timm_config(shape, settings, timm_sizes(shape))["pretrained_cfg"]
    assert told["input_size"] == [2, 32, 64]
    assert (told["mean"], told["std"]) == ([0.1, 0.2], [0.3, 0.4])
    model = timm.create_model("vit_base_patch16_224", **timm_sizes(shape))
    assert model(torch.zeros(1, 2, 32, 64)).shape == (1, 24)
