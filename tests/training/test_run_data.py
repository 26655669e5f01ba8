"""Shards that cannot be trained on, the views of the settings, network inputs from crops."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mocov3_ds.config.parts import DataConfig, KnnConfig, ViewConfig
from mocov3_ds.config.run_config import Config
from mocov3_ds.config.stored import from_json
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.loader import Batch
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.views.draw import draw_views
from mocov3_ds.data.views.photometric import make_views, normalise_crops
from mocov3_ds.data.views.spec import PARAMETERS, ViewSpec
from mocov3_ds.evaluation.labelled_images import shards_of_run
from mocov3_ds.recipes import parse
from mocov3_ds.training import run_data
from mocov3_ds.training.run_data import network_views, open_shards, view_spec
from tests.data.sets import make_set, picture


def config_of(folder: Path, *, probes: bool = False, **changes: object) -> Config:
    data = DataConfig(
        shards=str(folder / "train"), probe_shards=str(folder / "probes") if probes else ""
    )
    return replace(Config(recipe="tiny", batch=16, data=data), **changes)


def test_shards_of_the_settings(tmp_path: Path) -> None:
    make_set(str(tmp_path / "train"), [20, 7])
    make_set(str(tmp_path / "probes"), [9])
    train, probes = open_shards(config_of(tmp_path))
    assert (train.samples, probes) == (27, None)
    train, probes = open_shards(config_of(tmp_path, probes=True))
    assert probes is not None and probes.samples == 9
    data = DataConfig(shards=str(tmp_path / "train"), limit=18)
    train, _ = open_shards(config_of(tmp_path, data=data))
    assert train.samples == 18
    with pytest.raises(ValueError, match="fewer than one global batch of 28; lower --batch"):
        open_shards(config_of(tmp_path, batch=28))
    with pytest.raises(ValueError, match=r"recipe vit_b16 needs images: --data\.images FOLDER, or"):
        open_shards(Config(recipe="vit_b16"))


def test_images_are_sharded_on_first_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "photos"
    for number in range(20):
        path = images / f"{'ab'[number % 2]}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    config = config_of(tmp_path, data=DataConfig(images=str(images)), runs=tmp_path / "runs")
    train, probes = open_shards(config)
    assert (train.samples, train.classes, probes) == (20, ("a", "b"), None)
    assert Path(train.url).parent == tmp_path / "runs" / "sharded-images"
    assert "sharding these images once" in capsys.readouterr().out
    assert open_shards(config)[0].digest == train.digest
    probes_of = config_of(
        tmp_path,
        data=DataConfig(images=str(images), probe_shards=str(images)),
        runs=tmp_path / "runs",
    )
    _, probes = open_shards(probes_of)
    assert probes is not None and probes.digest == train.digest
    assert shards_of_run(probes_of, tmp_path / "runs") == (train.url, train.url)
    with pytest.raises(ValueError, match="are two training sets; give one of them"):
        open_shards(config_of(tmp_path, data=DataConfig(images=str(images), shards="x")))


def test_the_monitor_needs_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(str(tmp_path / "train"), [20])
    make_set(str(tmp_path / "probes"), [9])
    monkeypatch.setattr(Manifest, "has_labels", property(lambda self: "probes" not in self.url))
    with pytest.raises(ValueError, match=r"probes holds samples without labels.*--knn.probes 0"):
        open_shards(config_of(tmp_path, probes=True))
    _, probes = open_shards(config_of(tmp_path, probes=True, knn=KnnConfig(probes=0)))
    assert probes is not None


def test_probes_get_the_class_numbers_of_training(tmp_path: Path) -> None:
    train, probes = (make_set(str(tmp_path / name), [20]) for name in ("train", "probes"))
    config = config_of(tmp_path, probes=True)
    manifests.write(train.url, train.shards, train.index_N, classes=[*"abcdefghij"])
    manifests.write(probes.url, probes.shards, probes.index_N, classes=[*"bcdefghija"])
    _, paired = open_shards(config)
    wanted = [(label + 1) % 10 for label in probes.index_N["label"].tolist()]
    assert paired is not None and paired.index_N["label"].tolist() == wanted
    manifests.write(probes.url, probes.shards, probes.index_N, classes=[*"zcdefghija"])
    with pytest.raises(ValueError, match=r"1 classes of which .* has none: 'z'.*--knn.probes 0 "):
        open_shards(config)


def test_views_of_the_settings() -> None:
    views = ViewConfig(crop_min=0.3, crop_max=0.9, blur_p=(0.5, 0.1), solarise_p=(0.0, 0.4))
    assert view_spec(Config(views=views)) == ViewSpec(
        crop_min=0.3, crop_max=0.9, blur_p=(0.5, 0.1), solarise_p=(0.0, 0.4)
    )
    with pytest.raises(ValueError, match=r"crops from 1\.5 to 1\.0 of the image area"):
        view_spec(Config(views=ViewConfig(crop_min=1.5)))


def drawn_batch(spec: ViewSpec) -> Batch:
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (2, 5, 3, 8, 8), generator=generator, dtype=torch.uint8)
    params = torch.empty(2, 5, PARAMETERS)
    for row in range(5):
        *_, drawn = draw_views(spec, 0, 0, row, 8, 8)
        params[:, row] = torch.as_tensor(drawn)
    empty = torch.zeros(5, dtype=torch.long)
    return Batch(crops, params, empty, empty, 0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_views_are_the_two_views_in_order(dtype: torch.dtype) -> None:
    spec, device = ViewSpec(), torch.device("cpu")
    batch = drawn_batch(spec)
    coloured = network_views(batch, spec, device, dtype, coloured=True)
    made = network_views(batch, spec, device, dtype, coloured=False)
    for view, (plain, full) in enumerate(zip(coloured, made, strict=True)):
        crops_BCHW, params_BP = batch.crops_VBCHW[view], batch.params_VBP[view]
        assert torch.equal(plain, normalise_crops(crops_BCHW, spec.mean, spec.std, dtype))
        assert torch.equal(full, make_views(crops_BCHW, params_BP, spec.mean, spec.std, dtype))
        assert plain.dtype == full.dtype == dtype
        assert not torch.equal(plain, full)


def test_no_monitor_without_probes(tmp_path: Path) -> None:
    train = make_set(str(tmp_path / "train"), [20])
    cpu = torch.device("cpu")
    for probes, knn in ((None, KnnConfig()), (train, KnnConfig(probes=0))):
        config = config_of(tmp_path, knn=knn)
        monitor = run_data.build_knn_monitor(
            config, ViewSpec(), train, probes, cpu, torch.float32, width=32
        )
        assert monitor is None


def test_the_flags_of_the_views_are_the_distribution() -> None:
    assert view_spec(Config()) == ViewSpec()
    flags = [
        *("--views.channels", "2", "--views.mean", "0.1", "0.2", "--views.std", "0.3", "0.4"),
        *("--views.colour_ops", "off", "--views.aspect", "0.5", "2", "--views.jitter_p", "0.7"),
        *("--views.brightness", "0.6", "--views.contrast", "0.5", "--views.flip_p", "0"),
        *("--views.blur_sigma", "0.2", "3", "--views.solarise_threshold", "99"),
        *("--views.blur_p", "0.5", "0.6", "--views.solarise_p", "0.1", "0.3"),
        *("--views.crop_min", "0.2", "--views.crop_max", "0.9", "--views.image_size", "64x32"),
    ]
    config = parse(flags).config
    assert view_spec(config) == ViewSpec(
        mean=(0.1, 0.2), std=(0.3, 0.4), saturation=0.0, hue=0.0, grey_p=0.0, aspect=(0.5, 2.0),
        jitter_p=0.7, brightness=0.6, contrast=0.5, flip_p=0.0, blur_sigma=(0.2, 3.0),
        solarise_threshold=99, blur_p=(0.5, 0.6), solarise_p=(0.1, 0.3), crop_min=0.2, crop_max=0.9,
    )  # fmt: skip
    assert (config.vit.size, config.vit.channels) == ((64, 32), 2)
    stored = json.loads(json.dumps(parse(flags).as_json()))
    assert from_json(stored) == replace(config, ds=())
    functions = view_spec(parse(["--views.function", f"{__name__}:picture"]).config).functions
    assert functions == (picture, picture)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--views.channels", "1"], "--views.mean has 3 numbers for --views.channels 1"),
        (["--views.std", "1", "1"], "--views.std has 2 numbers for --views.channels 3"),
        (
            ["--views.channels", "1", "--views.mean", "0.5", "--views.std", "0.2"],
            "are of RGB alone; give --views.colour_ops off",
        ),
        (["--views.image_size", "64x"], "write the side of a square .* or HEIGHTxWIDTH"),
        (["--views.image_size", "0x64"], "each from 1 to 16384"),
        (["--views.image_size", "0"], "--views.image_size 0 cannot be"),
        (["--views.hue", "0.7"], "--views.hue 0.7 cannot be"),
        (["--views.function", "a:b", "a:c", "a:d"], "names 3 functions"),
        (["--views.function", "a:b", "--views.hue", "0.2"], "--views.hue has no effect beside"),
        (["--views.solarise_threshold", "256"], "solarise_threshold 256 cannot be"),
    ],
)
def test_views_that_cannot_be_are_refused_with_the_flag(flags: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(flags)
