"""Signals of real runs: what a file holds, what an alarm leaves and does, and cures as options."""

import json
import os
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from mocov3_ds import train
from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.encoders.export import export_encoder
from mocov3_ds.encoders.load import load_encoder
from mocov3_ds.monitoring.signal_file import BLOCK_SIGNALS, read_signals
from mocov3_ds.monitoring.signal_recorder import SignalRecorder
from mocov3_ds.recipes import RECIPES, parse
from mocov3_ds.stability.series import read_series
from mocov3_ds.stability.verdict import judge
from mocov3_ds.training import build
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL, outcomes, rows_of

OFTEN = ["--signals.features_every", "4", "--signals.attention_every", "5"]
HALVE = ["--alarm.response", "halve_lr", "--alarm.steps", "3"]
CLIP = [
    "--alarm.response",
    "clip",
    "--alarm.steps",
    "3",
    "--ds",
    "optimizer.params.betas=[0.9,0.9]",
]
ABOVE_NOISE = [*HALVE, "--ds", "optimizer.params.eps=1e-6"]
"""A bias before a batch norm (the last norm's) and the keys' have no gradient but rounding, which
differs between numbers of ranks; at the usual eps of 1e-8 g / sqrt(v) makes it as large as a real
one."""
QK = ["--model.qk_norm", "--model.group_lr", "block_0=0", "--model.group_lr", "cls=3"]


def at_the_fourth_step(rms_T: np.ndarray, grad_T: np.ndarray) -> np.ndarray:
    """A rule that a run of a few steps breaks: its history has just four steps."""
    return np.full(len(rms_T), len(rms_T) == 4)


