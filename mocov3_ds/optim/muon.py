"""Muon (Jordan et al. 2024; arXiv 2502.16982) on whole matrices under every ZeRO stage, else AdamW.

The direction of a matrix is its momentum made orthogonal, which takes the whole matrix. Where ZeRO
has cut it, one rank, its owner, gathers the slices, does the work and gives the slices of the
result back; the owners' work is balanced (`owners`). The momentum itself stays where it is.

What is no hidden matrix moves by AdamW (`last_layer`, `convolutions` and the rule decide), in the
same optimizer and by the same kernels. Its second moment is the only one: a matrix has none where
tensors are whole, and in checkpoints. In a flat slice DeepSpeed's own access and converters want
state at each tensor's place, so there zeros stand for it (4 bytes a number, over the ranks).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.segments import Flat, Segment, Shape
from mocov3_ds.optim.arguments import (
    NamedParameters,
    check_betas,
    check_choice,
    check_count,
    check_number,
    check_switch,
    refuse_keywords,
)
from mocov3_ds.optim.exchange import work_on_whole
from mocov3_ds.optim.flat_step import flat_gradient
from mocov3_ds.optim.kernel_types import EVERYTHING, FlatStep, Quantity
from mocov3_ds.optim.orthogonal import count_operations, direction_scale, orthogonalise
from mocov3_ds.optim.owners import Round, assign_owners, list_matrices, plan_rounds
from mocov3_ds.optim.plain_kernels import add_sums, square_sum
from mocov3_ds.optim.rules import Rule, RuleFor, vit_rule
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.optim.step_tables import Share, StepTables
from mocov3_ds.optim.update_counts import KEPT

if TYPE_CHECKING:
    from mocov3_ds.distributed.engine import Engine

_QKV = ("qkv.weight", "in_proj_weight")


class Muon(ShardedOptimizer):
    """Muon that equals the unsharded optimizer on any world size.

    With m the momentum of the gradient of a hidden matrix w, as a whole,

        m <- momentum m + (1 - momentum) g
        d = momentum m + (1 - momentum) g        (m without `nesterov`)
        w <- w - lr (scale orthogonalise(d) + weight_decay w)

    as `torch.optim.Muon` does. Every other tensor moves as by `AdamW`, at `adamw_rate` times lr.
    The gradient is taken as it is given: clip it with DeepSpeed's `gradient_clipping`.

    Args:
        named_parameters: `model.named_parameters()`, in the order from input to output; frozen
            tensors are left out.
        lr: Learning rate of tensors whose rule has no multiplier.
        momentum: Decay rate of the momentum, in [0, 1).
        nesterov: Whether the step looks one momentum step ahead.
        weight_decay: Decoupled decay of the tensors whose rule decays, whoever moves them.
        adjust: Scale of a direction of R rows and C columns: "match_rms_adamw" is
            0.2 sqrt(max(R, C)), at which AdamW's rates and decays fit; "original" is
            sqrt(max(1, R / C)).
        ns_steps: Rounds of the Newton-Schulz iteration, from 1 to 99.
        ns_dtype: Precision of its products: "bf16", "fp32", or "auto", which is bf16 on a GPU and
            fp32 on a CPU.
        qkv: Whether the matrix of queries, keys and values is orthogonalised as one ("whole"), as
            three ("thirds"), or each head's by itself ("heads"; the rule says how many).
        last_layer: Whether "adamw" or "muon" moves the last matrix.
        convolutions: Whether "adamw" or "muon" moves kernels of more than two dimensions, such as
            the patch projection; "muon" takes each as a matrix of shape[0] rows.
        betas: AdamW's decay rates of the first and second moment.
        eps: Number that AdamW adds to the root of the second moment.
        adamw_rate: Learning rate of the tensors that AdamW moves, as a multiple of lr.
        rule: Function of a tensor's name and full shape that gives its `Rule`. What does not adapt
            is moved by AdamW; by default biases, norms, tokens and tables of positions, which do
            not decay either.
        backend: Which kernels do AdamW's arithmetic; see `kernels`.
        unknown: Anything else is refused, with what to use instead.

    Raises:
        ValueError: An impossible value, no matrix to orthogonalise, or a choice without effect.
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    hints: ClassVar[Mapping[str, str]] = {
        "update_clip": "an orthogonal direction has its length already; remove it",
        "muon_lr": "give lr, and adamw_rate for the tensors that AdamW moves",
        "adam_lr": "give adamw_rate, a multiple of lr",
        "adjust_lr_fn": "it is called adjust here",
        "ns_method": "there is one, the standard iteration; remove it",
        "ns_coefficients": "they are the published ones; remove it",
    }
    measures_rms: ClassVar[bool] = True
    rule_options: ClassVar[tuple[str, ...]] = ("qkv", "last_layer", "convolutions", "adamw_rate")

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust: str = "match_rms_adamw",
        ns_steps: int = 5,
        ns_dtype: str = "auto",
        qkv: str = "whole",
        last_layer: str = "adamw",
        convolutions: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adamw_rate: float = 1.0,
        rule: RuleFor = vit_rule,
        backend: str = "auto",
        **unknown: Any,
    ) -> None:
        refuse_keywords(type(self), unknown)
        defaults = {
            "lr": check_number("lr", lr, 0),
            "momentum": check_number("momentum", momentum, 0, 1),
            "nesterov": check_switch("nesterov", nesterov),
            "weight_decay": check_number("weight_decay", weight_decay, 0),
            "adjust": check_choice("adjust", adjust, ("match_rms_adamw", "original")),
            "ns_steps": check_count("ns_steps", ns_steps, 1, 99),
            "ns_dtype": check_choice("ns_dtype", ns_dtype, ("auto", "bf16", "fp32")),
            "qkv": check_choice("qkv", qkv, ("whole", "thirds", "heads")),
            "last_layer": check_choice("last_layer", last_layer, ("adamw", "muon")),
            "convolutions": check_choice("convolutions", convolutions, ("adamw", "muon")),
            "betas": check_betas(betas),
            "eps": check_number("eps", eps, 0),
            "adamw_rate": check_number("adamw_rate", adamw_rate, 0),
        }
        if adamw_rate == 0:
            raise ValueError(
                "adamw_rate is 0; it must be above 0. Freeze tensors that are to stay."
            )
        super().__init__(named_parameters, defaults, rule, backend)
        self._rules = _split_rules(self._rules, self._shapes, defaults)

    def moments_of(self, name: str) -> tuple[str, ...]:
        """A matrix has its momentum alone."""
        return self.moments[: 1 if self._rules[name].adapt else 2]

    def _detach(self) -> None:
        super()._detach()
        self._rounds: dict[Tensor, list[Round]] = {}
        self._halves: dict[Share, tuple[Share, Share]] = {}

    def attach(self, engine: "Engine[nn.Module] | None" = None) -> None:
        """Learn which segments are on this rank, and who owns which matrix; all ranks must call.

        Args:
            engine: What `deepspeed.initialize` returned, given this optimizer; none for whole
                tensors.

        Raises:
            ValueError: As `ShardedOptimizer.attach`.
        """
        super().attach(engine)
        self._halves = {}
        self._rounds = {
            flat.tensor: self._plan(flat) for flat in self._flats.values() if flat.sharded
        }

    def _plan(self, flat: Flat) -> list[Round]:
        works = self.matrix_works()
        flat_works = {name: works[name] for name in flat.names if name in works}
        segments_by_rank = ranks.gather_objects(flat.segments, flat.group)
        matrices = list_matrices(flat_works, segments_by_rank)
        return plan_rounds(assign_owners(matrices, len(segments_by_rank)))

    def matrix_works(self) -> dict[str, float]:
        """Operations that it takes to orthogonalise each of the hidden matrices, by name."""
        group = self.param_groups[0]
        return {
            name: count_operations(
                *matrix_shape(self._shapes[name]),
                steps=group["ns_steps"],
                blocks=count_blocks(name, rule, group["qkv"]),
            )
            for name, rule in self._rules.items()
            if rule.adapt
        }

    # ------------------------------------------------------------------------------ stepping

    def measure_flat(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor) -> None:
        """Matrices: update the momentum, leave its direction in g. The rest moves by AdamW."""
        hidden, by_adamw = self._split(flat.share)
        group = {**flat.group, "bias_correction": True}
        if by_adamw.flat.segments:
            flat.kernels.update_adam(replace(flat, share=by_adamw, group=group), sums_QS, rate_S)
        momentum = flat.group["momentum"]
        for segment in hidden.flat.segments:
            row = hidden.row(segment)
            w_, g_, m_ = (segment.of(x) for x in (flat.weight, flat.gradient, flat.state[0]))
            add_sums(sums_QS, row, w_, g_, m_)
            if len(sums_QS) == EVERYTHING:  # there is no second moment
                sums_QS[Quantity.AFTER : Quantity.BEFORE + 1, row] = torch.nan
            m_.lerp_(g_, 1 - momentum)
            if flat.group["nesterov"]:
                g_.lerp_(m_, momentum)
            else:
                g_.copy_(m_)

    def finish_directions(
        self, tables: StepTables, flats: Sequence[FlatStep], sums_QS: Tensor
    ) -> None:
        """Make the matrices' directions orthogonal, by their owners where they are cut."""
        for share in tables.shares:
            if share.flat.tensor in self._rounds:
                self._orthogonalise_cut(share, tables.absent)
        for flat in flats:
            hidden, _ = self._split(flat.share)
            for segment in hidden.flat.segments:
                row, (w_, g_) = hidden.row(segment), map(segment.of, (flat.weight, flat.gradient))
                rows, columns = matrix_shape(hidden.flat.shapes[segment.index])
                if not hidden.flat.sharded:
                    g_.copy_(self._orthogonalise(segment.name, g_.view(rows, columns)).reshape(-1))
                blocks = count_blocks(segment.name, hidden.rules[segment.index], flat.group["qkv"])
                g_.mul_(direction_scale(rows // blocks, columns, flat.group["adjust"]))
                g_.add_(w_, alpha=flat.group["weight_decay"] * hidden.decay(segment))
                sums_QS[Quantity.UPDATE, row] += square_sum(g_)

    def _orthogonalise_cut(self, share: Share, absent: frozenset[str]) -> None:
        flat = self._flats[share.flat.tensor]
        has_gradient = flat.tensor.grad is not None
        values = flat_gradient(flat) if has_gradient else torch.zeros_like(flat.view())

        def work(name: str, x: Tensor) -> Tensor:
            if name in absent:
                return x
            return self._orthogonalise(name, x.view(matrix_shape(self._shapes[name])))

        device = self._exchange_device or values.device
        work_on_whole(
            self._rounds[flat.tensor],
            values,
            work,
            group=flat.group,
            device=device,
            dtype=resolve_dtype(self.param_groups[0]["ns_dtype"], device),
        )

    def _orthogonalise(self, name: str, x_RC: Tensor) -> Tensor:
        group = self.param_groups[0]
        blocks = count_blocks(name, self._rules[name], group["qkv"])
        x_RC = x_RC.to(resolve_dtype(group["ns_dtype"], x_RC.device))
        return orthogonalise(x_RC, group["ns_steps"], blocks)

    def move_flat(self, flat: FlatStep, rate_S: Tensor, factor_S: Tensor) -> None:
        """Move the matrices along their directions; AdamW has moved the rest."""
        hidden, _ = self._split(flat.share)
        if hidden.flat.segments:
            flat.kernels.move_weights(replace(flat, share=hidden), rate_S)

    def _split(self, share: Share) -> tuple[Share, Share]:
        """The part of a share that is orthogonalised, and the rest; kernels keep tables of both."""
        if share not in self._halves:
            if len(self._halves) >= KEPT:
                self._halves.clear()
            sides: tuple[list[Segment], list[Segment]] = ([], [])
            for segment in share.flat.segments:
                sides[not share.rules[segment.index].adapt].append(segment)
            self._halves[share] = (share.only(sides[0]), share.only(sides[1]))
        return self._halves[share]

    @classmethod
    def bytes_moved(cls) -> int:
        """Of a matrix: w g m read, m g written; g read and written; w g read, g written; w g, w."""
        return 52


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix."""
    return shape[0], math.prod(shape[1:])


def count_blocks(name: str, rule: Rule, qkv: str) -> int:
    """Blocks of rows of a matrix that are orthogonalised by themselves.

    Args:
        name: Name of the tensor.
        rule: Rule of the tensor, which knows its heads.
        qkv: The optimizer's choice for matrices of queries, keys and values.
    """
    if qkv == "whole" or not name.endswith(_QKV):
        return 1
    return 3 if qkv == "thirds" else 3 * rule.heads


def _split_rules(
    rules: Mapping[str, Rule], shapes: Mapping[str, Shape], options: Mapping[str, Any]
) -> dict[str, Rule]:
    """Rules in which exactly those tensors adapt that are orthogonalised.

    Raises:
        ValueError: There is none, or a choice has no effect or cannot be followed.
    """
    takes_kernels = options["convolutions"] == "muon"
    dimensions = {name: len(shapes[name]) for name, rule in rules.items() if rule.adapt}
    matrices = [n for n, count in dimensions.items() if count == 2 or (count > 2 and takes_kernels)]
    if options["last_layer"] == "adamw":
        last = [name for name, count in dimensions.items() if count >= 2][-1:]
        matrices = [name for name in matrices if name not in last]
    if not matrices:
        raise ValueError(
            f"Muon has nothing to orthogonalise: of {len(rules)} trained tensors none is a hidden "
            "matrix (kernels of convolutions count with convolutions 'muon', the last matrix with "
            "last_layer 'muon'); use AdamW."
        )
    if takes_kernels and not any(dimensions[name] > 2 for name in matrices):
        raise ValueError(
            "convolutions 'muon' has no effect: no trained kernel has more than two dimensions; "
            "remove it."
        )
    _check_qkv(matrices, rules, shapes, options["qkv"])
    return {
        name: replace(rule, adapt=True)
        if name in matrices
        else replace(rule, adapt=False, lr_multiplier=rule.lr_multiplier * options["adamw_rate"])
        for name, rule in rules.items()
    }


def _check_qkv(
    matrices: Iterable[str], rules: Mapping[str, Rule], shapes: Mapping[str, Shape], qkv: str
) -> None:
    """Make sure that the matrices of queries, keys and values can be cut as asked.

    Raises:
        ValueError: There are none, their heads are not known, or do not divide the rows.
    """
    if qkv == "whole":
        return
    fused = [name for name in matrices if name.endswith(_QKV)]
    if not fused:
        raise ValueError(
            f"qkv {qkv!r} has no effect: no matrix is called {' or '.join(f'*{n}' for n in _QKV)}; "
            "remove it."
        )
    for name in fused:
        blocks, rows = count_blocks(name, rules[name], qkv), shapes[name][0]
        if not blocks or rows % blocks:
            heads = f"{rules[name].heads} heads" if blocks else "an unknown number of heads"
            raise ValueError(
                f"qkv {qkv!r} cannot cut {name!r}: {rows} rows and {heads}; use qkv 'whole', or "
                "give a rule with the right heads."
            )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the iteration's products.

    Args:
        name: what the optimizer's `ns_dtype` says.
        device: where they are computed.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32
