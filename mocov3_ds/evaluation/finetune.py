"""How good is an encoder as a start for supervised training? End-to-end fine-tuning.

    accelerate launch -m mocov3_ds.evaluation.finetune RUN
    python -m mocov3_ds.evaluation.finetune RUN --epochs 10 --batch 256 --micro_batch 64

The recipe is DeiT's (arXiv 2012.12877, Table 9), as the paper uses it: 150 epochs (ViT-L: 100 with
drop path 0.5), AdamW, a cosine after five epochs of warm-up, RandAugment, mixup or cutmix, label
smoothing, random erasing, repeated augmentation. Augmentations, layer-wise decay and averaged
weights are timm's. DeiT averages weights, too, but reports the trained ones, so `--ema` is 0 here;
layer-wise decay is no part of the recipe and starts at 1.

The state file `finetune-base.safetensors` is read by `mocov3 export` like any other weights.

Shape suffixes: B = images of a rank, C H W = image, K = classes.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import auto_augment
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.export import published_name
from mocov3_ds.encoders.load import build_encoder
from mocov3_ds.encoders.owner_settings import OwnerSettings
from mocov3_ds.encoders.timm_networks import write_arguments
from mocov3_ds.encoders.weights import Weights
from mocov3_ds.evaluation.flags import FinetuneConfig, read_finetune_flags
from mocov3_ds.evaluation.labelled_images import SeededTransform, seed_generators
from mocov3_ds.evaluation.supervised_run import SupervisedRun, measure_top1, run_command
from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.shapes import TimmShape, VitShape

_BETAS, _EPS = (0.9, 0.999), 1e-8
_MOMENTS = ("exp_avg", "exp_avg_sq")


def resolve_config(config: FinetuneConfig, dim: int, world_size: int = 1) -> FinetuneConfig:
    """Settings with the paper's epochs and drop path where none were given.

    Args:
        config: settings as the user gave them.
        dim: width of the Vision Transformer, 1024 is ViT-L's; 0 = it is another network, which
            gets the epochs of ViT-B and no drop path.
        world_size: number of ranks that share a batch.

    Raises:
        ValueError: settings that cannot be.
    """
    large = dim >= 1024
    drop_path = 0.5 if large else 0.1 if dim else 0.0
    config = replace(
        config,
        epochs=config.epochs or (100 if large else 150),
        drop_path=config.drop_path if config.drop_path >= 0 else drop_path,
    )
    if config.batch % world_size:
        raise ValueError(
            f"batch {config.batch} cannot be shared equally by {world_size} ranks; choose e.g. "
            f"{math.ceil(config.batch / world_size) * world_size}."
        )
    if config.mixes and config.batch // world_size % 2:
        raise ValueError(
            f"mixup and cutmix pair the images of a rank, so {config.batch} / {world_size} = "
            f"{config.batch // world_size} must be even; change --batch or set --mixup 0 "
            "--cutmix 0."
        )
    if not 0 < config.layer_decay <= 1:
        raise ValueError(f"layer_decay {config.layer_decay} must lie in (0, 1].")
    if config.repeats < 1:
        raise ValueError(f"repeats {config.repeats} must be 1 at least.")
    return config


def learning_rate_at(step: int, *, config: FinetuneConfig, steps_per_epoch: int) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine down to `min_rate`."""
    peak = config.learning_rate * config.batch / 512
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_rate + (peak - config.warmup_rate) * step / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return config.min_rate + 0.5 * (peak - config.min_rate) * (1 + math.cos(math.pi * progress))


def build_classifier(weights: Weights, classes: int, config: FinetuneConfig) -> nn.Module:
    """The encoder with a fresh linear head, in train mode, every weight trained.

    Args:
        weights: the encoder to start from.
        classes: number of classes that the head tells apart.
        config: image size, drop path and seed are taken from it.
    """
    network: Any = build_encoder(weights, image_size=config.image_size, drop_path=config.drop_path)
    seed_generators(config.seed)
    network.reset_classifier(classes)
    head = network.get_classifier()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the classifier of {shape_name(weights.backbone)} is a {type(head).__name__}; one "
            "linear layer is what is trained here."
        )
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    classifier: nn.Module = network.requires_grad_(True).train()
    return classifier


