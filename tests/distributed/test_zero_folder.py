"""What DeepSpeed's own checkpoints hold, merged over its ranks, without running pickled code."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.zero_folder import merge_weights
from tests.optim import engines, plain
from tests.optim.engines import Case
from tests.ranks_pool import run_ranks

RAN: list[int] = []


def save_folders(folder: str) -> list[dict[str, Tensor]]:
    """Train a step at each stage and let DeepSpeed save it; the fp32 masters at the end."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    masters = []
    for stage in range(4):
        case = Case(stage)
        engine, optimizer = engines.start(case)
        engines.train(engine, engines.batches(case, 1))
        engine.save_checkpoint(f"{folder}/{stage}")
        masters.append(engines.weights(optimizer))
        engines.stop(engine)
    ranks.barrier()
    return masters


class Code:
    """Something whose unpickling runs code."""

    def __reduce__(self) -> Any:
        return RAN.append, (1,)


def test_folders_of_each_stage_give_the_masters(tmp_path: Path) -> None:
    (masters, _) = run_ranks(2, save_folders, str(tmp_path))
    model = plain.odd_model()
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for stage, expected in enumerate(masters):
        merged = merge_weights(tmp_path / f"{stage}")
        assert merged.keys() == {*expected, *frozen}, stage
        assert all(torch.equal(merged[name], w) for name, w in expected.items()), stage
        assert all(torch.equal(merged[name], w) for name, w in frozen.items()), stage
        step = merge_weights(tmp_path / f"{stage}" / "global_step1")
        assert all(torch.equal(step[name], w) for name, w in merged.items()), stage
    next((tmp_path / "2/global_step1").glob("*rank_1*optim_states.pt")).unlink()
    with pytest.raises(ValueError, match="DeepSpeed checkpoint that cannot be read: Expected 2"):
        merge_weights(tmp_path / "2")
    for file in (tmp_path / "0/global_step1").glob("*_model_states.pt"):
        torch.save({"module": {"w": torch.zeros(1)}, "x": Code()}, file)
    with pytest.raises(ValueError, match="DeepSpeed checkpoint that cannot be read"):
        merge_weights(tmp_path / "0")
    assert not RAN
