"""What do shorter sequences do to the gradient? Its error, beside that of another batch.

    python -m mocov3_ds.bench compression runs/NAME

The run is one of a Vision Transformer, with a checkpoint; `--untrained` looks at its networks as
they were before the first step. One batch of its own views goes through its own networks: once
whole, and several times with patches drawn anew for queries and keys alike. Error and cosine are
those of one draw against the gradient of the whole batch, which the error is also divided by. The
error has two parts: bias is that of the mean over infinitely many draws, as far as few can tell;
noise is what one draw has beside it. All of it takes the batch at once, as batch norm and loss do.

Any step has an error of its own, as its batch is one of many. So the first line is that of other
batches of the same size, over whole sequences: their noise is that of drawing a batch, and their
distance from the first one has that of both.

Shape suffixes: D = draws, W = all trained numbers.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from mocov3_ds.checkpoints.checkpoint import Checkpoint, find_newest
from mocov3_ds.config.compression import SequenceLength, StepLength
from mocov3_ds.config.run_config import Config, encoder_shape
from mocov3_ds.distributed.engine import full_tensors
from mocov3_ds.encoders.load import read_run_config
from mocov3_ds.model.momentum_encoder import MomentumEncoder, ViewKeys
from mocov3_ds.model.token_dropout import draw_patch_order, keep_first
from mocov3_ds.planning.architecture import model_operations, patches_of
from mocov3_ds.training.run_data import network_views, open_loader, open_shards, view_spec
from mocov3_ds.training.run_model import build_model, trained_parameters
from mocov3_ds.training.step import Draws, QueriesToLoss, make_both_keys
from mocov3_ds.training.trained_state import load_weights


@dataclass(frozen=True, kw_only=True)
class CompressionOptions:
    """Error of the gradient of compressed sequences."""

    run: tyro.conf.Positional[Path]
    """run folder with a checkpoint, whose networks, views and samples are used"""
    batch: int = 128
    """images of the batch"""
    draws: int = 6
    """draws of patches for each line, and other batches"""
    shares: tuple[float, ...] = (0.75, 0.5, 0.25, 0.125)
    """shares of the patches that queries and keys keep"""
    scales: tuple[float, ...] = (1.0,)
    """patch scales to try with each share, and alone"""
    untrained: bool = False
    """whether the networks are those of the run's seed, before its first step"""


class GradientError(NamedTuple):
    """Errors of a draw against the norm of the whole gradient, and the cosine of the two."""

    bias: float
    noise: float
    error: float
    """root mean square over the draws"""
    cosine: float
    """mean over the draws"""


class Networks(NamedTuple):
    """What the gradient is of."""

    model: QueriesToLoss
    momentum_encoder: MomentumEncoder


class Batch(NamedTuple):
    """What the networks see."""

    views: tuple[Tensor, Tensor]
    sample_ids_B: Tensor


def run_bench(options: CompressionOptions) -> None:
    """Print a table of the gradient's errors.

    Raises:
        ValueError: no run with a checkpoint, or one whose network cannot leave patches out.
    """
    config = read_run_config(options.run)
    saved = None if options.untrained else find_newest(options.run)
    if saved is None and not options.untrained:
        raise ValueError(f"{options.run} has no checkpoint; --untrained needs none.")
    if options.draws < 2:
        raise ValueError(f"--draws {options.draws} shows no noise; give 2 or more.")
    if not 2 <= options.batch <= config.batch:
        raise ValueError(
            f"--batch {options.batch} must be from 2 to the run's {config.batch}, one of whose "
            "batches it is cut from."
        )
    shape = encoder_shape(config)
    patches = patches_of(shape)
    if not patches.count:
        raise ValueError(f"{patches.network} has no patches that can be left out.")
    sequences = [
        SequenceLength(query_share=share, key_share=share, patch_scale=scale)
        for scale in options.scales
        for share in (*((1.0,) if scale != 1 else ()), *options.shares)
    ]
    lengths = [patches.length_of(each) for each in sequences]
    networks = load_networks(config, saved)
    batch, *other_batches = read_batches(config, saved, options.batch, 1 + options.draws)
    whole_W = gradient(networks, batch, Draws())
    step = saved.step if saved is not None else 0
    print(f"{options.run} after step {step}, {options.batch} images, {options.draws} draws\n")
    print("| patches kept | patch scale | operations, % | bias, % | noise, % | error, % | cosine |")
    print("|---|---|---|---|---|---|---|")
    other_DW = torch.stack([gradient(networks, other, Draws()) for other in other_batches])
    error = measure_error(other_DW, whole_W)
    patches_text = f"all {patches.count}, another batch"
    print(
        f"| {patches_text} | 1 | 100 | | {describe(error.noise, error.error, error.cosine)} |",
        flush=True,
    )
    for length in lengths:
        draws = [draw(length, batch, seed) for seed in range(options.draws)]
        drawn_DW = torch.stack([gradient(networks, batch, drawn) for drawn in draws])
        operations = model_operations(shape, length) / model_operations(shape)
        patches_text = f"{length.query_patches} of {length.patches}"
        errors = describe(operations, *measure_error(drawn_DW, whole_W))
        print(f"| {patches_text} | {length.patch_scale:g} | {errors} |", flush=True)


