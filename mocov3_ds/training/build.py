"""A run is put together, from its settings and its newest checkpoint.

    settings -> shards, views -> trained module -> optimizer -> run folder claimed
             -> weights of the checkpoint -> engine -> momentum encoder -> chunks -> the rest

What a user can have wrong is found before the folder is touched, as far as possible.
"""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.config.compression import check_last_step
from mocov3_ds.config.run_config import Config, Settings
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.distributed import devices, ranks
from mocov3_ds.distributed.engine import Engine, check_precision, gradient_bytes, start_engine
from mocov3_ds.distributed.engine_config import compute_dtype, engine_config
from mocov3_ds.model.backbones import compile_blocks
from mocov3_ds.model.chunking import Chunks
from mocov3_ds.model.layer_groups import layer_group
from mocov3_ds.model.loss import PairLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.monitoring.alarm_response import check_response
from mocov3_ds.monitoring.signal_recorder import SignalRecorder
from mocov3_ds.optim.build import base_rate, build_optimizer
from mocov3_ds.optim.gradient_clip import refuse_two_clips
from mocov3_ds.training import chunk_size, trained_state
from mocov3_ds.training.instruments import Instruments, check_instruments
from mocov3_ds.training.planned import check_length
from mocov3_ds.training.resume import build_saver, claim_run, merge_bad_samples
from mocov3_ds.training.run import Run
from mocov3_ds.training.run_data import build_knn_monitor, open_loader, open_shards, view_spec
from mocov3_ds.training.run_model import build_model, start_momentum_encoder, trained_parameters
from mocov3_ds.training.schedule import scaled_rate
from mocov3_ds.training.start import Start, find_start, start_of
from mocov3_ds.training.step import QueriesToLoss
from mocov3_ds.training.step_limits import StepLimits
from mocov3_ds.training.tensor_rules import tensor_rules

_log = logging.getLogger("mocov3_ds")


def build_run(settings: Settings, device: torch.device, loss: PairLoss | None = None) -> Run:
    """Open the data, claim the run folder, and put every part in place; all ranks must call.

    Args:
        settings: resolved command line of the run.
        device: device of this rank.
        loss: loss to train with; None = the paper's at `--moco.temperature`.

    Raises:
        ValueError: anything a user can have wrong, before the run folder is touched where possible.
    """
    config, block = settings.config, settings.engine.get("optimizer")
    engine_json = _check_engine(settings)
    peak_rate = scaled_rate(base_rate(block), config.batch, config.rate_rule)
    train, probes = open_shards(config)
    total_steps, warmup_steps = count_steps(config, train)
    check_length(config, device, total_steps)
    spec, model = view_spec(config), build_model(config, ranks.world_size(), loss)
    trained = trained_parameters(model)
    optimizer = build_optimizer(block, trained, tensor_rules(config))
    check_response(config.alarm, optimizer)
    refuse_two_clips(optimizer.clipper, engine_json["gradient_clipping"])
    check_instruments(config.signals, config.batch, ranks.world_size())
    start = _begin_with(model, find_start(settings, train, model))
    check_last_step(config.compress, total_steps - start.schedule_begins(config))
    # the last thing that can be refused is the folder itself
    saved = claim_run(settings, train.digest, start.ancestry)
    if saved is not None:
        start = start_of(saved)
        _load_weights(model, saved)
    dtype = compute_dtype(engine_json)
    instruments = Instruments(config.signals, model, device, dtype)
    engine = start_engine(model.to(device), optimizer, engine_json)
    momentum_encoder = start_momentum_encoder(config, engine, device, dtype)
    conditions = _set_chunks(config, engine, momentum_encoder, saved)
    _compile_networks(config, model, momentum_encoder)
    groups = [layer_group(name) for name, _ in trained]
    recorder_from = partial(SignalRecorder, config, optimizer, model.base.facts, groups, train)
    loader_from = partial(open_loader, config, train, spec, device)
    state = saved.state if saved else {}
    step, position = (saved.step, saved.position) if saved else (start.step, start.position)
    run = Run(
        config=config, device=device, dtype=dtype,
        engine=engine, optimizer=optimizer, momentum_encoder=momentum_encoder,
        loader=loader_from(position, merge_bad_samples([state.get("bad_samples", {})])),
        knn_monitor=build_knn_monitor(
            config, spec, train, probes, device, dtype, width=model.base.facts.width),
        view_spec=spec, manifest=train, chunk_conditions=conditions,
        peak_rate=peak_rate, total_steps=total_steps, warmup_steps=warmup_steps,
        step=step, position=position, start=start,
        saver=build_saver(config), recorder=recorder_from(saved),
        limits=StepLimits(config.trouble, state.get("trouble", {})), instruments=instruments,
        open_loader=loader_from, open_recorder=recorder_from,
    )  # fmt: skip
    if saved is not None:
        run.restore(saved)
        _log.info("continuing %s from step %d", config.folder, saved.step)
    elif start.parent is not None:
        run.restore(start.parent, with_queues=start.parent_has_same_samples)
    return run


