"""Linear probe: the paper's protocol (Sec. 5), many learning rates in one pass over the images.

    accelerate launch -m mocov3_ds.evaluation.linear RUN
    python -m mocov3_ds.evaluation.linear RUN --epochs 10 --batch 1024

Frozen backbone in eval mode, features of random-resized, flipped crops, SGD with momentum and
cosine decay, no weight decay. A bank of linear heads, one for each base learning rate, shares each
batch of features; the heads do not know each other, so each ends where it would have ended alone.

Shape suffixes: L = learning rates, B = images of a pass, C = classes, D = features.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from mocov3_ds.data.views.photometric import ViewSpec, normalise
from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.load import Which, build, read_weights
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
    centre_crop,
    epoch_order,
    labelled_splits,
    plan,
    random_crop,
    reader,
    split_urls,
)

_MEAN, _STD = ViewSpec().mean, ViewSpec().std


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Linear probe of an encoder; the defaults are the paper's protocol.

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
    epochs: int = 90
    """passes over the training images"""
    batch: int = 4096
    """global batch: images per step over all ranks"""
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """base rates, per 256 images, all trained at once; the best is reported"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float = 0.0
    """of SGD"""
    crop_min: float = 0.08
    """smallest random crop, as a share of the image area"""
    image_size: int = 0
    """side of a crop, pixels; 0 = as pretrained"""
    heads: int = 0
    """attention heads where the weights cannot tell; 0 = the paper's for their width"""
    seed: int = 0
    """of the initialisation, the order and the crops"""
    micro_batch: int = 256
    """images of a rank in one forward pass; changes nothing but memory"""
    workers: int = 4
    """reading processes of each rank; 0 = none beside the rank itself"""
    precision: Precision = "auto"
    """of the backbone; auto = bf16 on a GPU that has it, else fp32"""
    stop_after_epochs: int = 0
    """end early, as a kill would; 0 = run to the end"""
    out: Path | None = None
    """folder of results.json and the probe; empty = RUN, or FILE-evaluation"""


@dataclass
class HeadBank:
    """Linear classifiers that see the same features, each with its own learning rate."""

    weight_LCD: Tensor
    bias_LC: Tensor
    weight_velocity_LCD: Tensor
    bias_velocity_LC: Tensor

    @classmethod
    def start(cls, rates: int, classes: int, dim: int, seed: int) -> "HeadBank":
        """All heads at the same N(0, 0.01) weights and zero biases."""
        generator = torch.Generator().manual_seed(seed)
        weight_LCD = 0.01 * torch.randn(classes, dim, generator=generator).repeat(rates, 1, 1)
        bias_LC = torch.zeros(rates, classes)
        return cls(weight_LCD, bias_LC, torch.zeros_like(weight_LCD), torch.zeros_like(bias_LC))

    def to(self, device: torch.device) -> "HeadBank":
        """The same on another device."""
        return HeadBank(*(tensor.to(device) for tensor in vars(self).values()))

    def logits(self, x_BD: Tensor) -> Tensor:
        """Scores (L, B, C) of all heads."""
        return torch.baddbmm(
            self.bias_LC[:, None],
            x_BD.expand(len(self.weight_LCD), *x_BD.shape),
            self.weight_LCD.transpose(1, 2),
        )

    def add_gradient(
        self, x_BD: Tensor, labels_B: Tensor, grad_LCD: Tensor, grad_LC: Tensor
    ) -> Tensor:
        """Add the gradient of the *summed* cross entropy; returns the summed losses (L,).

        d loss / d logits = softmax(logits) - one_hot(label), so no graph is built.
        """
        log_p_LBC = self.logits(x_BD).log_softmax(2)
        labels_LB1 = labels_B.expand(len(log_p_LBC), -1)[..., None]
        loss_L = -log_p_LBC.gather(2, labels_LB1).sum((1, 2))
        residual_LBC = log_p_LBC.exp_()
        residual_LBC.scatter_add_(2, labels_LB1, -torch.ones_like(residual_LBC[..., :1]))
        grad_LCD += residual_LBC.transpose(1, 2) @ x_BD
        grad_LC += residual_LBC.sum(1)
        return loss_L

    def step(
        self,
        grad_LCD: Tensor,
        grad_LC: Tensor,
        *,
        rate_L: Tensor,
        momentum: float,
        weight_decay: float,
    ) -> None:
        """SGD as torch has it: v <- momentum v + (g + decay w), w <- w - rate v."""
        for w, v, g, rate in (
            (self.weight_LCD, self.weight_velocity_LCD, grad_LCD, rate_L[:, None, None]),
            (self.bias_LC, self.bias_velocity_LC, grad_LC, rate_L[:, None]),
        ):
            v.mul_(momentum).add_(g).add_(w, alpha=weight_decay)
            w.sub_(rate * v)


