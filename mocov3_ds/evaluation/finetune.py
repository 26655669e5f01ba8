"""End-to-end fine-tuning: the DeiT recipe (arXiv 2012.12877, Table 9) that the paper uses.

    accelerate launch -m mocov3_ds.evaluation.finetune RUN
    python -m mocov3_ds.evaluation.finetune RUN --epochs 10 --batch 256 --micro_batch 64

150 epochs (ViT-L: 100 with drop path 0.5), AdamW, cosine after five epochs of warm-up, RandAugment,
mixup or cutmix, label smoothing, random erasing, repeated augmentation. Augmentations, layer-wise
decay and the averaged weights are timm's. DeiT averages weights too but reports those it trains, so
`--ema` is 0 here; layer-wise decay is no part of the recipe either and starts at 1.

The state file `finetune-base.safetensors` is read by `mocov3 export` like any other weights.

Shape suffixes: B = images of a rank, C H W = image, K = classes.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import auto_augment
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.load import Weights, Which, build, read_weights
from mocov3_ds.evaluation import results
from mocov3_ds.evaluation.protocol import (
    Precision,
    accelerator_for,
    check,
    differences,
    plain,
    watched,
)
from mocov3_ds.evaluation.samples import (
    Splits,
    UnreadableSample,
    epoch_order,
    labelled_splits,
    plan,
    reader,
    seed_all,
    split_urls,
    through,
)

_BETAS, _EPS = (0.9, 0.999), 1e-8
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune an encoder end to end; the defaults are the DeiT recipe as the paper uses it.

    Runs on one process or many (`accelerate launch`), and continues where it was stopped.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder)"""
    which: Which = "base"
    """base or momentum encoder"""
    train: str = ""
    """labelled training shards; empty = those of the run"""
    val: str = ""
    """labelled held-out shards; empty = the run's probe shards"""
    epochs: int = 0
    """passes over the training images; 0 = the paper's: 150, and 100 from ViT-L on"""
    batch: int = 1024
    """global batch: images per step over all ranks"""
    learning_rate: float = 5e-4
    """peak rate per 512 images"""
    warmup_epochs: float = 5.0
    """epochs of linear warm-up from `warmup_rate`"""
    warmup_rate: float = 1e-6
    """rate at the first step"""
    min_rate: float = 1e-5
    """rate at the end of the cosine"""
    weight_decay: float = 0.05
    """of AdamW; not on biases, norms, class token and positions"""
    layer_decay: float = 1.0
    """rate of a block relative to the next one; 1 = none (DeiT), 0.65 to 0.75 is common"""
    drop_path: float = -1.0
    """stochastic depth rate of the last block; -1 = the paper's: 0.1, and 0.5 from ViT-L on"""
    label_smoothing: float = 0.1
    """share of the target spread over all classes"""
    mixup: float = 0.8
    """alpha of mixup; 0 = none"""
    cutmix: float = 1.0
    """alpha of cutmix; 0 = none; with both, each batch gets one of them"""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's policy; empty = none"""
    erase: float = 0.25
    """probability of random erasing"""
    repeats: int = 3
    """crops of one image in an epoch of constant length (repeated augmentation); 1 = none"""
    crop_min: float = 0.08
    """smallest random crop, as a share of the image area"""
    clip: float = 0.0
    """largest gradient norm; 0 = no clipping"""
    ema: float = 0.0
    """decay of averaged weights, which are then judged too (DeiT: 0.99996); 0 = none"""
    image_size: int = 0
    """side of a crop, pixels; 0 = as pretrained"""
    heads: int = 0
    """attention heads where the weights cannot tell; 0 = the paper's for their width"""
    seed: int = 0
    """of the initialisation, the order and all random draws"""
    micro_batch: int = 128
    """images of a rank in one pass; bounds memory, moves none but drop path's random draws"""
    workers: int = 4
    """reading processes of each rank; 0 = none beside the rank itself"""
    precision: Precision = "auto"
    """auto = bf16 on a GPU that has it, else fp32"""
    judge_every_epochs: int = 10
    """epochs between looks at the held-out images (one is always taken at the end); 0 = none"""
    save_every_epochs: int = 1
    """epochs between saved states"""
    stop_after_epochs: int = 0
    """end early, as a kill would; 0 = run to the end"""
    out: Path | None = None
    """folder of results.json and the state; empty = RUN, or FILE-evaluation"""


