"""Classifiers that see the same features, each trained with its own learning rate.

A bank stacks the weights of its classifiers along a first axis, so that one pass over the features
trains all of them; none knows of the others, and each ends where it would have ended alone.

Shape suffixes: L = learning rates, B = images of a pass, C = classes, D = features, N = tokens,
H = attention heads, E = features of a head (D / H).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_HEADS = 12  # of an attentive classifier; what they pool is H times as large as the features
_HEAD_WIDTH = 64

BankT = TypeVar("BankT", bound="ProbeBank")


class ProbeBank(ABC):
    """Classifiers and their SGD; a subclass is a dataclass of weights, then as many velocities."""

    @classmethod
    def start(cls: type[BankT], rates: int, classes: int, dim: int, seed: int) -> BankT:
        """Classifiers at rest that all begin with the same weights.

        Args:
            rates: number of learning rates, and so of classifiers.
            classes: number of classes that one tells apart.
            dim: width of a feature, or of a token.
            seed: seed of the weights.
        """
        first_weights = cls.draw_weights(classes, dim, seed)
        weights = [weight.repeat(rates, *[1] * weight.dim()) for weight in first_weights]
        return cls(*weights, *map(torch.zeros_like, weights))

    @staticmethod
    @abstractmethod
    def draw_weights(classes: int, dim: int, seed: int) -> list[Tensor]:
        """First weights of one classifier, without the axis of the rates; see `start`."""

    @property
    def weights(self) -> list[Tensor]:
        """Trained tensors, (L, ...) each."""
        tensors = [*vars(self).values()]
        return tensors[: len(tensors) // 2]

    @property
    def velocities(self) -> list[Tensor]:
        """Velocity of each trained tensor."""
        tensors = [*vars(self).values()]
        return tensors[len(tensors) // 2 :]

    def to(self: BankT, device: torch.device) -> BankT:
        """A copy of the classifiers on another device."""
        return type(self)(*(tensor.to(device) for tensor in vars(self).values()))

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Scores (L, B, C) of all classifiers for the features of a pass."""

    @abstractmethod
    def add_gradient(self, x: Tensor, labels_B: Tensor, *gradients: Tensor) -> Tensor:
        """Add the gradient of the *summed* cross entropy, in place.

        Args:
            x: features of a pass, fp32.
            labels_B: class of each image, int64.
            gradients: gradient of each of `weights`.

        Returns:
            (L,) losses, summed over the images.
        """

    def step(
        self, *gradients: Tensor, rate_L: Tensor, momentum: float, weight_decay: float
    ) -> None:
        """One step of SGD as torch has it: v <- momentum v + (g + decay w), w <- w - rate v.

        Args:
            gradients: mean gradient of each of `weights`.
            rate_L: learning rate of each classifier in this step.
            momentum: factor of the velocity v.
            weight_decay: factor of the weight in the gradient.
        """
        for w, v, g in zip(self.weights, self.velocities, gradients, strict=True):
            v.mul_(momentum).add_(g).add_(w, alpha=weight_decay)
            w.sub_(rate_L.view(-1, *[1] * (w.dim() - 1)) * v)


def _draw_classifier(classes: int, dim: int, seed: int) -> list[Tensor]:
    """N(0, 0.01) weights (C, D) and zero biases (C,)."""
    generator = torch.Generator().manual_seed(seed)
    return [0.01 * torch.randn(classes, dim, generator=generator), torch.zeros(classes)]


def _score(weight_LCD: Tensor, bias_LC: Tensor, x_LBD: Tensor) -> Tensor:
    return torch.baddbmm(bias_LC[:, None], x_LBD, weight_LCD.transpose(1, 2))


