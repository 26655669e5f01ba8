"""What do the linear probe and fine-tuning share? Training a classifier on an encoder, and judging.

Both run on one process or many (`accelerate launch`), read the same labelled images, save their
state after an epoch, go on from it when the same command is given again, and write their accuracy
to results.json. `SupervisedRun` does that; a protocol adds its network, its step and its schedule.

Shape suffixes: B = images of a batch, C H W = image, M = classifiers that are judged at once,
N = held-out images.
"""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from mocov3_ds.data.storage import StorageError
from mocov3_ds.data.storage.atomic import replace_when_whole
from mocov3_ds.data.storage.tensor_file import save_tensors
from mocov3_ds.distributed import devices, ranks
from mocov3_ds.encoders.load import read_weights
from mocov3_ds.evaluation import results
from mocov3_ds.evaluation.features import Batch, join_ranks, show_progress
from mocov3_ds.evaluation.flags import Precision, SupervisedConfig
from mocov3_ds.evaluation.labelled_images import (
    ImageMaker,
    UnreadableSample,
    choose_split_urls,
    draw_epoch_order,
    open_splits,
    read_batches,
    split_into_passes,
)
from mocov3_ds.evaluation.per_class import write_class_table
from mocov3_ds.model.shapes import write_size
from mocov3_ds.settings.bounds import check_bounds
from mocov3_ds.settings.comparison import differences
from mocov3_ds.settings.environment import check_environment

CHANGEABLE_ON_RESUME = frozenset(
    {
        *("run", "out", "train", "val", "micro_batch", "workers"),
        *("stop_after_epochs", "judge_every_epochs", "save_every_epochs", "per_class"),
        "probe",  # each kind has a state file of its own
    }
)
"""Settings that decide no number of the result, so that a resumed run may change them. The shards
may move, too: their digests, which are compared as well, say whether they hold the same images."""


ConfigT = TypeVar("ConfigT", bound=SupervisedConfig)


