"""What a pretraining run is made of, assembled from its settings or from its newest checkpoint.

Shape suffixes: V = the two views, B = rank batch, C H W = image.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocov3_ds.checkpoints import checkpoint, mirror, run_folder
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.checkpoints.saver import Saver
from mocov3_ds.config import Config, Settings, group_rates
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.loader import Batch, Stream, evaluation_batches
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.storage.cache import Cache
from mocov3_ds.data.views import decode
from mocov3_ds.data.views.photometric import ViewSpec, normalise, photometric
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import (
    compute_dtype,
    engine_config,
    full_tensors,
    gradient_bytes,
    start_engine,
)
from mocov3_ds.model.base_encoder import BaseEncoder, Chunks, EncoderShape
from mocov3_ds.model.layer_groups import group_of
from mocov3_ds.model.loss import chance_loss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import compile_blocks
from mocov3_ds.monitoring.knn_monitor import KnnMonitor
from mocov3_ds.monitoring.signal_recorder import Watch, check_response
from mocov3_ds.optim.build import base_rate, build_optimizer
from mocov3_ds.optim.rules import Rule
from mocov3_ds.planning import memory, pace
from mocov3_ds.planning.hardware import Cluster, card_of_device
from mocov3_ds.planning.memory import Memory
from mocov3_ds.planning.pace import Pace
from mocov3_ds.training import chunk_size
from mocov3_ds.training.schedule import scaled_rate
from mocov3_ds.training.step import QueriesToLoss
from mocov3_ds.training.step_limits import Guard

_LAST_WRITE_S = 20.0

_log = logging.getLogger("mocov3_ds")


@dataclass
class Run:
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
    saver: Saver
    watch: Watch
    guard: Guard
    position: int
    """global batches gone through; the next one, counted from 0"""
    manifest: Manifest
    open_stream: Callable[[int, dict[int, str]], Stream]
    open_watch: Callable[[Checkpoint], Watch]
    save_s: float = 0.0

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
        mean, std, dtype = self.spec.mean, self.spec.std, self.dtype
        crops_VBCHW = batch.crops_VBCHW.to(self.device, non_blocking=True)
        if self.config.views.colour == "threads":
            x1_BCHW, x2_BCHW = (normalise(crops, mean, std, dtype) for crops in crops_VBCHW)
        else:
            x1_BCHW, x2_BCHW = (
                photometric(crops, params, mean, std, dtype)
                for crops, params in zip(crops_VBCHW, batch.params_VBP, strict=True)
            )
        return x1_BCHW, x2_BCHW

    def count_step(self) -> None:
        """A step and its global batch are done."""
        self.step += 1
        self.position += 1

    def return_to(self, saved: Checkpoint) -> None:
        """Be as a checkpoint of this run says, but go on with the batch after the present one."""
        for name, buffer in self.engine.module.base.named_buffers():
            buffer.copy_(saved.tensor("base", name))
        _restore(self, saved)
        kept = {name: self.guard.state()[name] for name in ("count", "left_out", "returned_to")}
        before = saved.state.get("trouble", {})
        self.guard = Guard(self.config.trouble, {**before, **kept})
        self.watch.close()
        self.watch = self.open_watch(saved)
        self.step, self.position = saved.step, max(saved.position, self.position + 1)
        bad = _merged(ranks.gather_objects(self.stream.bad))
        self.stream.close()
        self.stream = self.open_stream(self.position, bad)

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint of everything the run needs to go on; all ranks must call.

        Args:
            last: nothing is trained after it, so it is waited for.

        Raises:
            ValueError: it could not be written; the former one is in force.
        """
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
            "chunks": {
                **asdict(self.engine.module.chunks),
                **_chunks_depend_on(self.config, self.engine),
            },
            "watch": self.watch.state(),
            "position": self.position,
            "trouble": self.guard.state(),
            "bad_samples": _merged(ranks.gather_objects(self.stream.bad)),
        }
        background = self.config.save.background and not last
        self.save_s += self.saver.save(self.step, groups, state, background=background)

    def stall_s(self) -> float:
        """Seconds that the step loop stood still for checkpoints since this was last asked."""
        seconds, self.save_s = self.save_s, 0.0
        return seconds

    def close(self) -> None:
        """Wait for what is on its way to disk and mirror, and leave data and folder; each rank."""
        self.stream.close()
        self.watch.close()
        self.saver.close()
        run_folder.unlock(self.config.folder)

    def abandon(self) -> None:
        """Leave where the run has failed, which is to be told soon; each rank.

        A checkpoint on its way to the disk gets a moment, its copy to a mirror none.
        """
        self.stream.close()
        self.watch.close()
        self.saver.wait(_LAST_WRITE_S)
        run_folder.unlock(self.config.folder)

    def _base_tensors(self, trained: set[str]) -> Iterator[tuple[str, Tensor]]:
        """fp32 masters of the trained tensors; the frozen ones and buffers as they are.

        The engine keeps frozen weights in low precision alone. Where the momentum encoder's fp32
        copy rounds to the same, that is taken, so that a sitting in bf16 costs them nothing.
        """
        for name, state in self.optimizer.full_state("weight"):
            yield name.removeprefix("base."), state["weight"]
        masters = dict(self.momentum_encoder.full_state())
        for name, tensor in full_tensors(self.engine.module.base):
            if name not in trained:
                master = masters.get(name, tensor)
                same = torch.equal(master.to(tensor.dtype), tensor)
                yield name, master if same else tensor

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

    def plan(self) -> Memory:
        """What the planner thinks this rank holds."""
        return memory.of_a_rank(
            encoder_shape(self.config),
            stage=self.engine.zero_optimization_stage(),
            world_size=ranks.world_size(),
            batch=self.config.batch,
            size=self.dtype.itemsize,
            chunks=self.engine.module.chunks,
            recompute_blocks=self.config.recompute_blocks,
            key_block=self.engine.module.key_block,
            moments=len(self.optimizer.moments),
            bucket=int(self.engine.zero_reduce_bucket_size()),
            on_demand=self.device.type == "cpu",
        )

    def pace(self) -> Pace | None:
        """How fast the planner thinks a step is; None on a CPU and on cards it does not know."""
        if self.device.type != "cuda":
            return None
        card = card_of_device(torch.cuda.get_device_name(self.device))
        if card is None:
            return None
        per_node = min(ranks.local_world_size(), ranks.world_size())
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return pace.of_a_step(
            encoder_shape(self.config),
            Cluster(card, ranks.world_size(), per_node),
            stage=self.engine.zero_optimization_stage(),
            batch=self.config.batch,
            precision=names[self.dtype],
            optimizer=type(self.optimizer).__name__.lower(),
            chunks=self.engine.module.chunks,
            recompute_blocks=self.config.recompute_blocks,
            bucket=int(self.engine.zero_reduce_bucket_size()),
        )

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


