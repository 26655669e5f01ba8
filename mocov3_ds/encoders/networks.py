"""Which networks lie in a file, and what else? Told by the names of its tensors alone.

A file holds mappings within mappings: `{"state_dict": {"module.base_encoder.cls_token": ...}}`. Its
tensors are named by the whole way to them, with dots, so that `state_dict.module.base_encoder.` and
`teacher.backbone.` are prefixes of the same kind. Words are whole words between dots, underscores
and hyphens: "ema" is not found in "semantic_encoder".
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.encoders.choices import EncoderRole

Tensors = Mapping[str, Tensor]

CLASS_TOKEN = "cls_token"

_DEEPEST = 16  # mappings within mappings; a stranger's file could hold itself
_AVERAGES = frozenset(
    [
        "momentum",
        "ema",
        "teacher",
        "target",
        "averaged",
        "average",
        "avg",
        "swa",
        "shadow",
        "polyak",
    ]
)
_NETWORK = "(encoder|model|backbone|net|network|branch|vit)"
_KEY_ENCODER = re.compile(rf"(^|\.)({_NETWORK}_(k|key)|(k|key)_{_NETWORK})(\.|$)", re.ASCII)
_NO_NETWORKS = frozenset(["optimizer", "optimizers", "optim", "exp", "grad", "grads", "scheduler"])
_HEADS = frozenset(
    [
        "head",
        "heads",
        "classifier",
        "classifiers",
        "fc",
        "linear",
        "projector",
        "projection",
        "predictor",
        "predictors",
        "decoder",
        "pooler",
        "neck",
        "mask",
        "queue",
        "prototypes",
        "logits",
        "pre_logits",
        "loss",
        "criterion",
        "center",
        "optimizer",
        "scaler",
        "scheduler",
        "dino",
        "ibot",
        "lm",
        "cls_head",
        "epoch",
    ]
)
_IS_PART = re.compile(r"fc_norm|(dist|distillation)_token", re.ASCII)
"""parts of a backbone although a word of them is a head's"""


def flatten_tensors(tree: Mapping[Any, Any]) -> dict[str, Tensor]:
    """All tensors in mappings within mappings, by their names joined with dots.

    Args:
        tree: what a file holds; values that are neither tensors nor mappings are passed over.

    Raises:
        ValueError: two tensors of one name, or mappings too deep.
    """
    tensors: dict[str, Tensor] = {}
    level: list[tuple[str, Mapping[Any, Any]]] = [("", tree)]
    for _ in range(_DEEPEST):
        deeper: list[tuple[str, Mapping[Any, Any]]] = []
        for prefix, mapping in level:
            for key, value in mapping.items():
                name = f"{prefix}{key}"
                if isinstance(value, Mapping):
                    deeper.append((f"{name}.", value))
                elif isinstance(value, Tensor):
                    if name in tensors:
                        raise ValueError(f"two of its tensors are called {name!r}.")
                    tensors[name] = value
        level = deeper
        if not level:
            return tensors
    raise ValueError(f"its mappings lie more than {_DEEPEST} deep within each other.")


def describe_tree(tree: Mapping[Any, Any]) -> str:
    """What lies in a file on its first level, in words: `'epoch' (int), 'args' (Namespace)`."""
    entries = [f"{str(key)[:40]!r} ({_describe_value(value)})" for key, value in tree.items()]
    return ", ".join(entries[:8]) + " ..." * (len(entries) > 8) if entries else "nothing at all"


def _describe_value(value: object) -> str:
    if isinstance(value, Mapping):
        tensors = sum(isinstance(entry, Tensor) for entry in value.values())
        return f"{tensors} tensors" if tensors else f"mapping of {len(value)}"
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


def find_prefixes(tensors: Tensors) -> list[str]:
    """The texts in front of all names of a Vision Transformer, one for each that is there."""
    return [
        name.removesuffix(CLASS_TOKEN).removesuffix("embeddings.")
        for name in tensors
        if name.rpartition(".")[2] == CLASS_TOKEN and not _split_words(name) & _NO_NETWORKS
    ]


def is_average(prefix: str) -> bool:
    """Whether the words of a prefix are those of a moving average: `model_ema.`, `encoder_k.`."""
    return bool(_split_words(prefix) & _AVERAGES or _KEY_ENCODER.search(prefix.lower()))


def choose_prefix(tensors: Tensors, role: EncoderRole) -> str:
    """The text in front of all names of one encoder.

    Args:
        tensors: tensors of a file by their whole names.
        role: encoder to choose from a file that holds two.

    Raises:
        ValueError: no such encoder, or several that differ.
    """
    prefixes = find_prefixes(tensors)
    if not prefixes:
        raise ValueError(
            f"no Vision Transformer with a class token is in it; its {len(tensors)} tensors are "
            f"{', '.join(f'{name[:80]}' for name in list(tensors)[:4])} ..."
        )
    of_role = [p for p in prefixes if is_average(p) == (role == "momentum")]
    distinct = of_role[:1] + [p for p in of_role[1:] if not _is_same(tensors, of_role[0], p)]
    if len(distinct) == 1:
        return distinct[0]
    other_role: EncoderRole = "base" if role == "momentum" else "momentum"
    hint = f" (a {other_role} encoder: take it by --which {other_role})" if not of_role else ""
    if of_role:
        hint = "; save the one that is meant in a file of its own"
    raise ValueError(
        f"it holds {len(of_role) or 'no'} {role} encoder{'s' * (len(of_role) > 1)}; "
        f"class tokens stand below {', '.join(map(repr, prefixes))}{hint}."
    )


def is_head(name: str) -> bool:
    """Whether a tensor below an encoder's prefix has no part in its class-token features.

    Heads, projectors and predictors come after the features; a mask token, a decoder and an
    optimizer are of training alone.

    Args:
        name: its name without the prefix.
    """
    first = name.removeprefix("embeddings.").partition(".")[0].lower()
    return not _IS_PART.search(first) and bool({first, *_split_words(first)} & _HEADS)


def summarise_names(names: Iterable[str], prefix: str) -> str:
    """Names of tensors in groups: `module.predictor (6), module.momentum_encoder (150)`.

    Args:
        names: whole names of tensors that are not used.
        prefix: text in front of the names of the encoder that is used; a group is named down to
            the first part in which it differs from this.
    """
    groups: Counter[str] = Counter()
    for name in names:
        parts, common = name.split("."), prefix.split(".")
        shared = 0
        while shared < min(len(parts), len(common)) and parts[shared] == common[shared]:
            shared += 1
        groups[".".join(parts[: shared + 1])] += 1
    texts = [f"{group[:80]} ({count})" for group, count in groups.most_common(6)]
    return ", ".join(texts) + " ..." * (len(groups) > 6)


def _split_words(name: str) -> set[str]:
    return {*re.split(r"[._\-\s/]+", name.lower())}


def _is_same(tensors: Tensors, first: str, second: str) -> bool:
    """Whether the same tensors stand below two prefixes, as where a file names a network twice."""
    states = [
        {name.removeprefix(p): t for name, t in tensors.items() if name.startswith(p)}
        for p in (first, second)
    ]
    return {*states[0]} == {*states[1]} and all(
        tensor.shape == states[1][name].shape and torch.equal(tensor, states[1][name])
        for name, tensor in states[0].items()
    )