def cosine(step: int, total: int) -> float:
    """Share of the peak rate: a half cosine from 1 to 0 over `total` steps, no warm-up."""
    return 0.5 * (1.0 + math.cos(math.pi * step / total))


@dataclass
class _Probe:
    """A probe in memory."""

    config: LinearConfig
    splits: Splits
    accelerator: Accelerator
    backbone: nn.Module
    size: int
    bank: HeadBank
    epochs_done: int = 0

    @torch.no_grad()
    def features(self, crops_BCHW: Tensor) -> Tensor:
        """Class-token features (B, D), fp32."""
        device = self.accelerator.device
        images_BCHW = normalise(
            crops_BCHW.to(device, non_blocking=True), _MEAN, _STD, torch.float32
        )
        with self.accelerator.autocast():
            features_BD: Tensor = self.backbone(images_BCHW)
        return features_BD.float()


def linear(config: LinearConfig) -> dict[str, Any]:
    """Train and judge the probe; each rank calls it.

    Returns:
        The entry of results.json.

    Raises:
        ValueError: anything a user can have wrong.
    """
    probe, settings, title, folder = _prepare(config)
    path = folder / f"linear-{config.which}.safetensors"
    _resume(probe, path, settings)
    last = config.stop_after_epochs or config.epochs
    while probe.epochs_done < last:
        loss_L = _train_epoch(probe)
        probe.epochs_done += 1
        if ranks.is_first():
            _save(probe, path, settings)
            best = int(loss_L.nan_to_num(nan=math.inf).argmin())
            tqdm.write(
                f"epoch {probe.epochs_done}/{config.epochs}: lowest training loss "
                f"{float(loss_L[best]):.4f} at lr {config.learning_rates[best]:g}"
            )
        ranks.barrier()
    top1_L = accuracy(probe)
    best = int(top1_L.argmax())
    entry = {
        "top1": float(top1_L[best]),
        "encoder": title,
        "best_learning_rate": config.learning_rates[best],
        "top1_by_learning_rate": {
            f"{rate:g}": float(top1)
            for rate, top1 in zip(config.learning_rates, top1_L.tolist(), strict=True)
        },
        "epochs_done": probe.epochs_done,
        "val_images": probe.splits.val.samples,
        **settings,
    }
    if ranks.is_first():
        if probe.epochs_done >= config.epochs:
            results.record(folder, "linear", config.which, entry)
        _report(entry, config, folder)
    ranks.barrier()
    return entry


def _prepare(config: LinearConfig) -> tuple[_Probe, dict[str, Any], str, Path]:
    check(config.batch, config.micro_batch, config.epochs, config.precision)
    if not config.learning_rates or min(config.learning_rates) <= 0:
        raise ValueError(f"learning rates {config.learning_rates} must be positive, one at least.")
    accelerator = accelerator_for(config.precision)
    weights = read_weights(config.run, config.which, heads=config.heads)
    size = config.image_size or weights.shape.image_size
    backbone = build(weights, image_size=size).requires_grad_(False).to(accelerator.device)
    splits = labelled_splits(*split_urls(weights, config.train, config.val))
    bank = HeadBank.start(
        len(config.learning_rates), splits.classes, weights.shape.dim, config.seed
    )
    settings = {
        **plain(config, _FREE),
        "image_size": size,
        "step": weights.saved.step if weights.saved is not None else None,
        "train": splits.train.digest,
        "val": splits.val.digest,
    }
    probe = _Probe(config, splits, accelerator, backbone, size, bank.to(accelerator.device))
    folder = config.out or results.folder_of(weights.path)
    return probe, settings, weights.title, folder


_FREE = ("run", "out", "train", "val", "micro_batch", "workers", "stop_after_epochs")


