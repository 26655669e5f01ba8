"""Flags of the commands on an encoder, which are read before torch is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mocov3_ds.encoders.choices import EncoderRole, Format
from mocov3_ds.settings.bounds import (
    Bounds,
    Coefficient,
    Count,
    Positive,
    PositiveCount,
    Seed,
    Share,
)
from mocov3_ds.settings.command_line import read_flags

FeatureType = Literal["fp32", "fp16"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Encoder = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """Which encoder of a run, or of a file of weights."""

    which: EncoderRole = "base"
    """base or momentum encoder"""
    heads: Count = 0
    """attention heads where the weights cannot tell; 0 = the paper's for their width"""


@dataclass(frozen=True, kw_only=True)
class SplitChoice:
    """Which labelled images."""

    train: str = ""
    """labelled training shards; empty = those of the run"""
    val: str = ""
    """labelled held-out shards; empty = the run's probe shards"""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(EncoderChoice):
    """How features are computed and stored."""

    dtype: FeatureType = "fp32"
    """type of the stored features; they are computed in fp32"""
    image_size: int = 0
    """side of a crop, pixels; 0 = as pretrained"""
    batch: int = 256
    """images per forward pass of a rank"""
    threads: int = 4
    """decode threads of a rank"""
    max_unreadable: int = 0
    """images of a rank that may be left out because they are unreadable"""


@dataclass(frozen=True, kw_only=True)
class LookOptions(EncoderChoice, SplitChoice):
    """What the pictures of an encoder show."""

    images: int = 8
    """number of held-out images that are shown, spread evenly over their set"""
    neighbours: int = 8
    """number of training images beside each of them"""
    bank: int = 10000
    """number of training images that are searched, spread evenly over their set"""
    threads: int = 4
    """number of decode threads"""


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(EncoderChoice, SplitChoice):
    """Settings that the linear probe and fine-tuning have in common."""

    run: Encoder
    """run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder)"""
    epochs: int
    batch: int
    micro_batch: int
    image_size: Count = 0
    """side of a crop, pixels; 0 = as pretrained"""
    seed: Seed = 0
    """seed of the initialisation, of the order and of all random draws"""
    workers: Count = 4
    """reading processes of each rank; 0 = the rank reads by itself"""
    precision: Precision = "auto"
    """arithmetic of the encoder; auto = bf16 on a GPU that has it, else fp32"""
    stop_after_epochs: Count = 0
    """end early, as a kill would; 0 = run to the end"""
    per_class: Path | None = None
    """CSV file to write: each class, its held-out images, top-1 and what it is confused with"""
    out: Path | None = None
    """folder of results.json and of the state; empty = RUN, or FILE-evaluation"""