def describe(*fractions: float) -> str:
    """Cells of a row: per cent of all but the last number, which is a cosine."""
    *errors, cosine = fractions
    return " | ".join([*(f"{100 * error:.0f}" for error in errors), f"{cosine:.2f}"])


def load_networks(config: Config, saved: Checkpoint | None) -> Networks:
    """Networks of a run.

    Args:
        config: settings of the run.
        saved: checkpoint that holds the weights; None = those before the first step.
    """
    model = build_model(config, 1)
    encoder = MomentumEncoder(encoder_shape(config))
    if saved is None:
        encoder.start_from(dict(full_tensors(model.base)))
    else:
        load_weights(model, saved)
        encoder.load_full_state(saved.read_group("momentum"))
    return Networks(model, encoder)


def read_batches(config: Config, saved: Checkpoint | None, size: int, count: int) -> list[Batch]:
    """The first images of each of the batches that come after a checkpoint.

    Args:
        config: settings of the run.
        saved: checkpoint that holds the position; None = those from the start.
        size: images of a batch.
        count: number of batches to read, one after another.
    """
    device = torch.device("cpu")
    spec, (train, _) = view_spec(config), open_shards(config)
    position = 0 if saved is None else saved.position
    loader = open_loader(config, train, spec, device, position, {})
    batches = []
    try:
        for _ in range(count):
            following = next(loader)
            coloured = config.views.colour == "threads"
            x1, x2 = network_views(following, spec, device, torch.float32, coloured=coloured)
            views = (x1[:size].clone(), x2[:size].clone())
            batches.append(Batch(views, following.sample_ids_B[:size].clone()))
    finally:
        loader.close()
    return batches


def draw(length: StepLength, batch: Batch, seed: int) -> Draws:
    """Patches of a length for each image of the batch.

    Args:
        length: how many patches each network keeps, of how large ones.
        batch: names the images by their numbers in the manifest.
        seed: seed of the draw.
    """
    ids_B = batch.sample_ids_B.numpy().astype(np.int64)
    order_VBN = draw_patch_order(length.patches, ids_B, seed=seed, step=0)
    return Draws(
        query_patches_VBK=keep_first(order_VBN, length.query_patches),
        key_patches_VBK=keep_first(order_VBN, length.key_patches),
        patch_scale=length.patch_scale,
    )


def gradient(networks: Networks, batch: Batch, draws: Draws) -> Tensor:
    """The gradient (W,) of the loss of the batch.

    Args:
        networks: base and momentum encoder.
        batch: views that both of them see.
        draws: what takes part in the step.
    """
    model, views = networks.model, batch.views

    def make_keys() -> tuple[ViewKeys, ViewKeys]:
        return make_both_keys(networks.momentum_encoder, *views, 0, draws)

    weights = [parameter for _, parameter in trained_parameters(model)]
    loss = model(*views, make_keys, draws).loss
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def measure_error(drawn_DW: Tensor, whole_W: Tensor) -> GradientError:
    """Errors of drawn gradients against the whole one.

    The mean of D draws has a D-th of their variance, which is taken off its square distance.

    Args:
        drawn_DW: gradients of independent draws, two or more.
        whole_W: gradient of whole sequences.
    """
    draws, mean_W = len(drawn_DW), drawn_DW.mean(0)
    variance = float((drawn_DW - mean_W).square().sum()) / (draws - 1)
    squared_bias = float((mean_W - whole_W).square().sum()) - variance / draws
    norm = float(whole_W.norm())
    squared_D = (drawn_DW - whole_W).square().sum(1)
    return GradientError(
        bias=math.sqrt(max(squared_bias, 0.0)) / norm,
        noise=math.sqrt(variance) / norm,
        error=math.sqrt(float(squared_D.mean())) / norm,
        cosine=float(torch.cosine_similarity(drawn_DW, whole_W[None]).mean()),
    )
