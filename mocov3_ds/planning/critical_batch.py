"""How large a batch still pays, from the gradient's noise scale (arXiv 1812.06162, Sec. 2.3).

    steps(B)  = fewest steps  * (1 + N / B)
    images(B) = fewest images * (1 + B / N)        with fewest images = N * fewest steps

N is the noise scale in images: the variance of one image's gradient over the squared length of the
true one. A batch of N needs twice the fewest steps and twice the fewest images, which is why it is
called critical. Both laws are exact for a quadratic loss at the best rate of each batch; a
contrastive loss has a batch in its negatives as well, of which they know nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TRACE, _SQUARE = "noise_trace", "gradient_square"
_AROUND = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class NoiseScale:
    """A noise scale and where it is from."""

    images: float
    source: str
    batch: int = 0
    """global batch of the run that it was measured in; 0 = not of a run"""


def relative_steps(batch: float, noise: float) -> float:
    """Steps to a target as a multiple of the fewest, which an endless batch needs.

    Args:
        batch: images of a step.
        noise: noise scale in images, of the same run.
    """
    return 1 + noise / batch


def relative_images(batch: float, noise: float) -> float:
    """Images to a target as a multiple of the fewest, which a batch near 0 needs.

    Args:
        batch: images of a step.
        noise: noise scale in images, of the same run.
    """
    return 1 + batch / noise


def find_noise_scale(given: str) -> NoiseScale:
    """The noise scale that a number or a run folder means.

    Of a run, numerator and denominator are averaged apart over the second half of the steps at
    which they were measured: the ratio of one step is noise itself.

    Args:
        given: images, or a folder with metrics.jsonl.

    Raises:
        ValueError: It is neither, or the run did not measure it.
    """
    try:
        images = float(given)
    except ValueError:
        return _read_noise_scale(Path(given))
    if not 0 < images < 1e12:
        raise ValueError(f"--critical_batch {given} cannot be; give a number of images above 0.")
    return NoiseScale(images, "as given")


def _read_noise_scale(run: Path) -> NoiseScale:
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(
            f"--critical_batch {run} is neither a number of images nor a run folder: there is no "
            f"{file}."
        )
    rows = {row["step"]: row for row in _measured_rows(file)}  # a resumed run repeats steps
    if not rows:
        raise ValueError(
            f"{file} has no {_TRACE} and {_SQUARE}, of which the noise scale is made; switch its "
            "measurement on in the run (--signals.noise_every 50, say), or give a "
            "number of images."
        )
    late = [rows[step] for step in sorted(rows)][len(rows) // 2 :]
    trace, square = (sum(row[key] for row in late) for key in (_TRACE, _SQUARE))
    if not (trace > 0 and square > 0):
        raise ValueError(
            f"the mean {_TRACE} {trace / len(late):.3g} and {_SQUARE} {square / len(late):.3g} of "
            f"{file} give no noise scale: too few steps were measured for a gradient so weak."
        )
    source = f"of {run}, {len(late)} measurements from step {late[0]['step']} on"
    try:
        batch = int(json.loads((run / "config.json").read_text())["config"]["batch"])
    except (OSError, ValueError, KeyError, TypeError):  # a log without its run
        batch = 0
    return NoiseScale(trace / square, source, batch)


def _measured_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of the log in which the noise was measured; lines that a kill cut short have none."""
    for line in file.read_text(errors="replace").splitlines():
        if _TRACE in line and line.endswith("}"):
            row = json.loads(line)
            if {"step", _TRACE, _SQUARE} <= row.keys():
                yield row


def describe_critical_batch(noise: NoiseScale, batch: int) -> str:
    """Table of steps and images to a target by batch, against one batch.

    Args:
        noise: the noise scale that the law is given.
        batch: images of a step of the run that the others are compared with.
    """
    steps, images = relative_steps(batch, noise.images), relative_images(batch, noise.images)
    lines = [
        f"noise scale {noise.images:,.0f} images ({noise.source}): a batch of so many needs twice "
        "the fewest steps and twice the fewest images",
        "",
        f"{'batch':>9}  {'steps':>7}  {'images':>7}   to the same target, batch {batch} = 1",
    ]
    for factor in _AROUND:
        another_batch = round(batch * factor)
        if another_batch >= 2:
            steps_here = relative_steps(another_batch, noise.images) / steps
            images_here = relative_images(another_batch, noise.images) / images
            lines.append(f"{another_batch:>9}  {steps_here:>7.2f}  {images_here:>7.2f}")
    saved = 1 - relative_steps(2 * batch, noise.images) / steps
    dearer = relative_images(2 * batch, noise.images) / images - 1
    lines += [
        "",
        f"Twice the batch saves {saved:.0%} of the steps and costs {dearer:.0%} more images; it "
        "pays where cards would stand idle, until the images cost more than the time.",
        "Computed by the law of arXiv 1812.06162 for the best rate of each batch; the noise scale "
        "grows along a run, and the negatives of a contrastive loss are not in it.",
    ]
    return "\n".join(lines)
