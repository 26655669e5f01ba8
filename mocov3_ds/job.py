"""What a pretraining run is made of, assembled from its settings or from its newest checkpoint.

Shape suffixes: V = the two views, B = rank batch, C H W = image.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocov3_ds import checkpoint, fit
from mocov3_ds.checkpoint import Checkpoint
from mocov3_ds.config import Config, Run
from mocov3_ds.data import decode
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.cache import Cache
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.stream import Batch, Stream, evaluation_batches
from mocov3_ds.data.views import ViewSpec, normalise, photometric
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import (
    compute_dtype,
    engine_config,
    full_tensors,
    gradient_bytes,
    start_engine,
)
from mocov3_ds.evaluation.monitor import KnnMonitor
from mocov3_ds.model.loss import chance_loss
from mocov3_ds.model.moco import BaseEncoder, Chunks, EncoderShape
from mocov3_ds.model.momentum import MomentumEncoder
from mocov3_ds.optim.build import base_rate, build_optimizer
from mocov3_ds.optim.rules import Rule
from mocov3_ds.optim.schedule import scaled_rate
from mocov3_ds.step import QueriesToLoss

_log = logging.getLogger("mocov3_ds")


@dataclass
class Job:
    """A run in memory: its parts, its length, and `step`, the optimizer steps done so far."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    engine: Any
    optimizer: Any
    momentum_encoder: MomentumEncoder
    stream: Stream
    monitor: KnnMonitor | None
    spec: ViewSpec
    peak_rate: float
    total_steps: int
    warmup_steps: float
    step: int

    @property
    def backbone(self) -> nn.Module:
        """The base encoder's Vision Transformer."""
        backbone: nn.Module = self.engine.module.base.backbone
        return backbone

    @property
    def chance_loss(self) -> float:
        """Loss of a network that cannot tell the keys of a global batch apart."""
        return chance_loss(self.config.batch, self.config.moco.temperature)

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both views (B, C, H, W) on the device, in the network's dtype."""
        x1_BCHW, x2_BCHW = (
            photometric(
                crops.to(self.device, non_blocking=True),
                params,
                self.spec.mean,
                self.spec.std,
                self.dtype,
            )
            for crops, params in zip(batch.crops_VBCHW, batch.params_VBP, strict=True)
        )
        return x1_BCHW, x2_BCHW

    def save(self) -> None:
        """Write a checkpoint of everything the run needs to go on."""
        trained = {n for n, p in self.engine.module.base.named_parameters() if p.requires_grad}
        groups: dict[str, Any] = {
            "base": self._base_tensors(trained),
            "optimizer": self._optimizer_tensors(),
            "momentum": self.momentum_encoder.full_state(),
        }
        if self.monitor is not None:
            groups["extra"] = self.monitor.full_state()
        state = {
            "optimizer_steps": self.optimizer.step_count,
            "loss_scale": self.optimizer.loss_scale(),
            "chunks": {**asdict(self.engine.module.chunks), "world_size": ranks.world_size()},
        }
        checkpoint.save(self.config.folder, self.step, groups, state, keep=self.config.save.keep)

    def _base_tensors(self, trained: set[str]) -> Iterator[tuple[str, Tensor]]:
        """fp32 masters of the trained tensors, the engine's own copy of the frozen ones."""
        for name, state in self.optimizer.full_state("weight"):
            yield name.removeprefix("base."), state["weight"]
        for name, tensor in full_tensors(self.engine.module.base):
            if name not in trained:
                yield name, tensor

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, state in self.optimizer.full_state(*self.optimizer.moments):
            for key, tensor in state.items():
                yield f"{key}/{name}", tensor

    def summary(self) -> str:
        """One paragraph on what is about to run."""
        config, world = self.config, ranks.world_size()
        weights = sum(
            getattr(p, "ds_numel", p.numel()) for p in self.engine.module.base.parameters()
        )
        stage = self.engine.zero_optimization_stage()
        return (
            f"run {config.folder}: ViT {config.model.dim} x {config.model.depth} blocks "
            f"({weights / 1e6:.1f} M weights with heads), {self.stream.samples} samples, "
            f"global batch {config.batch} on {world} rank{'s' * (world > 1)}, "
            f"{self.stream.batches_per_epoch} steps an epoch "
            f"({self.stream.remainder} samples left over each time), "
            f"{type(self.optimizer).__name__} at peak lr {self.peak_rate:.3g}, ZeRO-{stage}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}, {self._passes()}, "
            f"views by {decode.about()}, "
            f"steps {self.step} to {self.total_steps}"
        )

    def _passes(self) -> str:
        chunks: Chunks = self.engine.module.chunks
        if not chunks.size:
            return "each view in one pass"
        return f"chunks of {chunks.size} images ({chunks.kept} kept)"

    def what_next(self) -> str:
        """Last words: where things lie and what can be done with them."""
        folder = self.config.folder
        done = self.step >= self.total_steps
        state = "finished" if done else f"stopped at step {self.step} of {self.total_steps}"
        return "\n".join(
            [
                f"{state}; checkpoint in {folder / 'checkpoints'}",
                "resume:   the same command again" + (" (with more --epochs: a new --name)" * done),
                f"k-NN:     mocov3 knn {folder}",
                f"export:   mocov3 export {folder}",
                f"curves:   tensorboard --logdir {folder / 'tensorboard'}"
                f"   (or read {folder / 'metrics.jsonl'})",
            ]
        )