def resolved(config: FinetuneConfig, dim: int) -> FinetuneConfig:
    """Settings with the paper's epochs and drop path where none were given.

    Args:
        config: as the user gave it.
        dim: width of the encoder.

    Raises:
        ValueError: settings that cannot be.
    """
    large = dim >= 1024
    config = replace(
        config,
        epochs=config.epochs or (100 if large else 150),
        drop_path=config.drop_path if config.drop_path >= 0 else (0.5 if large else 0.1),
    )
    check(config.batch, config.micro_batch, config.epochs, config.precision)
    world = ranks.world_size()
    if config.batch % world:
        raise ValueError(
            f"batch {config.batch} cannot be shared equally by {world} ranks; choose e.g. "
            f"{math.ceil(config.batch / world) * world}."
        )
    if _mixes(config) and config.batch // world % 2:
        raise ValueError(
            f"mixup and cutmix pair the images of a rank, so {config.batch} / {world} = "
            f"{config.batch // world} must be even; change --batch or set --mixup 0 --cutmix 0."
        )
    if not 0 < config.layer_decay <= 1:
        raise ValueError(f"layer_decay {config.layer_decay} must lie in (0, 1].")
    if config.repeats < 1:
        raise ValueError(f"repeats {config.repeats} must be 1 at least.")
    return config


def rate_at(step: int, *, config: FinetuneConfig, steps_per_epoch: int) -> float:
    """Learning rate of a step: linear warm-up, then a half cosine down to `min_rate`."""
    peak = config.learning_rate * config.batch / 512
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_rate + (peak - config.warmup_rate) * step / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return config.min_rate + 0.5 * (peak - config.min_rate) * (1 + math.cos(math.pi * done))


def classifier(weights: Weights, classes: int, config: FinetuneConfig) -> VisionTransformer:
    """The encoder with a fresh linear head, every weight trained."""
    vit = build(weights, image_size=config.image_size, drop_path=config.drop_path)
    seed_all(config.seed)
    vit.reset_classifier(classes)
    assert isinstance(vit.head, nn.Linear)
    nn.init.trunc_normal_(vit.head.weight, std=0.02)
    nn.init.zeros_(vit.head.bias)
    return vit.requires_grad_(True).train()