def train_each(folder: str, flags: list[str], attempts: dict[str, list[str]]) -> None:
    """Train each run by the command's own function, with an alarm at the fourth step."""
    os.chdir(folder)
    warnings.filterwarnings("ignore")
    rules = {"fourth": at_the_fourth_step}
    with mock.patch.object(build, "SignalRecorder", partial(SignalRecorder, rules=rules)):
        for name, further_flags in attempts.items():
            train.train(parse([*flags, *further_flags, "--name", name.rstrip("'")]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs that the tests look at."""
    folder = tmp_path_factory.mktemp("runs")
    make_set(str(folder / "train"), [20, 7, 23])
    make_set(str(folder / "probes"), [33])
    flags = [*SMALL, "--data.shards", str(folder / "train"), *OFTEN, "--save.keep", "9"]
    flags += ["--data.probe_shards", str(folder / "probes"), "--model.patch_lr", "1"]
    attempts = {
        "plain": [],
        "halved": HALVE,
        "broken": [*HALVE, "--stop_after_steps", "5"],  # in the middle of the response
        "broken'": HALVE,
        "clipped": CLIP,
        "sparse": ["--signals.every", "3"],
        "off": ["--signals.every", "0"],
        "qk": QK,
        "one": ABOVE_NOISE,
    }
    run_ranks(1, train_each, str(folder), flags, attempts, timeout=600)
    run_ranks(2, train_each, str(folder), flags, {"two": ABOVE_NOISE}, timeout=600)
    return folder / "runs"


def test_each_column_is_filled_when_it_is_due(runs: Path) -> None:
    table = read_signals(runs / "plain")
    assert table.groups == (
        "patch_embed",
        "cls",
        "block_0",
        "block_1",
        "norm",
        "projector",
        "predictor",
    )
    assert table.steps.tolist() == list(range(1, 13))
    for signal in ("grad_linf", "grad_l2", "weight_l2", "update_l2", "update_ratio", "rms"):
        assert np.isfinite(table.grid(signal)).all() and (table.grid(signal)[:, 1:] > 0).any()
    assert np.isnan(table.grid("rms_before")[:, 0]).all()
    assert np.isfinite(table.grid("rms_before")[:, 1:]).all()
    assert (np.abs(table.grid("cosine")[:, 2:]) <= 1).all()
    assert np.isnan(table.grid("trust")).all()  # AdamW without its clip has no such factor
    for name in ("features_std", "features_rank", "positive", "negative"):
        assert table.measured(name)[0].tolist() == [4, 8, 12]
    for name in ("knn", "knn_momentum"):
        assert table.measured(name)[0].tolist() == [3, 6, 9, 12]
    for group in ("block_0", "block_1"):
        for signal in BLOCK_SIGNALS:
            steps_K, values_K = table.measured(f"{group}/{signal}")
            assert steps_K.tolist() == [5, 10] and (values_K > 0).all()
        entropies = [table.measured(f"{group}/{name}")[1] for name in ("entropy_min", "entropy")]
        assert (entropies[0] < entropies[1]).all()
    rows = [row for row in rows_of(runs / "plain") if row["step"] > 0]
    np.testing.assert_allclose(table.scalar("loss"), [row["loss"] for row in rows], rtol=1e-6)
    np.testing.assert_allclose(table.scalar("lr"), [row["lr"] for row in rows], rtol=1e-6)


def test_fewer_rows_and_none(runs: Path) -> None:
    table = read_signals(runs / "sparse")
    assert table.steps.tolist() == [3, 4, 5, 6, 8, 9, 10, 12]
    assert table.measured("block_1/grad_l2")[0].tolist() == [3, 6, 9, 12]
    assert not (runs / "off/signals.json").exists()
    losses = [[row.get("loss") for row in rows_of(runs / name)] for name in ("plain", "off")]
    assert losses[0] == losses[1]  # measuring changes no bit


def test_an_alarm_leaves_the_rows_before_it_and_the_samples(runs: Path) -> None:
    (path,) = (runs / "plain/alarms").iterdir()
    content = json.loads(path.read_text())
    assert (path.name, content["step"], content["alarms"]) == ("step-00000004.json", 4, ["fourth"])
    assert content["group"] == "patch_embed"
    table = read_signals(runs / "plain")
    rows = np.array([[np.nan if v is None else v for v in row] for row in content["rows"]])
    np.testing.assert_array_equal(rows.astype(np.float32), table.values_TC[:4])
    assert tuple(content["columns"]) == table.columns
    assert len({sample["id"] for sample in content["samples"]}) == 16
    assert all(s["key"] and s["shard"].endswith(".tar") for s in content["samples"])
    (of_two,) = (runs / "two/alarms").iterdir()  # the same global batch
    samples = [json.loads(p.read_text())["samples"] for p in (path, of_two)]
    assert sorted(s["key"] for s in samples[0]) == sorted(s["key"] for s in samples[1])


@pytest.mark.parametrize("name", ["halved", "two"])
def test_halved_rate_lasts_as_long_as_asked(runs: Path, name: str) -> None:
    plain, halved = (
        {r["step"]: r for r in rows_of(runs / n) if r["step"]} for n in ("plain", name)
    )
    share = [halved[step]["lr"] / plain[step]["lr"] for step in range(2, 12)]
    assert share == [1, 1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 1]
    assert halved[4]["alarms"] == ["fourth"] and halved[4]["response"] == "halve_lr"
    assert "response" not in plain[4] and "alarms" not in halved[5]


def test_a_run_stopped_in_the_middle_of_a_response_goes_on_with_it(runs: Path) -> None:
    assert (runs / "broken/signals.f32").read_bytes() == (runs / "halved/signals.f32").read_bytes()
    rows = [
        [{k: v for k, v in row.items() if k != "knn_full"} for row in rows_of(runs / name)]
        for name in ("broken", "halved")
    ]
    assert rows[0] == rows[1]


def test_clipped_updates_last_as_long_as_asked(runs: Path) -> None:
    table = read_signals(runs / "clipped")
    steps, factors = table.measured("predictor/trust")
    assert steps.tolist() == [5, 6, 7]
    assert (factors > 0).all() and (factors <= 1).all()


def test_signals_do_not_depend_on_the_ranks(runs: Path) -> None:
    one, two = read_signals(runs / "one"), read_signals(runs / "two")
    for signal in ("grad_l2", "grad_linf", "weight_l2", "rms"):
        a, b = one.grid(signal), two.grid(signal)
        close = np.abs(a - b) <= 2e-2 * np.abs(a) + 1e-6
        assert close[:, :4].all(), signal
    for name in ("features_std", "features_rank", "positive", "negative", "loss"):
        a, b = one.measured(name)[1], two.measured(name)[1]
        np.testing.assert_allclose(a[:1], b[:1], rtol=1e-3, atol=1e-5)


def test_a_group_of_rate_zero_stays_and_is_not_measured(runs: Path) -> None:
    folders = checkpoint.list_checkpoints(runs / "qk")
    first, last = (checkpoint.Checkpoint(f).read_group("base") for f in (folders[0], folders[-1]))
    for name in first:
        still = ".blocks.0." in name or name.endswith("pos_embed")
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(first[name], last[name]) == still, name
    table = read_signals(runs / "qk")
    assert np.isnan(table.column("block_0", "grad_l2")).all()
    assert np.isfinite(table.column("block_0", "entropy")[[4, 9]]).all()  # measured all the same


def test_query_key_norm_is_trained_and_goes_to_timm_alone(runs: Path, tmp_path: Path) -> None:
    encoder = load_encoder(runs / "qk")
    weight = encoder.blocks[1].attn.q_norm.weight
    assert weight.shape == (12,) and not torch.equal(weight, torch.ones(12))
    assert export_encoder(runs / "qk", tmp_path / "timm", to="timm") < 1e-5
    again = load_encoder(tmp_path / "timm", heads=2)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(x), encoder(x))
    for to in ("hf", "deit", "moco-v3"):
        with pytest.raises(ValueError, match=f"for which --to {to} has no place; use --to timm"):
            export_encoder(runs / "qk", tmp_path / to, to=to)  # type: ignore[arg-type]
        assert not (tmp_path / to).exists()


def test_a_run_is_read_as_a_series(runs: Path) -> None:
    series = read_series(runs / "plain", twin_knn=50.0)
    assert series.steps_T.tolist() == list(range(1, 13)) and series.total_steps == 12
    assert (series.probes, series.knn_steps_K.tolist()) == (30, [3, 6, 9, 12])
    np.testing.assert_array_equal(series.rms_GT, read_signals(runs / "plain").grid("rms"))
    assert not series.stopped_non_finite and judge(series).lost_to_twin is not None
    bare = read_series(runs / "off")
    assert bare.groups == () and judge(bare).lead is None
    with pytest.raises(ValueError, match="is no run folder"):
        read_series(runs)


BAD: list[tuple[list[str], str]] = [
    (
        ["--model.group_lr", "block_7=1"],
        "names no layer group; groups are patch_embed, cls, block_0",
    ),
    (["--model.group_lr", "cls=x"], "gives no rate"),
    (["--model.group_lr", "cls=-1"], "gives no rate"),
    (["--model.group_lr", "cls=1", "--model.group_lr", "cls=2"], "is there twice"),
    (["--model.group_lr", "patch_embed=10"], "has no effect on a frozen patch projection"),
    ([*HALVE, "--signals.every", "2"], "needs the signals of each step"),
    (["--alarm.steps", "0"], "--alarm.steps 0 cannot be"),
    (["--signals.every", "-1"], "--signals.every -1 cannot be"),
    (
        ["--alarm.response", "clip", "--ds", "optimizer.type=Lamb"],
        "clip does not go with Lamb: the trust ratio sets the length of the step",
    ),
    (
        ["--alarm.response", "clip", "--ds", "optimizer.params.update_clip=true"],
        "update_clip is always on",
    ),
]


def test_bad_input_gets_a_sentence(tmp_path: Path) -> None:
    ((*found,),) = run_ranks(1, outcomes, str(tmp_path), [flags for flags, _ in BAD], timeout=300)
    for (flags, words), (status, said) in zip(BAD, found, strict=True):
        assert status == 2 and words in said, (flags, said)
        assert said.count("\n") == 1 or "error:" in said.splitlines()[-1]
    assert not (tmp_path / "runs/tiny").exists()
    assert RECIPES["tiny"].config.alarm.response == "none"