def build_job(run: Run, device: torch.device) -> Job:
    """Open the data, claim the run folder, and put every part in place.

    Raises:
        ValueError: anything a user can have wrong, before the run folder is touched where possible.
    """
    config = run.config
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    json_config = engine_config(
        run.engine, global_batch=config.batch, world_size=ranks.world_size()
    )
    dtype = compute_dtype(json_config)
    shape = encoder_shape(config)
    peak_rate = scaled_rate(base_rate(run.engine.get("optimizer")), config.batch)
    train_shards, probe_shards = open_data(config)
    steps_per_epoch = train_shards.samples // config.batch
    if steps_per_epoch == 0:
        raise ValueError(
            f"{train_shards.url} holds {train_shards.samples} samples, fewer than one global "
            f"batch of {config.batch}; lower --batch."
        )
    spec = ViewSpec(
        crop_min=config.views.crop_min,
        crop_max=config.views.crop_max,
        blur_p=config.views.blur_p,
        solarise_p=config.views.solarise_p,
    )
    torch.manual_seed(config.seed)
    base = BaseEncoder(shape)
    base.backbone.set_grad_checkpointing(config.recompute_blocks)
    rank_batch = config.batch // ranks.world_size()
    model = QueriesToLoss(
        base,
        temperature=config.moco.temperature,
        key_block=config.key_block or fit.fitting_key_block(rank_batch, config.batch),
    )
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(run.engine.get("optimizer"), trained, partial(_rule, config))
    # the last thing that can be refused is the folder itself
    ranks.first_does(
        partial(checkpoint.claim_folder, config.folder, run.as_json(), train_shards.digest)
    )
    saved = checkpoint.newest_of_all_ranks(config.folder)
    if saved is not None:
        load_base(base, saved)
    engine = start_engine(model.to(device), optimizer, json_config)
    momentum_encoder = MomentumEncoder(shape, device=device, dtype=dtype)
    momentum_encoder.start_from(dict(full_tensors(engine.module.base)))
    momentum_encoder.follow(engine.module.base)
    model.chunks = _chunks(config, engine, momentum_encoder, saved)
    job = Job(
        config=config,
        device=device,
        dtype=dtype,
        engine=engine,
        optimizer=optimizer,
        momentum_encoder=momentum_encoder,
        stream=Stream(
            train_shards,
            views=spec,
            image_size=config.views.image_size,
            global_batch=config.batch,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            seed=config.seed,
            position=saved.step if saved else 0,
            lanes=config.data.lanes,
            pool=config.data.pool,
            threads=config.data.threads,
            bad_sample_budget=config.data.max_bad_samples,
            bad_samples=config.folder / "bad_samples.jsonl",
            cache=_cache(config),
            pin=device.type == "cuda",
        ),
        monitor=_monitor(config, spec, train_shards, probe_shards, device, dtype),
        spec=spec,
        peak_rate=peak_rate,
        total_steps=max(1, round(config.epochs * steps_per_epoch)),
        warmup_steps=config.warmup_epochs * steps_per_epoch,
        step=saved.step if saved else 0,
    )
    if saved is not None:
        _restore(job, saved)
    return job


def _chunks(
    config: Config, engine: Any, encoder: MomentumEncoder, saved: Checkpoint | None
) -> Chunks:
    """Chunks as given, as in the last sitting on as many ranks (same bits), or as memory allows."""
    world, batch = ranks.world_size(), config.batch // ranks.world_size()
    if config.chunk:
        return Chunks(size=config.chunk if config.chunk < batch else 0, kept=config.keep_chunks)
    before = saved.state["chunks"] if saved is not None else {}
    if before.get("world_size") == world:
        return Chunks(size=before["size"], kept=before["kept"])
    size, parameter = config.views.image_size, next(encoder.parameters())
    room = fit.measure_room(
        encoder,
        torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device),
        batch=batch,
        global_batch=config.batch,
        gradient_bytes=gradient_bytes(engine),
        recompute_blocks=config.recompute_blocks,
    )
    chunks = fit.fitting_chunks(room, batch)
    _log.info("%s for %s", chunks, room)
    return chunks


