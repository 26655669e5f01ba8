"""Do names belong to different splits? Training and validation images are never joined unasked.

`imagenet1k-train-0000.tar` and `imagenet1k-validation-00.tar` are siblings: they differ by a word
that names a split and by numbers. `bullet_train` and `test_tube` are not.
"""

import re
from collections.abc import Iterable

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout"), "test"),
}
"""Split that a word names."""
_FILLING = {"image", "images", "img", "imgs", "set", "data", "split", "of", "jpeg", "jpg"}
_WORD = re.compile(r"[a-z]+")


def find_split(name: str) -> tuple[str, str]:
    """Split that a name speaks of, and the rest of the name, by which siblings are known.

    Args:
        name: Name of a folder, or of a file without its endings.

    Returns:
        The split (`train`, `val` or `test`; empty = none), and the other words of the name.
    """
    name_words = _WORD.findall(name.lower())
    split = next((SPLIT_WORDS[word] for word in name_words if word in SPLIT_WORDS), "")
    other_words = (word for word in name_words if word not in SPLIT_WORDS and word not in _FILLING)
    return split, " ".join(other_words)


def sibling_splits(names: Iterable[str]) -> list[str]:
    """Return the names that are siblings of another split, in order; [] = there are none.

    Args:
        names: Names of folders, or of files without their endings.
    """
    by_rest: dict[str, dict[str, list[str]]] = {}
    for name in sorted({*names}):
        split, skeleton = find_split(name)
        if split:
            by_rest.setdefault(skeleton, {}).setdefault(split, []).append(name)
    return sorted(
        name
        for splits in by_rest.values()
        if len(splits) > 1
        for siblings in splits.values()
        for name in siblings
    )
