"""A whole fp32 copy of the trained module, on which the loss is differentiated beside the training.

The engine, its partitions, hooks and buffers are not touched: whatever is computed here, the run
goes on bit for bit as without. The loss is the run's exact one, chunk by chunk over all ranks, at
fp32 weights: at each ZeRO stage and precision, for the price of 4 bytes a weight on each rank.

With f the features of the whole batch, c the loss's gradient by them and J the backbone's
derivative, the gradient is J^T c, and the Hessian H times u has as its part for the backbone the
derivative of that product along u:

    f'  = (f(w + h u) - f(w - h u)) / 2h
    c'  from f' and u by second derivatives of heads and loss
    H u = (J(w + h u)^T (c + h c') - J(w - h u)^T (c - h c')) / 2h

So the kinks of the heads' ReLUs, which no difference of gradients can tell from curvature, do not
count, as in published Hessians; and nothing but features exists for more than a chunk of images.

Shape suffixes: W = all trained weights in one row, D = backbone features, B = rank batch,
C H W = image, V = the two views.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.momentum_encoder import ViewKeys
from mocov3_ds.training.second_derivatives import differentiate_twice
from mocov3_ds.training.step import Draws, QueriesToLoss

Views = tuple[Tensor, Tensor]
"""something of view 1 and of view 2"""


@dataclass(frozen=True)
class FixedBatch:
    """A global batch whose loss depends on the base encoder's weights alone; one rank's part."""

    views: Views
    """both views (B, C, H, W), fp32"""
    keys: tuple[ViewKeys, ViewKeys]
    """keys of both views, which stay"""
    draws: Draws
    seed: int
    """seed of whatever else a network or a loss draws, the same for each derivative"""


@dataclass(frozen=True)
class Heads:
    """Heads and loss at some weights, differentiated once and ready for a second time."""

    leaves: tuple[Tensor, ...]
    """features of both views (B, D) of this rank, and weights of heads and loss"""
    gradients: tuple[Tensor, ...]
    """gradient of the sum of all ranks' losses by the features, and of this rank's by weights"""


class MeasuredCopy:
    """Derivatives of the loss at any weights; all ranks must make the same calls.

    Args:
        model: the trained module before an engine takes it over; it is copied.
        device: where to compute.
        dtype: dtype that the engine casts weights to; frozen ones have no fp32 masters, and are
            measured as they are trained with.
    """

    def __init__(
        self, model: QueriesToLoss, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self._model = copy.deepcopy(model).to(device).float().train()
        for parameter in self._model.parameters():
            if not parameter.requires_grad:
                parameter.copy_(parameter.to(dtype))
        base, loss = self._model.base, self._model.loss
        differentiate_twice(nn.ModuleList([base.projector, base.predictor]), loss)
        trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self.names, self._trained = tuple(trained), tuple(trained.values())
        backbone_ids = {id(parameter) for parameter in base.backbone.parameters()}
        self._backbone = tuple(p for p in self._trained if id(p) in backbone_ids)
        self._heads = self._trained[len(self._backbone) :]
        assert not any(id(p) in backbone_ids for p in self._heads), "the backbone comes first"
        self.backbone_numbers = sum(parameter.numel() for parameter in self._backbone)
        """weights of the backbone, which are the first of a row"""

    def set_chunk(self, chunk: int) -> None:
        """Let the backbone run over so many images at once; 0 = all, as at first."""
        self._model.chunks = Chunks(size=chunk)

    @torch.no_grad()
    def take_buffers(self, model: nn.Module) -> None:
        """Take over what the trained module keeps beside its weights, such as spectral vectors."""
        for (_, buffer), (_, given) in zip(
            self._model.named_buffers(), model.named_buffers(), strict=True
        ):
            buffer.copy_(given)

    def join(self, tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Named tensors of all trained weights in one row (W,)."""
        by_name = {name: tensor.reshape(-1) for name, tensor in tensors}
        return torch.cat([by_name[name] for name in self.names]).to(self._trained[0].device)

    def split(self, row_W: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of what `join` has joined."""
        yield from zip(self.names, _cut(row_W, self._trained), strict=True)

    @torch.no_grad()
    def set_weights(self, weights_W: Tensor) -> None:
        """Differentiate at these weights from now on."""
        for parameter, tensor in zip(self._trained, _cut(weights_W, self._trained), strict=True):
            parameter.copy_(tensor)

    @torch.no_grad()
    def _set_backbone(self, weights_W: Tensor) -> None:
        """The backbone's alone: those of the heads are leaves of a graph that is kept."""
        row = weights_W[: self.backbone_numbers]
        for parameter, tensor in zip(self._backbone, _cut(row, self._backbone), strict=True):
            parameter.copy_(tensor)

    def differentiate_heads(self, batch: FixedBatch) -> Heads:
        """First derivatives of heads and loss on the whole batch."""
        leaves = [feature_BD.requires_grad_() for feature_BD in self._features(batch)]
        torch.manual_seed(batch.seed)
        with torch.enable_grad():
            loss = self._model.loss_of_features(leaves[0], leaves[1], lambda: batch.keys).loss
            all_leaves = (*leaves, *self._heads)
            gradients = torch.autograd.grad(loss, all_leaves, create_graph=True)
        return Heads(all_leaves, gradients)

    def pull_back(self, batch: FixedBatch, shares: Views) -> Tensor:
        """The backbone's derivative, transposed, times numbers beside its features; this rank's.

        Args:
            batch: this rank's part of the batch.
            shares: numbers (B, D) beside the features of both views.

        Returns:
            A row of the backbone's weights.
        """
        torch.manual_seed(batch.seed)
        with torch.enable_grad():
            features = self._model.features(*batch.views, batch.draws)
        return _join(torch.autograd.grad(features, self._backbone, shares))

    def gradient(self, batch: FixedBatch, heads: Heads) -> Tensor:
        """Gradient (W,) of the loss of the global batch at the present weights."""
        first, second, *of_heads = (gradient.detach() for gradient in heads.gradients)
        row_W = torch.cat([self.pull_back(batch, (first, second)), _join(of_heads)])
        return _mean_over_ranks(row_W)

    def hessian_product(
        self, batch: FixedBatch, heads: Heads, weights_W: Tensor, u_W: Tensor, step: float
    ) -> Tensor:
        """The loss's Hessian times a direction, (W,); see the module's text.

        Args:
            batch: this rank's part of the batch.
            heads: their derivatives at these weights.
            weights_W: weights at which the Hessian is taken, and which are set afterwards.
            u_W: direction of any length.
            step: length of a difference's step to either side, relative to the backbone's weights.
        """
        moves_W = u_W.clone()
        moves_W[self.backbone_numbers :] = 0
        length = float(moves_W.norm())
        weight_length = float(weights_W[: self.backbone_numbers].norm())
        h = step * weight_length / length if length else 1.0
        ends = [weights_W + h * moves_W, weights_W - h * moves_W]
        moved: list[Views] = []
        for end_W in ends:
            self._set_backbone(end_W)
            moved.append(self._features(batch))
        moved_VBD = [(plus - minus) / (2 * h) for plus, minus in zip(*moved, strict=True)]
        along = (*moved_VBD, *_cut(u_W[self.backbone_numbers :], self._heads))
        first, second, *of_heads = torch.autograd.grad(
            heads.gradients, heads.leaves, along, retain_graph=True
        )
        of_backbone = u_W.new_zeros(self.backbone_numbers)
        for sign, end_W in zip((1, -1), ends, strict=True):
            self._set_backbone(end_W)
            shares = (
                heads.gradients[0].detach() + sign * h * first,
                heads.gradients[1].detach() + sign * h * second,
            )
            of_backbone.add_(self.pull_back(batch, shares), alpha=sign)
        of_backbone /= 2 * h
        self._set_backbone(weights_W)
        return _mean_over_ranks(torch.cat([of_backbone, _join(of_heads)]))

    @torch.no_grad()
    def _features(self, batch: FixedBatch) -> Views:
        torch.manual_seed(batch.seed)
        return self._model.features(*batch.views, batch.draws)


def _cut(row: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """A row of numbers as tensors of the parameters' shapes."""
    pieces = torch.split(row, [parameter.numel() for parameter in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


def _join(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _mean_over_ranks(row_W: Tensor) -> Tensor:
    return ranks.all_reduce_sum(row_W).div_(ranks.world_size())
