"""The linear probe against torch's SGD, alone and as a whole; ranks; resume; bad input."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.views.photometric import normalise_crops
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.encoders.load import load_encoder
from mocov3_ds.evaluation import results
from mocov3_ds.evaluation.flags import LinearConfig
from mocov3_ds.evaluation.labelled_images import (
    CentreCrop,
    RandomCrop,
    draw_epoch_order,
    read_batches,
)
from mocov3_ds.evaluation.linear import annealed_step, cosine_share, train_probe
from mocov3_ds.evaluation.probe_banks import HeadBank
from tests.evaluation.runs import make_labelled_run

RATES = (0.1, 3.0, 40.0)


def settings(folder: Path, **changes: Any) -> LinearConfig:
    config = LinearConfig(
        run=folder / "run",
        epochs=3,
        batch=16,
        learning_rates=RATES,
        micro_batch=5,
        workers=0,
        crop_min=0.4,
    )
    return replace(config, **changes)


def plain_probe(folder: Path, rate: float) -> tuple[float, Tensor]:
    """The protocol once more, with torch's layer and SGD, one rate, whole batches."""
    config = settings(folder)
    encoder = load_encoder(config.run)
    train, val = (manifests.load(str(folder / name)) for name in ("train", "val"))

    @torch.no_grad()
    def features(crops: Tensor) -> Tensor:
        return encoder(normalise_crops(crops, ViewSpec.mean, ViewSpec.std, torch.float32))

    layer = torch.nn.Linear(32, 3)
    layer.weight.data = HeadBank.start(1, 3, 32, seed=0).weight_LCD[0].clone()
    layer.bias.data.zero_()
    sgd = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    step, per_epoch = 0, math.ceil(61 / 16)
    for epoch in range(3):
        order = draw_epoch_order(61, 0, epoch)
        for start in range(0, 61, 16):
            positions = range(start, min(start + 16, 61))
            crop = RandomCrop(16, ViewSpec(crop_min=0.4), 0)
            ((crops, labels, _),) = read_batches(train, crop, order, [positions], epoch=epoch)
            peak = rate * 16 / 256
            sgd.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * step / (3 * per_epoch))) / 2
            sgd.zero_grad()
            F.cross_entropy(layer(features(crops)), labels).backward()
            sgd.step()
            step += 1
    order = draw_epoch_order(37, 0, 0)
    ((crops, labels, _),) = read_batches(val, CentreCrop(16), order, [range(37)])
    right = (layer(features(crops)).argmax(1) == labels).sum()
    return 100 * float(right) / 37, layer.weight.detach()


def test_the_whole_probe_equals_a_plain_one(tmp_path: Path) -> None:
    run = make_labelled_run(tmp_path)
    entry = train_probe(settings(tmp_path))
    weight_LCD = load_file(run / "linear-base.safetensors")["weight_LCD"]
    plain = [plain_probe(tmp_path, rate) for rate in RATES]
    for head, (_, weight) in enumerate(plain):
        torch.testing.assert_close(weight_LCD[head], weight, atol=1e-4, rtol=1e-3)
    top1 = [accuracy for accuracy, _ in plain]
    assert list(entry["top1_by_learning_rate"].values()) == pytest.approx(top1)
    assert entry["top1"] == pytest.approx(max(top1))
    assert entry["best_learning_rate"] == RATES[top1.index(max(top1))]
    assert len({*top1}) > 1  # the rates can be told apart
    assert 34 < max(top1) < 100
    (found,) = results.read_results(run).values()
    assert found["top1"] == entry["top1"]
    assert found["encoder"] == "run (base encoder, step 7)"


