"""The state of a run: saved, brought back, rewound; counts and seconds."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.checkpoints.checkpoint import Checkpoint, find_newest, list_checkpoints
from mocov3_ds.recipes import parse
from mocov3_ds.training.advance import advance_run
from mocov3_ds.training.build import build_run
from mocov3_ds.training.run import Run
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL


def state_of(run: Run) -> dict[str, Tensor]:
    """All tensors of a run, copied."""
    tensors = {f"model.{n}": t.clone() for n, t in run.model.state_dict().items()}
    tensors |= {f"momentum.{n}": t.clone() for n, t in run.momentum_encoder.full_state()}
    for name, state in run.optimizer.full_state():
        tensors |= {f"optimizer.{name}.{key}": t.clone() for key, t in state.items()}
    return tensors


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    assert {*one} == {*two}
    return [name for name in one if not torch.equal(one[name], two[name])]


def rewound_run(folder: Path) -> dict[str, Any]:
    """Three steps, a checkpoint, two more that are undone, and one with other batches."""
    make_set(str(folder / "train"), [20, 7, 23])
    flags = [*SMALL, "--data.shards", str(folder / "train"), "--knn.probes", "0"]
    flags += ["--runs", str(folder / "runs"), "--warmup_epochs", "0", "--save.no-background"]
    run = build_run(parse(flags), torch.device("cpu"))
    out: dict[str, Any] = {}
    batches = [sorted(advance_run(run).batch.sample_ids_B.tolist()) for _ in range(3)]
    run.save_checkpoint()
    out["seconds"] = (run.take_save_seconds(), run.take_save_seconds())
    saved_state = state_of(run)
    batches += [sorted(advance_run(run).batch.sample_ids_B.tolist()) for _ in range(2)]
    out["moved"] = len(differing(saved_state, state_of(run)))
    run.limits.note_bad_step(run.position, run.position)
    saved = find_newest(folder / "runs/tiny")
    assert saved is not None
    run.rewind_to(saved)
    out["after rewind"] = differing(saved_state, state_of(run))
    out["position"] = (run.step, run.position, run.limits.count)
    batches.append(sorted(advance_run(run).batch.sample_ids_B.tolist()))
    out["batches"], out["last"] = batches, (run.step, run.position)
    run.save_checkpoint(last=True)
    run.close()
    return out


def test_a_run_is_rewound_to_what_was_saved_and_goes_on_behind(tmp_path: Path) -> None:
    [out] = run_ranks(1, rewound_run, tmp_path)
    seconds, again = out["seconds"]
    assert seconds > 0 and again == 0
    assert out["moved"] > 20
    assert out["after rewind"] == []
    assert out["position"] == (3, 6, 1)  # the bad batch, the sixth, is left out
    assert out["last"] == (4, 7)
    # seven batches of three an epoch: the one after the rewind is the first of the third epoch
    assert out["batches"][5] not in out["batches"][:5]
    saved = Checkpoint(list_checkpoints(tmp_path / "runs/tiny")[-1])
    assert (saved.step, saved.position) == (4, 7)
    assert saved.state["trouble"]["count"] == 1
    assert {"size", "kept", "world_size", "given"} <= {*saved.state["chunks"]}


def abandoned_run(folder: Path) -> bool:
    make_set(str(folder / "train"), [20])
    flags = [*SMALL, "--data.shards", str(folder / "train"), "--knn.probes", "0"]
    settings = parse([*flags, "--runs", str(folder / "runs")])
    build_run(settings, torch.device("cpu")).abandon()
    build_run(settings, torch.device("cpu")).close()  # the folder is free again
    return True


def test_an_abandoned_run_leaves_its_folder(tmp_path: Path) -> None:
    assert run_ranks(1, abandoned_run, tmp_path) == [True]