class SupervisedRun(ABC, Generic[ConfigT]):
    """A classifier in training: each rank makes one and calls `run`.

    Args:
        config: settings as the user gave them.

    Raises:
        ValueError: settings that cannot be, no encoder, no labelled images.
    """

    name: ClassVar[results.Evaluation]
    """name in results.json and of the state file"""
    title: ClassVar[str]
    """what messages call the run"""
    required: ClassVar[tuple[str, ...]]
    """names of values and tensors that a state file must hold"""
    save_every_epochs = 1
    """epochs between saved states"""

    def __init__(self, config: ConfigT) -> None:
        self.accelerator = start_accelerator(config.precision)
        self.device: torch.device = self.accelerator.device
        self.weights = read_weights(config.run, config.which, heads=config.heads)
        self.config = config = self.resolve(config)
        if min(config.batch, config.micro_batch, config.epochs) < 1:
            raise ValueError(
                f"batch {config.batch}, micro_batch {config.micro_batch} and epochs "
                f"{config.epochs} must be 1 at least."
            )
        check_bounds(config)
        self.size = self.weights.size_for(config.image_size)
        self.splits = open_splits(*choose_split_urls(self.weights, config.train, config.val))
        self.folder = config.out or results.results_folder(self.weights.path)
        self.state_file = self.folder / f"{self.name}-{config.which}.safetensors"
        self.epochs_done = 0

    @abstractmethod
    def resolve(self, config: ConfigT) -> ConfigT:
        """Check the settings and fill in those that depend on the encoder or on the ranks."""

    @abstractmethod
    def train_epoch(self, *, final: bool) -> str:
        """Train one epoch; a line that says how it went.

        Args:
            final: whether this is the last epoch before the run is judged.
        """

    @abstractmethod
    def judge(self) -> tuple[dict[str, Any], str]:
        """Accuracy on the held-out images: JSON values, `top1` among them, and lines to print."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which `load_state` continues."""

    @abstractmethod
    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from what `state` returned; the tensors are on the CPU."""

    def run(self) -> dict[str, Any]:
        """Train to the end, or to `stop_after_epochs`, and judge; the entry of results.json."""
        config, settings = self.config, self.describe_settings()
        self._resume(settings)
        last = config.stop_after_epochs or config.epochs
        while self.epochs_done < last:
            summary = self.train_epoch(final=self.epochs_done + 1 == last)
            self.epochs_done += 1
            if ranks.is_first():
                if self.epochs_done == last or self.epochs_done % self.save_every_epochs == 0:
                    self._save(settings)
                tqdm.write(f"epoch {self.epochs_done}/{config.epochs}: {summary}")
            ranks.barrier()
        accuracy, text = self.judge()
        entry = {
            **accuracy,
            "encoder": self.weights.title,
            "epochs_done": self.epochs_done,
            "val_images": self.splits.val.samples,
            **settings,
        }
        if ranks.is_first():
            print(text)  # noqa: T201
            if self.epochs_done >= config.epochs:
                results.record_result(self.folder, self.name, config.which, entry)
                print(results.format_table(self.folder, config.which))  # noqa: T201
            else:
                print(f"stopped after epoch {self.epochs_done} of {config.epochs}")  # noqa: T201
        ranks.barrier()
        return entry

    def describe_settings(self) -> dict[str, Any]:
        """Settings that decide the result, as JSON values."""
        config = {k: v for k, v in asdict(self.config).items() if k not in CHANGEABLE_ON_RESUME}
        return {
            **json.loads(json.dumps(config)),
            "image_size": write_size(self.size),
            "step": self.weights.saved.step if self.weights.saved is not None else None,
            "train": self.splits.train.digest,
            "val": self.splits.val.digest,
        }

    def _save(self, settings: dict[str, Any]) -> None:
        """Write the state file: tensors by name, JSON values as the file's metadata."""
        tensors, values = self.state()
        values |= {"epochs_done": self.epochs_done, "settings": settings}
        metadata = {name: json.dumps(value) for name, value in values.items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_when_whole(self.state_file) as temporary:
            save_tensors(tensors, temporary, metadata)

    def _resume(self, settings: dict[str, Any]) -> None:
        """Continue from the state file, if there is one.

        Raises:
            ValueError: the file is damaged or foreign, or it was written with other settings.
        """
        path = self.state_file
        if not path.exists():
            return
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                values = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
            missing = {"epochs_done", "settings", *self.required} - {*tensors} - {*values}
            if missing:
                raise KeyError(*sorted(missing))
        except Exception as error:  # a damaged file can raise almost anything
            raise ValueError(
                f"{path} is no {self.title} of ours ({error}); move it away."
            ) from None
        if changes := ", ".join(differences(values["settings"], settings)):
            raise ValueError(
                f"{path} holds a {self.title} with other settings: {changes}. Give --out another "
                "folder, or remove it."
            )
        self.load_state(tensors, values)
        self.epochs_done = values["epochs_done"]

    def open_epoch(
        self,
        make_image: ImageMaker,
        *,
        images_per_pass: int,
        drop_last: bool = False,
        repeats: int = 1,
        held_out: bool = False,
    ) -> tuple[list[int], Iterator[Batch]]:
        """The training images of the epoch that comes next, or the held-out images in one step.

        Args:
            make_image: turns the bytes of a sample into an image.
            images_per_pass: most images in one forward pass of this rank.
            drop_last: whether a last step with fewer than `batch` images is left out.
            repeats: crops of one image in an epoch of constant length; 1 = none.
            held_out: whether to read the held-out images, in the order of epoch 0.

        Returns:
            Number of passes in each step of this rank, and the batches of all passes.
        """
        config, manifest, epoch = self.config, self.splits.train, self.epochs_done
        batch, title = config.batch, f"{self.title}, epoch {epoch + 1}"
        if held_out:
            manifest, epoch, title = self.splits.val, 0, "held-out images"
            batch = manifest.samples
        order_N = draw_epoch_order(manifest.samples, config.seed, epoch, repeats)
        steps = split_into_passes(
            order_N,
            batch=batch,
            micro_batch=images_per_pass,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            drop_last=drop_last,
        )
        passes = [positions for step in steps for positions in step]
        pin, workers = self.device.type == "cuda", config.workers
        batches = read_batches(
            manifest, make_image, order_N, passes, epoch=epoch, workers=workers, pin=pin
        )
        return [len(step) for step in steps], show_progress(batches, len(passes), title)

    @torch.no_grad()
    def classify_held_out(
        self, make_image: ImageMaker, classify: Callable[[Tensor], Tensor], classifiers: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Classes (N, M) given to the held-out images of all ranks, each once, and labels (N,).

        Args:
            make_image: turns the bytes of a sample into an image.
            classify: images (B, C, H, W) -> classes (M, B).
            classifiers: number M of classifiers.
        """
        _, batches = self.open_epoch(
            make_image, images_per_pass=self.config.micro_batch, held_out=True
        )
        none = torch.zeros(0, dtype=torch.int64, device=self.device)  # a rank may have no images
        classes, labels, ids = [none.new_zeros(0, classifiers)], [none], [none]
        for images_BCHW, labels_B, ids_B in batches:
            classes.append(classify(images_BCHW.to(self.device, non_blocking=True)).T)
            labels.append(labels_B.to(self.device))
            ids.append(ids_B.to(self.device))
        return join_ranks(torch.cat(classes), torch.cat(labels), torch.cat(ids))[:2]

    def write_class_table(self, classes_N: Tensor, labels_N: Tensor) -> None:
        """Write the table of `--per_class`, if it is asked for.

        Args:
            classes_N: class that each held-out image was given.
            labels_N: true class of each image.
        """
        path = self.config.per_class
        if path is not None and ranks.is_first():
            write_class_table(path, classes_N, labels_N, self.splits.train.classes)


def measure_top1(classes_NM: Tensor, labels_N: Tensor) -> Tensor:
    """Top-1 (M,) float64 in percent, on the CPU.

    Args:
        classes_NM: class that each classifier gives each image.
        labels_N: true class of each image.
    """
    return 100.0 * (classes_NM == labels_N[:, None]).sum(0).double().cpu() / len(labels_N)


def start_accelerator(precision: Precision) -> Accelerator:
    """Join the ranks of this launch, on their GPUs or on their CPUs.

    Raises:
        ValueError: fp16 without a GPU, bf16 on a GPU that has none, or a GPU that torch cannot use.
    """
    device = ranks.start()
    gpu = device.type == "cuda"
    if precision == "fp16" and not gpu:
        raise ValueError("fp16 needs a GPU; use --precision fp32 or bf16.")
    if precision == "bf16":
        devices.check_bf16(device)
    if precision == "auto":
        precision = "bf16" if gpu and devices.has_bf16(device) else "fp32"
    return Accelerator(cpu=not gpu, mixed_precision="no" if precision == "fp32" else precision)


def run_command(program: str, evaluate: Callable[[], object]) -> int:
    """Exit status of a command: 0, 2 for bad input or 3 for a diverged run, each with a sentence.

    Args:
        program: name of the command, as error messages begin.
        evaluate: trains and judges, on each rank.
    """
    try:
        check_environment()
        evaluate()
    except (ValueError, StorageError, FloatingPointError) as error:
        if ranks.is_first() or isinstance(error, UnreadableSample):
            print(f"{program}: error: {error}", file=sys.stderr)  # noqa: T201
        return 3 if isinstance(error, FloatingPointError) else 2
    finally:
        ranks.stop()
    return 0
