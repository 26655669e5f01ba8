"""What must a text of a table look like that a spreadsheet shall show, and not compute?"""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""what a cell begins with that a spreadsheet computes, or skips on the way to such a letter"""


def as_cell(text: str) -> str:
    """The text, behind an apostrophe where a spreadsheet would compute it as a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text
