"""Every knob of a run, the recipes, and the one parser.

Each fact has one owner. What is DeepSpeed's (ZeRO, offload, precision, clipping, the optimizer and
its parameters) is read from a plain DeepSpeed JSON; what is ours (data, views, architecture, batch,
schedule, saving, evaluation) from `Config`. Precedence: recipe < `--deepspeed_config` < flags.
The learning rate of the JSON's optimizer block is the paper's *base* rate: per 256 images.
"""

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mocov3_ds.model.layer_groups import group_names
from mocov3_ds.model.vit import PAPER_SHAPES, Positions, VitShape


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples come from."""

    shards: str = ""
    """folder or URL of the training shards (with manifest.json); empty = drawn sample images"""
    probe_shards: str = ""
    """labelled held-out shards for the k-NN monitor; empty = none (drawn ones without `shards`)"""
    limit: int = 0
    """train on this many samples, the first of the set; 0 = all"""
    threads: int = 4
    """decode threads of each rank"""
    lanes: int = 1024
    """parallel sample sequences that make up the order, best no fewer than ranks; part of what
    fixes the global batches"""
    pool: int = 32768
    """samples that are shuffled together at any time over all ranks, held as stored bytes; part of
    what fixes the global batches"""
    cache: str = ""
    """folder on a fast local disk that keeps what was read from object storage, shared by the ranks
    of a machine; empty = none"""
    cache_gb: float = 200.0
    """size of that folder, 10^9 bytes; the least recently used blocks leave"""
    max_bad_samples: int = 0
    """unreadable samples (of this rank) that a run may replace by others; each is counted and
    listed in bad_samples.jsonl, one more stops the run"""


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The two random views of an image (BYOL's asymmetric recipe, as the paper uses it)."""

    image_size: int = 224
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
    """where jitter, grey, blur and solarisation run: on the training device, or in the decode
    threads, for machines whose processors idle while the device is busy"""
    fixed: bool = False
    """the same two views of an image in each epoch: no noise but the choice of images"""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Vision Transformer and its heads."""

    patch_size: int = 16
    """side of a patch, pixels"""
    dim: int = 768
    """embedding width; the MLP is four times as wide"""
    depth: int = 12
    """blocks"""
    heads: int = 12
    """attention heads (the paper's ViT-S has 12)"""
    hidden: int = 4096
    """hidden width of projector and predictor"""
    out: int = 256
    """output width of projector and predictor"""
    positions: Positions = "sincos"
    """fixed 2-D sin-cos positions, or none (Sec. 6.2)"""
    patch_lr: float = 0.0
    """learning rate of the patch projection relative to the others; 0 freezes it (Sec. 4.3)"""
    drop_path: float = 0.0
    """stochastic depth rate of the last block"""
    group_lr: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """learning rate of one layer group relative to the others, e.g. --model.group_lr block_0=0.2
    (repeatable; 0 freezes it; patch_embed, cls, block_0 ..., norm, projector, predictor)"""
    qk_norm: bool = False
    """LayerNorm on queries and keys of each attention head, which bounds the attention logits;
    another architecture, which only timm of the export formats can hold"""


@dataclass(frozen=True, kw_only=True)
class MocoConfig:
    """The contrastive game."""

    temperature: float = 0.2
    """softmax temperature T"""
    momentum: float = 0.99
    """momentum of the key encoder at the start"""
    momentum_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine reaches 1 at the end"""


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """When the run's state is written."""

    every_steps: int = 500
    """steps between checkpoints (one is always written at the end)"""
    keep: int = 2
    """newest checkpoints that stay on disk (two at least with --trouble.policy rewind)"""
    keep_every: int = 0
    """checkpoints of multiples of so many steps stay as well; 0 = none"""
    background: bool = True
    """write while training goes on; the step loop waits for copies in host memory alone"""
    host_gb: float = 16.0
    """10^9 bytes of such copies on the first rank (a whole checkpoint is 16 bytes a weight with
    Adam or LAMB); with less, the step loop waits for the disk"""
    mirror: str = ""
    """folder or URL that checkpoints are copied to, and that a fresh machine goes on from"""


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """The k-NN monitor (Wu et al.'s weighted vote, as the paper watches its runs)."""

    every_steps: int = 50
    """steps between dense evaluations on the queue of recent training features; 0 = none"""
    k: int = 200
    """neighbours that vote (fewer when the bank is smaller)"""
    temperature: float = 0.07
    """a neighbour votes with exp(similarity / temperature)"""
    bank: int = 0
    """training features compared against; 0 = a tenth of the training samples, 4096 at least"""
    probes: int = 5000
    """held-out images that are classified, the same ones each time"""
    momentum_encoder: bool = True
    """judge the momentum encoder as well, against a queue of its own (as large once more)"""


@dataclass(frozen=True, kw_only=True)
class SignalConfig:
    """What is measured of each layer group beside the loss: RUN/signals.f32, signals.json."""

    every: int = 1
    """steps between rows of gradient, update, trust ratio, g / sqrt(v) and cosine; 0 = no file"""
    features_every: int = 10
    """steps between spread and cosines of queries and keys; 0 = none"""
    attention_every: int = 50
    """steps between largest attention logit and entropy of three blocks; 0 = none"""


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """What an early alarm does, 3 to 5 steps before the loss shows anything (monitor/alarm.py)."""

    response: Literal["none", "clip", "halve_lr"] = "none"
    """nothing but a file in RUN/alarms; AdamW's update clip; or half the learning rate"""
    steps: int = 20
    """steps after an alarm for which the response lasts"""


@dataclass(frozen=True, kw_only=True)
class TroubleConfig:
    """What happens at a loss or gradient that is not finite, or a spike; RUN/trouble names it."""

    policy: Literal["stop", "skip", "rewind"] = "stop"
    """stop the run; skip that batch, its update dropped on all ranks; or go back to the newest
    checkpoint (the second time to the one before it) and on behind that batch"""
    limit: int = 10
    """bad steps of a run that are skipped or rewound; one more stops it"""
    loss_spike: float = 0.0
    """a loss above this many times the trailing median is bad as well; 0 = no loss is"""
    gradient_spike: float = 0.0
    """the same for the norm of the whole gradient, before clipping (under fp16 the loss scale is
    lowered, too)"""
    window: int = 100
    """steps of that median (none is judged before 20 of them)"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain a Vision Transformer with MoCo v3 on DeepSpeed.

    Without arguments: a two-minute run on drawn sample images, any machine. The same command again
    continues where the run folder ends.
    """

    recipe: str = "tiny"
    """named starting point: tiny, cifar10, vit_s16, vit_b16, vit_l16, vit_h14 (and *_lamb)"""
    name: str = ""
    """run folder below `runs`; empty = the recipe's name"""
    runs: Path = Path("runs")
    """folder of all runs"""
    batch: int = 4096
    """global batch: images per step over all ranks"""
    chunk: int = 0
    """images per backbone pass (exact at any value, memory falls with it); 0 = measure what fits"""
    keep_chunks: int = 0
    """chunks that keep their activations, trading memory for time (chosen when chunk is 0)"""
    recompute_blocks: bool = False
    """recompute each block in the backward: less memory inside a chunk, or instead of chunks"""
    compile_blocks: bool = False
    """compile the blocks with torch.compile (not at ZeRO stage 3): same values up to rounding, a
    minute or so at the start; slower on an AMD processor, where fp32 has a faster way"""
    key_block: int = 0
    """keys per block of the loss (exact at any value); 0 = all where 512 MiB hold the logits"""
    epochs: float = 300.0
    """passes over the training samples"""
    warmup_epochs: float = 40.0
    """epochs of linear warm-up"""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up: half a cosine down to 0, or the peak rate to the end"""
    stop_after_steps: int = 0
    """end early, as a kill would, with a checkpoint; 0 = run to the end of the schedule"""
    hang_timeout: float = 0.0
    """seconds that reading a batch, computing a step, logging or saving may take before the run
    ends and names the rank that hangs; 0 = ten times the longest so far, no less than 40 s for
    computing, 10 minutes for disks and a store's own patience for data, an hour the first two times
    (k-NN may take for ever)"""
    decay: Literal["all", "matrices"] = "all"
    """weight decay on all trained tensors (the reference) or not on biases, norms, class token"""
    stopped_status: int = 0
    """exit status where a signal ended the run early, with a checkpoint; not 0 for a manager that
    starts again only what failed (Kubernetes)"""
    profile: int = 0
    """steps to profile after two others: a table where the time goes and a trace of each rank, in
    the run's profile/; 0 = none"""
    seed: int = 0
    """of the initialisation, the order of samples and the views"""
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
        """Where this run lives."""
        return self.runs / (self.name or self.recipe)

    @property
    def vit(self) -> VitShape:
        """Size of the backbone."""
        model = self.model
        return VitShape(
            image_size=self.views.image_size,
            patch_size=model.patch_size,
            dim=model.dim,
            depth=model.depth,
            heads=model.heads,
        )


def engine_defaults(
    optimizer: str, stage: int, precision: str, **parameters: Any
) -> dict[str, Any]:
    """A DeepSpeed JSON of ours as a dict; `ds_configs/` holds the same as files."""
    config: dict[str, Any] = {
        "optimizer": {"type": optimizer, "params": parameters},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return config


def _paper(shape: str, **changes: Any) -> Config:
    vit = PAPER_SHAPES[shape]
    model = ModelConfig(patch_size=vit.patch_size, dim=vit.dim, depth=vit.depth, heads=vit.heads)
    return Config(recipe=shape, model=model, **changes)


_ADAMW = engine_defaults("AdamW", 1, "bf16", lr=1.5e-4, betas=[0.9, 0.999], weight_decay=0.1)
_LAMB = engine_defaults("Lamb", 1, "bf16", lr=5e-4, betas=[0.9, 0.999], weight_decay=1e-3)


@dataclass(frozen=True)
class Recipe:
    """A named starting point: our knobs, DeepSpeed's, and what the paper reports."""

    config: Config
    engine: Mapping[str, Any]
    paper: str = ""


# arXiv 2104.02057: Sec. 5 (recipe), Tables 1-3 (accuracy); base rate and decay from CONFIG.md of
# the authors' code; LAMB values from Sec. 4.1, Fig. 3 (100 epochs). All at 224 px, batch 4096.
RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        Config(
            recipe="tiny",
            batch=256,
            epochs=12,
            warmup_epochs=2,
            views=ViewConfig(image_size=32, crop_min=0.3, blur_p=(0.5, 0.1)),
            model=ModelConfig(patch_size=8, dim=128, depth=4, heads=4, hidden=512, out=128),
            save=SaveConfig(every_steps=50),
            knn=KnnConfig(every_steps=20, bank=2048, probes=1000),
        ),
        engine_defaults("AdamW", 1, "fp32", lr=1.5e-3, betas=[0.9, 0.999], weight_decay=0.1),
    ),
    "cifar10": Recipe(
        Config(
            recipe="cifar10",
            batch=256,
            epochs=20,
            warmup_epochs=1,
            views=ViewConfig(image_size=32, crop_min=0.2, blur_p=(0.0, 0.0)),
            model=ModelConfig(patch_size=4, dim=192, depth=4, heads=3, hidden=512, out=128),
            save=SaveConfig(every_steps=100),
            knn=KnnConfig(every_steps=50, bank=5120, probes=10000),
        ),
        engine_defaults("AdamW", 1, "bf16", lr=1e-3, betas=[0.9, 0.999], weight_decay=0.1),
    ),
    "vit_s16": Recipe(_paper("vit_s16"), _ADAMW, "linear probe 72.5 %"),
    "vit_b16": Recipe(_paper("vit_b16"), _ADAMW, "linear probe 76.5 %"),
    "vit_l16": Recipe(_paper("vit_l16"), _ADAMW, "linear probe 77.6 %"),
    "vit_h14": Recipe(_paper("vit_h14"), _ADAMW, "linear probe 78.1 %"),
    "vit_b16_lamb": Recipe(
        dataclasses.replace(_paper("vit_b16"), recipe="vit_b16_lamb", epochs=100),
        _LAMB,
        "linear probe 72.5 % after 100 epochs, trained patch projection",
    ),
    "vit_l16_lamb": Recipe(
        dataclasses.replace(_paper("vit_l16"), recipe="vit_l16_lamb"), _LAMB, "not in the paper"
    ),
    "vit_h14_lamb": Recipe(
        dataclasses.replace(_paper("vit_h14"), recipe="vit_h14_lamb"), _LAMB, "not in the paper"
    ),
}


