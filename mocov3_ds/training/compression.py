"""How many patches of an image take part in a step of a run, and which runs can leave some out."""

from math import prod

from mocov3_ds.config.compression import (
    SequenceLength,
    StepLength,
    count_length,
    length_at,
    read_schedule,
)
from mocov3_ds.config.run_config import Config
from mocov3_ds.model.backbones import BackboneFacts, shape_name
from mocov3_ds.model.shapes import scaled_grid

WITHOUT = "off"


def check_backbone(config: Config, facts: BackboneFacts) -> None:
    """Refuse to compress the sequences of a network that cannot do it.

    Args:
        config: settings of the run.
        facts: facts of the run's backbone.

    Raises:
        ValueError: it has no patches to leave out, or cannot have larger ones as the schedule asks.
    """
    if config.compress == WITHOUT:
        return
    name = shape_name(config.backbone)
    if not facts.patches:
        raise ValueError(
            f"--compress {config.compress} leaves patches of an image out, and {name} has none "
            "that can be left out: it is for Vision Transformers (vit, vit_conv, timm:vit_*)."
        )
    for point in read_schedule(config.compress):
        scale = point.length.patch_scale
        if scale != 1 and not facts.patch_size:
            raise ValueError(
                f"--compress {config.compress}: {name} cannot have patches {scale:g} times as "
                "large, as no single projection makes its tokens; leave the patch scale out."
            )
        _count_patches(config, facts, point.length)


def check_last_step(config: Config, total_steps: int) -> None:
    """Refuse a run so short that its last step would not be at full length.

    Args:
        config: settings of the run.
        total_steps: steps of the schedule.

    Raises:
        ValueError: it is.
    """
    points = read_schedule(config.compress)
    if not length_at(points, (total_steps - 1) / total_steps).is_whole:
        raise ValueError(
            f"--compress {config.compress} does not come to full length in the {total_steps} steps "
            "of this run; train longer, or give a schedule that ends sooner."
        )


def length_of_step(
    config: Config, facts: BackboneFacts, step: int, total_steps: int
) -> StepLength | None:
    """Patches that take part in a step; None where the run leaves none out at any time.

    Args:
        config: settings of the run.
        facts: facts of the run's backbone.
        step: steps of the schedule that are done before it.
        total_steps: steps of the schedule.
    """
    if config.compress == WITHOUT:
        return None
    length = length_at(read_schedule(config.compress), step / total_steps)
    return count_length(length, _count_patches(config, facts, length))


def _count_patches(config: Config, facts: BackboneFacts, length: SequenceLength) -> int:
    """Patches of an image at the patch scale of a step."""
    if length.patch_scale == 1:
        return facts.patches
    return prod(scaled_grid(config.backbone.size, facts.patch_size, length.patch_scale))
