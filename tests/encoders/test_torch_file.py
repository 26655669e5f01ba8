"""Plain data beside weights is read as stand-ins; nothing of a stranger's runs."""

import argparse
import collections
import datetime
import os
import pathlib
import pickle
import shlex
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mocov3_ds.encoders.torch_file import StandIn, read_torch_file

RAN: list[int] = []
WEIGHTS = {"norm.weight": torch.arange(3.0)}


class Code:
    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def history() -> object:
    """A log of mmengine, which keeps methods of its class."""
    buffer = type("HistoryBuffer", (), {"mean": lambda self: 0})
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = buffer  # type: ignore[attr-defined]
    buffer.__module__, buffer.__qualname__ = module.__name__, "HistoryBuffer"
    sys.modules |= {"mmengine": types.ModuleType("mmengine"),
                    "mmengine.logging": types.ModuleType("mmengine.logging"),
                    module.__name__: module}  # fmt: skip
    log: Any = buffer()
    log.values, log.methods = np.arange(4.0), {"mean": Code(getattr, buffer, "mean")}
    return log


HARMLESS: dict[str, object] = {
    "scalar": np.float64(71.3),
    "array": np.array([0.4, 0.5], dtype=np.float32),
    "objects": np.array(["a", None], dtype=object),
    "path": pathlib.Path("out"),
    "args": argparse.Namespace(arch="vit_small", out=pathlib.Path("x"), nested={"a": 1}),
    "namespace": types.SimpleNamespace(a=1),
    "log": collections.defaultdict(list, {"loss": [1.0, 2.0]}),
    "last": collections.deque([1, 2], maxlen=2),
    "date": datetime.datetime(2024, 1, 2, 3, 4),
    "took": datetime.timedelta(1),
    "set": {1, 2},
    "version": torch.__version__,
    "rng": np.random.RandomState(0).get_state(),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_classes_are_no_reason_to_refuse(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    try:
        torch.save({"state_dict": WEIGHTS, **HARMLESS, "hub": history()}, path,
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
    finally:
        for name in [name for name in sys.modules if name.startswith("mmengine")]:
            del sys.modules[name]
    tree = read_torch_file(path)
    assert torch.equal(tree["state_dict"]["norm.weight"], torch.arange(3.0))
    assert {*tree} == {"state_dict", "hub", *HARMLESS}
    assert tree["args"].fields["arch"] == "vit_small"
    assert tree["args"].fields["nested"] == {"a": 1}
    assert tree["log"] == {"loss": [1.0, 2.0]}
    for name in ("scalar", "array", "path", "date", "hub"):
        assert isinstance(tree[name], StandIn), name
    assert "mmengine" not in sys.modules


ATTACKS = {
    "os": Code(os.system, "true"),
    "eval": Code(eval, "1"),
    "append": Code(RAN.append, 1),
    "getattr": Code(getattr, 1, "x"),
    "getattr of a class": Code(getattr, argparse.Namespace, "__init__"),
    "builder": Code(pathlib.Path.read_text, pathlib.Path("x")),
    "import": Code(__import__, "os"),
    "load": Code(torch.load, "x"),
    "module": torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("layout", ["zip", "old", "raw", "raw 0"])
def test_everything_else_is_refused_with_a_line_that_runs(
    tmp_path: Path, name: str, layout: str
) -> None:
    path, content = tmp_path / "it's.pth", {"state_dict": WEIGHTS, "x": ATTACKS[name]}
    if layout.startswith("raw"):
        path.write_bytes(pickle.dumps({"x": ATTACKS[name]}, protocol=0 if "0" in layout else 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(ValueError, match="pickled objects besides tensors") as caught:
        read_torch_file(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    python, flag, code = shlex.split(sentence.partition("can be read: ")[2])
    assert (python, flag) == ("python", "-c")
    assert not RAN
    if name == "module" and layout == "zip":
        exec(code, {})
        kept = read_torch_file(tmp_path / "it's-weights.pth")
        assert torch.equal(kept["state_dict"]["norm.weight"], torch.arange(3.0))
        assert {*kept["x"]} == {"weight", "bias"}


def test_another_protocol_and_no_pickle_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"x": np.float64(1)}, path, pickle_protocol=4)
    with pytest.raises(ValueError, match="of another pickle protocol than 2"):
        read_torch_file(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="it is no torch file"):
        read_torch_file(path)
    script: Any = torch.jit.script  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, its files are still about
        script(torch.nn.ReLU()).save(str(path))
    with pytest.raises(ValueError, match=r"a TorchScript archive, which is code.*torch.jit.load"):
        read_torch_file(path)
