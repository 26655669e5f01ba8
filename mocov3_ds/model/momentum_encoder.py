"""The momentum encoder: whole on each rank, fp32, moved once per optimizer step.

Order of the paper's Alg. 1: the queries are computed first, the momentum encoder then moves from
the *current* base weights (this step's optimizer update is still to come), and only then makes the
keys. Parameters alone are averaged; batch-norm statistics are those of the batch at hand.

Why fp32: an exponential average whose increment is below half a unit in the last place stands
still. Stored in bf16 it was off by 23-31 % of its movement at m = 0.99 and 96-98 % at m = 0.9999,
after 300 to 3000 steps of Adam-sized drift; stored in fp32 but fed bf16 base weights, by 0.02 %.
So the master is fp32 always, and where the network runs in low precision a copy is cast once per
step for the forward pass.

Shape suffixes: B = images, C H W = image, D = backbone features, P = projector output,
K = patches that are kept.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import devices
from mocov3_ds.distributed.buffers import persistent_buffers
from mocov3_ds.model.backbones import build_backbone, describe_backbone, has_compiled_blocks
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.chunking import chunked_features
from mocov3_ds.model.cpu_ops import suit_cpu
from mocov3_ds.model.heads import build_projector
from mocov3_ds.model.sequence_length import shortened
from mocov3_ds.model.sigma_reparam import move_all_vectors

if TYPE_CHECKING:
    from mocov3_ds.model.momentum_triton import MoveTable


class ViewKeys(NamedTuple):
    """What the momentum encoder makes of one view."""

    keys_BP: Tensor
    features_BD: Tensor
    """class-token features of its backbone, from which the keys are made"""


class MomentumEncoder(nn.Module):
    """Backbone and projector without gradient; see the module's text for the rules it keeps.

    Build it before the engine exists, call `follow` after (the engine may have cast, broadcast or
    partitioned the base encoder), and never make it a child of the trained module: ZeRO-3 would
    partition it and the low precision would be its only copy.

    Args:
        shape: architecture of the base encoder; there is no predictor and no stochastic depth here.
        device: where the encoder lives and computes.
        dtype: dtype of the forward pass; below fp32 a copy is cast from the fp32 master.
    """

    def __init__(
        self,
        shape: EncoderShape,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(shape)
        self.shape, self.facts = shape, describe_backbone(self.backbone, shape.backbone)
        self.projector = build_projector(
            self.facts.width, shape.hidden, shape.out, shape.projector_layers
        )
        suit_cpu(self)
        self.requires_grad_(False).to(device)
        self._low_precision = dtype != torch.float32
        self._master: dict[str, Tensor] = {name: p.data for name, p in self.named_parameters()}
        if self._low_precision:
            for parameter in self.parameters():
                parameter.data = parameter.data.to(dtype)
            persistent = {name for name, _ in persistent_buffers(self)}
            for name, table in self.named_buffers():
                if name not in persistent and table.is_floating_point():
                    table.data = table.data.to(dtype)  # as the engine casts the base encoder's
        self._trained: dict[str, nn.Parameter] = {}
        self._partitioned = False
        self._table: MoveTable | None = None
        self._pending: set[str] = set()
        self._weight_of_base = 0.0

    @torch.no_grad()
    def start_from(self, base_tensors: dict[str, Tensor]) -> None:
        """Become a copy of the base encoder.

        Args:
            base_tensors: full tensors of the base encoder by name (predictor entries are ignored).
        """
        for name, buffer in persistent_buffers(self):
            buffer.copy_(base_tensors[name])
        for name, master in self._master.items():
            master.copy_(base_tensors[name])
        self._refresh_copies()

    def follow(self, base: BaseEncoder) -> None:
        """Move with `base` from now on; call once, after the engine took `base` over.

        Where ZeRO-3 partitions the weights, each module is averaged in a forward pre-hook that runs
        right after the engine's own, while the weights are gathered anyway: no extra collective.
        """
        trained = {
            n: p for n, p in base.named_parameters() if p.requires_grad and n in self._master
        }
        self._trained = trained
        self._partitioned = any(hasattr(p, "ds_id") for p in trained.values())
        if not self._partitioned:
            return
        for prefix, module in base.named_modules():
            parameters = module.named_parameters(prefix, recurse=False)
            names = [name for name, _ in parameters if name in trained]
            if names:
                module.register_forward_pre_hook(self._averaging_hook(names))

    def _averaging_hook(self, names: list[str]) -> Callable[[nn.Module, object], None]:
        def average_pending(_module: nn.Module, _inputs: object) -> None:
            if self._pending and names[0] in self._pending:
                self._average_tensors(names)
                self._pending.difference_update(names)

        return average_pending

    @torch.no_grad()
    def _average_tensors(self, names: list[str]) -> None:
        """Move the masters, and the low-precision copies after them while they are in the cache."""
        low = dict(self.named_parameters()) if self._low_precision else {}
        triples: list[Triple] = [
            (self._master[name], self._trained[name].detach(), low.get(name)) for name in names
        ]
        device = next(iter(self._master.values())).device
        if triples and device.type == "cuda" and not devices.triton_problem(device):
            self._move_by_kernel(triples)
            return
        for masters, bases, copies in _bounded_groups(triples):
            bases = [base.to(torch.float32) for base in bases]
            torch._foreach_lerp_(masters, bases, self._weight_of_base)
            if copies:
                torch._foreach_copy_(copies, masters)

    def _move_by_kernel(self, triples: "list[Triple]") -> None:
        """One launch for all tensors, where they keep their places from step to step."""
        from mocov3_ds.model.momentum_triton import MoveTable, move_tensor

        if self._partitioned:
            for master, base, copy in triples:
                move_tensor(master, base, copy, self._weight_of_base)
            return
        masters = [master for master, _, _ in triples]
        bases = [base for _, base, _ in triples]
        copies = [copy for _, _, copy in triples if copy is not None]
        if self._table is None or not self._table.holds(masters, bases, copies):
            self._table = MoveTable(masters, bases, copies)
        self._table.move(self._weight_of_base)

    def begin_move(self, momentum: float) -> None:
        """Start this step's move `k <- momentum * k + (1 - momentum) * q`.

        Call it before the queries are computed. Frozen tensors are equal in both encoders and stay
        bit-identical: they are not touched.

        Args:
            momentum: share of its own weights that the momentum encoder keeps, 0 to 1.
        """
        assert not self._pending, f"the last move never finished: {sorted(self._pending)[:3]}"
        self._weight_of_base = 1.0 - momentum
        if self._partitioned:
            self._pending = set(self._trained)
        else:
            self._average_tensors(list(self._trained))

    def finish_move(self) -> None:
        """Move what no forward pass has reached; before the keys, on all ranks alike.

        A layer may compute with the weight of another one, whose own forward nobody calls. Then
        what follows from the weights: the singular vectors of `sigma_reparam`.
        """
        if self._pending:
            from mocov3_ds.distributed.engine import gather_parameters

            names = [name for name in self._trained if name in self._pending]
            with gather_parameters(self._trained[name] for name in names):
                self._average_tensors(names)
            self._pending.clear()
        move_all_vectors(self.backbone)

    @torch.no_grad()
    def _refresh_copies(self) -> None:
        if not self._low_precision:
            return
        parameters = dict(self.named_parameters())
        torch._foreach_copy_(list(parameters.values()), [self._master[n] for n in parameters])

    @torch.no_grad()
    def make_keys(
        self,
        x_BCHW: Tensor,
        chunk: int = 0,
        kept_BK: Tensor | None = None,
        patch_scale: float = 1.0,
    ) -> ViewKeys:
        """Keys of one view: backbone by chunks, projector on the whole rank batch.

        Args:
            x_BCHW: this rank's images of the view, in the dtype of the forward pass.
            chunk: images per pass of the backbone; 0 = all at once.
            kept_BK: places of the patches that each image keeps; None = all.
            patch_scale: side of a patch over that of a whole sequence.
        """

        def run_backbone(x_bCHW: Tensor, kept_bK: Tensor | None) -> Tensor:
            with shortened(self.backbone, kept_bK, patch_scale):
                features_bD: Tensor = self.backbone(x_bCHW)
            return features_bD

        features_BD = chunked_features(
            run_backbone, x_BCHW, chunk, 0, kept_BK, fill=has_compiled_blocks(self.backbone)
        )
        return ViewKeys(self.projector(features_BD), features_BD)

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 master of each parameter, then name and value of each buffer."""
        yield from self._master.items()
        yield from persistent_buffers(self)

    @torch.no_grad()
    def load_full_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `full_state` gave.

        Args:
            tensors: whole tensors of the momentum encoder by name.

        Raises:
            ValueError: the names are those of another model.
        """
        expected = {name for name, _ in self.full_state()}
        if expected != set(tensors):
            missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
            raise ValueError(
                f"momentum encoder of another model: missing {missing[:3]}, unknown {extra[:3]}."
            )
        self.start_from(tensors)


Triple = tuple[Tensor, Tensor, Tensor | None]


def _bounded_groups(
    triples: list[Triple],
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Flat pieces of (master, base, copy) tensors, in groups of a bounded count of numbers.

    The bound keeps what a group makes in passing (an fp32 copy of low-precision weights) inside the
    cache of a CPU core, where a fresh allocation of megabytes costs ten times the arithmetic, and
    to 64 MiB on a GPU, where many small tensors in one launch are what counts.
    """
    at_once = 2**18 if triples[0][0].device.type == "cpu" else 2**24
    groups: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    room = at_once
    for triple in triples:
        flats = [tensor.view(-1) for tensor in triple if tensor is not None]
        start, numbers = 0, flats[0].numel()
        while start < numbers:
            end = min(start + room, numbers)
            for group, flat in zip(groups, flats, strict=False):
                group.append(flat[start:end])
            room -= end - start
            start = end
            if not room:
                yield groups
                groups, room = ([], [], []), at_once
    if groups[0]:
        yield groups
