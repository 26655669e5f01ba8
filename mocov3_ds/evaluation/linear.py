"""How linearly separable are the classes of an encoder's features? The paper's linear probe.

    accelerate launch -m mocov3_ds.evaluation.linear RUN
    python -m mocov3_ds.evaluation.linear RUN --learning_rates 0.3 1 3 --batch 1024
    python -m mocov3_ds.evaluation.linear RUN --probe attentive --per_class classes.csv

The backbone is frozen and in eval mode. Its features of random-resized, flipped crops train linear
heads by SGD with momentum, a cosine schedule and no weight decay. There is one head for each base
learning rate; all heads share each batch of features and know nothing of each other, so each ends
where it would have ended alone. The attentive probe differs in the heads alone: they see all tokens
of the backbone, or all places of its last map, and learn which to look at (see `probe_banks`).

Shape suffixes: L = learning rates, B = images of a pass, C = classes, D = features, N = tokens,
M = classifiers.
"""

import math
import sys
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.load import build_encoder
from mocov3_ds.evaluation import results
from mocov3_ds.evaluation.features import compute_tokens, make_inputs
from mocov3_ds.evaluation.flags import LinearConfig, read_linear_flags
from mocov3_ds.evaluation.labelled_images import CentreCrop, RandomCrop
from mocov3_ds.evaluation.probe_banks import AttentiveBank, HeadBank, ProbeBank
from mocov3_ds.evaluation.supervised_run import SupervisedRun, measure_top1, run_command
from mocov3_ds.settings.bounds import Bounds


def cosine_share(step: int, total: int) -> float:
    """Share of the peak rate: half a cosine from 1 to 0 over `total` steps, without warm-up."""
    return 0.5 * (1.0 + math.cos(math.pi * step / total))


def annealed_step(anneal: str, epoch: int, steps: int, index: int) -> int:
    """Step whose place on the cosine gives the rate.

    Args:
        anneal: "step", or "epoch" for that of the epoch's first step.
        epoch: epochs done before this one.
        steps: steps of each epoch.
        index: number of the step within its epoch, from 0.
    """
    return epoch * steps + (index if anneal == "step" else 0)