def build_job(run: Settings, device: torch.device) -> Run:
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
    if config.compile_blocks and json_config["zero_optimization"]["stage"] == 3:
        raise ValueError(
            "--compile_blocks does not go with ZeRO stage 3, which gathers weights inside of a "
            "block; use --ds zero_optimization.stage=2."
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
    _freeze(base, config)
    rank_batch = config.batch // ranks.world_size()
    model = QueriesToLoss(
        base,
        temperature=config.moco.temperature,
        key_block=config.key_block or chunk_size.fitting_key_block(rank_batch, config.batch),
    )
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(run.engine.get("optimizer"), trained, partial(_rule, config))
    check_response(config, optimizer)
    # the last thing that can be refused is the folder itself
    ranks.first_does(partial(_enter, config, run.as_json(), train_shards.digest))
    saved = checkpoint.newest_of_all_ranks(config.folder)
    if saved is not None:
        load_base(base, saved)
    engine = start_engine(model.to(device), optimizer, json_config)
    momentum_encoder = MomentumEncoder(shape, device=device, dtype=dtype)
    momentum_encoder.start_from(dict(full_tensors(engine.module.base)))
    momentum_encoder.follow(engine.module.base)
    model.chunks = _chunks(config, engine, momentum_encoder, saved)
    if config.compile_blocks:
        compile_blocks(base.backbone)
        compile_blocks(momentum_encoder.backbone)

    def open_stream(position: int, bad_before: dict[int, str]) -> Stream:
        return Stream(
            train_shards,
            views=spec,
            image_size=config.views.image_size,
            global_batch=config.batch,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            seed=config.seed,
            position=position,
            lanes=config.data.lanes,
            pool=config.data.pool,
            threads=config.data.threads,
            augment=config.views.colour == "threads",
            fixed_views=config.views.fixed,
            bad_sample_budget=config.data.max_bad_samples,
            bad_samples=config.folder / "bad_samples.jsonl",
            bad_before=bad_before,
            cache=_cache(config),
            pin=device.type == "cuda",
        )

    groups = [group_of(name) for name, _ in trained]
    open_watch = partial(Watch, config, optimizer, groups, train_shards)
    state = saved.state if saved is not None else {}
    position = saved.position if saved is not None else 0
    job = Run(
        config=config,
        device=device,
        dtype=dtype,
        engine=engine,
        optimizer=optimizer,
        momentum_encoder=momentum_encoder,
        stream=open_stream(position, _merged([state.get("bad_samples", {})])),
        monitor=_monitor(config, spec, train_shards, probe_shards, device, dtype),
        spec=spec,
        peak_rate=peak_rate,
        total_steps=max(1, round(config.epochs * steps_per_epoch)),
        warmup_steps=config.warmup_epochs * steps_per_epoch,
        step=saved.step if saved else 0,
        saver=_saver(config),
        watch=open_watch(saved),
        guard=Guard(config.trouble, state.get("trouble", {})),
        position=position,
        manifest=train_shards,
        open_stream=open_stream,
        open_watch=open_watch,
    )
    if saved is not None:
        _restore(job, saved)
    return job


def _merged(of_ranks: list[dict[Any, str]]) -> dict[int, str]:
    """Unreadable samples of all ranks; the keys of a JSON object are text."""
    return {int(sample): reason for each in of_ranks for sample, reason in each.items()}


def _enter(config: Config, resolved: dict[str, Any], data: str) -> None:
    """Make the run folder this job's own, and bring it up to its mirror; the first rank alone."""
    if config.save.mirror:
        mirror.check_same(config.save.mirror, resolved, data)
    run_folder.enter(config.folder, resolved, data)
    checkpoint.sweep(config.folder)
    if config.save.mirror:
        mirror.fetch_newer(config.save.mirror, config.folder)


def _saver(config: Config) -> Saver:
    run, save = config.folder, config.save
    # a rewind may need the one before the newest
    least = 2 if config.trouble.policy == "rewind" else 1
    kept = {"keep": max(save.keep, least), "keep_every": save.keep_every}
    copies = mirror.Mirror(save.mirror, run, **kept) if save.mirror else None
    return Saver(run, **kept, host_bytes=int(save.host_gb * 1e9), mirror=copies)


def _chunks(
    config: Config, engine: Any, encoder: MomentumEncoder, saved: Checkpoint | None
) -> Chunks:
    """Chunks as given, as chosen by the last sitting on alike ranks (same bits), or measured."""
    batch = config.batch // ranks.world_size()
    if config.chunk:
        return Chunks(size=config.chunk if config.chunk < batch else 0, kept=config.keep_chunks)
    before = saved.value("chunks") if saved is not None else {}
    conditions = _chunks_depend_on(config, engine)
    if all(before.get(key) == value for key, value in conditions.items()):
        return Chunks(size=before["size"], kept=before["kept"])
    size, parameter = config.views.image_size, next(encoder.parameters())
    room = chunk_size.measure_room(
        encoder,
        torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device),
        batch=batch,
        global_batch=config.batch,
        gradient_bytes=gradient_bytes(engine),
        recompute_blocks=config.recompute_blocks,
    )
    return chunk_size.fitting_chunks(room, batch)


