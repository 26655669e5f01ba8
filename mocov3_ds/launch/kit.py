"""What files start a run on a cluster? `mocov3 launch KIND` fills them in from templates.

A kit is a folder of `kits/`; `@{name}` in its files is replaced, `@@` is an `@`. Each kit starts
one process a GPU (a rank) on each node with the same flags. The flags are read here first, so that
a mistake is reported at once and not after hours in a queue.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated, Literal, get_args

import tyro

from mocov3_ds import recipes
from mocov3_ds.distributed.engine_config import engine_config

Kind = Literal["slurm", "kubernetes", "hostfile", "torchrun", "accelerate", "container"]

_KITS = Path(__file__).parent / "kits"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_STOPPED_STATUS = 75
"""exit status of train.py in a pod that was told to leave: not 0, so that Kubernetes starts it
again"""


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """What the machines of a cluster are and have."""

    nodes: int = 1
    """machines"""
    gpus: int = 8
    """GPUs, and so ranks, of each machine"""
    cores: int = 8
    """CPU cores of each rank"""
    hosts: tuple[str, ...] = ()
    """names of the machines; all ranks connect to the first one; empty = node-0, node-1, ..."""
    cpu: bool = False
    """the machines have no GPUs: `gpus` counts the ranks of a machine"""
    hours: int = 24
    """time limit in Slurm's queue, from one start of the run to its next stop"""
    image: str = "mocov3-ds:latest"
    """container image"""


def write_launch_files(
    kind: Annotated[Kind, tyro.conf.Positional],
    train: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    cluster: Annotated[LaunchSettings, tyro.conf.arg(name="")] = LaunchSettings(),
    out: Path | None = None,
) -> None:
    """Write the files that start a run on a cluster.

        mocov3 launch slurm --nodes 4 --gpus 8 -- --recipe vit_l16 --data.shards s3://bucket/imagenet

    Args:
        kind: Slurm, plain Kubernetes, DeepSpeed's own launcher over ssh, torchrun or accelerate on
            each node, or the file that builds a container image.
        train: flags of train.py, after --
        cluster: the machines and what they have.
        out: folder to make; empty = launch-KIND.
    """
    folder = out or Path(f"launch-{kind}")
    for path in write_kit(kind, cluster, folder, train):
        print(path)  # noqa: T201


class _KitTemplate(Template):
    delimiter = "@"


def write_kit(
    kind: Kind, settings: LaunchSettings, folder: Path, train_arguments: Sequence[str]
) -> list[Path]:
    """Write the files of a kit into a new folder.

    Args:
        kind: which of the kits to write, the name of a folder in `kits/`.
        settings: the machines and what they have.
        folder: the new folder of the kit; it must not exist.
        train_arguments: command-line flags that train.py is started with.

    Returns:
        The files; scripts are executable.

    Raises:
        ValueError: train.py refuses the flags, the batch does not divide over the ranks, a number
            or a name is impossible, or the folder exists.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"there is no kit {kind!r}; there are {', '.join(get_args(Kind))}.")
    run = recipes.parse(list(train_arguments))
    _check_settings(settings)
    engine_config(
        run.engine, global_batch=run.config.batch, world_size=settings.nodes * settings.gpus
    )
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it or choose another --out.")
    if any("\ud800" <= letter <= "\udfff" for letter in str(folder.resolve())):
        raise ValueError(
            f"{str(folder.resolve())!r} is not UTF-8 text, which no script can name; make the kit "
            "in another folder."
        )
    name = run.config.name or run.config.recipe
    values = {
        **_template_values(settings, folder.resolve(), train_arguments, name),
        "run": shlex.quote(str(run.config.folder)),
    }
    folder.mkdir(parents=True)
    sources = sorted((_KITS / kind).iterdir())
    if kind in ("slurm", "hostfile", "torchrun", "accelerate"):
        sources.append(_KITS / "environment.sh")
    paths = []
    for source in sources:
        path = folder / source.name
        path.write_text(_KitTemplate(source.read_text()).substitute(values))
        if path.stem == "train":
            path.chmod(0o755)
        paths.append(path)
    return paths


def _check_settings(settings: LaunchSettings) -> None:
    for flag in ("nodes", "gpus", "cores", "hours"):
        value = getattr(settings, flag)
        if value < 1:
            raise ValueError(f"--{flag} {value} cannot be; it must be 1 or more.")
    hosts = settings.hosts
    if hosts and len(hosts) != settings.nodes:
        raise ValueError(f"--hosts names {len(hosts)} machines, --nodes says {settings.nodes}.")
    if len({*hosts}) < len(hosts):
        raise ValueError("--hosts names a machine twice; more ranks on one are --gpus.")
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ValueError(f"--hosts {host!r} is no name or address of a machine.")
    if not re.fullmatch(r"[a-zA-Z0-9](?:[\w.:/@-]*[a-zA-Z0-9_])?", settings.image):
        raise ValueError(f"--image {settings.image!r} is no name of a container image.")


def _template_values(
    settings: LaunchSettings, folder: Path, train_arguments: Sequence[str], name: str
) -> Mapping[str, str | int]:
    hosts = settings.hosts or tuple(f"node-{index}" for index in range(settings.nodes))
    label = _dns_label(name)
    limits = {} if settings.cpu else {"nvidia.com/gpu": str(settings.gpus)}
    return {
        "name": label,
        "nodes": settings.nodes,
        "last_node": settings.nodes - 1,
        "ranks": settings.gpus,
        "world": settings.nodes * settings.gpus,
        "cores": settings.cores,
        "node_cores": settings.gpus * settings.cores,
        "hours": settings.hours,
        "image": settings.image,
        "image_text": json.dumps(settings.image),
        "folder": shlex.quote(str(folder)),
        "gpu_line": "# no GPUs" if settings.cpu else f"#SBATCH --gpus-per-node={settings.gpus}",
        "host_lines": "\n".join(f"{host} slots={settings.gpus}" for host in hosts),
        "host_list": ",".join(hosts),
        "first_host": hosts[0],
        "first_host_text": json.dumps(hosts[0]),
        "limits": json.dumps(limits),
        "train": shlex.join(["python", "-m", "mocov3_ds.train", *train_arguments]),
        "module_train": shlex.join(["mocov3_ds.train", *train_arguments]),
        "train_json": json.dumps([*train_arguments]),
        "command": json.dumps(_pod_command(settings, label, train_arguments)),
    }


def _pod_command(settings: LaunchSettings, label: str, train_arguments: Sequence[str]) -> list[str]:
    """Command line of a pod; all pods connect to the first, `LABEL-0` of the service `LABEL`."""
    return [
        *("torchrun", "--nnodes", str(settings.nodes), "--nproc-per-node", str(settings.gpus)),
        *("--node-rank", "$(NODE_RANK)", "--master-addr", f"{label}-0.{label}"),
        *("--master-port", "29500", "--shutdown-timeout", "540"),
        *("-m", "mocov3_ds.train", "--stopped_status", str(_STOPPED_STATUS)),
        # Kubernetes replaces $(NAME) and takes $$ for a $
        *(argument.replace("$", "$$") for argument in train_arguments),
    ]


def _dns_label(name: str) -> str:
    """The name of a run as DNS and Slurm allow it."""
    return ("mocov3-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))[:48].rstrip("-")
