"""The networks of a run: the trained module as the settings describe it, the momentum encoder."""

import logging

import torch
from torch import nn

from mocov3_ds.config.run_config import Config, encoder_shape
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import Engine, full_tensors
from mocov3_ds.model.backbones import recompute_blocks, shape_name
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.chunking import choose_key_block
from mocov3_ds.model.loss import ContrastiveLoss, PairLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.training.compression import check_compression
from mocov3_ds.training.step import QueriesToLoss
from mocov3_ds.training.tensor_rules import freeze_tensors
from mocov3_ds.training.trained_state import check_restorable

_log = logging.getLogger("mocov3_ds")


def build_model(config: Config, world_size: int, loss: PairLoss | None = None) -> QueriesToLoss:
    """The trained module with the weights of the run's seed.

    Args:
        config: settings of the run.
        world_size: number of ranks, over which the global batch is divided.
        loss: loss to train with; None = the paper's at `--moco.temperature`.

    Raises:
        ValueError: sizes that do not divide, or a loss whose tensors no checkpoint could bring
            back.
    """
    torch.manual_seed(config.seed)
    base = BaseEncoder(encoder_shape(config))
    _check_chunk(config, config.batch // world_size, base)
    check_compression(config, base.facts)
    if base.facts.unused and ranks.is_first():
        unused = base.facts.unused
        _log.info("no feature depends on %d tensors, which stay: %s", len(unused), unused[:5])
    if config.recompute_blocks:
        recompute_blocks(base.backbone)
    freeze_tensors(base, config)
    if loss is None:
        rank_batch = config.batch // world_size
        key_block = config.key_block or choose_key_block(rank_batch, config.batch)
        loss = ContrastiveLoss(config.moco.temperature, key_block)
    model = QueriesToLoss(base, loss)
    check_restorable(model)
    return model


def _check_chunk(config: Config, rank_batch: int, base: BaseEncoder) -> None:
    if 0 < config.chunk < rank_batch and base.facts.rows_know_each_other:
        raise ValueError(
            f"--chunk {config.chunk} would change what is computed: "
            f"{shape_name(config.backbone)} has batch norm, whose statistics are those of all "
            f"{config.batch} images of a step; leave --chunk out, and give --recompute_blocks, "
            "more ranks or a smaller --batch where the memory is short."
        )


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of all that is trained, in the module's order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def start_momentum_encoder(
    config: Config, engine: Engine[QueriesToLoss], device: torch.device, dtype: torch.dtype
) -> MomentumEncoder:
    """A momentum encoder that equals the engine's base encoder, and follows it from now on.

    Args:
        config: settings of the run.
        engine: engine that has taken the base encoder over; all ranks must call.
        device: where the momentum encoder lives.
        dtype: dtype of its forward pass, the engine's.
    """
    base = engine.module.base
    encoder = MomentumEncoder(encoder_shape(config), device=device, dtype=dtype)
    encoder.start_from(dict(full_tensors(base)))
    encoder.follow(base)
    return encoder
