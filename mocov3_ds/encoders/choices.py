"""What a command line chooses of an encoder; known before torch is imported."""

from typing import Literal

EncoderRole = Literal["base", "momentum"]
"""the encoder that gradients train, or its moving average"""
Format = Literal["timm", "deit", "hf", "moco-v3"]
"""program that weights are written for"""
