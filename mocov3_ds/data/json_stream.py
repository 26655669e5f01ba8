"""How is a JSON file of any size read in bounded memory? Entry after entry, never as a whole.

`json.load` holds the text and everything that it describes: a file of `{},{},...` takes 27 times
its size. Here the caller says how the top object is laid out and keeps what it needs of each entry;
what is held is a block of the file and one value, which may not be longer than `VALUE_LIMIT`.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

VALUE_LIMIT = 4 << 20
"""Characters of the longest value that is read at once."""

_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_VALUE = {*" \t\n\r,:]}"}
_DECODER = json.JSONDecoder()


class JsonStream:
    """A JSON text that arrives in blocks; values are taken from it in their order.

    Args:
        blocks: The file's bytes in UTF-8, none of the blocks empty.

    Raises:
        ValueError: From any method: the text is no JSON, not laid out as asked for, or a value is
            too long.
        RecursionError: From any method: a value is nested too deeply.
    """

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._place, self._has_ended = "", 0, False

    def entries(self) -> Iterator[str]:
        """Yield each key of an object; its value has to be taken before the next."""
        self._take("{")
        if self._next_sign() != "}":
            yield self._take_key()
            while self._next_sign() == ",":
                self._take(",")
                yield self._take_key()
        self._take("}")

    def elements(self) -> Iterator[Any]:
        """Yield each value of a list."""
        self._take("[")
        if self._next_sign() != "]":
            yield self.take_value()
            while self._next_sign() == ",":
                self._take(",")
                yield self.take_value()
        self._take("]")

    def take_value(self) -> Any:
        """Return the next value, whatever it is."""
        self._next_sign()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if self._has_ended:
                    raise ValueError(f"it is no JSON ({error.msg})") from None
            else:
                # a number may go on in the next block, as 1 does in 1.5e+2
                if self._text[end : end + 1] in _AFTER_VALUE or self._has_ended:
                    self._place = end
                    return value
            if len(self._text) - self._place > VALUE_LIMIT:
                raise ValueError(f"a value in it is longer than {VALUE_LIMIT} characters")
            self._read_block()

    def check_end(self) -> None:
        """Refuse anything that still follows."""
        if sign := self._next_sign():
            raise ValueError(f"it is no JSON ({sign!r} behind its end)")

    def _take_key(self) -> str:
        key = self.take_value()
        if not isinstance(key, str):
            raise ValueError(f"it is no JSON ({str(key)[:40]!r} where a key should be)")
        self._take(":")
        return key

    def _take(self, sign: str) -> None:
        if (next_sign := self._next_sign()) != sign:
            raise ValueError(f"{next_sign!r} is in it where {sign!r} should be")
        self._place += 1

    def _next_sign(self) -> str:
        """The next character that is no white space, still to be taken; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._place)
            assert space is not None
            self._place = space.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if self._has_ended:
                return ""
            self._read_block()

    def _read_block(self) -> None:
        block = next(self._blocks, b"")
        self._has_ended = not block
        self._text = self._text[self._place :] + self._decode(block, self._has_ended)
        self._place = 0
