"""How is a number of things said in a message?"""


def count_noun(count: int, noun: str) -> str:
    """Return the count and the noun in its number: `1 rank`, `2 ranks`, `0 ranks`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
