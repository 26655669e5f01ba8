"""Features of a split, computed on ranks that hold different numbers of images."""

import io
from pathlib import Path

import torch
from PIL import Image

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed import ranks
from mocov3_ds.evaluation.features import extract_features, join_ranks, make_inputs, split_features
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks


def flat_image(value: int) -> bytes:
    """A grey image without noise."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def uneven_extract() -> list[torch.Tensor]:
    """Rank 0 holds 3 batches, rank 1 one small one."""
    ids = [torch.tensor([0, 2]), torch.tensor([4, 6]), torch.tensor([7])]
    if ranks.rank() == 1:
        ids = [torch.tensor([1, 3, 5])]
    batches = [(i.float()[:, None], i * 10, i) for i in ids]
    backbone = torch.nn.Linear(1, 2)
    torch.nn.init.ones_(backbone.weight)
    torch.nn.init.zeros_(backbone.bias)
    return list(join_ranks(*extract_features(backbone, batches, lambda x: x)))


def test_features_of_all_ranks_are_joined_once_each() -> None:
    for features, labels, ids in run_ranks(2, uneven_extract):
        assert ids.tolist() == list(range(8))
        assert labels.tolist() == [10 * i for i in range(8)]
        assert torch.equal(features[:, 0], ids.float())


class MeanColour(torch.nn.Module):
    """Features that are the mean of each channel, which centre crops of flat images keep."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.scale * images.mean((2, 3))


def test_a_split_is_read_once_in_the_order_of_its_ids(tmp_path: Path) -> None:
    manifest = make_set(str(tmp_path), [7, 4], lambda number: flat_image(20 * number), 3)
    backbone = MeanColour()
    features, labels, ids = split_features(backbone, manifest, image_size=8, batch=3, threads=2)
    assert backbone.training  # as before
    assert ids.tolist() == list(range(11))
    assert labels.tolist() == [number % 3 for number in range(11)]
    mean, std = torch.tensor(ViewSpec.mean), torch.tensor(ViewSpec.std)
    grey = torch.arange(11)[:, None] * 20 / 255
    torch.testing.assert_close(features.detach(), (grey - mean) / std, atol=1e-5, rtol=1e-5)
    part, _, part_ids = split_features(backbone, manifest, image_size=8, limit=4)
    assert len({*part_ids.tolist()}) == 4
    assert torch.equal(part, features[part_ids])


def extract_two(url: str) -> str:
    try:
        split_features(MeanColour(), manifests.load(url), image_size=8, limit=1)
    except ValueError as error:
        return str(error)
    return ""


def test_more_ranks_than_samples_are_refused(tmp_path: Path) -> None:
    make_set(str(tmp_path), [3], lambda number: flat_image(number), 3)
    for sentence in run_ranks(2, extract_two, str(tmp_path)):
        assert sentence.endswith("gives 1 samples to 2 ranks; use fewer ranks.")


def test_inputs_are_normalised_by_the_imagenet_statistics() -> None:
    crops = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    black, white = make_inputs(crops)[:, :, 0, 0]
    mean, std = torch.tensor(ViewSpec.mean), torch.tensor(ViewSpec.std)
    torch.testing.assert_close(black, -mean / std)
    torch.testing.assert_close(white, (1 - mean) / std)
