"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS_PER_LINE = 10.0


class Progress:
    """Counts images and bytes; shows images/s, MB/s and the time left on standard error.

    Args:
        what: what is going on, one word.
        total: images in all.
        quiet: show nothing.
    """

    def __init__(self, what: str, total: int, *, quiet: bool = False) -> None:
        self._what, self._total, self._quiet = what, total, quiet
        self._images = self._bytes = 0
        self._started = self._spoke = time.monotonic()
        self._bar: tqdm[None] | None = None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(desc=what, total=total, unit=" images", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def update(self, images: int, size: int) -> None:
        """Some more images of so many bytes are done."""
        self._images += images
        self._bytes += size
        rate = self._bytes / 1e6 / max(self.seconds, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
            self._bar.update(images)
        elif not self._quiet and time.monotonic() - self._spoke >= _SECONDS_PER_LINE:
            self._spoke = time.monotonic()
            per_second = self._images / self.seconds
            left = (self._total - self._images) / max(per_second, 1e-9)
            print(
                f"{self._what}: {self._images} of {self._total} images, {per_second:.0f} images/s, "
                f"{rate:.1f} MB/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
