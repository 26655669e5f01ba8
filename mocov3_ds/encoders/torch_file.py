"""What lies in a file of `torch.save`, opened so that nothing of a stranger's runs?

torch's own restricted unpickler builds tensors and plain containers. Checkpoints hold more besides
their weights: the options of the program, numpy numbers, paths, the history of a log. None of it is
needed, so each name of `HARMLESS` is given an empty stand-in written here: the class or function
of that name is never imported and never called. Any other name is refused.
"""

import io
import pickle
import pickletools
import shlex
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_STORED = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.dtypes": "Float64DType Float32DType Float16DType Int64DType Int32DType BoolDType",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "uuid": "UUID",
    "typing": "Any",
    "builtins": "int float bool str bytes tuple frozenset range slice object",
    "torch.torch_version": "TorchVersion",
    "mmengine": "HistoryBuffer",
    "mmengine.logging.history_buffer": "HistoryBuffer",
    "mmengine.logging.message_hub": "MessageHub",
    "mmengine.config.config": "Config",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler DynamicLossScaler",
    "deepspeed.utils.tensor_fragment": "fragment_address",
}
_MAPPINGS = {
    "builtins": "dict",
    "collections": "defaultdict",
    "addict.addict": "Dict",
    "mmengine.config.config": "ConfigDict",
    "mmcv.utils.config": "ConfigDict",
    "yacs.config": "CfgNode",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "lightning.fabric.utilities.data": "AttributeDict",
}
_LISTS = {"builtins": "list", "collections": "deque"}


class StandIn:
    """What a pickle asked for, without anything of it but its attributes.

    Args:
        arguments: what the pickle would have it made of; dropped.
    """

    fields: dict[str, Any]

    def __new__(cls, *arguments: object) -> "StandIn":
        """Make one without attributes, whatever the arguments are."""
        stand_in = super().__new__(cls)
        stand_in.fields = {}
        return stand_in

    def __init__(self, *arguments: object) -> None:
        del arguments

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.fields = {str(name): value for name, value in state.items()}


class _MappingStandIn:
    """A mapping of a special class becomes a plain one; what it was made of is dropped."""

    def __new__(cls, *arguments: object) -> Any:
        return OrderedDict[Any, Any]()


class _ListStandIn(list[Any]):
    def __init__(self, *arguments: object) -> None:
        super().__init__()


def _method_stand_in(owner: object, name: object) -> StandIn:
    """In the place of `getattr`: a history of mmengine keeps methods of its own class by name."""
    if not (isinstance(owner, type) and owner.__name__ == "HistoryBuffer"):
        raise pickle.UnpicklingError("GLOBAL builtins.getattr is not allowed here")
    return StandIn(name)


def _make_stand_ins() -> Iterator[tuple[Any, str]]:
    for table, base in ((_STORED, StandIn), (_MAPPINGS, _MappingStandIn), (_LISTS, _ListStandIn)):
        for module, names in table.items():
            for name in names.split():
                yield type(name, (base,), {}), f"{module}.{name}"
    yield _method_stand_in, "builtins.getattr"


HARMLESS: list[Any] = list(_make_stand_ins())
"""pairs of a stand-in and the name that it stands for"""


def read_torch_file(path: Path) -> Any:
    """The content of a file of `torch.save`, tensors on the CPU, other objects as stand-ins.

    Args:
        path: file to read; old (plain pickle) and new (zip archive) layouts.

    Raises:
        ValueError: no torch file, a damaged one, or one with classes that are not known here.
    """
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every pickle protocol but 2
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = _refused_name(str(error))
        if name or _is_pickle(path):
            raise ValueError(
                "it holds pickled objects besides tensors, which could run code and are not opened "
                f"({name or 'of another pickle protocol than 2'}). Where you trust it, this saves "
                f"its weights alone, which can be read: {_saving_line(path)}"
            ) from None
        raise ValueError(f"it is no torch file ({first_sentence(error)}).") from None
    except Exception as error:  # a damaged archive can raise almost anything
        if "TorchScript" in str(error):
            raise ValueError(
                "it is a TorchScript archive, which is code and is not opened. Where you trust it, "
                f"this saves its weights alone, which can be read: {_saving_line(path, 'jit.')}"
            ) from None
        raise ValueError(
            f"it is no torch file, or a truncated one ({first_sentence(error)})."
        ) from None


def first_sentence(error: BaseException) -> str:
    """The type and the first sentence of an error, on one line."""
    sentence = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
    return f"{type(error).__name__}: {sentence}"


def _refused_name(message: str) -> str:
    """Name of the class or function that torch refused, from its message; empty = none named."""
    for line in message.splitlines():
        if "GLOBAL" in line:
            return repr(line.partition("GLOBAL ")[2].split()[0])
        if "unrecognized function" in line or "allowlisted via" in line:
            return repr(line.strip()[:120])
    return ""


def _is_pickle(path: Path) -> bool:
    """Whether a file is a zip archive or begins with a whole pickle; none of it is executed."""
    try:
        with path.open("rb") as file:
            beginning = file.read(1 << 24)
        if not beginning.startswith(b"PK"):
            for _ in pickletools.genops(io.BytesIO(beginning)):
                pass
    except Exception:  # whatever a file that is no pickle raises
        return False
    return True


def _saving_line(path: Path, loader: str = "") -> str:
    """A line for the shell that writes the tensors of a file into another one."""
    path = path.absolute()
    load = f"torch.jit.load({str(path)!r}, 'cpu')"
    if not loader:
        load = f"torch.load({str(path)!r}, 'cpu', weights_only=False)"
    kinds = "(dict, torch.Tensor, torch.nn.Module)"
    target = path.with_name(path.name.split(".")[0] + "-weights.pth")
    code = (
        "import torch; keep = lambda c: c if torch.is_tensor(c) else {k: keep(v) for k, v in "
        f"(c if isinstance(c, dict) else c.state_dict()).items() if isinstance(v, {kinds})}}; "
        f"torch.save(keep({load}), {str(target)!r})"
    )
    special = any(character in code for character in '"$`\\!')
    return f"python -c {shlex.quote(code)}" if special else f'python -c "{code}"'
