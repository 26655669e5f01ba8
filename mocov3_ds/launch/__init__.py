"""Files that start a run on a cluster, filled in from templates: `mocov3 launch KIND`.

A kit is a folder of `kits/`; `@{name}` in its files is replaced, `@@` is an `@`. Each kit starts
one process a GPU (a rank) on each node with the same flags, which are read here first, so that what
train.py would refuse is refused before a queue was waited for.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal, get_args

from mocov3_ds import config
from mocov3_ds.distributed.engine import engine_config

Kind = Literal["slurm", "kubernetes", "hostfile", "torchrun", "accelerate", "container"]

_KITS = Path(__file__).parent / "kits"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a kit is filled in with."""

    nodes: int = 1
    """machines"""
    gpus: int = 8
    """GPUs, and so ranks, of each"""
    cores: int = 8
    """CPU cores of each rank"""
    hosts: tuple[str, ...] = ()
    """names of the machines, the first of them meets the others; empty = node-0, node-1, ..."""
    cpu: bool = False
    """there are no GPUs: `gpus` counts the ranks of a machine"""
    hours: int = 24
    """time limit of one sitting in Slurm's queue"""
    image: str = "mocov3-ds:latest"
    """container image"""


class _File(Template):
    delimiter = "@"


def write_kit(
    kind: Kind, cluster: Cluster, folder: Path, train_arguments: Sequence[str]
) -> list[Path]:
    """Write the files of a kit into a new folder.

    Args:
        kind: which kit.
        cluster: machines and what they have.
        folder: to make.
        train_arguments: flags of train.py.

    Returns:
        the files, scripts executable.

    Raises:
        ValueError: flags that train.py refuses, a batch that does not divide over the ranks,
            numbers or names that cannot be, a folder that exists.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"there is no kit {kind!r}; there are {', '.join(get_args(Kind))}.")
    run = config.parse(list(train_arguments))
    _check(cluster)
    engine_config(
        run.engine, global_batch=run.config.batch, world_size=cluster.nodes * cluster.gpus
    )
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it or choose another --out.")
    name = run.config.name or run.config.recipe
    values = _values(cluster, folder.resolve(), train_arguments, name)
    folder.mkdir(parents=True)
    sources = sorted((_KITS / kind).iterdir())
    if kind in ("slurm", "hostfile", "torchrun", "accelerate"):
        sources.append(_KITS / "environment.sh")
    written = []
    for source in sources:
        path = folder / source.name
        path.write_text(_File(source.read_text()).substitute(values))
        if path.stem == "train":
            path.chmod(0o755)
        written.append(path)
    return written


def _check(cluster: Cluster) -> None:
    for flag, value in (
        ("nodes", cluster.nodes),
        ("gpus", cluster.gpus),
        ("cores", cluster.cores),
        ("hours", cluster.hours),
    ):
        if value < 1:
            raise ValueError(f"--{flag} {value} cannot be; it must be 1 or more.")
    hosts = cluster.hosts
    if hosts and len(hosts) != cluster.nodes:
        raise ValueError(f"--hosts names {len(hosts)} machines, --nodes says {cluster.nodes}.")
    if len({*hosts}) < len(hosts):
        raise ValueError("--hosts names a machine twice; more ranks on one are --gpus.")
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ValueError(f"--hosts {host!r} is no name or address of a machine.")
    if not re.fullmatch(r"[\w.:/@-]+", cluster.image):
        raise ValueError(f"--image {cluster.image!r} is no name of a container image.")


def _values(
    cluster: Cluster, folder: Path, train_arguments: Sequence[str], name: str
) -> Mapping[str, str | int]:
    hosts = cluster.hosts or tuple(f"node-{index}" for index in range(cluster.nodes))
    module_train = shlex.join(["mocov3_ds.train", *train_arguments])
    torchrun = ["torchrun", "--nnodes", str(cluster.nodes), "--nproc-per-node", str(cluster.gpus)]
    label = _label(name)
    meeting = ["--node-rank", "$(NODE_RANK)", "--master-addr", f"{label}-0.{label}"]
    patience = ["--master-port", "29500", "--shutdown-timeout", "540"]
    limits = {} if cluster.cpu else {"nvidia.com/gpu": str(cluster.gpus)}
    # Kubernetes replaces $(NAME) and takes $$ for a $
    flags = [argument.replace("$", "$$") for argument in train_arguments]
    again = ["--stopped_status", "75"]
    return {
        "name": label,
        "nodes": cluster.nodes,
        "last_node": cluster.nodes - 1,
        "ranks": cluster.gpus,
        "world": cluster.nodes * cluster.gpus,
        "cores": cluster.cores,
        "node_cores": cluster.gpus * cluster.cores,
        "hours": cluster.hours,
        "image": cluster.image,
        "folder": shlex.quote(str(folder)),
        "gpu_line": "# no GPUs" if cluster.cpu else f"#SBATCH --gpus-per-node={cluster.gpus}",
        "host_lines": "\n".join(f"{host} slots={cluster.gpus}" for host in hosts),
        "host_list": ",".join(hosts),
        "first_host": hosts[0],
        "limits": json.dumps(limits),
        "train": shlex.join(["python", "-m", "mocov3_ds.train", *train_arguments]),
        "module_train": module_train,
        "train_json": json.dumps([*train_arguments]),
        "command": json.dumps(
            [*torchrun, *meeting, *patience, "-m", "mocov3_ds.train", *again, *flags]
        ),
    }


def _label(name: str) -> str:
    """A name that DNS and Slurm take."""
    return ("mocov3-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))[:48].rstrip("-")
