"""The settings of a run in parts: data, views, model, saving, k-NN, signals, alarms, bad steps.

The string under a field is its help text.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.model.shapes import (
    CONV_STEM_SHAPES,
    LARGEST_SIDE,
    Positions,
)
from mocov3_ds.settings.bounds import (
    Bounds,
    Count,
    NonNegative,
    Positive,
    PositiveCount,
    Share,
)

Logger = Literal[
    "tensorboard", "csv", "wandb", "mlflow", "trackio", "comet_ml", "swanlab", "clearml", "aim",
    "dvclive",
]  # fmt: skip

VIT_BACKBONES = ("vit", "vit_conv", *CONV_STEM_SHAPES)
"""backbones that are Vision Transformers of ours"""
RESNETS = ("resnet50", "resnet101")
TIMM = "timm:"
"""before the name of a timm model"""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples come from."""

    shards: str = ""
    """folder or URL of the training shards (with manifest.json); empty = drawn sample images"""
    images: str = ""
    """folder of training images, labelled or not, instead of shards: it is sharded on first use, to
    RUNS/sharded-images"""
    probe_shards: str = ""
    """labelled held-out shards for the k-NN monitor, or a folder of images, which is sharded on
    first use; empty = none (drawn ones without `shards`)"""
    limit: Count = 0
    """train on this many samples, the first of the set; 0 = all"""
    threads: Annotated[int, Bounds(0, 1024)] = 4
    """decode threads of each rank"""
    lanes: PositiveCount = 1024
    """number of lanes, the sequences of samples that are read in parallel; best no fewer than
    ranks; another number gives other global batches"""
    pool: PositiveCount = 32768
    """samples that are shuffled together at any time over all ranks, held as stored bytes; another
    number gives other global batches"""
    cache: str = ""
    """folder on a fast local disk for blocks read from object storage; the ranks of a machine share
    it; empty = none"""
    cache_gb: float = 200.0
    """size of that folder, 10^9 bytes; the least recently used blocks are deleted"""
    max_bad_samples: Count = 0
    """unreadable samples (of each rank) that a run may replace by others; each is listed in
    bad_samples.jsonl; one more stops the run"""


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The two random views of an image (BYOL's asymmetric recipe, as the paper uses it)."""

    image_size: Annotated[int | str, Bounds(1, LARGEST_SIDE)] = 224
    """size of a view, pixels: the side of a square, or HEIGHTxWIDTH (192x256)"""
    channels: Annotated[int, Bounds(1, 256)] = 3
    """channels of an image: 3 = RGB, 1 = grey; other numbers are taken as the images have them
    (RGBA and CMYK: 4; arrays of .npy: any), and need --views.colour_ops off"""
    mean: tuple[float, ...] = ViewSpec.mean
    """mean of the pixels in [0, 1], for each channel (python -m data_prep stats prints it)"""
    std: tuple[float, ...] = ViewSpec.std
    """standard deviation of the pixels in [0, 1], for each channel"""
    crop_min: float = 0.08
    """smallest crop, as a share of the image area"""
    crop_max: float = 1.0
    """largest crop, as a share of the image area"""
    aspect: tuple[float, float] = ViewSpec.aspect
    """narrowest and widest crop, width / height"""
    colour_ops: Literal["on", "off"] = "on"
    """off = saturation and hue stay, and no view is grey, whatever their strengths: for images
    without colours; brightness, contrast, blur and solarisation go on"""
    jitter_p: Share = 0.8
    """probability that brightness, contrast, saturation and hue change, in a drawn order"""
    brightness: Share = 0.4
    """brightness is multiplied by a factor from [1 - x, 1 + x]"""
    contrast: Share = 0.4
    """the same for the contrast"""
    saturation: Share = 0.2
    """the same for the saturation"""
    hue: Annotated[float, Bounds(0, 0.5)] = 0.1
    """hue turns by up to this share of the colour circle, either way"""
    grey_p: Share = 0.2
    """probability of a grey view"""
    blur_p: tuple[float, float] = (1.0, 0.1)
    """probability of the blur in view 1 and view 2"""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """range of the blur's standard deviation, pixels"""
    solarise_p: tuple[float, float] = (0.0, 0.2)
    """probability of solarisation in view 1 and view 2"""
    solarise_threshold: Annotated[int, Bounds(1, 255)] = 128
    """solarisation inverts pixels from this value on, of 255"""
    flip_p: Share = 0.5
    """probability of a horizontal flip"""
    function: tuple[str, ...] = ()
    """make the views with a Python function of yours instead, package.module:name, or with two, one
    for each view; it gets the image and a random generator (mocov3_ds/data/README.md)"""
    colour: Literal["device", "threads"] = "device"
    """where jitter, grey, blur and solarisation run: on the training device or in the decode
    threads; threads suit machines whose processors idle while the device is busy"""
    fixed: bool = False
    """give an image the same two views in each epoch"""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone and its heads."""

    backbone: str = "vit"
    """vit = the paper's Vision Transformer, whose sizes are the flags below; vit_conv = the same on
    a stem of convolutions (vit_conv_s16, vit_conv_b16: with the published sizes); resnet50,
    resnet101; timm:NAME = any model of timm, e.g. timm:convnext_tiny"""
    timm: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """keyword of a timm model, e.g. --model.timm embed_dim=192 --model.timm depths=[2,2]
    (repeatable)"""
    patch_size: Annotated[int, Bounds(1, 16384)] = 16
    """side of a patch, pixels"""
    dim: Annotated[int, Bounds(1, 2**20)] = 768
    """embedding width; the MLP is four times as wide"""
    depth: Annotated[int, Bounds(1, 4096)] = 12
    """blocks"""
    heads: Annotated[int, Bounds(1, 4096)] = 12
    """attention heads (the paper's ViT-S has 12)"""
    hidden: Annotated[int, Bounds(1, 2**24)] = 4096
    """hidden width of projector and predictor"""
    out: Annotated[int, Bounds(1, 2**24)] = 256
    """output width of projector and predictor"""
    projector_layers: Annotated[int, Bounds(1, 64)] = 3
    """linear layers of the projector; 2 with the paper's ResNets"""
    predictor_norm: bool = True
    """batch norm after the last layer of the predictor; none with the paper's ResNets"""
    positions: Positions = "sincos"
    """fixed 2-D sin-cos positions, or none (Sec. 6.2)"""
    patch_lr: Share = 0.0
    """learning rate of the patch projection of `vit` relative to the others; 0 freezes it (Sec.
    4.3)"""
    drop_path: Share = 0.0
    """stochastic depth rate of the last block; its draws belong to samples: the same with any
    --chunk, number of ranks and sitting"""
    group_lr: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """learning rate of one layer group relative to the others, e.g. --model.group_lr block_0=0.2
    (repeatable; 0 freezes it; patch_embed, cls, block_0 ..., norm, projector, predictor; of other
    backbones a name that there is not lists them, e.g. conv1, layer1.0)"""
    qk_norm: bool = False
    """LayerNorm on queries and keys of each attention head; it bounds the attention logits; of the
    export formats only timm can hold this architecture"""
    layer_scale: Share = 0.0
    """first value of LayerScale (arXiv 2103.17239), a learned factor on each feature of both
    branches of a block, e.g. 1e-5: blocks begin as nearly the identity; 0 = none; exported to timm
    alone"""
    sigma_reparam: bool = False
    """sigma-reparametrisation (arXiv 2303.06296): the largest singular value of each linear layer
    of the blocks is a learned number, so that attention cannot sharpen at a blow; exported as
    ordinary weights"""
    fp8: bool = False
    """multiply in fp8 in the linear layers of the blocks, with a scale for each token: bf16 configs
    and, on a GPU, compute capability 8.9 or more; the gradient of weights stays in bf16; the step
    is exact in chunks as with bf16 (model/README.md)"""


@dataclass(frozen=True, kw_only=True)
class MocoConfig:
    """The contrastive loss and the momentum encoder."""

    temperature: Positive = 0.2
    """softmax temperature T"""
    momentum: Share = 0.99
    """momentum of the key encoder at the start"""
    momentum_batch: Count = 0
    """global batch that the momentum is meant for: each step's is raised to the power batch /
    momentum_batch, so that the key encoder lags by as many images at any batch (arXiv 2307.13813);
    0 = the momentum as it stands"""
    momentum_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine = grow to 1 at the end of the run"""


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """When the run's state is written."""

    every_steps: PositiveCount = 500
    """steps between checkpoints (one is always written at the end)"""
    keep: PositiveCount = 2
    """newest checkpoints that stay on disk (at least two with --trouble.policy rewind)"""
    keep_every: Count = 0
    """also keep the checkpoints at multiples of this many steps; 0 = none"""
    background: bool = True
    """write while training goes on; the step loop waits only for copies in host memory"""
    host_gb: NonNegative = 16.0
    """memory for such copies on the first rank, 10^9 bytes (a checkpoint has 16 bytes for each
    weight with Adam or LAMB); with less, the step loop waits for the disk"""
    mirror: str = ""
    """folder or URL that checkpoints are copied to; a fresh machine resumes from it"""


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """The k-NN monitor: Wu et al.'s weighted vote, with which the paper follows its runs."""

    every_steps: Count = 50
    """steps between dense evaluations on the queue of recent training features; 0 = none"""
    k: PositiveCount = 200
    """neighbours that vote (fewer if the bank is smaller)"""
    temperature: float = 0.07
    """a neighbour votes with exp(similarity / temperature)"""
    bank: Count = 0
    """training features to compare with; 0 = a tenth of the training samples, at least 4096"""
    probes: Count = 5000
    """held-out images that are classified, the same ones each time"""
    momentum_encoder: bool = True
    """evaluate the momentum encoder as well, with a second queue of the same size"""


@dataclass(frozen=True, kw_only=True)
class SignalConfig:
    """What is measured of each layer group beside the loss (RUN/signals.f32, signals.json)."""

    every: Count = 1
    """steps between rows of gradient, update, trust ratio, g / sqrt(v) and cosine; 0 = no file"""
    features_every: Count = 10
    """steps between spread and cosines of queries and keys; 0 = none"""
    attention_every: Count = 50
    """steps between largest attention logit, entropies (mean, and lowest head) and RMS of
    activations of each block; 0 = none"""
    sharpness_every: Count = 0
    """steps between curvatures of the loss: largest eigenvalue of the preconditioned Hessian, and
    curvature along the step, beside the limits at which steps become unstable; each takes as long
    as ten to sixty gradients and an fp32 copy of the weights; 0 = none"""
    noise_every: Count = 0
    """steps between gradient noise scales (the batch above which more images help little); each
    takes about as long as a step, and an fp32 copy of the weights; 0 = none"""


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """What an alarm does; it comes 3 to 5 steps before the loss rises (monitoring/alarms.py)."""

    response: Literal["none", "clip", "halve_lr"] = "none"
    """none = only write a file to RUN/alarms; clip = AdamW's update clip; halve_lr = half the
    learning rate"""
    steps: PositiveCount = 20
    """steps that the response lasts"""


@dataclass(frozen=True, kw_only=True)
class TroubleConfig:
    """What happens at a bad step: loss or gradient not finite, or a spike (see RUN/trouble)."""

    policy: Literal["stop", "skip", "rewind"] = "stop"
    """stop = end the run; skip = drop the update of that batch on all ranks; rewind = go back to
    the newest checkpoint (the second time to the one before it) and continue after that batch"""
    limit: Count = 10
    """bad steps of a run that are skipped or rewound; one more stops the run"""
    loss_spike: NonNegative = 0.0
    """a loss above this many times the trailing median is bad as well; 0 = off"""
    gradient_spike: NonNegative = 0.0
    """the same for the norm of the whole gradient before clipping; 0 = off (under fp16 the loss
    scale is lowered, too)"""
    window: PositiveCount = 100
    """steps of that median (no step is judged before 20 of them)"""
