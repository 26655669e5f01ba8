"""Linear layers whose largest singular value is a learned number (sigma-reparametrisation).

    W_hat = gain / sigma(W) * W          arXiv 2303.06296, Sec. 3.1

The attention's logits can then grow no faster than the gains, so that its entropy cannot collapse.
sigma(W) = u' W v with u and v from one power iteration a step, before the forward pass, and held
fixed in it: each chunk, the recomputation of a chunk and each rank see the same number, and the
gradient goes through W alone, as in spectral normalisation (arXiv 1802.05957). The momentum encoder
has weights, gains, u and v of its own. A finished encoder is an ordinary one: `bake_weights`.

Legend: O = features out, I = features in, R = rows (images and tokens).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mocov3_ds.model.cpu_ops import linear

_FIRST_ITERATIONS = 30
"""power iterations before the first step, after which sigma is right to a percent or better"""
_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_LEAVES = ("gain", "u", "v")


class SigmaLinear(nn.Linear):
    """`nn.Linear` with `gain / sigma(weight)` times its weight.

    Args:
        fan_in: features in.
        fan_out: features out.
    """

    u: Tensor
    v: Tensor

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("u", F.normalize(torch.randn(fan_out), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(fan_in), dim=0))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name is nn.Linear's)
        """(..., I) -> (..., O)."""
        sigma = spectral_norm(self.weight, self.u, self.v)
        scale = self.gain.to(sigma.dtype) / sigma
        if not input.is_meta and torch.is_autocast_enabled(input.device.type):
            return F.linear(input, self.weight) * scale.to(input.dtype) + self.bias
        product: Tensor = _ScaledProduct.apply(input, self.weight, scale)
        return product + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> "SigmaLinear":
        """Go where the module goes, but never into low precision: u and v are no weights."""
        u_O, v_I = self.u, self.v
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.u, self.v = u_O.to(self.u.device), v_I.to(self.v.device)
        return self


def spectral_norm(weight_OI: Tensor, u_O: Tensor, v_I: Tensor) -> Tensor:
    """Estimate u' W v of the largest singular value, fp32 (fp64 of fp64), a scalar."""
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    return torch.mv(weight_OI.to(wide), v_I.to(wide)).dot(u_O.to(wide))


class _ScaledProduct(torch.autograd.Function):
    """Rows times a scaled weight, which keeps nothing beyond what `nn.Linear` keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI, scale)
        return linear(x, weight_OI) * scale.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, scale = ctx.saved_tensors
        factor = scale.to(x.dtype)
        gradient_RO, x_RI = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        plain_OI = linear(gradient_RO.t(), x_RI.t())
        grad_x = linear(gradient_RO, weight_OI.t()).view(x.shape) * factor
        return grad_x, plain_OI * factor, (plain_OI.to(scale.dtype) * weight_OI).sum().view(1)


def reparametrise_blocks(blocks: Iterable[nn.Module]) -> None:
    """Replace the linear layers of transformer blocks, weights and biases as they are."""
    for block in blocks:
        for name in _LAYERS:
            plain = block.get_submodule(name)
            assert isinstance(plain, nn.Linear)
            layer = SigmaLinear(plain.in_features, plain.out_features)
            layer.weight, layer.bias = plain.weight, plain.bias
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, layer)
            move_vectors(layer, _FIRST_ITERATIONS)


def sigma_layers(module: nn.Module) -> Iterator[SigmaLinear]:
    """The reparametrised layers inside of a module."""
    return (child for child in module.modules() if isinstance(child, SigmaLinear))


@torch.no_grad()
def move_vectors(layer: SigmaLinear, iterations: int = 1) -> None:
    """Power iterations with the layer's weight, which must be whole; u and v are changed."""
    u_O, v_I = iterate_power(layer.weight.detach(), layer.u, iterations)
    layer.u.copy_(u_O)
    layer.v.copy_(v_I)


def iterate_power(weight_OI: Tensor, u_O: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors after some power iterations, fp32 (fp64 of fp64).

    Args:
        weight_OI: matrix whose largest singular vectors are sought.
        u_O: left vector to begin with, of length 1.
        iterations: number of iterations, at least 1.
    """
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_OI, u_O = weight_OI.to(wide), u_O.to(wide)
    for _ in range(iterations):
        v_I = F.normalize(torch.mv(weight_OI.t(), u_O), dim=0)
        u_O = F.normalize(torch.mv(weight_OI, v_I), dim=0)
    return u_O, v_I


def move_all_vectors(module: nn.Module) -> None:
    """One power iteration of each reparametrised layer, once a step; all ranks must call."""
    for layer in sigma_layers(module):
        if not hasattr(layer.weight, "ds_id"):
            move_vectors(layer)
            continue
        from mocov3_ds.distributed.engine import gather_parameters

        with gather_parameters([layer.get_parameter("weight")]):
            move_vectors(layer)


def with_gains(tensors: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An ordinary network's tensors as those of a reparametrised one that computes the same.

    Each gain is sigma(W), with u and v from power iterations: the opposite of `bake_weights`.

    Args:
        tensors: tensors of an ordinary network by name.
        network: tensors of a reparametrised network, whose u the iterations begin with.
    """
    added = dict(tensors)
    for name, gain in network.items():
        layer = name.removesuffix(".gain")
        if layer != name and f"{layer}.weight" in tensors:
            weight_OI = tensors[f"{layer}.weight"].float()
            u_O, v_I = iterate_power(weight_OI, network[f"{layer}.u"], _FIRST_ITERATIONS)
            sigma = spectral_norm(weight_OI, u_O, v_I).to(gain.dtype)
            added |= {name: sigma.view(1), f"{layer}.u": u_O, f"{layer}.v": v_I}
    return added


def bake_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with their scale in them, without gains, u and v: those of an ordinary network.

    Args:
        tensors: tensors of a network by name; others than of reparametrised layers stay.
    """
    baked = dict(tensors)
    for name in tensors:
        layer = name.removesuffix(".weight")
        leaves = [f"{layer}.{leaf}" for leaf in _LEAVES]
        if layer != name and {*leaves} <= {*tensors}:
            gain, u_O, v_I = (baked.pop(leaf) for leaf in leaves)
            weight_OI = tensors[name].float()
            baked[name] = weight_OI * (gain.float() / spectral_norm(weight_OI, u_O, v_I))
    return baked
