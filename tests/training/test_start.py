"""What a run that goes on says of its beginning, and when a new beginning is not looked for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mocov3_ds.config.run_config import Config
from mocov3_ds.recipes import parse
from mocov3_ds.training.start import Start, find_start, start_of

INIT = {"kind": "init", "path": "/weights.pth", "which": "base", "digest": "ab"}
EXTEND = {"kind": "extend", "path": "/runs/parent", "digest": "cd", "begins_at": 6}


def saved(*ancestry: dict[str, Any]) -> Any:
    return SimpleNamespace(state={"ancestry": [*ancestry]} if ancestry else {})


def test_what_a_checkpoint_tells_of_the_beginning() -> None:
    assert start_of(saved()) == Start()
    begun = start_of(saved(INIT))
    assert (begun.step, begun.ancestry) == (0, (INIT,))
    assert "once began with /weights.pth (init), which is not read again" in begun.line
    extended = start_of(saved(INIT, EXTEND))
    assert (extended.step, len(extended.ancestry)) == (6, 2)
    assert extended.schedule_begins(Config()) == 0
    assert extended.schedule_begins(Config(extend="x", extend_schedule="new")) == 6


def test_a_run_with_a_checkpoint_looks_for_no_other_beginning(tmp_path: Path) -> None:
    flags = ["--init", str(tmp_path / "gone.pth"), "--runs", str(tmp_path), "--name", "run"]
    unused: Any = SimpleNamespace(base=SimpleNamespace(state_dict=dict))
    with pytest.raises(ValueError, match=r"there is no .*gone\.pth"):
        find_start(parse(flags), unused, unused)
    (tmp_path / "run/checkpoints/step-00000002").mkdir(parents=True)
    assert find_start(parse(flags), unused, unused) == Start()
    assert find_start(parse([]), unused, unused) == Start()