def _chunks_depend_on(config: Config, engine: Any) -> dict[str, Any]:
    """What a sitting may change that decides the chunks, as JSON; all ranks must call.

    It is the same on each rank, so that either all of them measure or none.
    """
    total = min(ranks.gather_objects(chunk_size.total_bytes(ranks.this_device())))
    keys = ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types")
    return {
        "world_size": ranks.world_size(),
        "given": bool(config.chunk),
        "recompute_blocks": config.recompute_blocks,
        "engine": {key: engine.config.get(key) for key in keys},
        # drivers and kernels differ by some MiB in what they keep of the same memory
        "memory_gib": round(total / 2**30),
    }


def encoder_shape(config: Config) -> EncoderShape:
    """Architecture that the settings describe."""
    return EncoderShape(
        vit=config.vit,
        hidden=config.model.hidden,
        out=config.model.out,
        positions=config.model.positions,
        train_patch_projection=config.model.patch_lr > 0,
        drop_path=config.model.drop_path,
        qk_norm=config.model.qk_norm,
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
    if config.data.limit:
        splits = splits[0].first(config.data.limit), splits[1]
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


def _restore(job: Run, saved: Checkpoint) -> None:
    """Optimizer, momentum encoder and k-NN queue as they were."""

    def optimizer_state(name: str) -> dict[str, Tensor]:
        moments = {key: saved.tensor("optimizer", f"{key}/{name}") for key in job.optimizer.moments}
        return {"weight": saved.tensor("base", name.removeprefix("base.")), **moments}

    job.optimizer.load_full_state(optimizer_state, saved.value("optimizer_steps"))
    job.optimizer.load_loss_scale(saved.value("loss_scale"))
    job.momentum_encoder.load_full_state(saved.group("momentum"))
    if job.monitor is not None and saved.names("extra"):
        job.monitor.load_full_state(saved.group("extra"))
    _log.info("continuing %s from step %d", job.config.folder, saved.step)


def _cache(config: Config) -> Cache | None:
    """The local disk's part in reading from object storage."""
    if not config.data.cache:
        return None
    return Cache(Path(config.data.cache).expanduser(), int(config.data.cache_gb * 1e9))


def _freeze(base: BaseEncoder, config: Config) -> None:
    """Take the layer groups whose rate is 0 out of the training."""
    rates = group_rates(config.model)
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and rates[group_of(name)] == 0:
            parameter.requires_grad_(False)


def _rule(config: Config, name: str, shape: tuple[int, ...]) -> Rule:
    """Weight decay, rate and trust-ratio rule of one tensor."""
    matrix = len(shape) > 1 and not name.endswith("cls_token")
    group = group_of(name)
    patch_lr = config.model.patch_lr if group == "patch_embed" else 1.0
    return Rule(
        decay=matrix or config.decay == "all",
        lr_multiplier=patch_lr * group_rates(config.model)[group],
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
        momentum_encoder=config.knn.momentum_encoder,
    )
