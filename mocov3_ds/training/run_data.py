"""What a run reads and looks at: its shards, its loader, network inputs, the k-NN monitor.

Shape suffixes: V = the two views, B = rank batch, C H W = image.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor

from mocov3_ds.config.run_config import Config
from mocov3_ds.data.class_names import pair_classes
from mocov3_ds.data.evaluation_batches import evaluation_batches
from mocov3_ds.data.loader import Batch, Loader, LoaderSettings
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.own_space import holds_images
from mocov3_ds.data.shared_set import load_on_ranks
from mocov3_ds.data.storage.cache import Cache
from mocov3_ds.data.views.own_views import load_functions
from mocov3_ds.data.views.photometric import make_views, normalise_crops
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed import ranks
from mocov3_ds.monitoring.knn_monitor import KnnMonitor
from mocov3_ds.settings.paths import expand_user

_log = logging.getLogger("mocov3_ds")


def open_shards(config: Config) -> tuple[Manifest, Manifest | None]:
    """Manifests of the training shards and of the probe shards (None where there are none).

    Images of `--data.images` are sharded on first use; with neither, the tiny recipe draws its
    sample images and shards those. All ranks must call.

    Args:
        config: settings of the run.

    Raises:
        ValueError: no shards, too few samples for a batch, probes without labels or of classes
            that training has not.
    """
    train_url, probe_url = _find_shards(config)
    cache = expand_user(config.data.cache) if config.data.cache else None
    train = load_on_ranks(train_url, cache)
    probes = load_on_ranks(probe_url, cache) if probe_url else None
    if probes is not None and config.knn.probes:
        probes = _pair_probes(train, probes)
    if config.data.limit:
        train = train.first_samples(config.data.limit)
    if train.samples < config.batch:
        raise ValueError(
            f"{train.url} holds {train.samples} samples, fewer than one global "
            f"batch of {config.batch}; lower --batch."
        )
    return train, probes


def _find_shards(config: Config) -> tuple[str, str]:
    """Folders of the training shards and of the probe shards, made where the run makes them."""
    data = config.data
    if data.shards and data.images:
        raise ValueError(
            f"--data.shards {data.shards} and --data.images {data.images} are two training sets; "
            "give one of them."
        )
    if data.shards or data.images:
        train_url = data.shards or _shard_images(data.images, config)
        with_images = ranks.run_on_first(partial(holds_images, data.probe_shards))
        return train_url, (
            _shard_images(data.probe_shards, config) if with_images else data.probe_shards
        )
    if config.recipe != "tiny":
        raise ValueError(
            f"recipe {config.recipe} needs images: --data.images FOLDER, or --data.shards FOLDER "
            "(make the folder with python -m data_prep shard SOURCE FOLDER)."
        )
    from data_prep.drawn_samples import ensure_samples

    folders: tuple[str, str] = ranks.run_on_first(
        partial(ensure_samples, config.runs / "sample-images")
    )
    return folders


def _shard_images(images: str, config: Config) -> str:
    """Shards of a folder of images, made on first use; all ranks must call."""
    from data_prep.own_shards import ensure_shards

    url: str = ranks.run_on_first(partial(ensure_shards, images, config.runs))
    return url


def _pair_probes(train: Manifest, probes: Manifest) -> Manifest:
    """The probes with the class numbers of training, as the k-NN monitor compares them."""
    for manifest in (train, probes):
        if not manifest.has_labels:
            raise ValueError(
                f"{manifest.url} holds samples without labels, which the k-NN monitor needs; "
                "use --knn.probes 0 to run without it."
            )
    try:
        probes, notes = pair_classes(train, probes)
    except ValueError as error:
        raise ValueError(f"{error} --knn.probes 0 runs without the k-NN monitor.") from None
    for note in notes if ranks.is_first() else ():
        _log.warning(note)
    return probes


def view_spec(config: Config) -> ViewSpec:
    """Distribution of the two views that the settings describe.

    Raises:
        ValueError: a share or probability that cannot be, or a function that is not there.
    """
    views = config.views
    shared = {entry.name for entry in fields(ViewSpec)} & {entry.name for entry in fields(views)}
    values = {name: getattr(views, name) for name in shared}
    if views.colour_ops == "off":
        values |= {"saturation": 0.0, "hue": 0.0, "grey_p": 0.0}
    return ViewSpec(**values, functions=load_functions(views.function))


def open_loader(
    config: Config,
    manifest: Manifest,
    spec: ViewSpec,
    device: torch.device,
    position: int,
    bad_samples: Mapping[int, str],
) -> Loader:
    """This rank's batches from a global batch on.

    Args:
        config: settings of the run.
        manifest: manifest of the training shards.
        spec: distribution of the two views.
        device: where the batches go.
        position: global batches gone through.
        bad_samples: unreadable samples that all ranks met so far, id -> reason.

    Raises:
        ValueError: an order of samples that cannot be.
    """
    settings = LoaderSettings(
        views=spec,
        image_size=config.backbone.size,
        global_batch=config.batch,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        seed=config.seed,
        lanes=config.data.lanes,
        pool=config.data.pool,
        threads=config.data.threads,
        augment=config.views.colour == "threads",
        fixed_views=config.views.fixed,
        bad_sample_budget=config.data.max_bad_samples,
        bad_sample_listing=config.folder / "bad_samples.jsonl",
        cache=_open_cache(config),
        device=device,
    )
    return Loader(manifest, settings, position=position, earlier_bad=bad_samples)


def _open_cache(config: Config) -> Cache | None:
    """The local disk's part in reading from object storage."""
    if not config.data.cache:
        return None
    return Cache(expand_user(config.data.cache), int(config.data.cache_gb * 1e9))