@dataclass(frozen=True, kw_only=True)
class LinearConfig(SupervisedConfig):
    """Linear or attentive probe of an encoder; the defaults are the paper's protocol.

    Runs on one process or many (`accelerate launch`), and continues where it was stopped.
    """

    epochs: int = 90
    """passes over the training images"""
    batch: int = 4096
    """global batch: images per step over all ranks"""
    probe: Literal["linear", "attentive"] = "linear"
    """linear = a linear classifier of the features, the paper's; attentive = one that sees all
    tokens (of a ResNet: all places of the last map) through one learned attention query"""
    micro_batch: int = 256
    """images of a rank in one forward pass; changes nothing but memory"""
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """base rates, per 256 images, all trained at once; the best is reported"""
    momentum: Share = 0.9
    """momentum of SGD"""
    weight_decay: Coefficient = 0.0
    """weight decay of SGD"""
    anneal: Literal["step", "epoch"] = "step"
    """when the rate follows the cosine; the published MoCo v3 code changes it at each epoch"""
    crop_min: Share = 0.08
    """smallest random crop, as a share of the image area"""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(SupervisedConfig):
    """Fine-tune an encoder end to end; the defaults are the DeiT recipe as the paper uses it.

    Runs on one process or many (`accelerate launch`), and continues where it was stopped.
    """

    epochs: int = 0
    """passes over the training images; 0 = the paper's: 150, and 100 from ViT-L on"""
    batch: int = 1024
    """global batch: images per step over all ranks"""
    micro_batch: int = 128
    """images of a rank in one pass; bounds memory, changes no number but drop path's draws"""
    learning_rate: Positive = 5e-4
    """peak rate per 512 images"""
    warmup_epochs: Coefficient = 5.0
    """epochs of linear warm-up from `warmup_rate`"""
    warmup_rate: Coefficient = 1e-6
    """rate at the first step"""
    min_rate: Coefficient = 1e-5
    """rate at the end of the cosine"""
    weight_decay: Coefficient = 0.05
    """weight decay of AdamW; not on biases, norms, class token and positions"""
    layer_decay: float = 1.0
    """rate of a block relative to the next one; 1 = none (DeiT), 0.65 to 0.75 is common"""
    drop_path: Annotated[float, Bounds(-1, 1)] = -1.0
    """stochastic depth rate of the last block; -1 = the paper's: 0.1, and 0.5 from ViT-L on"""
    label_smoothing: Share = 0.1
    """share of the target spread over all classes"""
    mixup: Coefficient = 0.8
    """alpha of mixup; 0 = none"""
    cutmix: Coefficient = 1.0
    """alpha of cutmix; 0 = none; with both, each batch gets one of them"""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's policy; empty = none"""
    erase: Share = 0.25
    """probability of random erasing"""
    repeats: int = 3
    """crops of one image in an epoch of constant length (repeated augmentation); 1 = none"""
    crop_min: Share = 0.08
    """smallest random crop, as a share of the image area"""
    clip: Coefficient = 0.0
    """largest gradient norm; 0 = no clipping"""
    ema: Share = 0.0
    """decay of averaged weights, which are then judged too (DeiT: 0.99996); 0 = none"""
    judge_every_epochs: Count = 10
    """epochs between looks at the held-out images (one is always taken at the end); 0 = none"""
    save_every_epochs: PositiveCount = 1
    """epochs between saved states"""

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class KnnOptions(EncoderChoice, SplitChoice):
    """Weighted k-NN accuracy of an encoder, with the whole training split as the bank.

    Works on all ranks: `torchrun --nproc-per-node 8 -m mocov3_ds.cli knn RUN`.
    """

    run: Encoder
    """run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder)"""
    k: int = 200
    """number of neighbours that vote"""
    temperature: float = 0.07
    """a neighbour votes with exp(similarity / temperature)"""
    image_size: int = 0
    """side of a crop, pixels; 0 = as pretrained"""
    batch: int = 256
    """images per forward pass of a rank"""
    threads: int = 4
    """decode threads of a rank"""
    labels: str = ""
    """entry of each sample's KEY.json that lists its classes, several or none (multi-label); the
    result is then the mean average precision over classes; empty = one class an image"""
    per_class: Path | None = None
    """CSV file to write: each class, its held-out images, top-1 and what it is confused with; with
    --labels its average precision"""
    out: Path | None = None
    """folder of results.json; empty = RUN, or FILE-evaluation"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(EncoderChoice):
    """Write an encoder for another program, with a model card, and check its features there."""

    run: Encoder
    """run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder)"""
    to: Format = "timm"
    """program that will load it: timm, DeiT, transformers (hf) or the published MoCo v3 code"""
    out: Path | None = None
    """folder to make; empty = RUN-TO-WHICH beside the run"""
    image_size: int = 0
    """side of an image, pixels; 0 = as pretrained"""
    push: str = ""
    """repository USER/NAME of a Hub (HF_ENDPOINT, with the token of HF_TOKEN or of `hf auth
    login`) that gets the folder, too; empty = none"""
    private: bool = False
    """whether a repository that is made for it is seen by its owner alone"""


@dataclass(frozen=True, kw_only=True)
class EmbedCommand(EmbedOptions):
    """Write the features of all images of a set, with ids and labels, for other programs.

    Works on all ranks: `torchrun --nproc-per-node 8 -m mocov3_ds.cli embed RUN IMAGES --out FILE`.
    """

    run: Encoder
    """run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder)"""
    images: Annotated[str, tyro.conf.Positional]
    """folder or URL of shards, or a folder of images"""
    out: Path
    """file to write: .parquet, .npz or .safetensors"""


@dataclass(frozen=True, kw_only=True)
class LookCommand(LookOptions):
    """Draw what an encoder sees: attention, nearest neighbours, a histogram of similarities."""

    run: Encoder
    """run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder)"""
    out: Path | None = None
    """folder of the pictures; empty = RUN/look-WHICH, or FILE-evaluation/look-WHICH"""


def read_knn_flags(arguments: Sequence[str]) -> KnnOptions:
    """The flags that follow `mocov3 knn`; help and what is wrong end in SystemExit."""
    return read_flags(KnnOptions, "mocov3 knn", arguments)


def read_export_flags(arguments: Sequence[str]) -> ExportOptions:
    """The flags that follow `mocov3 export`; help and what is wrong end in SystemExit."""
    return read_flags(ExportOptions, "mocov3 export", arguments)


def read_embed_flags(arguments: Sequence[str]) -> EmbedCommand:
    """The flags that follow `mocov3 embed`; help and what is wrong end in SystemExit."""
    return read_flags(EmbedCommand, "mocov3 embed", arguments)


def read_look_flags(arguments: Sequence[str]) -> LookCommand:
    """The flags that follow `mocov3 look`; help and what is wrong end in SystemExit."""
    return read_flags(LookCommand, "mocov3 look", arguments)


def read_linear_flags(arguments: Sequence[str]) -> LinearConfig:
    """The flags of a linear probe; help and what is wrong end in SystemExit."""
    return read_flags(LinearConfig, "python -m mocov3_ds.evaluation.linear", arguments)


def read_finetune_flags(arguments: Sequence[str]) -> FinetuneConfig:
    """The flags of a fine-tuning; help and what is wrong end in SystemExit."""
    return read_flags(FinetuneConfig, "python -m mocov3_ds.evaluation.finetune", arguments)
