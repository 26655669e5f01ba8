"""The environment variables that this program reads: each with its kind, in one list.

A command checks all of them before it begins (`check_environment`), whether it needs them or not: a
value that cannot be read would otherwise end a run at a random step, hours later.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mocov3_ds.settings.spelling import did_you_mean

DeviceChoice = Literal["auto", "cpu"]
"""what `--device` of a command may be"""


@dataclass(frozen=True)
class Number:
    """A variable that holds a number from `low` to `high`, both included."""

    default: float
    low: float = 0.0
    high: float = math.inf
    is_whole: bool = False
    """whether it counts something: 2.5 is refused"""

    def read(self, name: str, text: str) -> float:
        """Return the number that `text`, the value of variable `name`, stands for.

        Raises:
            ValueError: It stands for none, or for one that is out of bounds or not finite.
        """
        try:
            number: float = int(text) if self.is_whole else float(text)
        except ValueError:
            kind = "whole number" if self.is_whole else "number"
            raise ValueError(f"{name}={text!r} is no {kind}; {self._describe_remedy()}.") from None
        if not (math.isfinite(number) and self.low <= number <= self.high):
            raise ValueError(f"{name}={text!r} cannot be; {self._describe_remedy()}.")
        return number

    def _describe_remedy(self) -> str:
        span = f"{self.low:.15g} to {self.high:.15g}" if self.high < math.inf else "0 or more"
        example = f"{self.default:.15g}"
        return f"it must be {span}, e.g. {example}, or unset"


@dataclass(frozen=True)
class Choice:
    """A variable that holds one of a few words."""

    choices: tuple[str, ...]

    def read(self, name: str, text: str) -> str:
        """Return `text`, the value of variable `name`, if it is one of the words.

        Raises:
            ValueError: It is none of them.
        """
        if text not in self.choices:
            raise ValueError(
                f"{name}={text!r} is none of {', '.join(self.choices)}"
                f"{did_you_mean(text, self.choices)}; correct it or unset it."
            )
        return text


_MONTH_S = 30 * 86400.0
_MOST_RANKS = 10**6

NUMBERS: Mapping[str, Number] = {
    "MOCOV3_STORAGE_PATIENCE_S": Number(900, high=_MONTH_S),
    "MOCOV3_STORAGE_FIRST_CONTACT_S": Number(60, high=_MONTH_S),
    "MOCOV3_STORAGE_STALL_S": Number(20, high=_MONTH_S),
    "MOCOV3_STORAGE_LOW_BYTES_S": Number(16 << 10, high=2.0**40),
    "MOCOV3_STORAGE_CONNECT_S": Number(10, high=_MONTH_S),
    # of launchers: deepspeed, torchrun, accelerate, Slurm
    "RANK": Number(0, high=_MOST_RANKS, is_whole=True),
    "LOCAL_RANK": Number(0, high=_MOST_RANKS, is_whole=True),
    "WORLD_SIZE": Number(1, low=1, high=_MOST_RANKS, is_whole=True),
    "LOCAL_WORLD_SIZE": Number(1, low=1, high=_MOST_RANKS, is_whole=True),
    "MASTER_PORT": Number(29500, low=1, high=65535, is_whole=True),
    "TORCHELASTIC_RESTART_COUNT": Number(0, high=_MOST_RANKS, is_whole=True),
    "SLURM_PROCID": Number(0, high=_MOST_RANKS, is_whole=True),
    "SLURM_NTASKS": Number(1, low=1, high=_MOST_RANKS, is_whole=True),
    "SLURM_LOCALID": Number(0, high=_MOST_RANKS, is_whole=True),
    "SLURM_STEP_NUM_TASKS": Number(1, low=1, high=_MOST_RANKS, is_whole=True),
}
"""Variables that hold a number; one that is empty counts as unset."""

CHOICES: Mapping[str, Choice] = {
    "MOCOV3_DS_DECODER": Choice(("native", "simplejpeg", "pillow")),
    "MOCOV3_DS_CPU": Choice(("avx2", "plain")),
    "MOCOV3_STORAGE_ANONYMOUS": Choice(("1", "0")),
    "MOCOV3_STORAGE_REQUESTER_PAYS": Choice(("1", "0")),
    "DS_ACCELERATOR": Choice(
        ("cuda", "cpu", "xpu", "npu", "mps", "hpu", "mlu", "sdaa", "supa", "klxpu")
    ),
}
"""Variables that hold a word; one that is empty counts as unset."""

_STORAGE = "MOCOV3_STORAGE_"
"""prefix of variables that are all ours: one that nobody reads is misspelt"""


def read_number(name: str) -> float:
    """Return the number in a variable of the list, or its default where it is unset or empty.

    Args:
        name: A key of `NUMBERS`.

    Raises:
        ValueError: The variable holds something else.
    """
    text = os.environ.get(name, "").strip()
    return NUMBERS[name].read(name, text) if text else NUMBERS[name].default


def read_word(name: str) -> str:
    """Return the word in a variable of the list, or an empty text where it is unset or empty.

    Args:
        name: A key of `CHOICES`.

    Raises:
        ValueError: The variable holds another word.
    """
    text = os.environ.get(name, "").strip()
    return CHOICES[name].read(name, text) if text else ""


def check_environment() -> None:
    """Read every variable of the list once, and look for misspelt ones.

    Raises:
        ValueError: A variable holds what it cannot, or has a name of ours that nobody reads.
    """
    for name in NUMBERS:
        read_number(name)
    for name in CHOICES:
        read_word(name)
    for name in sorted(os.environ):
        if name.startswith(_STORAGE) and name not in {**NUMBERS, **CHOICES}:
            hint = did_you_mean(name, [*NUMBERS, *CHOICES])
            raise ValueError(f"nothing reads the environment variable {name}{hint}.")