def test_a_stopped_probe_goes_on_to_the_same_end(tmp_path: Path) -> None:
    run = make_labelled_run(tmp_path)
    whole = train_probe(settings(tmp_path, out=tmp_path / "whole"))
    stopped = train_probe(settings(tmp_path, stop_after_epochs=1))
    assert stopped["epochs_done"] == 1
    assert not (run / "results.json").exists()
    entry = train_probe(settings(tmp_path, micro_batch=16, workers=1))  # may change on the way
    assert entry["top1_by_learning_rate"] == whole["top1_by_learning_rate"]
    states = [load_file(f / "linear-base.safetensors") for f in (run, tmp_path / "whole")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=1e-5, rtol=1e-4)
    again = train_probe(settings(tmp_path))  # a finished one is judged again
    assert again["top1"] == entry["top1"]
    with pytest.raises(ValueError, match=r"batch is 16 there, 8 here\. Give --out"):
        train_probe(settings(tmp_path, batch=8))
    (run / "linear-base.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"is no linear probe of ours .* move it away"):
        train_probe(settings(tmp_path))


def test_resumed_bits_are_those_of_an_unbroken_probe(tmp_path: Path) -> None:
    make_labelled_run(tmp_path)
    train_probe(settings(tmp_path, out=tmp_path / "a"))
    for last in (1, 2, 0):
        train_probe(settings(tmp_path, out=tmp_path / "b", stop_after_epochs=last))
    a, b = (load_file(tmp_path / f / "linear-base.safetensors") for f in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_attentive_probe_learns_and_has_a_state_and_a_result_of_its_own(tmp_path: Path) -> None:
    run = make_labelled_run(tmp_path)
    attentive = {"probe": "attentive", "learning_rates": (1.0, 10.0), "epochs": 8}
    table = tmp_path / "classes.csv"
    train_probe(settings(tmp_path, **attentive, stop_after_epochs=3))
    entry = train_probe(settings(tmp_path, **attentive, per_class=table))
    whole = train_probe(settings(tmp_path, **attentive, out=tmp_path / "whole"))
    assert entry["top1_by_learning_rate"] == whole["top1_by_learning_rate"]
    a, b = (load_file(f / "attentive-base.safetensors") for f in (run, tmp_path / "whole"))
    assert a["query_LHD"].shape == (2, 1, 32)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert 40 < entry["top1"] <= 100  # chance is 33 %
    assert a["query_LHD"].abs().max() > 1e-3  # it has learned where to look
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    right = sum(int(row[1]) * float(row[2]) for row in rows) / 37
    assert right == pytest.approx(entry["top1"], abs=0.01)
    train_probe(settings(tmp_path, epochs=1))
    assert {*results.read_results(run)} == {"attentive base", "linear base"}


def test_a_rate_that_diverges_hurts_no_other(tmp_path: Path) -> None:
    make_labelled_run(tmp_path)
    alone = train_probe(settings(tmp_path, learning_rates=(3.0,), out=tmp_path / "a"))
    both = train_probe(settings(tmp_path, learning_rates=(3.0, 1e38), out=tmp_path / "b"))
    assert both["top1_by_learning_rate"]["3"] == alone["top1"]
    assert both["top1"] >= alone["top1"]


def test_the_rate_of_an_epoch_stays_where_it_is_asked_to() -> None:
    assert [annealed_step("step", 2, 5, index) for index in range(5)] == [10, 11, 12, 13, 14]
    assert {annealed_step("epoch", 2, 5, index) for index in range(5)} == {10}
    # what the published code has at the start of epoch 30 of 90
    assert cosine_share(annealed_step("epoch", 30, 5, 4), 90 * 5) == pytest.approx(0.75)


def test_cosine_ends() -> None:
    assert cosine_share(0, 10) == 1.0
    assert cosine_share(5, 10) == pytest.approx(0.5)
    assert cosine_share(10, 10) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch": 0}, "batch 0, micro_batch 5 and epochs 3 must be 1 at least"),
        ({"learning_rates": ()}, "must be positive, one at least"),
        ({"learning_rates": (1.0, -1.0)}, "must be positive"),
        ({"learning_rates": (float("nan"),)}, "--learning_rates nan cannot be"),
        ({"momentum": 1.5}, "--momentum 1.5 cannot be; it must be 0 to 1"),
        ({"weight_decay": float("inf")}, "--weight_decay inf cannot be"),
        ({"workers": -1}, "--workers -1 cannot be; it must be 0 or more"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"image_size": 15}, "image size 15 is not a multiple of the patch size 4"),
        ({"run": Path("nowhere")}, "there is no nowhere"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    run = make_labelled_run(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        train_probe(settings(tmp_path, **change))
    assert not list(run.glob("linear*"))
