"""Pictures for the tests of the data path, and their stored bytes."""

import io

import numpy as np
from PIL import Image
from torchvision.transforms import functional as tvf


def picture(height=97, width=131, seed=0):
    """Smooth colours with edges and noise, so that resampling and chroma handling show."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 / width, y * 255 / height, 127 + 120 * np.sin(x * y / 300)]
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return Image.fromarray((np.stack(channels, -1) + noise).clip(0, 255).astype(np.uint8))


def encode_image(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode_image(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def crops_by_torchvision(image, boxes, flips=(False, False), size=32):
    """Crops (V, C, H, W) uint8 of an image, resized as RandomResizedCrop does."""
    views = []
    for box, flip in zip(boxes, flips, strict=True):
        view = tvf.resized_crop(image, *box, [size, size])
        views.append(np.asarray(tvf.hflip(view) if flip else view).transpose(2, 0, 1))
    return np.stack(views)


def detailed_picture(height, width, seed):
    """Energy at all scales, as photographs have: noise whose spectrum falls with frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    fall = frequency ** -rng.uniform(0.8, 1.3)
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) * fall
    planes = np.fft.irfft2(spectrum, (height, width))
    planes = planes / planes.std() * rng.uniform(20, 60) + rng.uniform(70, 180, (3, 1, 1))
    return Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
