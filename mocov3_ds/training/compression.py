"""How many patches of an image take part in a step of a run, and which runs can leave some out."""

import math
from functools import lru_cache

from mocov3_ds.config.compression import OFF, Patches, StepLength, check_patches, step_length
from mocov3_ds.config.run_config import Config
from mocov3_ds.model.backbones import BackboneFacts, shape_name
from mocov3_ds.model.shapes import EncoderShape
from mocov3_ds.planning.architecture import model_operations


def check_compression(config: Config, facts: BackboneFacts) -> None:
    """Refuse to compress the sequences of a network that cannot do it.

    Args:
        config: settings of the run.
        facts: facts of the run's backbone.

    Raises:
        ValueError: it has no patches to leave out, or cannot have larger ones as the schedule asks.
    """
    check_patches(config.compress, _patches(config, facts))


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
    if config.compress == OFF:
        return None
    return step_length(config.compress, step / total_steps, _patches(config, facts))


@lru_cache(maxsize=256)
def image_operations(shape: EncoderShape, length: StepLength) -> float:
    """Operations that the model asks for in a step for one image; nan where they are not known.

    Args:
        shape: architecture of the encoder.
        length: patches that take part in the step.
    """
    try:
        return model_operations(shape, length)
    except ValueError:  # a backbone that does not run without numbers
        return math.nan


def _patches(config: Config, facts: BackboneFacts) -> Patches:
    return Patches(
        network=shape_name(config.backbone),
        image_size=config.backbone.size,
        count=facts.patches,
        side=facts.patch_size,
    )
