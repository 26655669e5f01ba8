"""What is trained is what is saved: a loss with parameters, old checkpoints, what is refused."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocov3_ds.checkpoints.checkpoint import Checkpoint, list_checkpoints
from mocov3_ds.encoders.export import export_encoder
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.loss import ContrastiveLoss, PairLoss
from mocov3_ds.model.vit import VitShape
from mocov3_ds.recipes import parse
from mocov3_ds.training.advance import advance_run
from mocov3_ds.training.build import build_run
from mocov3_ds.training.step import QueriesToLoss
from mocov3_ds.training.trained_state import (
    check_loss,
    check_restorable,
    load_weights,
    split_name,
)
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL


class SigmoidLoss(PairLoss):
    """Each pair of query and key judged alone (arXiv 2303.15343), with two learnable numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.bias = nn.Parameter(torch.full((1,), -3.0))
        self.register_buffer("calls", torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, q_BP: Tensor, k_GP: Tensor, first_key: int) -> Tensor:
        self.calls += 1
        similarity_BG = F.normalize(q_BP, dim=1) @ F.normalize(k_GP, dim=1).T
        logits_BG = similarity_BG * self.log_scale.exp() * self.frozen[0] + self.bias
        sign_BG = -torch.ones_like(logits_BG)
        rows = torch.arange(len(q_BP))
        sign_BG[rows, first_key + rows] = 1.0
        return -F.logsigmoid(sign_BG * logits_BG).sum(1).mean()

    def chance_level(self, global_batch: int) -> float:
        return 2 * global_batch * math.log(2.0)


LEARNED = ("log_scale", "bias")
OF_THE_LOSS = {"bias", "calls", "frozen", "log_scale"}


def train_attempt(flags: list[str], until: int, loss: Callable[[], PairLoss]) -> dict[str, Any]:
    """Start or continue a run, advance it, save it; what it was and what it is."""
    run = build_run(parse(flags), torch.device("cpu"), loss())
    out: dict[str, Any] = {"begin": run.step, "chance": run.chance_loss}
    out["losses"] = [advance_run(run).result.loss for _ in range(run.step, until)]
    run.save_checkpoint(last=True)
    run.close()
    return out


