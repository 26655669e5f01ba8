"""Every setting of a run, with its default and its bounds.

Each setting has one owner. DeepSpeed's settings (ZeRO, offload, precision, clipping, the optimizer
and its parameters) are read from a plain DeepSpeed JSON. Ours (data, views, architecture, batch,
schedule, saving, evaluation) are the fields of `Config`; the string under a field is its help text.
The learning rate of the JSON's optimizer block is the paper's *base* rate: per 256 images.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mocov3_ds.model.layer_groups import group_names
from mocov3_ds.model.shapes import EncoderShape, Positions, VitShape
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

    image_size: Annotated[int, Bounds(1, 16384)] = 224
    """side of a view, pixels"""
    crop_min: float = 0.08
    """smallest crop, as a share of the image area"""
    crop_max: float = 1.0
    """largest crop, as a share of the image area"""
    blur_p: tuple[float, float] = (1.0, 0.1)
    """probability of the blur in view 1 and view 2"""
    solarise_p: tuple[float, float] = (0.0, 0.2)
    """probability of solarisation in view 1 and view 2"""
    colour: Literal["device", "threads"] = "device"
    """where jitter, grey, blur and solarisation run: on the training device or in the decode
    threads; threads suit machines whose processors idle while the device is busy"""
    fixed: bool = False
    """give an image the same two views in each epoch"""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Vision Transformer and its heads."""

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
    positions: Positions = "sincos"
    """fixed 2-D sin-cos positions, or none (Sec. 6.2)"""
    patch_lr: Share = 0.0
    """learning rate of the patch projection relative to the others; 0 freezes it (Sec. 4.3)"""
    drop_path: Share = 0.0
    """stochastic depth rate of the last block; its draws belong to samples: the same with any
    --chunk, number of ranks and sitting"""
    group_lr: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """learning rate of one layer group relative to the others, e.g. --model.group_lr block_0=0.2
    (repeatable; 0 freezes it; patch_embed, cls, block_0 ..., norm, projector, predictor)"""
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
    """Pretrain a Vision Transformer with MoCo v3 on DeepSpeed.

    Without arguments: a two-minute run on drawn sample images, on any machine. The same command
    again continues where the run folder ends.
    """

    recipe: str = "tiny"
    """named starting point: tiny, cifar10, vit_s16, vit_b16, vit_l16, vit_h14 (and *_lamb)"""
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
    profile: Annotated[int, Bounds(0, 1000)] = 0
    """steps to profile, after two others; RUN/profile gets a table of where the time goes and a
    trace of each rank; 0 = none"""
    seed: Seed = 0
    """seed of the initialisation, the order of samples and the views"""
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
    def vit(self) -> VitShape:
        """Shape of the backbone."""
        model = self.model
        return VitShape(
            image_size=self.views.image_size,
            patch_size=model.patch_size,
            dim=model.dim,
            depth=model.depth,
            heads=model.heads,
        )


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
        raise ValueError(f"--extend_schedule {config.extend_schedule} has no effect without --extend.")
    group_rates(config.model)
    if config.alarm.response != "none" and config.signals.every != 1:
        raise ValueError(
            f"--alarm.response {config.alarm.response} needs the signals of each step; give "
            "--signals.every 1."
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


def group_rates(model: ModelConfig) -> dict[str, float]:
    """Learning rate of each layer group relative to the others, from input to output.

    Raises:
        ValueError: `group_lr` has an unknown group, a group twice, a rate that is not a number from
            0 on, or a rate without effect.
    """
    rates = dict.fromkeys(group_names(model.depth), 1.0)
    assigned: set[str] = set()
    for entry in model.group_lr:
        group, _, value = entry.partition("=")
        if group not in rates or group in assigned:
            problem = "is there twice" if group in assigned else "names no layer group"
            raise ValueError(f"--model.group_lr {entry} {problem}; groups are {', '.join(rates)}.")
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
        if group == "patch_embed" and model.patch_lr == 0 and rates[group] > 0:
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
            values[name] = type(current)(value)
    return dataclasses.replace(default, **values)


def encoder_shape(config: Config) -> EncoderShape:
    """Architecture that the settings describe.

    Args:
        config: settings of the run.
    """
    return EncoderShape(
        backbone=config.vit,
        hidden=config.model.hidden,
        out=config.model.out,
        positions=config.model.positions,
        train_patch_projection=config.model.patch_lr > 0,
        drop_path=config.model.drop_path,
        qk_norm=config.model.qk_norm,
    )
