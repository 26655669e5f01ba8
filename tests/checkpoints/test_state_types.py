"""Values of a foreign state.json: each of its kind, or one sentence with key and value."""

from typing import Any

import pytest

from mocov3_ds.checkpoints import checkpoint
from mocov3_ds.checkpoints.state_types import check_types
from tests.checkpoints.saved import save_step

SOUND: dict[str, Any] = {
    "step": 5,
    "position": 7,
    "optimizer_steps": 5,
    "version": "0.1.0",
    "loss": "ContrastiveLoss",
    "loss_scale": {"cur_scale": 65536.0, "cur_iter": 3},
    "chunks": {"size": 0, "kept": 0, "world_size": 2, "engine": {"bf16": None}},
    "watch": {
        "alarms": {"rms": [1.0, None], "grad": []},
        "answer_until": 0,
        "quiet_until": 12,
    },
    "trouble": {
        "count": 1,
        "left_out": [[3, 4]],
        "returned_to": None,
        "losses": [2.5],
        "norms": [],
    },
    "bad_samples": {"3": "damaged"},
}


def test_what_a_run_writes_is_sound() -> None:
    check_types(SOUND)
    check_types({"step": 0})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", True),
        ("step", -4),
        ("step", "5"),
        ("step", 5.0),
        ("position", 10**25),
        ("position", None),
        ("optimizer_steps", "x"),
        ("version", 3),
        ("loss", ["a"]),
        ("loss_scale", {"cur_scale": "big"}),
        ("loss_scale", 2.0),
        ("chunks", []),
        ("chunks", {"size": -3, "kept": 0}),
        ("chunks", {"size": 1}),
        ("watch", 5),
        ("watch", {"alarms": {"rms": "x", "grad": []}, "answer_until": 0, "quiet_until": 0}),
        ("watch", {}),
        ("trouble", {"left_out": [[1]]}),
        ("trouble", {"count": "many"}),
        ("trouble", {"losses": [None]}),
        ("bad_samples", [1]),
        ("bad_samples", {"x": "damaged"}),
        ("bad_samples", {"1": 2}),
    ],
)
def test_each_other_kind_is_a_sentence(key: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"state\.json has '{key}' = .*, which is not (a|the)"
    ) as told:
        check_types({**SOUND, key: value})
    assert len(str(told.value)) < 200


def test_a_checkpoint_of_another_kind_is_passed_over_with_its_name(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save_step(tmp_path, 5)
    save_step(tmp_path, 10, state={"position": 10**25})
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 5
    assert "step-00000010: state.json has 'position' = 1000000" in caplog.text