@dataclass(frozen=True)
class Settings:
    """A resolved command line."""

    config: Config
    engine: dict[str, Any]
    """the DeepSpeed JSON with overrides applied, still with its optimizer block"""

    def as_json(self) -> dict[str, Any]:
        """All knobs as plain JSON values."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config), default=str))
        del config["deepspeed_config"], config["ds"]
        return {"config": config, "deepspeed": self.engine}


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Read the command line; `--recipe X --help` shows the defaults of recipe X.

    Raises:
        ValueError: unknown recipe, a number that cannot be, unreadable JSON, a malformed `--ds`.
        SystemExit: tyro's own messages (unknown flag, wrong type, --help).
    """
    arguments = without_launcher_flags(list(sys.argv[1:] if argv is None else argv))
    recipe = _recipe(arguments)
    config = tyro.cli(Config, default=recipe.config, args=arguments, prog="train.py")
    _check(config)
    engine = dict(json.loads(json.dumps(recipe.engine)))
    if config.deepspeed_config is not None:
        own = read_json(config.deepspeed_config)
        engine = {"optimizer": engine["optimizer"]} | own
    return Settings(config, with_overrides(engine, config.ds))


def _check(config: Config) -> None:
    """Numbers that cannot be, each with its flag."""
    bounds: list[tuple[str, float, float, float]] = [
        ("batch", config.batch, 1, math.inf),
        ("chunk", config.chunk, 0, math.inf),
        ("keep_chunks", config.keep_chunks, 0, math.inf),
        ("key_block", config.key_block, 0, math.inf),
        ("warmup_epochs", config.warmup_epochs, 0, config.epochs),
        ("stop_after_steps", config.stop_after_steps, 0, math.inf),
        ("hang_timeout", config.hang_timeout, 0, math.inf),
        ("stopped_status", config.stopped_status, 0, 255),
        ("profile", config.profile, 0, 1000),
        ("data.limit", config.data.limit, 0, math.inf),
        ("data.threads", config.data.threads, 0, 1024),
        ("data.lanes", config.data.lanes, 1, math.inf),
        ("data.pool", config.data.pool, 1, math.inf),
        ("data.max_bad_samples", config.data.max_bad_samples, 0, math.inf),
        ("views.image_size", config.views.image_size, 1, 16384),
        ("model.patch_size", config.model.patch_size, 1, 16384),
        ("model.dim", config.model.dim, 1, 2**20),
        ("model.depth", config.model.depth, 1, 4096),
        ("model.heads", config.model.heads, 1, 4096),
        ("model.hidden", config.model.hidden, 1, 2**24),
        ("model.out", config.model.out, 1, 2**24),
        ("model.patch_lr", config.model.patch_lr, 0, 1),
        ("model.drop_path", config.model.drop_path, 0, 1),
        ("moco.momentum", config.moco.momentum, 0, 1),
        ("save.every_steps", config.save.every_steps, 1, math.inf),
        ("save.keep", config.save.keep, 1, math.inf),
        ("save.keep_every", config.save.keep_every, 0, math.inf),
        ("save.host_gb", config.save.host_gb, 0, math.inf),
        ("trouble.limit", config.trouble.limit, 0, math.inf),
        ("trouble.loss_spike", config.trouble.loss_spike, 0, math.inf),
        ("trouble.gradient_spike", config.trouble.gradient_spike, 0, math.inf),
        ("trouble.window", config.trouble.window, 1, math.inf),
        ("knn.every_steps", config.knn.every_steps, 0, math.inf),
        ("knn.k", config.knn.k, 1, math.inf),
        ("knn.bank", config.knn.bank, 0, math.inf),
        ("knn.probes", config.knn.probes, 0, math.inf),
        ("signals.every", config.signals.every, 0, math.inf),
        ("signals.features_every", config.signals.features_every, 0, math.inf),
        ("signals.attention_every", config.signals.attention_every, 0, math.inf),
        ("alarm.steps", config.alarm.steps, 1, math.inf),
    ]
    for flag, value, low, high in bounds:
        if not low <= value <= high:
            range_ = f"{low} to {high:g}" if high < math.inf else f"{low} or more"
            raise ValueError(f"--{flag} {value} cannot be; it must be {range_}.")
    for flag, value in (("epochs", config.epochs), ("moco.temperature", config.moco.temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"--{flag} {value} cannot be; it must be above 0.")
    if config.keep_chunks and not config.chunk:
        raise ValueError(
            f"--keep_chunks {config.keep_chunks} has no effect without --chunk: both are chosen "
            "from the free memory then."
        )
    group_rates(config.model)
    if config.alarm.response != "none" and config.signals.every != 1:
        raise ValueError(
            f"--alarm.response {config.alarm.response} needs the signals of each step; give "
            "--signals.every 1."
        )


def group_rates(model: ModelConfig) -> dict[str, float]:
    """Learning rate of each layer group relative to the others, from input to output.

    Raises:
        ValueError: an unknown group, one named twice, a rate that is no number from 0 on, or one
            without effect.
    """
    rates = dict.fromkeys(group_names(model.depth), 1.0)
    seen: set[str] = set()
    for entry in model.group_lr:
        group, _, value = entry.partition("=")
        if group not in rates or group in seen:
            wrong = "is there twice" if group in seen else "names no layer group"
            raise ValueError(f"--model.group_lr {entry} {wrong}; groups are {', '.join(rates)}.")
        seen.add(group)
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


def without_launcher_flags(arguments: list[str]) -> list[str]:
    """Drop `--local_rank N`, appended by the deepspeed launcher; LOCAL_RANK says the same."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def _recipe(arguments: list[str]) -> Recipe:
    name = "tiny"
    for position, argument in enumerate(arguments):
        if argument == "--recipe" and position + 1 < len(arguments):
            name = arguments[position + 1]
        elif argument.startswith("--recipe="):
            name = argument.partition("=")[2]
    return find_recipe(name)


def find_recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"no recipe {name!r}{hint}; there are {', '.join(RECIPES)}.")
    return RECIPES[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: missing file, not JSON, not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"there is no DeepSpeed config {path}; see ds_configs/.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value


def with_overrides(engine: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=value` settings; a value is read as JSON, else taken as text.

    Raises:
        ValueError: no `=`, or a path through something that is not an object.
    """
    result: dict[str, Any] = json.loads(json.dumps(engine))
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise ValueError(f"--ds {override!r} is not of the form key.sub=value.")
        *path, leaf = dotted.split(".")
        node = result
        for key in path:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"--ds {override!r}: {key!r} holds {node!r}, not an object.")
        try:
            node[leaf] = json.loads(text)
        except json.JSONDecodeError:
            node[leaf] = text
    return result


def from_json(tree: Mapping[str, Any]) -> Config:
    """The `Config` of a run from its `config.json`.

    Raises:
        ValueError: the file is of another version of the program.
    """
    try:
        config: Config = _filled(Config(), tree["config"])
        _check(config)
        return config
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"config.json was written by version {tree.get('version')} of mocov3-ds and is not "
            f"understood by this one ({error})."
        ) from None


def _filled(default: Any, tree: Mapping[str, Any]) -> Any:
    values = {}
    for name, value in tree.items():
        current = getattr(default, name)
        if dataclasses.is_dataclass(current):
            values[name] = _filled(current, value)
        else:
            values[name] = type(current)(value)
    return dataclasses.replace(default, **values)
