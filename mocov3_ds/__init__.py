"""MoCo v3 pretraining of Vision Transformers at huge batch sizes on DeepSpeed."""

__version__ = "0.1.0"