def _begin_with(model: QueriesToLoss, start: Start) -> Start:
    """Fill the trained module with what the run begins with, where that is not random."""
    if start.parent is not None:
        _load_weights(model, start.parent)
    elif start.tensors:
        model.base.load_state_dict({**model.base.state_dict(), **start.tensors})
    return replace(start, tensors={})  # they are in the network now


def _load_weights(model: QueriesToLoss, saved: Checkpoint) -> None:
    """Fill the trained module from a checkpoint of the same network and loss."""
    trained_state.load_weights(model, saved)
    trained_state.check_loss(model.loss, saved)


def _compile_networks(config: Config, model: QueriesToLoss, encoder: MomentumEncoder) -> None:
    """Compile the blocks of both encoders where the settings ask for it."""
    if config.compile_blocks:
        compile_blocks(model.base.backbone)
        compile_blocks(encoder.backbone)


def _check_engine(settings: Settings) -> dict[str, Any]:
    """The DeepSpeed JSON of the run, after what is asked of torch itself.

    Raises:
        ValueError: keys or values that cannot be, or that do not go together.
    """
    config = settings.config
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    device = ranks.this_device()
    devices.set_tf32(config.tf32, device)
    engine_json = engine_config(
        settings.engine, global_batch=config.batch, world_size=ranks.world_size()
    )
    check_precision(engine_json)
    if config.model.fp8:
        devices.check_fp8(device)
        if compute_dtype(engine_json) != torch.bfloat16:
            raise ValueError(
                "--model.fp8 takes the place of products in bf16, and this network is not in bf16; "
                "use --ds bf16.enabled=true, or leave the flag out."
            )
    if config.compile_blocks and engine_json["zero_optimization"]["stage"] == 3:
        raise ValueError(
            "--compile_blocks does not go with ZeRO stage 3, which gathers weights inside of a "
            "block; use --ds zero_optimization.stage=2."
        )
    if config.overlap_keys and engine_json["zero_optimization"]["stage"] == 3:
        raise ValueError(
            "--overlap_keys does not go with ZeRO stage 3, where the momentum encoder moves while "
            "the queries are computed; use --ds zero_optimization.stage=2."
        )
    if config.overlap_keys and device.type == "cpu":
        raise ValueError("--overlap_keys has no effect on a CPU; leave the flag out.")
    if config.compile_blocks and device.type == "cuda" and devices.triton_problem(device):
        raise ValueError(
            f"--compile_blocks needs Triton on a GPU: {devices.triton_problem(device)}; or leave "
            "the flag out."
        )
    return engine_json


def count_steps(config: Config, train: Manifest) -> tuple[int, float]:
    """Steps of the whole run, and of its warm-up, which need not be whole.

    Args:
        config: settings of the run.
        train: manifest of the training shards; what is left over of an epoch is no step.
    """
    steps_per_epoch = train.samples // config.batch
    total_steps = max(1, round(config.epochs * steps_per_epoch))
    return total_steps, config.warmup_epochs * steps_per_epoch


def _set_chunks(
    config: Config,
    engine: Engine[QueriesToLoss],
    encoder: MomentumEncoder,
    saved: Checkpoint | None,
) -> dict[str, Any]:
    """Give the trained module its chunks; returns what decided them."""
    batch = config.batch // ranks.world_size()

    def measure_chunks() -> Chunks:
        room = chunk_size.measure_room(
            encoder,
            batch=batch,
            global_batch=config.batch,
            gradient_bytes=gradient_bytes(engine),
            recompute_blocks=config.recompute_blocks,
            overlap_keys=config.overlap_keys,
        )
        return chunk_size.agree_on_chunks(room, batch, whole=encoder.facts.rows_know_each_other)

    memory_bytes = chunk_size.smallest_memory_bytes(ranks.this_device())
    conditions = chunk_size.chunk_conditions(
        config, engine.config, ranks.world_size(), memory_bytes
    )
    saved_chunks = saved.state_value("chunks") if saved is not None else {}
    engine.module.chunks = chunk_size.resolve_chunks(
        config, batch, conditions, saved_chunks, measure_chunks
    )
    return conditions
