"""What a kind of input is, how one is damaged, and what an error must say."""

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from numpy.random import Generator

from tests.fuzz.mutate import mutated

Outcome = Literal["accepted", "skipped"]
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    name: str
    share: int
    """inputs of each round of all kinds"""
    sound: Callable[[], list[Files]]
    """undamaged inputs: path -> content"""
    feed: Callable[[Path], Outcome]
    seal: Callable[[dict[str, bytes]], None] | None = None
    """makes digests right again, so that the damage is met behind them"""
    names_files: bool = True
    """whether an error must say which file it is about"""

    def make(self, folder: Path, rng: Generator) -> None:
        """Write a damaged input."""
        choices = self.sound()
        files = dict(choices[int(rng.integers(len(choices)))])
        names = sorted(files)
        for _ in range(1 + int(rng.random() < 0.2)):
            name = names[int(rng.integers(len(names)))]
            files[name] = mutated(name, files[name], rng)
        if self.seal is not None and rng.random() < 0.6:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                self.seal(files)
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def files_of(folder: Path) -> Files:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def clear(error: BaseException, folder: Path | None) -> None:
    """One sentence for people that says which file of `folder` it is about.

    Raises:
        AssertionError: it is none.
    """
    words = re.sub(r"(.)\1{99,}", r"\1...", f"{error}".strip())  # what was given may be repeated
    if isinstance(error, SystemExit):  # a parser's own page, with a usage line
        assert words, "ended without a word"
        return
    assert len(words) > 10, f"says nothing: {error!r}"
    assert len(words) < 1500, f"{len(words)} characters: {words[:200]!r}"
    assert words.count("\n") < 2, f"more than a sentence: {words[:300]!r}"
    assert "Traceback" not in words
    assert folder is None or folder.name in words, f"does not say which file: {words[:300]!r}"
