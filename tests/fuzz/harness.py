"""Feed many inputs in child processes, so that a crash is seen, and count what became of them."""

import json
import os
import selectors
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.kinds import KINDS
from tests.fuzz.worker import PATIENCE_S

ROOT = Path(__file__).parents[2]
_START_S = 900.0  # imports on a busy machine
GROWTH_MIB = 64.0
"""Resident set that may be gained after the first look."""


@dataclass
class Outcomes:
    """What became of the inputs."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """kind -> outcome -> inputs"""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """kept input and what happened"""
    resources: list[dict[str, Any]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        return sum(sum(counts.values()) for counts in self.counts.values())

    def leaks(self) -> str:
        """What grew between the first look and the last; empty = nothing."""
        if len(self.resources) < 2:
            return ""
        first, last = self.resources[0], self.resources[-1]
        grown = [
            f"{what} from {first[what]:.0f} to {last[what]:.0f}"
            for what, room in (("files", 0), ("threads", 0), ("mib", GROWTH_MIB))
            if last[what] > first[what] + room
        ]
        return ", ".join(grown)

    def __str__(self) -> str:
        columns = ("accepted", "error", "skipped", "failed")
        lines = ["| kind | inputs | accepted | clear errors | counted skips | failures |",
                 "|---|---|---|---|---|---|"]  # fmt: skip
        for kind in KINDS:
            counts = self.counts.get(kind.name, Counter())
            cells = [sum(counts.values()), *(counts[c] for c in columns)]
            lines.append(f"| {kind.name} | " + " | ".join(map(str, cells)) + " |")
        whole = Counter[str]()
        for counts in self.counts.values():
            whole.update(counts)
        cells = [self.inputs, *(whole[c] for c in columns)]
        lines.append("| all | " + " | ".join(map(str, cells)) + " |")
        if self.resources:
            first, last = self.resources[0], self.resources[-1]
            lines.append(
                f"\nafter input {first['resources'] + 1} and {last['resources'] + 1}: "
                f"{first['files']} and {last['files']} open files, {first['threads']} and "
                f"{last['threads']} threads, {first['mib']:.0f} and {last['mib']:.0f} MiB"
            )
        lines += [f"FAILED {path}: {said.strip().splitlines()[-1]}" for path, said in self.failures]
        return "\n".join(lines)


def fuzz(
    folder: Path,
    seed: int,
    inputs: int,
    *,
    first: int = 0,
    shown: Callable[[int], None] | None = None,
) -> Outcomes:
    """Feed inputs `first` to `first + inputs` of a seed.

    Args:
        folder: for the inputs that fail.
        seed: of all damage.
        inputs: how many.
        first: number of the first one.
        shown: is told the number of each input that is done.
    """
    found = Outcomes()
    folder.mkdir(parents=True, exist_ok=True)
    last = first + inputs
    while first < last:
        first = _feed(folder, seed, first, last, found, shown or (lambda number: None))
    return found


def _feed(
    folder: Path, seed: int, first: int, last: int, found: Outcomes, shown: Callable[[int], None]
) -> int:
    """Run one child until it is done or dies; the number of the next input."""
    command = [sys.executable, "-m", "tests.fuzz.worker", *map(str, (folder, seed, first, last))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    begun: dict[str, Any] | None = None
    with child, selectors.DefaultSelector() as waiting:
        waiting.register(child.stdout, selectors.EVENT_READ)
        while True:
            # of the clock, where the child's own alarm counts CPU time and reaches Python code only
            if not waiting.select(_START_S if begun is None else 10 * PATIENCE_S):
                child.kill()
            text = child.stdout.readline()
            if not text:
                break
            line = json.loads(text)
            if "begin" in line:
                begun = line
            elif "resources" in line:
                found.resources.append(line)
            else:
                begun = None
                found.counts.setdefault(line["kind"], Counter())[line["outcome"]] += 1
                if line["outcome"] == "failed":
                    name = f"failed-{line['kind'].replace(' ', '-')}-{line['end']}"
                    found.failures.append((str(folder / name), line["said"]))
                shown(line["end"])
    if child.returncode == 0:
        return last
    if begun is None:  # not an input's fault, and trying again would not end
        said = (folder / "said.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the worker ended with status {child.returncode}:\n{said}")
    number, kind = begun["begin"], begun["kind"]
    name = folder / f"failed-{kind.replace(' ', '-')}-{number}"
    if not name.exists():
        shutil.copytree(folder / f"now-{number}", name)
    shutil.rmtree(folder / f"now-{number}", ignore_errors=True)
    found.counts.setdefault(kind, Counter())["failed"] += 1
    how = "hung in compiled code" if child.returncode == -9 else f"signal {-child.returncode}"
    found.failures.append((str(name), f"the process died: {how}"))
    return int(number) + 1