@dataclass
class HeadBank(ProbeBank):
    """Linear classifiers of features (B, D)."""

    weight_LCD: Tensor
    bias_LC: Tensor
    weight_velocity_LCD: Tensor
    bias_velocity_LC: Tensor

    @staticmethod
    def draw_weights(classes: int, dim: int, seed: int) -> list[Tensor]:
        """N(0, 0.01) weights and zero biases."""
        return _draw_classifier(classes, dim, seed)

    def logits(self, x: Tensor) -> Tensor:
        """Scores (L, B, C) of all heads for features (B, D)."""
        return _score(self.weight_LCD, self.bias_LC, x.expand(len(self.weight_LCD), *x.shape))

    def add_gradient(self, x: Tensor, labels_B: Tensor, *gradients: Tensor) -> Tensor:
        """See the base class; d loss / d logits = softmax(logits) - one_hot(label): no graph."""
        grad_LCD, grad_LC = gradients
        log_p_LBC = self.logits(x).log_softmax(2)
        labels_LB1 = labels_B.expand(len(log_p_LBC), -1)[..., None]
        loss_L = -log_p_LBC.gather(2, labels_LB1).sum((1, 2))
        residual_LBC = log_p_LBC.exp_()
        residual_LBC.scatter_add_(2, labels_LB1, -torch.ones_like(residual_LBC[..., :1]))
        grad_LCD += residual_LBC.transpose(1, 2) @ x
        grad_LC += residual_LBC.sum(1)
        return loss_L


@dataclass
class AttentiveBank(ProbeBank):
    """Classifiers of tokens (B, N, D): one learned query attends to them, then a linear head.

    This is the attentive probe of CAE (arXiv 2202.03026) and V-JEPA (arXiv 2404.08471) at its
    smallest: multi-head cross-attention with one learned query and no MLP behind it. The query is
    the same for all images, so that its product with the key projection is learned as one vector of
    width D for each head, as arXiv 2506.10178 does. Tokens are normalised without weights first, so
    that a rate means the same for any backbone. At the start all tokens weigh the same and the
    values are the tokens themselves: the classifier is a linear one of their mean.
    """

    query_LHD: Tensor
    value_LHED: Tensor
    weight_LCD: Tensor
    bias_LC: Tensor
    query_velocity_LHD: Tensor
    value_velocity_LHED: Tensor
    weight_velocity_LCD: Tensor
    bias_velocity_LC: Tensor

    @staticmethod
    def draw_weights(classes: int, dim: int, seed: int) -> list[Tensor]:
        """Queries of zero, values that are the tokens, and an N(0, 0.01) head."""
        heads = count_attention_heads(dim)
        value_HED = torch.eye(dim).view(heads, dim // heads, dim)
        return [torch.zeros(heads, dim), value_HED, *_draw_classifier(classes, dim, seed)]

    def logits(self, x: Tensor) -> Tensor:
        """Scores (L, B, C) of all classifiers for tokens (B, N, D)."""
        return attentive_logits(self.weights, x)

    def add_gradient(self, x: Tensor, labels_B: Tensor, *gradients: Tensor) -> Tensor:
        """See the base class; autograd computes it."""
        with torch.enable_grad():
            weights = [weight.requires_grad_() for weight in self.weights]
            logits_LBC = attentive_logits(weights, x)
            labels_LB = labels_B.expand(len(logits_LBC), -1)
            loss_LB = F.cross_entropy(
                logits_LBC.flatten(0, 1), labels_LB.flatten(), reduction="none"
            ).view_as(labels_LB)
            addends = torch.autograd.grad(loss_LB.sum(), weights)
        for weight, gradient, addend in zip(weights, gradients, addends, strict=True):
            weight.requires_grad_(False)
            gradient += addend
        return loss_LB.detach().sum(1)


def count_attention_heads(dim: int) -> int:
    """Heads of an attentive classifier: about one for 64 features, twelve at most, dividing them.

    Args:
        dim: width of a token.
    """
    head_count = min(max(dim // _HEAD_WIDTH, 1), _MOST_HEADS)
    return next(heads for heads in range(head_count, 0, -1) if dim % heads == 0)


def attentive_logits(weights: Sequence[Tensor], x_BND: Tensor) -> Tensor:
    """Scores (L, B, C) of attentive classifiers.

    Args:
        weights: query (L, H, D), value (L, H, E, D), weight (L, C, D) and bias (L, C).
        x_BND: tokens of the images, fp32.
    """
    query_LHD, value_LHED, weight_LCD, bias_LC = weights
    x_BND = F.layer_norm(x_BND, x_BND.shape[-1:])
    score_LBHN = torch.einsum("lhd,bnd->lbhn", query_LHD, x_BND) * x_BND.shape[-1] ** -0.5
    pooled_LBHD = torch.einsum("lbhn,bnd->lbhd", score_LBHN.softmax(-1), x_BND)
    value_LBD = torch.einsum("lbhd,lhed->lbhe", pooled_LBHD, value_LHED).flatten(2)
    return _score(weight_LCD, bias_LC, value_LBD)
