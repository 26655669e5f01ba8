"""Every setting of a run, with its default and its bounds.

Each setting has one owner. DeepSpeed's settings (ZeRO, offload, precision, clipping, the optimizer
and its parameters) are read from a plain DeepSpeed JSON. Ours (data, views, architecture, batch,
schedule, saving, evaluation) are the fields of `Config`; the string under a field is its help text.
The learning rate of the JSON's optimizer block is the paper's *base* rate: per 256 images.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.model.layer_groups import group_names
from mocov3_ds.model.own_backbones import OWN_BACKBONE, make_own_backbone
from mocov3_ds.model.shapes import (
    CONV_STEM_SHAPES,
    LARGEST_SIDE,
    BackboneShape,
    EncoderShape,
    OwnShape,
    Positions,
    TimmShape,
    VitShape,
    parse_size,
)
from mocov3_ds.settings.bounds import (
    Bounds,
    Count,
    NonNegative,
    Positive,
    PositiveCount,
    Seed,
    Share,
    check_bounds,
)
from mocov3_ds.settings.environment import DeviceChoice
from mocov3_ds.settings.spelling import did_you_mean

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
    """labelled held-out shards for the k-NN monitor; empty = none (drawn ones without `shards`)"""
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


@dataclass(frozen=True, kw_only=True)
class MocoConfig:
    """The contrastive loss and the momentum encoder."""

    temperature: Positive = 0.2
    """softmax temperature T"""
    momentum: Share = 0.99
    """momentum of the key encoder at the start"""
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
    """steps between largest attention logit and entropy of three blocks; 0 = none"""


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


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain a vision encoder with MoCo v3 on DeepSpeed.

    Without arguments: a two-minute run on drawn sample images, on any machine. The same command
    again continues where the run folder ends.
    """

    recipe: str = "tiny"
    """named starting point: tiny, cifar10, vit_s16, vit_b16, vit_l16, vit_h14 (and *_lamb),
    vit_conv_s16, vit_conv_b16, r50, r50_1000"""
    name: str = ""
    """name of the run folder in `runs`; empty = the recipe's name"""
    runs: Path = Path("runs")
    """folder of all runs"""
    init: str = ""
    """weights that both encoders start from instead of random ones: a run, one of its checkpoints,
    or a file or folder of another program (published MoCo v3, DINO, DeiT, timm, transformers); the
    first lines say what was taken and what was not"""
    init_which: Literal["base", "momentum"] = "base"
    """encoder that `init` takes where there are two"""
    extend: str = ""
    """folder of a finished run that this new one (FOLDER-extended) goes on from, with optimizer and
    momentum encoder; its settings are the defaults; give more --epochs, counted from its start"""
    extend_schedule: Literal["longer", "new"] = "longer"
    """longer = rate and momentum as if all epochs had been planned from the start; new = warm-up
    and decay begin again where the other run ended"""
    batch: PositiveCount = 4096
    """global batch: images per step over all ranks"""
    chunk: Count = 0
    """images per backbone pass (the result is exact at any value; a smaller one saves memory);
    0 = measure what fits"""
    keep_chunks: Count = 0
    """chunks that keep their activations, which takes memory and saves time (chosen when chunk is
    0)"""
    recompute_blocks: bool = False
    """recompute each block in the backward pass: less memory inside a chunk, or without chunks"""
    compile_blocks: bool = False
    """compile the blocks with torch.compile (not at ZeRO stage 3): same values up to rounding,
    about a minute at the start; slower in fp32 on an AMD processor"""
    key_block: Count = 0
    """keys per block of the loss (exact at any value); 0 = all if 512 MiB hold the logits"""
    epochs: Positive = 300.0
    """passes over the training samples"""
    warmup_epochs: float = 40.0
    """epochs of linear warm-up, from 0 to all of them"""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up: half a cosine down to 0, or the peak rate to the end"""
    stop_after_steps: Count = 0
    """end early after this many steps, with a checkpoint; 0 = run to the end of the schedule"""
    hang_timeout: NonNegative = 0.0
    """seconds that reading a batch, computing a step, logging or saving may take before the run
    ends and names the rank that hangs; 0 = ten times the longest so far, at least 40 s for
    computing, 10 minutes for disks, a store's own retry time for data, and an hour the first two
    times (k-NN has no limit)"""
    decay: Literal["all", "matrices"] = "all"
    """all = weight decay on all trained tensors (the reference); matrices = none on biases, norms
    and the class token"""
    stopped_status: Annotated[int, Bounds(0, 255)] = 0
    """exit status after a signal ended the run early, with a checkpoint; choose one that is not 0
    for a manager that restarts only what failed (Kubernetes)"""
    log: tuple[Logger, ...] = ("tensorboard",)
    """where the numbers of metrics.jsonl go as well, one or several: --log wandb csv; none after
    --log = nowhere (monitoring/README.md)"""
    profile: Annotated[int, Bounds(0, 1000)] = 0
    """steps to profile, after two others; RUN/profile gets a table of where the time goes and a
    trace of each rank; 0 = none"""
    seed: Seed = 0
    """seed of the initialisation, the order of samples and the views"""
    device: DeviceChoice = "auto"
    """auto = the rank's GPU, or the CPU of a machine without one; cpu = leave GPUs alone, also where
    the run would take days"""
    tf32: bool = False
    """let matrix products in fp32 round their inputs to TF32 (10 bits) on GPUs that have it: many
    times faster, and the planner reckons with it; bf16 and fp16 are not touched"""
    deterministic: bool = False
    """refuse operations without a reproducible implementation (GPU; the CPU always reproduces)"""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moco: MocoConfig = field(default_factory=MocoConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    trouble: TroubleConfig = field(default_factory=TroubleConfig)
    signals: SignalConfig = field(default_factory=SignalConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    deepspeed_config: Path | None = None
    """DeepSpeed JSON; its optimizer block is honoured, batch sizes are derived from `batch`"""
    ds: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """one value of the DeepSpeed JSON, e.g. --ds zero_optimization.stage=2 (repeatable)"""

    @property
    def folder(self) -> Path:
        """Folder of this run."""
        return self.runs / (self.name or self.recipe)

    @property
    def backbone(self) -> BackboneShape:
        """Shape of the backbone."""
        model = self.model
        height, width = parse_size(self.views.image_size)
        if model.backbone.startswith(OWN_BACKBONE):
            name = model.backbone.removeprefix(OWN_BACKBONE)
            make = partial(make_own_backbone, name)
            return OwnShape(
                name=name, make=make, size=(height, width), channels=self.views.channels
            )
        if model.backbone not in VIT_BACKBONES:
            return TimmShape(
                name=model.backbone.removeprefix(TIMM),
                size=(height, width),
                channels=self.views.channels,
                arguments=model.timm,
            )
        from_flags = VitShape(
            patch_size=model.patch_size,
            dim=model.dim,
            depth=model.depth,
            heads=model.heads,
            stem="patch" if model.backbone == "vit" else "conv",
        )
        return dataclasses.replace(
            CONV_STEM_SHAPES.get(model.backbone, from_flags),
            image_size=height,
            image_width=0 if width == height else width,
            channels=self.views.channels,
        )

    @property
    def vit(self) -> VitShape:
        """Shape of the backbone, where it is one of our Vision Transformers.

        Raises:
            ValueError: it is another network.
        """
        return encoder_shape(self).vit


@dataclass(frozen=True)
class Settings:
    """A resolved command line: our settings and DeepSpeed's."""

    config: Config
    engine: dict[str, Any]
    """the DeepSpeed JSON with overrides applied, still with its optimizer block"""

    def as_json(self) -> dict[str, Any]:
        """All settings as plain JSON values, as `config.json` of a run holds them."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config), default=str))
        del config["deepspeed_config"], config["ds"]
        return {"config": config, "deepspeed": self.engine}


# ------------------------------------------------------------------------------------------- checks


def check_config(config: Config) -> None:
    """Refuse numbers outside of their bounds and settings that contradict one another.

    Raises:
        ValueError: names the first such flag, its value and what is allowed.
    """
    check_bounds(config)
    Bounds(0, config.epochs).check_value("warmup_epochs", config.warmup_epochs)
    if config.keep_chunks and not config.chunk:
        raise ValueError(
            f"--keep_chunks {config.keep_chunks} has no effect without --chunk: both are chosen "
            "from the free memory then."
        )
    if config.init and config.extend:
        raise ValueError(
            f"--init {config.init} and --extend {config.extend} are two beginnings; give one of "
            "them: --extend goes on with optimizer and schedule, --init takes weights alone."
        )
    if config.init_which != "base" and not config.init:
        raise ValueError(f"--init_which {config.init_which} has no effect without --init.")
    if config.extend_schedule != "longer" and not config.extend:
        raise ValueError(
            f"--extend_schedule {config.extend_schedule} has no effect without --extend."
        )
    _check_backbone(config)
    _check_views(config.views)
    if config.alarm.response != "none" and config.signals.every != 1:
        raise ValueError(
            f"--alarm.response {config.alarm.response} needs the signals of each step; give "
            "--signals.every 1."
        )


def _check_backbone(config: Config) -> None:
    """Refuse a backbone that is not known, and settings of the model that name nothing."""
    model = config.model
    names = (*VIT_BACKBONES, *RESNETS)
    if model.backbone not in names and not model.backbone.startswith((TIMM, OWN_BACKBONE)):
        hint = did_you_mean(model.backbone, names)
        raise ValueError(
            f"--model.backbone {model.backbone} is not known{hint}; there are {', '.join(names)}, "
            f"{TIMM}NAME for a model of timm, and {OWN_BACKBONE}PACKAGE.MODULE:FUNCTION for yours."
        )
    if model.backbone in VIT_BACKBONES:
        if model.timm:
            raise ValueError(
                f"--model.timm {model.timm[0]} has no effect on --model.backbone "
                f"{model.backbone}; it is for {TIMM}NAME."
            )
        group_rates(model, group_names(config.vit.depth))


def check_backbone_flags(model: ModelConfig, recipe: ModelConfig) -> None:
    """Refuse flags of the paper's Vision Transformer that were given for another backbone.

    Args:
        model: settings of the run.
        recipe: the recipe's, from which a given flag differs.

    Raises:
        ValueError: names the first flag that would have no effect.
    """
    sizes = ("patch_size", "dim", "depth", "heads")
    only_patches = ("patch_lr",)
    without_effect = {
        "vit": (),
        "vit_conv": only_patches,
        **dict.fromkeys(CONV_STEM_SHAPES, (*sizes, *only_patches)),
    }.get(model.backbone, (*sizes, *only_patches, "positions", "qk_norm"))
    for name in without_effect:
        if getattr(model, name) != getattr(recipe, name):
            raise ValueError(
                f"--model.{name} {getattr(model, name)} has no effect on --model.backbone "
                f"{model.backbone}, which has its own."
            )


def _check_views(views: ViewConfig) -> None:
    """Refuse views that images of so many channels cannot have."""
    parse_size(views.image_size)
    for name, numbers in (("mean", views.mean), ("std", views.std)):
        if len(numbers) != views.channels:
            raise ValueError(
                f"--views.{name} has {len(numbers)} numbers for --views.channels {views.channels}; "
                f"python -m data_prep stats SHARDS --channels {views.channels} prints those of "
                "your images."
            )
    if views.channels != 3 and views.colour_ops == "on" and not views.function:
        raise ValueError(
            f"--views.channels {views.channels}: saturation, hue and grey are of RGB alone; give "
            "--views.colour_ops off to train without them."
        )
    if len(views.function) > 2:
        raise ValueError(
            f"--views.function names {len(views.function)} functions; give one for both views, or "
            "two."
        )


def check_batch(batch: int) -> None:
    """Refuse a global batch in which an image has no other one to be told from.

    Args:
        batch: images of a step over all ranks.

    Raises:
        ValueError: there are fewer than two.
    """
    if batch < 2:
        raise ValueError(
            f"--batch {batch} has nothing to contrast: the negatives of an image are the keys of "
            "the others, so loss and gradient would be 0 in every step; choose 2 or more."
        )


def group_rates(model: ModelConfig, groups: Sequence[str] | None = None) -> dict[str, float]:
    """Learning rate of layer groups relative to the others, from input to output.

    Args:
        model: settings of the model, of which `group_lr` counts.
        groups: all layer groups of the encoder; None = those that `group_lr` names, unchecked.

    Raises:
        ValueError: `group_lr` has an unknown group, a group twice, a rate that is not a number from
            0 on, or a rate without effect.
    """
    rates = dict.fromkeys(groups or (), 1.0)
    assigned: set[str] = set()
    for entry in model.group_lr:
        group, _, value = entry.partition("=")
        if (groups is not None and group not in rates) or group in assigned:
            problem = "is there twice" if group in assigned else "names no layer group"
            raise ValueError(
                f"--model.group_lr {entry} {problem}; groups are {', '.join(groups or assigned)}."
            )
        assigned.add(group)
        try:
            rates[group] = float(value)
        except ValueError:
            rates[group] = math.nan
        if not 0 <= rates[group] < math.inf:
            raise ValueError(
                f"--model.group_lr {entry} gives no rate; write GROUP=NUMBER with a number from 0 "
                "on, e.g. patch_embed=0.2."
            )
        frozen = model.backbone == "vit" and group == "patch_embed" and model.patch_lr == 0
        if frozen and rates[group] > 0:
            raise ValueError(
                f"--model.group_lr {entry} has no effect on a frozen patch projection; give "
                "--model.patch_lr 1 as well."
            )
    return rates


def from_json(tree: Mapping[str, Any]) -> Config:
    """The `Config` of a run from the content of its `config.json`.

    Raises:
        ValueError: another version of the program wrote the file, or the file is damaged.
    """
    try:
        config: Config = _with_values(Config(), tree["config"])
        check_config(config)
        return config
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"config.json was written by version {tree.get('version')} of mocov3-ds and is not "
            f"understood by this one ({error})."
        ) from None


def _with_values(default: Any, tree: Mapping[str, Any]) -> Any:
    """A dataclass with some of its values replaced by those of a JSON object, field by field."""
    values = {}
    for name, value in tree.items():
        current = getattr(default, name)
        if dataclasses.is_dataclass(current):
            values[name] = _with_values(current, value)
        else:
            values[name] = value if name == "image_size" else type(current)(value)
    return dataclasses.replace(default, **values)


def encoder_shape(config: Config) -> EncoderShape:
    """Architecture that the settings describe.

    Args:
        config: settings of the run.
    """
    return EncoderShape(
        backbone=config.backbone,
        hidden=config.model.hidden,
        out=config.model.out,
        projector_layers=config.model.projector_layers,
        predictor_norm=config.model.predictor_norm,
        positions=config.model.positions,
        train_patch_projection=config.model.patch_lr > 0,
        drop_path=config.model.drop_path,
        qk_norm=config.model.qk_norm,
    )
