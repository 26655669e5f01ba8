"""What do shorter sequences do to the gradient? Its bias and noise, by the share of patches kept.

    python -m mocov3_ds.bench compression runs/NAME

The run is one of a Vision Transformer, with a checkpoint. One batch of its own views goes through
its own networks: once whole, and several times with patches drawn anew for queries and keys alike.
Against the norm of the whole gradient: bias is that of the mean over infinitely many draws, as far
as few can tell; noise that of what one draw has beside it. Both take the whole batch at once, as
batch norm and loss do.

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
from mocov3_ds.config.compression import SequenceLength, StepLength, count_length
from mocov3_ds.config.run_config import Config, encoder_shape
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
    """draws of patches for each line"""
    shares: tuple[float, ...] = (0.75, 0.5, 0.25, 0.125)
    """shares of the patches that queries and keys keep"""
    scales: tuple[float, ...] = (1.0,)
    """patch scales to try with each share, and alone"""


class GradientError(NamedTuple):
    """Errors against the norm of the whole gradient."""

    bias: float
    noise: float


class Networks(NamedTuple):
    """What the gradient is of."""

    model: QueriesToLoss
    momentum_encoder: MomentumEncoder
    views: tuple[Tensor, Tensor]
    sample_ids_B: Tensor


def run_bench(options: CompressionOptions) -> None:
    """Print a table of bias and noise.

    Raises:
        ValueError: no run with a checkpoint, or one whose network cannot leave patches out.
    """
    config = read_run_config(options.run)
    saved = find_newest(options.run)
    if saved is None:
        raise ValueError(f"{options.run} has no checkpoint.")
    if options.draws < 2:
        raise ValueError(f"--draws {options.draws} shows no noise; give 2 or more.")
    shape = encoder_shape(config)
    patches = patches_of(shape)
    if not patches.count:
        raise ValueError(f"{patches.network} has no patches that can be left out.")
    networks = load_networks(config, saved, options.batch)
    whole_W = gradient(networks, Draws())
    print(f"{options.run} after step {saved.step}, {options.batch} images, {options.draws} draws\n")
    print("| patches kept | patch scale | operations, % | bias, % | noise, % |")
    print("|---|---|---|---|---|")
    for scale in options.scales:
        for share in (*((1.0,) if scale != 1 else ()), *options.shares):
            sequence = SequenceLength(query_share=share, key_share=share, patch_scale=scale)
            length = count_length(sequence, patches.count_at(scale))
            drawn_DW = torch.stack(
                [gradient(networks, draw(length, networks, seed)) for seed in range(options.draws)]
            )
            error = measure_error(drawn_DW, whole_W)
            operations = model_operations(shape, length) / model_operations(shape)
            percent = (
                f"{100 * fraction:.0f}" for fraction in (operations, error.bias, error.noise)
            )
            kept_patches = f"{length.query_patches} of {length.patches}"
            print(f"| {kept_patches} | {scale:g} | {' | '.join(percent)} |", flush=True)


def load_networks(config: Config, saved: Checkpoint, batch: int) -> Networks:
    """Networks of a run and the batch that comes after a checkpoint.

    Args:
        config: settings of the run.
        saved: checkpoint that holds the weights and the position.
        batch: images of the batch.
    """
    device = torch.device("cpu")
    model = build_model(config, 1)
    load_weights(model, saved)
    encoder = MomentumEncoder(encoder_shape(config))
    encoder.load_full_state(saved.read_group("momentum"))
    spec, (train, _) = view_spec(config), open_shards(config)
    loader = open_loader(config, train, spec, device, saved.position, {})
    try:
        following = next(loader)
        coloured = config.views.colour == "threads"
        x1, x2 = network_views(following, spec, device, torch.float32, coloured=coloured)
        return Networks(model, encoder, (x1[:batch], x2[:batch]), following.sample_ids_B[:batch])
    finally:
        loader.close()


def draw(length: StepLength, networks: Networks, seed: int) -> Draws:
    """Patches of a length for each image of the batch.

    Args:
        length: how many patches each network keeps, of how large ones.
        networks: those whose batch names the images.
        seed: seed of the draw.
    """
    ids_B = networks.sample_ids_B.numpy().astype(np.int64)
    order_VBN = draw_patch_order(length.patches, ids_B, seed=seed, step=0)
    return Draws(
        query_patches_VBK=keep_first(order_VBN, length.query_patches),
        key_patches_VBK=keep_first(order_VBN, length.key_patches),
        patch_scale=length.patch_scale,
    )


def gradient(networks: Networks, draws: Draws) -> Tensor:
    """The gradient (W,) of the loss of the batch.

    Args:
        networks: networks and the views that they see.
        draws: what takes part in the step.
    """
    model, views = networks.model, networks.views

    def make_keys() -> tuple[ViewKeys, ViewKeys]:
        return make_both_keys(networks.momentum_encoder, *views, 0, draws)

    weights = [parameter for _, parameter in trained_parameters(model)]
    loss = model(*views, make_keys, draws).loss
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def measure_error(drawn_DW: Tensor, whole_W: Tensor) -> GradientError:
    """Bias and noise of drawn gradients against the norm of the whole one.

    The mean of D draws has a D-th of their variance, which is taken off its square distance.

    Args:
        drawn_DW: gradients of independent draws, two or more.
        whole_W: gradient of whole sequences.
    """
    draws, mean_W = len(drawn_DW), drawn_DW.mean(0)
    variance = float((drawn_DW - mean_W).square().sum()) / (draws - 1)
    squared_bias = float((mean_W - whole_W).square().sum()) - variance / draws
    norm = float(whole_W.norm())
    return GradientError(math.sqrt(max(squared_bias, 0.0)) / norm, math.sqrt(variance) / norm)