class LinearProbe(SupervisedRun[LinearConfig]):
    """A linear probe in training: the frozen backbone and a head for each learning rate."""

    name: ClassVar[results.Evaluation] = "linear"
    title = "linear probe"
    bank_type: ClassVar[type[HeadBank] | type[AttentiveBank]] = HeadBank
    required = tuple(field.name for field in fields(HeadBank))

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        backbone = build_encoder(self.weights, image_size=self.config.image_size)
        self.backbone = backbone.requires_grad_(False).to(self.device)
        rates, dim = len(config.learning_rates), self.count_features()
        bank = self.bank_type.start(rates, self.splits.classes, dim, config.seed)
        self.bank: ProbeBank = bank.to(self.device)

    def count_features(self) -> int:
        """Width of what `encode` gives."""
        return self.weights.width

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """What the heads see of network inputs: features (B, D)."""
        features_BD: Tensor = self.backbone(images_BCHW)
        return features_BD

    def resolve(self, config: LinearConfig) -> LinearConfig:
        """Check the learning rates."""
        if not config.learning_rates or min(config.learning_rates) <= 0:
            raise ValueError(
                f"learning rates {config.learning_rates} must be positive, one at least."
            )
        for rate in config.learning_rates:
            Bounds(0, exclusive=True).check_value("learning_rates", rate)
        return config

    @torch.no_grad()
    def compute_features(self, crops_BCHW: Tensor) -> Tensor:
        """What the heads see of uint8 crops, fp32."""
        images_BCHW = make_inputs(
            crops_BCHW, self.device, self.weights.settings.mean, self.weights.settings.std
        )
        with self.accelerator.autocast():
            return self.encode(images_BCHW).float()

    def train_epoch(self, *, final: bool) -> str:
        """Train one epoch; the lowest mean loss over the training images."""
        config, samples = self.config, self.splits.train.samples
        settings = self.weights.settings
        spec = ViewSpec(
            crop_min=config.crop_min, saturation=0.0, hue=0.0, grey_p=0.0,
            mean=settings.mean, std=settings.std,
        )  # fmt: skip
        crop = RandomCrop(self.size, spec, config.seed)
        passes_per_step, batches = self.open_epoch(crop, images_per_pass=config.micro_batch)
        steps = len(passes_per_step)
        peak_L = torch.tensor(config.learning_rates, device=self.device) * config.batch / 256
        losses_L = torch.zeros_like(peak_L)
        for index, passes in enumerate(passes_per_step):
            images = min(config.batch, samples - index * config.batch)
            gradients = [torch.zeros_like(weight) for weight in self.bank.weights]
            for _ in range(passes):
                crops_BCHW, labels_B, _ = next(batches)
                labels_B = labels_B.to(self.device)
                x = self.compute_features(crops_BCHW)
                losses_L += self.bank.add_gradient(x, labels_B, *gradients)
            step = annealed_step(config.anneal, self.epochs_done, steps, index)
            self.bank.step(
                *(ranks.all_reduce_sum(gradient) / images for gradient in gradients),
                rate_L=peak_L * cosine_share(step, config.epochs * steps),
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
        mean_L = (ranks.all_reduce_sum(losses_L) / samples).nan_to_num(nan=math.inf)
        best = int(mean_L.argmin())
        return (
            f"lowest training loss {float(mean_L[best]):.4f} at lr {config.learning_rates[best]:g}"
        )

    def judge(self) -> tuple[dict[str, Any], str]:
        """Accuracy of each head; `top1` is that of the best learning rate."""
        rates = self.config.learning_rates
        classes_NM, labels_N = self.classify_held_out(
            CentreCrop(self.size, len(self.weights.settings.mean)),
            lambda crops_BCHW: self.bank.logits(self.compute_features(crops_BCHW)).argmax(2),
            classifiers=len(rates),
        )
        top1_L = measure_top1(classes_NM, labels_N).tolist()
        best = top1_L.index(max(top1_L))
        self.write_class_table(classes_NM[:, best], labels_N)
        pairs = [(f"{rate:g}", top1) for rate, top1 in zip(rates, top1_L, strict=True)]
        lines = [f"{rate:>7}   {top1:6.2f} %" for rate, top1 in pairs]
        lines[best] += "  <- best"
        entry = {"top1": top1_L[best], "best_learning_rate": rates[best]}
        text = "\n".join(["base lr   top-1", *lines])
        return entry | {"top1_by_learning_rate": dict(pairs)}, text

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Heads and velocities."""
        return dict(vars(self.bank)), {}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from saved heads and velocities."""
        self.bank = self.bank_type(**tensors).to(self.device)


class AttentiveProbe(LinearProbe):
    """A probe whose heads see all tokens of the frozen backbone."""

    name = "attentive"
    title = "attentive probe"
    bank_type = AttentiveBank
    required = tuple(field.name for field in fields(AttentiveBank))

    def count_features(self) -> int:
        """Width of a token."""
        channels = self.weights.backbone.channels
        images_BCHW = torch.zeros(1, channels, *self.size, device=self.device)
        with torch.no_grad():
            return self.encode(images_BCHW).shape[-1]

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """The tokens (B, N, D) that the heads attend to."""
        return compute_tokens(self.backbone, images_BCHW)


def train_probe(config: LinearConfig) -> dict[str, Any]:
    """Train and judge the probe; each rank calls it.

    Returns:
        The entry of results.json.

    Raises:
        ValueError: anything a user can have wrong.
    """
    probe = AttentiveProbe if config.probe == "attentive" else LinearProbe
    return probe(config).run()


def main() -> int:
    """Command line; bad input ends with one sentence and status 2."""
    return run_command("linear", lambda: train_probe(read_linear_flags(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