def network_views(
    batch: Batch, spec: ViewSpec, device: torch.device, dtype: torch.dtype, *, coloured: bool
) -> tuple[Tensor, Tensor]:
    """Both views (B, C, H, W) of a batch as the network takes them.

    Args:
        batch: uint8 crops and the drawn numbers of this rank.
        spec: distribution of the views, of which mean and standard deviation count here.
        device: where the views are made and stay.
        dtype: dtype of the views, the network's.
        coloured: whether the decode threads have done jitter, grey, blur and solarisation already.
    """
    mean, std = spec.mean, spec.std
    crops_VBCHW = batch.crops_VBCHW.to(device) if batch.copy is None else batch.copy.take()
    views: Iterator[Tensor]
    if crops_VBCHW.is_floating_point():  # of a user's functions: normalised
        views = (crops_BCHW.to(dtype) for crops_BCHW in crops_VBCHW)
    elif coloured:
        views = (normalise_crops(crops_BCHW, mean, std, dtype) for crops_BCHW in crops_VBCHW)
    else:
        views = (
            make_views(crops_BCHW, params_BP, mean, std, dtype)
            for crops_BCHW, params_BP in zip(crops_VBCHW, batch.params_VBP, strict=True)
        )
    x1_BCHW, x2_BCHW = views
    return x1_BCHW, x2_BCHW


def build_knn_monitor(
    config: Config,
    spec: ViewSpec,
    train: Manifest,
    probes: Manifest | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    width: int,
) -> KnnMonitor | None:
    """The k-NN monitor of a run; None without labelled probe images.

    Args:
        config: settings of the run, of which `--knn.*` count.
        spec: distribution of the views, of which mean and standard deviation count here.
        train: manifest of the training shards, a part of which is the bank of full evaluations.
        probes: manifest of the held-out images.
        device: where the features of the queues live.
        dtype: dtype of the network's input.
        width: numbers of an image's features.
    """
    if probes is None or not config.knn.probes:
        return None
    world_size = ranks.world_size()
    bank = config.knn.bank or max(train.samples // 10, 4096)
    bank = min(bank, train.samples) // world_size * world_size
    open_batches = partial(
        evaluation_batches,
        image_size=config.backbone.size,
        channels=spec.channels,
        batch=256,
        rank=ranks.rank(),
        world_size=world_size,
        threads=config.data.threads,
        bad_sample_budget=config.data.max_bad_samples,
        cache=_open_cache(config),
    )

    def prepare_input(crops_BCHW: Tensor) -> Tensor:
        return normalise_crops(crops_BCHW.to(device), spec.mean, spec.std, dtype)

    return KnnMonitor(
        probes=open_batches(probes, limit=config.knn.probes),
        bank=partial(open_batches, train, limit=bank),
        capacity=bank // world_size,
        dim=width,
        k=config.knn.k,
        temperature=config.knn.temperature,
        prepare=prepare_input,
        device=device,
        momentum_encoder=config.knn.momentum_encoder,
    )
