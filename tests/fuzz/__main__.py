"""Damaged inputs of all kinds through the public entry points; only clear answers are allowed.

    python -m tests.fuzz --inputs 10000 --seed 0

Images, tars, sharded sets, settings, run folders, metrics and weights are damaged, by bytes and by
structure, and given to what reads them. Allowed are: acceptance; one sentence that says which file
is wrong (ValueError, OSError, a parser's exit); samples that are counted as unreadable. Not
allowed: any other exception, a crash of the process, 30 s of CPU time, open files or memory that
grow. Inputs that fail are kept; the same seed makes the same inputs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from tests.fuzz.harness import fuzz


@dataclass(frozen=True, kw_only=True)
class Options:
    """Damaged inputs of all kinds."""

    inputs: int = 10_000
    """how many"""
    seed: int = 0
    """of all damage"""
    first: int = 0
    """number of the first one, to look at a failure again"""
    folder: Path = Path("fuzz")
    """where inputs that fail are kept"""


def main() -> int:
    """Status 1 if an input failed or something grew."""
    options = tyro.cli(Options, description=__doc__)
    with tqdm(total=options.inputs, unit=" inputs", dynamic_ncols=True) as bar:
        found = fuzz(
            options.folder,
            options.seed,
            options.inputs,
            first=options.first,
            shown=lambda number: bar.update(1) and None,
        )
    print(found)
    leaks = found.leaks()
    print(f"leaks: {leaks or 'none'}")
    return int(bool(found.failures or leaks))


if __name__ == "__main__":
    sys.exit(main())