def _train_epoch(probe: _Probe) -> Tensor:
    """One pass over the training images; mean losses (L,) over all ranks."""
    config, bank, train = probe.config, probe.bank, probe.splits.train
    device = probe.accelerator.device
    order_N = epoch_order(train.samples, config.seed, probe.epochs_done)
    steps = plan(
        order_N,
        batch=config.batch,
        micro_batch=config.micro_batch,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        drop_last=False,
    )
    batches = reader(
        train,
        random_crop(probe.size, config.crop_min, config.seed),
        order_N,
        [places for passes in steps for places in passes],
        epoch=probe.epochs_done,
        workers=config.workers,
        pin=device.type == "cuda",
    )
    base_L = torch.tensor(config.learning_rates, device=device) * config.batch / 256
    losses_L = torch.zeros_like(base_L)
    bar = tqdm(
        total=train.samples,
        desc=f"linear, epoch {probe.epochs_done + 1}",
        unit="img",
        disable=not ranks.is_first(),
        leave=False,
    )
    for index, passes in enumerate(steps):
        rows = min(config.batch, train.samples - index * config.batch)
        grad_LCD = torch.zeros_like(bank.weight_LCD)
        grad_LC = torch.zeros_like(bank.bias_LC)
        for _ in passes:
            crops_BCHW, labels_B, _ = next(batches)
            losses_L += bank.add_gradient(
                probe.features(crops_BCHW), labels_B.to(device), grad_LCD, grad_LC
            )
        done = probe.epochs_done * len(steps) + index
        bank.step(
            ranks.all_reduce_sum(grad_LCD) / rows,
            ranks.all_reduce_sum(grad_LC) / rows,
            rate_L=base_L * cosine(done, config.epochs * len(steps)),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        bar.update(rows)
    bar.close()
    return ranks.all_reduce_sum(losses_L) / train.samples


@torch.no_grad()
def accuracy(probe: _Probe) -> Tensor:
    """Top-1 (L,) in percent on centre crops, each held-out image counted once over all ranks."""
    val, config = probe.splits.val, probe.config
    order_N = epoch_order(val.samples, config.seed, 0)
    passes = [
        places
        for step in plan(
            order_N,
            batch=val.samples,
            micro_batch=config.micro_batch,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            drop_last=False,
        )
        for places in step
    ]
    batches = reader(val, centre_crop(probe.size), order_N, passes, workers=config.workers)
    right_L = torch.zeros(len(config.learning_rates), device=probe.accelerator.device)
    for crops_BCHW, labels_B, _ in watched(batches, len(passes), "held-out images"):
        guess_LB = probe.bank.logits(probe.features(crops_BCHW)).argmax(2)
        right_L += (guess_LB == labels_B.to(guess_LB.device)).sum(1)
    return 100.0 * ranks.all_reduce_sum(right_L.double()).cpu() / val.samples


def _save(probe: _Probe, path: Path, settings: Mapping[str, Any]) -> None:
    """All state in one file, by name: heads, velocities, epochs done, settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    told = {"epochs_done": str(probe.epochs_done), "settings": json.dumps(settings)}
    save_file({k: v.cpu() for k, v in vars(probe.bank).items()}, str(aside), metadata=told)
    aside.replace(path)


def _resume(probe: _Probe, path: Path, settings: Mapping[str, Any]) -> None:
    """Take up a probe that was stopped.

    Raises:
        ValueError: the one that is there has other settings.
    """
    if not path.exists():
        return
    try:
        with safe_open(str(path), framework="pt") as file:
            told = file.metadata() or {}
            theirs = json.loads(told["settings"])
            tensors = {name: file.get_tensor(name) for name in vars(probe.bank)}
            epochs_done = int(told["epochs_done"])
    except Exception as error:  # damaged or foreign
        raise ValueError(f"{path} is no linear probe of ours ({error}); move it away.") from None
    if differing := differences(theirs, settings):
        raise ValueError(
            f"{path} holds a probe with other settings: {differing}. Give --out another folder, "
            "or remove it."
        )
    probe.bank = HeadBank(**tensors).to(probe.accelerator.device)
    probe.epochs_done = epochs_done


def _report(entry: Mapping[str, Any], config: LinearConfig, folder: Path) -> None:
    print("base lr   top-1")  # noqa: T201
    for rate, top1 in entry["top1_by_learning_rate"].items():
        mark = "  <- best" if float(rate) == entry["best_learning_rate"] else ""
        print(f"{rate:>7}   {top1:6.2f} %{mark}")  # noqa: T201
    if entry["epochs_done"] < config.epochs:
        print(f"stopped after epoch {entry['epochs_done']} of {config.epochs}")  # noqa: T201
        return
    print(results.HEADER)  # noqa: T201
    print(results.table_line(folder, config.which))  # noqa: T201


def main() -> int:
    """Command line; bad input ends with one sentence and status 2."""
    try:
        linear(tyro.cli(LinearConfig, prog="python -m mocov3_ds.evaluation.linear"))
    except ValueError as error:
        if ranks.is_first() or isinstance(error, UnreadableSample):
            print(f"linear: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    finally:
        ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
