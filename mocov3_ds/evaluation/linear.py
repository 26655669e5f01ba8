"""How linearly separable are the classes of an encoder's features? The paper's linear probe.

    accelerate launch -m mocov3_ds.evaluation.linear RUN
    python -m mocov3_ds.evaluation.linear RUN --learning_rates 0.3 1 3 --batch 1024

The backbone is frozen and in eval mode. Its features of random-resized, flipped crops train linear
heads by SGD with momentum, a cosine schedule and no weight decay. There is one head for each base
learning rate; all heads share each batch of features and know nothing of each other, so each ends
where it would have ended alone.

Shape suffixes: L = learning rates, B = images of a pass, C = classes, D = features.
"""

import math
import sys
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.load import build_encoder
from mocov3_ds.evaluation.features import make_inputs
from mocov3_ds.evaluation.flags import LinearConfig, read_linear_flags
from mocov3_ds.evaluation.labelled_images import CentreCrop, RandomCrop
from mocov3_ds.evaluation.supervised_run import SupervisedRun, run_command
from mocov3_ds.settings.bounds import Bounds


@dataclass
class HeadBank:
    """Linear classifiers that see the same features, each with its own learning rate."""

    weight_LCD: Tensor
    bias_LC: Tensor
    weight_velocity_LCD: Tensor
    bias_velocity_LC: Tensor

    @classmethod
    def start(cls, rates: int, classes: int, dim: int, seed: int) -> "HeadBank":
        """Heads that all have the same N(0, 0.01) weights and zero biases.

        Args:
            rates: number of learning rates, and so of heads.
            classes: number of classes that a head tells apart.
            dim: width of a feature.
            seed: seed of the weights.
        """
        generator = torch.Generator().manual_seed(seed)
        weight_LCD = 0.01 * torch.randn(classes, dim, generator=generator).repeat(rates, 1, 1)
        bias_LC = torch.zeros(rates, classes)
        return cls(weight_LCD, bias_LC, torch.zeros_like(weight_LCD), torch.zeros_like(bias_LC))

    def to(self, device: torch.device) -> "HeadBank":
        """A copy of the heads on another device."""
        return HeadBank(*(tensor.to(device) for tensor in vars(self).values()))

    def logits(self, x_BD: Tensor) -> Tensor:
        """Scores (L, B, C) of all heads for features (B, D)."""
        return torch.baddbmm(
            self.bias_LC[:, None],
            x_BD.expand(len(self.weight_LCD), *x_BD.shape),
            self.weight_LCD.transpose(1, 2),
        )

    def add_gradient(
        self, x_BD: Tensor, labels_B: Tensor, grad_LCD: Tensor, grad_LC: Tensor
    ) -> Tensor:
        """Add the gradient of the *summed* cross entropy.

        d loss / d logits = softmax(logits) - one_hot(label), so no graph is built.

        Args:
            x_BD: features of a pass, fp32.
            labels_B: class of each image, int64.
            grad_LCD: gradient of the weights, added to in place.
            grad_LC: gradient of the biases, added to in place.

        Returns:
            (L,) losses, summed over the images.
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
        """One step of SGD as torch has it: v <- momentum v + (g + decay w), w <- w - rate v.

        Args:
            grad_LCD: mean gradient of the weights.
            grad_LC: mean gradient of the biases.
            rate_L: learning rate of each head in this step.
            momentum: factor of the velocity v.
            weight_decay: factor of the weight in the gradient.
        """
        for w, v, g, rate in (
            (self.weight_LCD, self.weight_velocity_LCD, grad_LCD, rate_L[:, None, None]),
            (self.bias_LC, self.bias_velocity_LC, grad_LC, rate_L[:, None]),
        ):
            v.mul_(momentum).add_(g).add_(w, alpha=weight_decay)
            w.sub_(rate * v)


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

    name = "linear"
    title = "linear probe"
    required = tuple(field.name for field in fields(HeadBank))

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        backbone = build_encoder(self.weights, image_size=self.image_size)
        self.backbone = backbone.requires_grad_(False).to(self.device)
        rates, dim = len(config.learning_rates), self.weights.shape.dim
        self.bank = HeadBank.start(rates, self.splits.classes, dim, config.seed).to(self.device)

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
        """Class-token features (B, D), fp32, of uint8 crops."""
        images_BCHW = make_inputs(
            crops_BCHW, self.device, self.weights.settings.mean, self.weights.settings.std
        )
        with self.accelerator.autocast():
            features_BD = self.backbone(images_BCHW)
        return features_BD.float()

    def train_epoch(self, *, final: bool) -> str:
        """Train one epoch; the lowest mean loss over the training images."""
        config, samples = self.config, self.splits.train.samples
        crop = RandomCrop(self.image_size, ViewSpec(crop_min=config.crop_min), config.seed)
        passes_per_step, batches = self.open_epoch(crop, images_per_pass=config.micro_batch)
        steps = len(passes_per_step)
        peak_L = torch.tensor(config.learning_rates, device=self.device) * config.batch / 256
        losses_L = torch.zeros_like(peak_L)
        for index, passes in enumerate(passes_per_step):
            images = min(config.batch, samples - index * config.batch)
            grad_LCD = torch.zeros_like(self.bank.weight_LCD)
            grad_LC = torch.zeros_like(self.bank.bias_LC)
            for _ in range(passes):
                crops_BCHW, labels_B, _ = next(batches)
                labels_B = labels_B.to(self.device)
                features_BD = self.compute_features(crops_BCHW)
                losses_L += self.bank.add_gradient(features_BD, labels_B, grad_LCD, grad_LC)
            step = annealed_step(config.anneal, self.epochs_done, steps, index)
            self.bank.step(
                ranks.all_reduce_sum(grad_LCD) / images,
                ranks.all_reduce_sum(grad_LC) / images,
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
        top1_L = self.measure_top1(
            CentreCrop(self.image_size),
            lambda crops_BCHW: self.bank.logits(self.compute_features(crops_BCHW)).argmax(2),
            classifiers=len(rates),
        ).tolist()
        best = top1_L.index(max(top1_L))
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
        self.bank = HeadBank(**tensors).to(self.device)


def train_probe(config: LinearConfig) -> dict[str, Any]:
    """Train and judge the probe; each rank calls it.

    Returns:
        The entry of results.json.

    Raises:
        ValueError: anything a user can have wrong.
    """
    return LinearProbe(config).run()


def main() -> int:
    """Command line; bad input ends with one sentence and status 2."""
    return run_command("linear", lambda: train_probe(read_linear_flags(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
