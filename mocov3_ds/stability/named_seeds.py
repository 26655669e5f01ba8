"""Which seed does a run's name tell? `hot_seed-3` tells one; `hot_s3` may, `vit-s16` does not."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

PATCHES = frozenset({4, 7, 8, 12, 14, 16, 24, 28, 32, 50, 64})
"""numbers after an s that are sizes of patches and networks: `dino-s16`; all of a name's are"""
_WORD = re.compile(r"[-_. ]*seed[-_=. ]*(\d{1,9})(?!\d)", re.IGNORECASE)
_LETTER = re.compile(r"[-_]s(\d{1,9})\Z", re.IGNORECASE)
_NETWORK = re.compile(
    r"(.*[-_./ ])?(vit|deit\d?|swin\w*|cait|xcit|beit\w*|eva\d*|pvt\w*|convnext\w*|resnet\w*|mixer"
    r"|patch\w*)",
    re.IGNORECASE | re.DOTALL,
)
"""names of networks that come in sizes: an s and a number after these is a size"""
_NAMED = 5


@dataclass(frozen=True)
class NamedSeeds:
    """What the names of runs tell."""

    seeds: Mapping[str, int]
    """name of a run -> its seed, where the name tells one"""
    stems: Mapping[str, str]
    """name of a run -> the name without its seed"""
    refused: Sequence[str]
    """names that end in an s and a number which is not taken for a seed"""

    def describe_guesses(self, unknown: Iterable[str]) -> list[str]:
        """Sentences about what was guessed.

        Args:
            unknown: names of the runs whose settings tell no seed.
        """
        names = list(unknown)
        guessed = [name for name in names if name in self.seeds]
        refused = [name for name in names if name in self.refused]
        notes = []
        if guessed:
            first = guessed[0]
            of_what = f" of {self.stems[first]}" if self.stems[first] != first else ""
            notes.append(
                f"The seeds of {len(guessed)} runs are those in their names: {first} is seed "
                f"{self.seeds[first]}{of_what}. Where that is wrong, a config.json with a seed "
                "beside a log decides"
            )
        if refused:
            listed = ", ".join(refused[:_NAMED]) + " ..." * (len(refused) > _NAMED)
            notes.append(
                f"{listed}: the s and its number count as part of the name, not as a seed; a name "
                "such as run_seed16, or a config.json with a seed beside a log, tells one"
            )
        return notes


def read_named_seeds(names: Iterable[str]) -> NamedSeeds:
    """The seeds that the names of a page's runs tell.

    The word `seed` tells one. A lone s at the end does where the numbers of one name follow one
    another, or where another name has the same, and they are no sizes of networks.

    Args:
        names: names of all runs.
    """
    seeds: dict[str, int] = {}
    stems: dict[str, str] = {}
    numbers: dict[str, set[int]] = {}  # of each stem before an s
    with_letter: dict[str, re.Match[str]] = {}
    for name in names:
        stems[name] = name
        if word := _WORD.search(name):
            seeds[name] = int(word[1])
            stems[name] = _WORD.sub("", name) or name
        elif letter := _LETTER.search(name):
            with_letter[name] = letter
            numbers.setdefault(name[: letter.start()], set()).add(int(letter[1]))
    refused = []
    for name, letter in with_letter.items():
        stem = name[: letter.start()]
        if stem and _are_seeds(stem, numbers):
            seeds[name], stems[name] = int(letter[1]), stem
        else:
            refused.append(name)
    return NamedSeeds(seeds, stems, refused)


def _are_seeds(stem: str, numbers: Mapping[str, set[int]]) -> bool:
    """Whether the numbers after a name and an s are seeds."""
    of_stem = numbers[stem]
    if _NETWORK.fullmatch(stem) or of_stem <= PATCHES:
        return False
    follow = max(of_stem) - min(of_stem) + 1 == len(of_stem)
    return follow or any(
        of_another == of_stem for name, of_another in numbers.items() if name != stem
    )
