"""Sigma-reparametrisation in the step: any ranks, ZeRO stage and chunks are one plain process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.chunking import Chunks
from tests import reference
from tests.ranks_pool import run_ranks
from tests.training import test_step as steps

SIGMA = replace(steps.SHAPE, sigma_reparam=True)


class Written(nn.Module):
    """A backbone of plain linear layers that is called with weights of gain / sigma(W) W."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        plain = BaseEncoder(steps.SHAPE).backbone.double()
        self.__dict__["plain"] = plain
        self.tensors = dict(encoder.backbone.named_parameters())
        self.vectors = {n: b.double() for n, b in encoder.backbone.named_buffers()}

    def iterate(self) -> None:
        """One power iteration of each layer, as the step begins."""
        for name, gain in self.tensors.items():
            if name.endswith(".gain"):
                layer = name.removesuffix(".gain")
                weight = self.tensors[f"{layer}.weight"].detach()
                assert gain.shape == (1,)
                v = F.normalize(weight.T @ self.vectors[f"{layer}.u"], dim=0)
                u = F.normalize(weight @ v, dim=0)
                self.vectors |= {f"{layer}.u": u.float().double(), f"{layer}.v": v.float().double()}

    def forward(self, x: Tensor) -> Tensor:
        weights = {}
        for name, tensor in self.tensors.items():
            layer = name.removesuffix(".weight")
            gain = self.tensors.get(f"{layer}.gain")
            if gain is not None and layer != name:
                u, v = self.vectors[f"{layer}.u"], self.vectors[f"{layer}.v"]
                tensor = gain / (u @ tensor @ v) * tensor
            if not name.endswith(".gain"):
                weights[name] = tensor
        features: Tensor = functional_call(self.__dict__["plain"], weights, (x,))
        return features


def written_run() -> dict[str, Any]:
    """fp64, one process, the layers' formula written out."""
    base, momentum = steps.start()
    momentum.start_from(base.state_dict())
    base, momentum = base.double(), momentum.double()
    first = {n: p.detach().clone() for n, p in base.named_parameters()}
    trained = [p for p in base.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=steps.LR, momentum=0.9)
    queries, keys = Written(base), Written(momentum)
    losses = []
    for step in range(steps.STEPS):
        x1, x2 = (x.double() for x in steps.views(step))
        queries.iterate()
        project = reference.as_plain_batch_norm(base.projector)
        predict = reference.as_plain_batch_norm(base.predictor)
        q1, q2 = (predict(project(queries(x))) for x in (x1, x2))
        with torch.no_grad():
            for name, k in momentum.named_parameters():
                q = base.get_parameter(name)
                if q.requires_grad:
                    k.copy_(steps.MOMENTUM * k + (1 - steps.MOMENTUM) * q)
            keys.iterate()
            project = reference.as_plain_batch_norm(momentum.projector)
            k1, k2 = (project(keys(x)) for x in (x1, x2))
        loss = reference.contrastive_loss(q1, k2, 0.2) + reference.contrastive_loss(q2, k1, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    vectors = {f"backbone.{n}": b for n, b in queries.vectors.items()}
    key_vectors = {f"backbone.{n}": b for n, b in keys.vectors.items()}
    return {
        "losses": losses,
        "first": first,
        "base": {n: p.detach() for n, p in base.named_parameters()} | vectors,
        "momentum": dict(momentum.named_parameters()) | key_vectors,
    }


def sigma_runs(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    steps.SHAPE, plain = SIGMA, steps.SHAPE
    try:
        return steps.engine_runs(cases)
    finally:
        steps.SHAPE = plain


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_stages_and_chunks_are_one_process(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_shape = steps.SHAPE
    cases = [(1, steps.WHOLE, 0, False), (3, Chunks(size=4), 0, False)]
    results = run_ranks(world_size, sigma_runs, cases)
    written = Written.__init__

    def with_plain_shape(self: Written, encoder: nn.Module) -> None:
        with monkeypatch.context() as inside:
            inside.setattr(steps, "SHAPE", plain_shape)
            written(self, encoder)

    monkeypatch.setattr(Written, "__init__", with_plain_shape)
    monkeypatch.setattr(steps, "SHAPE", SIGMA)
    want = written_run()
    gains = [n for n in want["base"] if n.endswith(".gain")]
    assert len(gains) == 8
    assert all(abs(float(want["base"][n]) - 1) > 1e-5 for n in gains)
    for case, *of_ranks in zip(cases, *results, strict=True):
        ours = of_ranks[0]
        assert ours["losses"] == pytest.approx(want["losses"], rel=1e-5), case
        for name, start in want["first"].items():
            moved = (want["base"][name] - start).norm()
            error = (ours["base"][name].double() - want["base"][name]).norm()
            assert error <= 2e-3 * moved + 1e-7, (case, name)  # fp32 steps of 1e-6 of a weight
        for kind in ("base", "momentum"):
            vectors = [n for n in want[kind] if n.endswith((".u", ".v"))]
            assert len(vectors) == 16
            for name in vectors:
                torch.testing.assert_close(
                    ours[kind][name].double(), want[kind][name], atol=2e-5, rtol=0
                )
        for other in of_ranks[1:]:
            for kind in ("base", "momentum"):
                assert all(torch.equal(other[kind][n], t) for n, t in ours[kind].items()), case
