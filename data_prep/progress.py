"""How far is long work? A bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts images and bytes; shows images/s, MB/s and the time left on standard error.

    Args:
        title: Name of the work, one word.
        total: Number of images that the work has in all.
        quiet: Show nothing on standard error.
        line_s: Seconds between two lines where there is no terminal.
    """

    def __init__(
        self, title: str, total: int, *, quiet: bool = False, line_s: float = 10.0
    ) -> None:
        self._title, self._total, self._quiet, self._line_s = title, total, quiet, line_s
        self._images = self._bytes = 0
        self._started_s = self._line_at_s = time.monotonic()
        self._bar: tqdm[None] | None = None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(desc=title, total=total, unit=" images", dynamic_ncols=True)

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
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    def update(self, images: int, size: int) -> None:
        """Count `images` more images, of `size` bytes together."""
        self._images += images
        self._bytes += size
        rate = self._bytes / 1e6 / max(self.seconds, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
            self._bar.update(images)
        elif not self._quiet and time.monotonic() - self._line_at_s >= self._line_s:
            self._line_at_s = time.monotonic()
            per_second = self._images / self.seconds
            remaining_s = (self._total - self._images) / max(per_second, 1e-9)
            print(
                f"{self._title}: {self._images} of {self._total} images, "
                f"{per_second:.0f} images/s, {rate:.1f} MB/s, {remaining_s:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