def train_attempts(flags: list[str], attempts: list[tuple[str, int]]) -> list[dict[str, Any]]:
    return [train_attempt([*flags, "--name", name], n, SigmoidLoss) for name, n in attempts]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small run on a training set of 50 samples: 3 steps an epoch."""
    folder = tmp_path_factory.mktemp("siglip")
    make_set(str(folder / "train"), [20, 7, 23])
    data = ["--data.shards", str(folder / "train"), "--knn.probes", "0"]
    return [*SMALL, *data, "--runs", str(folder / "runs"), "--warmup_epochs", "0"]


def newest(flags: list[str], name: str) -> Checkpoint:
    run = Path(flags[flags.index("--runs") + 1]) / name
    return Checkpoint(list_checkpoints(run)[-1])


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (2, 3)])
def test_a_loss_with_parameters_trains_saves_and_resumes(
    flags: list[str], tmp_path: Path, world_size: int, stage: int
) -> None:
    of_stage = [*flags, "--ds", f"zero_optimization.stage={stage}"]
    whole, broken = f"whole-{stage}", f"broken-{stage}"
    attempts = [(whole, 5), (broken, 3), (broken, 5)]
    unbroken, first, second = run_ranks(world_size, train_attempts, of_stage, attempts)[0]
    assert (first["begin"], second["begin"]) == (0, 3)
    assert [*first["losses"], *second["losses"]] == unbroken["losses"]
    assert unbroken["chance"] == pytest.approx(2 * 16 * math.log(2))
    one, two = newest(flags, whole), newest(flags, broken)
    assert one.state["files"] == two.state["files"]  # sha256 of each: bit for bit
    assert {*one.tensor_names("loss")} == OF_THE_LOSS
    before = SigmoidLoss()
    for name in LEARNED:
        assert not torch.equal(one.read_tensor("loss", name), before.state_dict()[name]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert one.read_tensor("optimizer", f"{moment}/loss.{name}").shape == (1,)
    assert float(one.read_tensor("loss", "calls")) == 2 * 5
    assert torch.equal(one.read_tensor("loss", "frozen"), before.frozen)
    # the encoder alone is taken away
    assert export_encoder(one.folder.parents[1], tmp_path / "timm") < 1e-5


def test_the_names_of_the_encoder_are_those_of_before(flags: list[str]) -> None:
    [out] = run_ranks(1, plain_attempt, flags)
    saved = newest(flags, "plain")
    assert out["begin"] == 0
    assert not saved.tensor_names("loss")
    assert {*saved.tensor_names("base")} == {*small_model().base.state_dict()}
    assert saved.state["loss"] == "ContrastiveLoss"
    files = {name.rpartition("-")[0] for name in saved.state["files"]}
    assert files == {"base", "optimizer", "momentum"}
    assert saved.tensor_names("optimizer")[0].startswith("exp_avg/base.backbone.")


def plain_attempt(flags: list[str]) -> dict[str, Any]:
    return train_attempt([*flags, "--name", "plain"], 1, partial(ContrastiveLoss, 0.2))


def refused_resume(flags: list[str]) -> str:
    """A run with another loss than the one that the checkpoint was trained with."""
    train_attempts(flags, [("learned", 1)])
    with pytest.raises(ValueError, match="is of another model") as error:
        train_attempt([*flags, "--name", "learned"], 2, partial(ContrastiveLoss, 0.2))
    return str(error.value)


def test_another_loss_than_before_is_refused(flags: list[str]) -> None:
    [sentence] = run_ranks(1, refused_resume, flags)
    assert "4 tensors differ, e.g. loss.bias, loss.calls, loss.frozen." in sentence


class SquaredLoss(ContrastiveLoss):
    """Another loss without a tensor of its own."""


def test_another_loss_without_tensors_is_refused_by_its_name() -> None:
    saved = SimpleNamespace(folder="step-00000001", state={"loss": "SquaredLoss"})
    check_loss(SquaredLoss(0.2), saved)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"trained with the loss SquaredLoss, and .* ContrastiveLoss"
    ):
        check_loss(ContrastiveLoss(0.2), saved)  # type: ignore[arg-type]
    saved.state = {}  # of a version that knew one loss alone
    check_loss(ContrastiveLoss(0.2), saved)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trained with the loss ContrastiveLoss"):
        check_loss(SquaredLoss(0.2), saved)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------- a single module


def small_model(loss: PairLoss | None = None) -> QueriesToLoss:
    vit = VitShape(image_size=16, patch_size=8, dim=24, depth=2, heads=2)
    base = BaseEncoder(EncoderShape(backbone=vit, hidden=32, out=16))
    return QueriesToLoss(base, loss or ContrastiveLoss(0.2))


def test_names_and_groups() -> None:
    assert split_name("base.backbone.cls_token") == ("base", "backbone.cls_token")
    assert split_name("loss.bias") == ("loss", "bias")
    for name in ("scale", "other.scale", "base"):
        with pytest.raises(ValueError, match=f"the tensor '{name}' .* belongs to none"):
            split_name(name)


def test_what_could_not_be_brought_back_is_refused() -> None:
    check_restorable(small_model())
    check_restorable(small_model(SigmoidLoss()))

    flat = SigmoidLoss()
    flat.bias = nn.Parameter(torch.tensor(-3.0))
    with pytest.raises(ValueError, match=r"'loss\.bias' has no dimension.*the shape \(1,\)"):
        check_restorable(small_model(flat))

    lost = SigmoidLoss()
    lost.register_buffer("mean", torch.zeros(1), persistent=False)
    with pytest.raises(ValueError, match=r"1 tensors .*'loss\.mean'.*buffers as persistent"):
        check_restorable(small_model(lost))

    twice = SigmoidLoss()
    twice.shift = twice.bias
    with pytest.raises(ValueError, match=r"'loss\.shift'.*share no parameter"):
        check_restorable(small_model(twice))

    aside = small_model()
    aside.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"the tensor .scale. .* belongs to none of its parts"):
        check_restorable(aside)


class OneGroup:
    """A checkpoint of the version before there was a group for the loss."""

    folder = Path("step-00000001")

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def tensor_names(self, group: str) -> list[str]:
        return sorted(self.tensors) if group == "base" else []

    def read_tensor(self, group: str, name: str) -> Tensor:
        assert group == "base"
        return self.tensors[name]


def test_a_checkpoint_of_before_fills_the_module() -> None:
    source, model = small_model(), small_model()
    load_weights(model, OneGroup(source.base.state_dict()))  # type: ignore[arg-type]
    for name, tensor in model.base.state_dict().items():
        assert torch.equal(tensor, source.base.state_dict()[name]), name
    missing = dict(source.base.state_dict())
    del missing["backbone.cls_token"]
    with pytest.raises(ValueError, match=r"1 tensors differ, e\.g\. base\.backbone\.cls_token\."):
        load_weights(model, OneGroup(missing))  # type: ignore[arg-type]