def build_parameter_groups(network: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Weights by decay and by layer; `lr_scale` multiplies the learning rate of the step.

    The head has scale 1, the last block `layer_decay`, and so on down to the patch projection,
    class token and positions with `layer_decay` ^ (blocks + 1); timm knows the layers of others.

    Args:
        network: classifier that `build_classifier` made.
        config: weight decay and layer decay are taken from it.
    """
    undecayed = getattr(network, "no_weight_decay", set)
    return param_groups_layer_decay(
        network,
        weight_decay=config.weight_decay,
        no_weight_decay_list=undecayed(),
        layer_decay=config.layer_decay,
    )


def mean_loss(logits_BK: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean cross entropy of a batch, a scalar.

    Args:
        logits_BK: scores of the classes, fp32.
        target: class numbers (B,), smoothed here, or mixed targets (B, K), smoothed already.
        smoothing: share of the target that is spread over all classes.
    """
    if target.is_floating_point():
        return F.cross_entropy(logits_BK, target)
    return F.cross_entropy(logits_BK, target, label_smoothing=smoothing)


def build_transform(
    config: FinetuneConfig,
    size: int | tuple[int, int],
    settings: OwnerSettings = OwnerSettings(),  # noqa: B008
) -> Callable[[Image.Image], Tensor]:
    """Augmentation of a training image, which ends normalised as the encoder's owner does.

    Args:
        config: crop, augmentation policy and erasing are taken from it.
        size: side of the crop, or its height and width, pixels.
        settings: mean and deviation; by default ImageNet's.
    """
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
        mean=settings.mean,
        std=settings.std,
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


class Finetuning(SupervisedRun[FinetuneConfig]):
    """A fine-tuning in training: the whole network, AdamW and, if asked for, averaged weights."""

    name = "finetune"
    title = "fine-tuning"
    required = ("best", "optimizer_steps", "loss_scale")

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        if (channels := self.weights.backbone.channels) != 3:
            raise ValueError(
                f"fine-tuning augments images in RGB, {config.run} was trained on {channels} "
                "channels; linear and knn judge it."
            )
        config, train = self.config, self.splits.train
        if train.samples < config.batch:
            raise ValueError(
                f"{train.url} holds {train.samples} samples, fewer than one global "
                f"batch of {config.batch}; lower --batch."
            )
        self.save_every_epochs = config.save_every_epochs
        self.network = build_classifier(self.weights, self.splits.classes, config).to(self.device)
        self.ema = ModelEmaV3(self.network, decay=config.ema) if config.ema else None
        groups = build_parameter_groups(self.network, config)
        self.adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, eps=_EPS)
        # as accelerate wraps them, for the ranks' gradients and for mixed precision
        self.wrapped_network, self.wrapped_adamw = self.accelerator.prepare(
            self.network, self.adamw
        )
        self.best_top1 = 0.0
        self.mix = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.label_smoothing,
            num_classes=self.splits.classes,
        )

    def resolve(self, config: FinetuneConfig) -> FinetuneConfig:
        """Fill in the paper's numbers for the width of the encoder."""
        backbone = self.weights.backbone
        dim = backbone.dim if isinstance(backbone, VitShape) else 0
        return resolve_config(config, dim, ranks.world_size())

    def train_epoch(self, *, final: bool) -> str:
        """Train one epoch; mean loss over steps and ranks, and the accuracy if it is due."""
        config, epoch = self.config, self.epochs_done + 1
        transform = build_transform(config, self.size, self.weights.settings)
        passes_per_step, batches = self.open_epoch(
            SeededTransform(transform, config.seed),
            images_per_pass=config.batch // ranks.world_size(),
            drop_last=True,
            repeats=config.repeats,
        )
        steps = len(passes_per_step)
        self.wrapped_network.train()
        total = torch.zeros((), device=self.device)
        for index, (images_BCHW, labels_B, _) in enumerate(batches):
            step = self.epochs_done * steps + index
            rate = learning_rate_at(step, config=config, steps_per_epoch=steps)
            total += self.train_step(step, rate, images_BCHW, labels_B)
        loss = float(ranks.all_reduce_sum(total)) / steps / ranks.world_size()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of epoch {epoch} is {loss}; the state of the epoch before is kept. "
                "Lower --learning_rate or set --clip 1."
            )
        summary = f"loss {loss:.4f}"
        if config.judge_every_epochs and epoch % config.judge_every_epochs == 0 and not final:
            top1 = self.judge_network(self.network)
            self.best_top1 = max(self.best_top1, top1)
            summary += f", top-1 {top1:.2f} %"
        return summary

    def train_step(self, step: int, rate: float, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """One update of the weights; this rank's mean loss, a scalar.

        Args:
            step: number of the step, from 0.
            rate: learning rate of the step, before `lr_scale`.
            images_BCHW: augmented images of this rank, fp32.
            labels_B: class of each image, int64.
        """
        config = self.config
        # each step draws from a seed of its number, so a resumed run repeats an unbroken one
        seed_generators(config.seed, step, ranks.rank())
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["lr_scale"]
        x_BCHW, target = images_BCHW.to(self.device), labels_B.to(self.device)
        if config.mixes:
            x_BCHW, target = self.mix(x_BCHW, target)
        loss = self.accumulate_gradients(x_BCHW, target)
        if config.clip:
            self.accelerator.clip_grad_norm_(self.wrapped_network.parameters(), config.clip)
        self.wrapped_adamw.step()
        self.wrapped_adamw.zero_grad()
        if self.ema is not None:
            self.ema.update(self.network)
        return loss

    def accumulate_gradients(self, x_BCHW: Tensor, target: Tensor) -> Tensor:
        """Forward and backward in micro-batches; this rank's mean loss, a scalar.

        Args:
            x_BCHW: network inputs of this rank.
            target: class numbers (B,) or mixed targets (B, K).
        """
        config, accelerator = self.config, self.accelerator
        total = torch.zeros((), device=self.device)
        inputs, targets = (torch.split(x, config.micro_batch) for x in (x_BCHW, target))
        for number, (x, y) in enumerate(zip(inputs, targets, strict=True), 1):
            last = number == len(inputs)  # ranks exchange gradients once
            with nullcontext() if last else accelerator.no_sync(self.wrapped_network):
                with accelerator.autocast():
                    logits_BK = self.wrapped_network(x)
                loss = mean_loss(logits_BK.float(), y, config.label_smoothing)
                loss = loss * len(x) / len(x_BCHW)
                accelerator.backward(loss)
                total += loss.detach()
        return total

    def judge(self) -> tuple[dict[str, Any], str]:
        """Accuracy of the trained weights and, if there are any, of the averaged ones."""
        top1 = self.judge_network(self.network, final=True)
        entry = {"top1": top1, "best_top1_seen": max(self.best_top1, top1)}
        if self.ema is not None:
            entry["top1_of_averaged_weights"] = self.judge_network(self.ema.module)
        return entry, f"top-1 {top1:.2f} % of {self.splits.val.samples} held-out images"

    def judge_network(self, network: nn.Module, *, final: bool = False) -> float:
        """Top-1 in percent on centre crops of the held-out images.

        Args:
            network: classifier that is judged, on this rank's device.
            final: whether the table of classes is that of this look.
        """
        transform = create_transform(
            input_size=self.size,
            is_training=False,
            interpolation="bicubic",
            crop_pct=224 / 256,
            mean=self.weights.settings.mean,
            std=self.weights.settings.std,
        )

        def classify(images_BCHW: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return network(images_BCHW).argmax(1)[None]

        was_training = network.training
        network.eval()
        classes_NM, labels_N = self.classify_held_out(
            SeededTransform(transform, self.config.seed), classify
        )
        network.train(was_training)
        if final:
            self.write_class_table(classes_NM[:, 0], labels_N)
        return float(measure_top1(classes_NM, labels_N))

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """The trained and the averaged weights, by the names they have in the state file."""
        yield "model", self.network
        if self.ema is not None:
            yield "ema", self.ema.module

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, averaged weights and AdamW's moments; steps, best accuracy and loss scale."""
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, network in self.networks()
            for name, tensor in network.state_dict().items()
        }
        steps = 0
        for name, parameter in self.network.named_parameters():
            if moments := self.adamw.state[parameter]:  # none where no gradient has come
                steps = int(moments["step"])
                tensors |= {f"{key}/{name}": moments[key] for key in _MOMENTS}
        scaler = self.accelerator.scaler
        return tensors, {
            **self.describe_network(),
            "optimizer_steps": steps,
            "best": self.best_top1,
            "loss_scale": scaler.state_dict() if scaler is not None else {},
        }

    def describe_network(self) -> dict[str, Any]:
        """What the state file says of the network, so that it is read like other weights."""
        match self.weights.backbone:
            case VitShape(stem="conv") as vit:
                return {"num_heads": vit.heads, "architecture": published_name(vit)}
            case VitShape() as vit:
                return {"num_heads": vit.heads}
            case TimmShape() as named:
                shape = replace(named, size=self.size)
                return {"architecture": named.name, "model_args": write_arguments(shape)}
            case _:
                return {}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from saved weights and moments."""
        for prefix, network in self.networks():
            network.load_state_dict({n: tensors[f"{prefix}.{n}"] for n in network.state_dict()})
        step = float(values["optimizer_steps"])
        for name, parameter in self.network.named_parameters():
            if f"{_MOMENTS[0]}/{name}" not in tensors:
                continue
            moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in _MOMENTS}
            self.adamw.state[parameter] = {"step": torch.tensor(step), **moments}
        scaler = self.accelerator.scaler
        if scaler is not None and values["loss_scale"]:
            scaler.load_state_dict(values["loss_scale"])
        self.best_top1 = values["best"]


def finetune_encoder(config: FinetuneConfig) -> dict[str, Any]:
    """Train and judge; each rank calls it.

    Returns:
        The entry of results.json.

    Raises:
        ValueError: anything a user can have wrong.
        FloatingPointError: the loss is no longer finite.
    """
    return Finetuning(config).run()


def main() -> int:
    """Command line; bad input ends with one sentence and status 2, a diverged run with 3."""
    return run_command("finetune", lambda: finetune_encoder(read_finetune_flags(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
