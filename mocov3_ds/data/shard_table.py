"""Which shards does a set have? Columns, as a set may have millions: 70 bytes a shard, not 700.

Shape suffix: S = shards.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Shard:
    """One tar of a set; the fields are the keys of `manifest.json`."""

    name: str
    """file name beside the manifest"""
    bytes: int
    samples: int
    sha256: str
    """hexadecimal"""


class ShardTable(Sequence[Shard]):
    """The shards of a set, each made into a `Shard` when it is asked for.

    Args:
        shards: The shards in the order of their samples.

    Raises:
        ValueError: A SHA-256 is not one.
        OverflowError: A count is beyond 64 bits.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        names, digests = bytearray(), bytearray()
        ends, sizes, counts = array("q"), array("q"), array("q")
        for shard in shards:
            # a name of JSON may hold half a surrogate pair, which no file can have and no text say
            names += shard.name.encode("utf-8", "surrogatepass")
            ends.append(len(names))
            sizes.append(shard.bytes)
            counts.append(shard.samples)
            digest = bytes.fromhex(shard.sha256)
            if len(digest) != _DIGEST_BYTES:
                raise ValueError(f"shard {shard.name!r} has no sha256 but {shard.sha256!r}")
            digests += digest
        self._names, self._digests = bytes(names), bytes(digests)
        self._end_S: NDArray[np.int64] = np.frombuffer(ends, dtype=np.int64)
        self.bytes_S: NDArray[np.int64] = np.frombuffer(sizes, dtype=np.int64)
        """bytes of each shard"""
        self.samples_S: NDArray[np.int64] = np.frombuffer(counts, dtype=np.int64)
        """samples of each shard"""

    @cached_property
    def first_S(self) -> NDArray[np.int64]:  # noqa: N802 - a shape suffix
        """Id of the first sample of each shard, and N behind the last, (shards + 1,)."""
        return np.concatenate([[0], np.cumsum(self.samples_S)])

    def __len__(self) -> int:
        return len(self._end_S)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, number: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(number, slice):
            return tuple(self[index] for index in range(*number.indices(len(self))))
        index = range(len(self))[number]
        return Shard(
            self._name_bytes(index).decode("utf-8", "surrogatepass"),
            int(self.bytes_S[index]),
            int(self.samples_S[index]),
            self._digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES].hex(),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def _name_bytes(self, index: int) -> bytes:
        begin = int(self._end_S[index - 1]) if index else 0
        return self._names[begin : int(self._end_S[index])]

    def repeated_name(self) -> str | None:
        """Return a name that two shards have, or None."""
        hashes = (hash(self._name_bytes(index)) for index in range(len(self)))
        hash_S = np.fromiter(hashes, dtype=np.int64, count=len(self))
        kinds, counts = np.unique(hash_S, return_counts=True)
        names = set[bytes]()
        for index in np.flatnonzero(np.isin(hash_S, kinds[counts > 1])).tolist():
            name = self._name_bytes(index)
            if name in names:
                return name.decode("utf-8", "replace")
            names.add(name)
        return None
