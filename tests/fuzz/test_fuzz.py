"""The fuzzing harness on few inputs: nothing fails, what fails would be seen, seeds repeat."""

from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import harness
from tests.fuzz.harness import Outcomes, fuzz
from tests.fuzz.kind import Kind, files_of
from tests.fuzz.kinds import KINDS


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_sound_inputs_are_accepted(tmp_path: Path, kind: Kind) -> None:
    for number, files in enumerate(kind.sound()):
        folder = tmp_path / f"sound-{number}"
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        assert kind.feed(folder) == "accepted", kind.name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_same_seed_makes_the_same_input(tmp_path: Path, kind: Kind) -> None:
    trees = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        kind.make(folder, np.random.default_rng([5, 7]))
        trees.append(files_of(folder))
    assert trees[0] == trees[1]
    assert trees[0] not in kind.sound()


def test_a_few_hundred_inputs(tmp_path: Path) -> None:
    found = fuzz(tmp_path / "kept", seed=11, inputs=300)
    assert not found.failures, f"{found}"
    assert not found.leaks(), f"{found}"
    assert found.inputs == 300
    for kind in KINDS:
        assert sum(found.counts[kind.name].values()) == 15 * kind.share
    outcomes = {outcome for counts in found.counts.values() for outcome in counts}
    assert outcomes == {"accepted", "error", "skipped"}
    # nothing is left but what was said
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["said.log"]


@pytest.mark.slow
def test_thousands_of_inputs(tmp_path: Path) -> None:
    found = fuzz(tmp_path / "kept", seed=12, inputs=3000)
    assert not found.failures, f"{found}"
    assert not found.leaks(), f"{found}"
    assert found.inputs == 3000
    assert len(found.resources) == 6


DEADLY = """
import os, sys
from pathlib import Path
from tests.fuzz import kinds, worker
from tests.fuzz.data_kinds import jpegs
from tests.fuzz.kind import Kind

def feed(folder: Path) -> str:
    number = int(folder.name.removeprefix("now-"))
    if number == 1:
        os.kill(os.getpid(), 11)
    if number == 2:
        raise KeyError("step")
    if number == 3:
        raise ValueError("bad")
    if number == 4:
        while True:
            pass
    if number == 5:
        raise ValueError(f"{folder}: this file is cut short")
    return "accepted"

kinds.KINDS[:] = [Kind("JPEG", 1, jpegs, feed)]
worker.PATIENCE_S = 1
worker.main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
"""


def test_crashes_hangs_and_unclear_errors_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "deadly.py"
    program.write_text(DEADLY)
    python = harness.sys.executable
    started = harness.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        assert command[:3] == [python, "-m", "tests.fuzz.worker"]
        environment = {**options.pop("env"), "PYTHONPATH": str(harness.ROOT)}  # type: ignore[dict-item]
        return started([python, str(program), *command[3:]], env=environment, **options)

    monkeypatch.setattr(harness.subprocess, "Popen", popen)
    found = fuzz(tmp_path / "kept", seed=0, inputs=7)
    assert dict(found.counts["JPEG"]) == {"accepted": 2, "failed": 4, "error": 1}
    names = [Path(path).name for path, _ in found.failures]
    assert names == [f"failed-JPEG-{n}" for n in (1, 2, 3, 4)]
    said = [words for _, words in found.failures]
    for words, wanted in zip(
        said,
        ("signal 11", "KeyError: 'step'", "says nothing", "Hang: more than 1 s of CPU time"),
        strict=True,
    ):
        assert wanted in words
    for path, _ in found.failures:  # kept as it was fed
        assert (Path(path) / "image.jpg").stat().st_size
    assert "FAILED" in f"{found}"


def test_what_grows_is_seen() -> None:
    first = {"resources": 499, "files": 6, "threads": 2, "mib": 800.0}
    assert Outcomes(resources=[first, {**first, "mib": 850.0}]).leaks() == ""
    assert Outcomes(resources=[first, {**first, "files": 7}]).leaks() == "files from 6 to 7"
    assert "mib from 800 to 900" in Outcomes(resources=[first, {**first, "mib": 900.0}]).leaks()
