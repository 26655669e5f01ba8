"""What the linear probe and fine-tuning share: state files, resuming, results, exit status."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.evaluation.flags import SupervisedConfig
from mocov3_ds.evaluation.labelled_images import CentreCrop, UnreadableSample
from mocov3_ds.evaluation.supervised_run import (
    SupervisedRun,
    measure_top1,
    run_command,
    start_accelerator,
)
from tests.evaluation.runs import make_labelled_run


class Counter(SupervisedRun[SupervisedConfig]):
    """Counts the images of each epoch; calls every image class 1 and class 2."""

    name = "linear"
    title = "count"
    required = ("images",)
    images = torch.zeros(1)

    def resolve(self, config: SupervisedConfig) -> SupervisedConfig:
        return config

    def train_epoch(self, *, final: bool) -> str:
        passes_per_step, batches = self.open_epoch(
            CentreCrop(self.size), images_per_pass=self.config.micro_batch, drop_last=True
        )
        sizes = [len(labels) for _, labels, _ in batches]
        assert sum(passes_per_step) == len(sizes)
        self.images = self.images + sum(sizes)
        return f"{sum(sizes)} images{', the last' * final}"

    def judge(self) -> tuple[dict[str, Any], str]:
        classes_NM, labels_N = self.classify_held_out(
            CentreCrop(self.size),
            lambda images: torch.tensor([[1], [2]]).expand(2, len(images)),
            classifiers=2,
        )
        top1_M = measure_top1(classes_NM, labels_N)
        return {"top1": float(top1_M[0]), "top1_of_2": float(top1_M[1])}, "judged"

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"images": self.images}, {"note": "a"}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        assert values["note"] == "a"
        self.images = tensors["images"]


def settings(folder: Path, **changes: Any) -> SupervisedConfig:
    options: dict[str, Any] = {"epochs": 3, "batch": 16, "micro_batch": 5, "workers": 0}
    return SupervisedConfig(run=folder / "run", **options | changes)


def test_a_run_trains_saves_judges_and_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_labelled_run(tmp_path)
    stopped = Counter(settings(tmp_path, stop_after_epochs=1))
    assert stopped.run()["epochs_done"] == 1
    assert not (run / "results.json").exists()
    printed = capsys.readouterr().out
    assert "epoch 1/3: 48 images, the last" in printed
    assert printed.endswith("judged\nstopped after epoch 1 of 3\n")
    resumed = Counter(settings(tmp_path, micro_batch=16))
    entry = resumed.run()
    assert resumed.images.tolist() == [3 * 48]  # of 61, the last step is dropped
    assert entry["top1"] == pytest.approx(100 * 12 / 37)
    assert entry["top1_of_2"] == pytest.approx(100 * 12 / 37)
    assert (entry["encoder"], entry["step"]) == ("run (base encoder, step 7)", 7)
    assert json.loads((run / "results.json").read_text())["linear base"] == entry
    assert "| run (base encoder, step 7) | - | 32.43 % | - |" in capsys.readouterr().out


def test_the_state_file_holds_settings_that_must_not_change(tmp_path: Path) -> None:
    run = make_labelled_run(tmp_path)
    Counter(settings(tmp_path)).run()
    path = run / "linear-base.safetensors"
    assert [file.name for file in run.glob("linear*")] == [path.name]
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["epochs_done"], metadata["note"]) == ("3", '"a"')
    saved = json.loads(metadata["settings"])
    assert {*saved} == {
        *("which", "epochs", "batch", "image_size", "heads", "seed", "precision"),
        *("step", "train", "val"),
    }
    for change, sentence in [
        ({"batch": 8}, r"batch is 16 there, 8 here\. Give --out another folder, or remove it"),
        ({"seed": 1, "epochs": 4}, "epochs is 3 there, 4 here, seed is 0 there, 1 here"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            Counter(settings(tmp_path, **change)).run()
    changed = Counter(settings(tmp_path, out=run, micro_batch=2, workers=1))
    assert changed.run()["epochs_done"] == 3


def test_a_state_file_that_lacks_something_is_refused(tmp_path: Path) -> None:
    make_labelled_run(tmp_path)
    Counter(settings(tmp_path)).run()

    class Demanding(Counter):
        required = ("images", "other")

    with pytest.raises(ValueError, match=r"is no count of ours \('other'\); move it away"):
        Demanding(settings(tmp_path)).run()


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (None, 0, ""),
        (ValueError("bad."), 2, "name: error: bad.\n"),
        (FloatingPointError("nan."), 3, "name: error: nan.\n"),
    ],
)
def test_exit_status(
    error: Exception | None, status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate() -> None:
        ranks.start()
        if error is not None:
            raise error

    assert run_command("name", evaluate) == status
    assert capsys.readouterr().err == sentence
    assert not torch.distributed.is_initialized()


def test_an_unreadable_sample_is_told_by_the_rank_that_met_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "is_first", lambda: False)

    def fail(error: Exception) -> None:
        raise error

    assert run_command("name", lambda: fail(ValueError("on all ranks."))) == 2
    assert capsys.readouterr().err == ""
    assert run_command("name", lambda: fail(UnreadableSample("here."))) == 2
    assert capsys.readouterr().err == "name: error: here.\n"


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        start_accelerator("fp16")