def encoder_shape(config: Config) -> EncoderShape:
    """Architecture that the settings describe."""
    return EncoderShape(
        vit=config.vit,
        hidden=config.model.hidden,
        out=config.model.out,
        positions=config.model.positions,
        train_patch_projection=config.model.patch_lr > 0,
        drop_path=config.model.drop_path,
    )


def open_data(config: Config) -> tuple[Manifest, Manifest | None]:
    """Manifests of the training shards and of the probe shards (None where there are none).

    Without `--data.shards` the tiny recipe draws its sample images and shards them on first use.
    """
    train, probes = config.data.shards, config.data.probe_shards
    if not train:
        if config.recipe != "tiny":
            raise ValueError(
                f"recipe {config.recipe} needs images: --data.shards FOLDER (make the folder with "
                "python -m data_prep shard SOURCE FOLDER)."
            )
        from data_prep.samples import ensure_samples

        train, probes = ranks.first_does(partial(ensure_samples, config.runs / "sample-images"))
    splits = manifests.load(train), manifests.load(probes) if probes else None
    for split in splits:
        if probes and config.knn.probes and split is not None and not split.labelled:
            raise ValueError(
                f"{split.url} holds samples without labels, which the k-NN monitor needs; "
                "use --knn.probes 0 to run without it."
            )
    return splits


def load_base(base: BaseEncoder, saved: Checkpoint) -> None:
    """Fill a base encoder from a checkpoint.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    tensors = saved.group("base")
    own = base.state_dict()
    wrong = sorted(
        {*own} ^ {*tensors} | {n for n in {*own} & {*tensors} if own[n].shape != tensors[n].shape}
    )
    if wrong:
        raise ValueError(
            f"checkpoint {saved.folder} is of another model: {len(wrong)} tensors differ, "
            f"e.g. {', '.join(wrong[:3])}."
        )
    base.load_state_dict(tensors)


def _restore(job: Job, saved: Checkpoint) -> None:
    """Optimizer, momentum encoder and k-NN queue as they were."""

    def optimizer_state(name: str) -> dict[str, Tensor]:
        moments = {key: saved.tensor("optimizer", f"{key}/{name}") for key in job.optimizer.moments}
        return {"weight": saved.tensor("base", name.removeprefix("base.")), **moments}

    job.optimizer.load_full_state(optimizer_state, saved.state["optimizer_steps"])
    job.optimizer.load_loss_scale(saved.state["loss_scale"])
    job.momentum_encoder.load_full_state(saved.group("momentum"))
    if job.monitor is not None and saved.names("extra"):
        job.monitor.load_full_state(saved.group("extra"))
    _log.info("continuing %s from step %d", job.config.folder, saved.step)


def _cache(config: Config) -> Cache | None:
    """The local disk's part in reading from object storage."""
    if not config.data.cache:
        return None
    return Cache(Path(config.data.cache).expanduser(), int(config.data.cache_gb * 1e9))


def _rule(config: Config, name: str, shape: tuple[int, ...]) -> Rule:
    """Weight decay, rate and trust-ratio rule of one tensor."""
    matrix = len(shape) > 1 and not name.endswith("cls_token")
    patch = ".patch_embed.proj." in name
    return Rule(
        decay=matrix or config.decay == "all",
        lr_multiplier=config.model.patch_lr if patch else 1.0,
        adapt=matrix,
    )


def _monitor(
    config: Config,
    spec: ViewSpec,
    train: Manifest,
    probes: Manifest | None,
    device: torch.device,
    dtype: torch.dtype,
) -> KnnMonitor | None:
    if probes is None or not config.knn.probes:
        return None
    size, world = config.views.image_size, ranks.world_size()
    bank = config.knn.bank or max(train.samples // 10, 4096)
    bank = min(bank, train.samples) // world * world
    batches = partial(
        evaluation_batches,
        image_size=size,
        resize=round(size * 256 / 224),
        batch=256,
        rank=ranks.rank(),
        world_size=world,
        threads=config.data.threads,
        bad_sample_budget=config.data.max_bad_samples,
        cache=_cache(config),
    )

    def prepare(crops_BCHW: Tensor) -> Tensor:
        return normalise(crops_BCHW.to(device), spec.mean, spec.std, dtype)

    return KnnMonitor(
        probes=batches(probes, limit=config.knn.probes),
        bank=partial(batches, train, limit=bank),
        capacity=bank // world,
        dim=config.model.dim,
        k=config.knn.k,
        temperature=config.knn.temperature,
        prepare=prepare,
        device=device,
    )
