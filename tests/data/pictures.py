"""Pictures for the tests of the data path, and their stored bytes."""

import io

import numpy as np
from PIL import Image


def picture(height=97, width=131, seed=0):
    """Smooth colours with edges and noise, so that resampling and chroma handling show."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 / width, y * 255 / height, 127 + 120 * np.sin(x * y / 300)]
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return Image.fromarray((np.stack(channels, -1) + noise).clip(0, 255).astype(np.uint8))


def stored(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
