"""Who gives samples that lie in no shard, and what address does a set of them have?"""

from typing import Protocol

OWN_SET = "own://"
"""beginning of the address of a set in the memory of a process, see `own_images`"""


class SampleSource(Protocol):
    """Gives the image bytes of samples that lie in no shard."""

    def read(self, sample_id: int) -> bytes:
        """Return the bytes of an image file; any thread may call."""
        ...

    def name(self, sample_id: int) -> str:
        """Return what messages call the sample."""
        ...


def check_address(url: str) -> None:
    """Refuse the address of a set that was in the memory of a program.

    Args:
        url: Address of a set that this process does not hold.

    Raises:
        ValueError: It is such an address.
    """
    if url.startswith(OWN_SET):
        raise ValueError(
            f"{url} was a dataset in the memory of a program; only a program that gives it again "
            "(mocov3_ds.pretrain) can go on with it, or name shards in its place."
        )