def parameter_groups(vit: VisionTransformer, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Weights by decay and by block; `lr_scale` multiplies the rate of the step.

    The head has scale 1, the last block `layer_decay`, and so on down to the patch projection,
    class token and positions with `layer_decay` ^ (blocks + 1).
    """
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        vit,
        weight_decay=config.weight_decay,
        no_weight_decay_list=vit.no_weight_decay(),
        layer_decay=config.layer_decay,
    )
    return groups


def mean_loss(logits_BK: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross entropy with class numbers (smoothed here) or with mixed targets (smoothed already)."""
    if target.is_floating_point():
        return F.cross_entropy(logits_BK, target)
    return F.cross_entropy(logits_BK, target, label_smoothing=smoothing)


@dataclass
class _Tuning:
    """A fine-tuning in memory."""

    config: FinetuneConfig
    splits: Splits
    accelerator: Accelerator
    vit: VisionTransformer
    model: nn.Module
    """`vit` as accelerate wrapped it"""
    optimizer: Any
    ema: ModelEmaV3 | None
    size: int
    epochs_done: int = 0
    best: float = 0.0
    """highest top-1 seen on the way"""


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train and judge; each rank calls it.

    Returns:
        The entry of results.json.

    Raises:
        ValueError: anything a user can have wrong.
        FloatingPointError: the loss is no longer finite.
    """
    tuning, settings, title, folder = _prepare(config)
    config = tuning.config
    path = folder / f"finetune-{config.which}.safetensors"
    _resume(tuning, path, settings)
    last = config.stop_after_epochs or config.epochs
    while tuning.epochs_done < last:
        loss = _train_epoch(tuning)
        tuning.epochs_done += 1
        told = ""
        final = tuning.epochs_done == last
        every = config.judge_every_epochs
        if every and tuning.epochs_done % every == 0 and not final:
            top1 = accuracy(tuning, tuning.vit)
            tuning.best = max(tuning.best, top1)
            told = f", top-1 {top1:.2f} %"
        if ranks.is_first():
            if final or tuning.epochs_done % config.save_every_epochs == 0:
                _save(tuning, path, settings)
            tqdm.write(f"epoch {tuning.epochs_done}/{config.epochs}: loss {loss:.4f}{told}")
        ranks.barrier()
    top1 = accuracy(tuning, tuning.vit)
    entry = {
        "top1": top1,
        "encoder": title,
        "best_top1_seen": max(tuning.best, top1),
        "epochs_done": tuning.epochs_done,
        "val_images": tuning.splits.val.samples,
        **settings,
    }
    if tuning.ema is not None:
        entry["top1_of_averaged_weights"] = accuracy(tuning, tuning.ema.module)
    if ranks.is_first():
        print(f"top-1 {top1:.2f} % of {tuning.splits.val.samples} held-out images")  # noqa: T201
        if tuning.epochs_done >= config.epochs:
            results.record(folder, "finetune", config.which, entry)
            print(results.HEADER)  # noqa: T201
            print(results.table_line(folder, config.which))  # noqa: T201
    ranks.barrier()
    return entry


def _prepare(given: FinetuneConfig) -> tuple[_Tuning, dict[str, Any], str, Path]:
    accelerator = accelerator_for(given.precision)
    weights = read_weights(given.run, given.which, heads=given.heads)
    config = resolved(given, weights.shape.dim)
    size = config.image_size or weights.shape.image_size
    splits = labelled_splits(*split_urls(weights, config.train, config.val))
    if splits.train.samples < config.batch:
        raise ValueError(
            f"{splits.train.url} holds {splits.train.samples} samples, fewer than one global "
            f"batch of {config.batch}; lower --batch."
        )
    vit = classifier(weights, splits.classes, config).to(accelerator.device)
    ema = ModelEmaV3(vit, decay=config.ema) if config.ema else None
    groups = parameter_groups(vit, config)
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, eps=_EPS)
    model, optimizer = accelerator.prepare(vit, adamw)
    settings = {
        **plain(config, _FREE),
        "image_size": size,
        "step": weights.saved.step if weights.saved is not None else None,
        "train": splits.train.digest,
        "val": splits.val.digest,
    }
    tuning = _Tuning(config, splits, accelerator, vit, model, optimizer, ema, size)
    return tuning, settings, weights.title, config.out or results.folder_of(weights.path)


_FREE = {
    *("run", "out", "train", "val", "micro_batch", "workers"),
    *("stop_after_epochs", "judge_every_epochs", "save_every_epochs"),
}


# ---------------------------------------------------------------------------------------- training


def _mixes(config: FinetuneConfig) -> bool:
    return config.mixup > 0 or config.cutmix > 0


def _train_epoch(tuning: _Tuning) -> float:
    """One epoch; mean loss over steps and ranks."""
    config, accelerator, train = tuning.config, tuning.accelerator, tuning.splits.train
    order_N = epoch_order(train.samples, config.seed, tuning.epochs_done, config.repeats)
    rank_batch = config.batch // ranks.world_size()
    steps = plan(
        order_N,
        batch=config.batch,
        micro_batch=rank_batch,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        drop_last=True,
    )
    batches = reader(
        train,
        through(training_transform(config, tuning.size), config.seed),
        order_N,
        [places for passes in steps for places in passes],
        epoch=tuning.epochs_done,
        workers=config.workers,
        pin=accelerator.device.type == "cuda",
    )
    mix = None
    if _mixes(config):
        mix = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.label_smoothing,
            num_classes=tuning.splits.classes,
        )
    tuning.model.train()
    total = torch.zeros((), device=accelerator.device)
    bar = watched(batches, len(steps), f"fine-tune, epoch {tuning.epochs_done + 1}")
    for index, (images_BCHW, labels_B, _) in enumerate(bar):
        step = tuning.epochs_done * len(steps) + index
        # each step draws from its own seed, so a resumed run repeats an unbroken one
        seed_all(config.seed, step, ranks.rank())
        rate = rate_at(step, config=config, steps_per_epoch=len(steps))
        for group in tuning.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        x_BCHW, target = images_BCHW.to(accelerator.device), labels_B.to(accelerator.device)
        if mix is not None:
            x_BCHW, target = mix(x_BCHW, target)
        total += _step(tuning, x_BCHW, target)
    loss = float(ranks.all_reduce_sum(total)) / len(steps) / ranks.world_size()
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of epoch {tuning.epochs_done + 1} is {loss}; the state of the epoch before "
            "is kept. Lower --learning_rate or set --clip 1."
        )
    return loss


def _step(tuning: _Tuning, x_BCHW: Tensor, target: Tensor) -> Tensor:
    """Forward and backward by micro-batches, one update; the rank's mean loss."""
    config, accelerator = tuning.config, tuning.accelerator
    total = torch.zeros((), device=accelerator.device)
    pieces = [torch.split(whole, config.micro_batch) for whole in (x_BCHW, target)]
    for number, (x, y) in enumerate(zip(*pieces, strict=True)):
        last = number == len(pieces[0]) - 1  # ranks exchange gradients once
        with nullcontext() if last else accelerator.no_sync(tuning.model):
            with accelerator.autocast():
                logits_BK = tuning.model(x)
            loss = mean_loss(logits_BK.float(), y, config.label_smoothing) * len(x) / len(x_BCHW)
            accelerator.backward(loss)
            total += loss.detach()
    if config.clip:
        accelerator.clip_grad_norm_(tuning.model.parameters(), config.clip)
    tuning.optimizer.step()
    tuning.optimizer.zero_grad()
    if tuning.ema is not None:
        tuning.ema.update(tuning.vit)
    return total


def training_transform(config: FinetuneConfig, size: int) -> Callable[[Image.Image], Tensor]:
    """Augmentation of the training images; normalised by the ImageNet mean and deviation."""
    transform: Callable[[Image.Image], Tensor] = create_transform(
        input_size=size,
        is_training=True,
        scale=(config.crop_min, 1.0),
        color_jitter=0.0,  # RandAugment is in its place
        auto_augment=config.auto_augment or None,
        interpolation="bicubic",
        re_prob=config.erase,
        re_mode="pixel",
        re_count=1,
    )
    for step in getattr(transform, "transforms", ()):
        for op in getattr(step, "ops", ()):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """RandAugment at full strength keeps 0 bits: black, which Pillow from 13 on refuses to make."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


# ----------------------------------------------------------------------------------------- judging


@torch.no_grad()
def accuracy(tuning: _Tuning, network: nn.Module) -> float:
    """Top-1 in percent on centre crops, each held-out image counted once over all ranks."""
    val, config, device = tuning.splits.val, tuning.config, tuning.accelerator.device
    transform = create_transform(
        input_size=tuning.size, is_training=False, interpolation="bicubic", crop_pct=224 / 256
    )
    order_N = epoch_order(val.samples, config.seed, 0)
    (passes,) = plan(
        order_N,
        batch=val.samples,
        micro_batch=config.micro_batch,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        drop_last=False,
    )
    batches = reader(val, through(transform, config.seed), order_N, passes, workers=config.workers)
    was_training = network.training
    network.eval()
    right = torch.zeros((), dtype=torch.float64, device=device)
    for images_BCHW, labels_B, _ in watched(batches, len(passes), "held-out images"):
        with tuning.accelerator.autocast():
            guess_B = network(images_BCHW.to(device)).argmax(1)
        right += (guess_B == labels_B.to(device)).sum()
    network.train(was_training)
    return 100.0 * float(ranks.all_reduce_sum(right)) / val.samples


# ------------------------------------------------------------------------------------------- state


def _networks(tuning: _Tuning) -> Iterator[tuple[str, nn.Module]]:
    yield "model", tuning.vit
    if tuning.ema is not None:
        yield "ema", tuning.ema.module


def _save(tuning: _Tuning, path: Path, settings: Mapping[str, Any]) -> None:
    """All state in one file, by name: weights, moments, averages; epochs done and settings."""
    tensors = {
        f"{kind}.{name}": tensor.cpu().contiguous()
        for kind, network in _networks(tuning)
        for name, tensor in network.state_dict().items()
    }
    state = _adamw(tuning).state
    steps = 0
    for name, parameter in tuning.vit.named_parameters():
        steps = int(state[parameter]["step"])
        tensors |= {f"{key}/{name}": state[parameter][key].cpu() for key in _MOMENTS}
    scaler, blocks = tuning.accelerator.scaler, cast(Any, tuning.vit.blocks)
    told = {
        "num_heads": str(blocks[0].attn.num_heads),
        "epochs_done": str(tuning.epochs_done),
        "optimizer_steps": str(steps),
        "best": repr(tuning.best),
        "settings": json.dumps(settings),
        "loss_scale": json.dumps(scaler.state_dict() if scaler is not None else {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, str(aside), metadata=told)
    aside.replace(path)


def _resume(tuning: _Tuning, path: Path, settings: Mapping[str, Any]) -> None:
    """Take up a fine-tuning that was stopped.

    Raises:
        ValueError: the one that is there has other settings.
    """
    if not path.exists():
        return
    try:
        with safe_open(str(path), framework="pt") as file:
            told = file.metadata() or {}
            theirs = json.loads(told["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            epochs_done, best = int(told["epochs_done"]), float(told["best"])
            steps, scale = int(told["optimizer_steps"]), json.loads(told["loss_scale"])
    except Exception as error:  # damaged or foreign
        raise ValueError(f"{path} is no fine-tuning of ours ({error}); move it away.") from None
    if differing := differences(theirs, settings):
        raise ValueError(
            f"{path} holds a fine-tuning with other settings: {differing}. Give --out another "
            "folder, or remove it."
        )
    for kind, network in _networks(tuning):
        prefix = f"{kind}."
        network.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
    adamw = _adamw(tuning)
    for name, parameter in tuning.vit.named_parameters():
        moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in _MOMENTS}
        adamw.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
    if tuning.accelerator.scaler is not None and scale:
        tuning.accelerator.scaler.load_state_dict(scale)
    tuning.epochs_done, tuning.best = epochs_done, best


def _adamw(tuning: _Tuning) -> torch.optim.AdamW:
    """The optimizer inside accelerate's wrapper."""
    adamw: torch.optim.AdamW = tuning.optimizer.optimizer
    return adamw


def main() -> int:
    """Command line; bad input ends with one sentence and status 2, a diverged run with 3."""
    try:
        finetune(tyro.cli(FinetuneConfig, prog="python -m mocov3_ds.evaluation.finetune"))
    except ValueError as error:
        return _end(2, str(error), isinstance(error, UnreadableSample))
    except FloatingPointError as error:
        return _end(3, str(error))
    finally:
        ranks.stop()
    return 0


def _end(status: int, sentence: str, every_rank: bool = False) -> int:
    if ranks.is_first() or every_rank:
        print(f"finetune: error: {sentence}", file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main())
