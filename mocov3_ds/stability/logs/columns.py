"""Which column of a log means what? Known names first, the user's word before all of them."""

import re
from collections.abc import Iterable, Mapping, Sequence

from mocov3_ds.settings.spelling import did_you_mean

ROLES: Mapping[str, str] = {
    "step": "optimizer steps done",
    "epoch": "epochs done",
    "loss": "training loss",
    "lr": "learning rate",
    "knn": "accuracy of the features: k-NN, else of a validation set",
    "grad_norm": "norm of the whole gradient",
    "chance_loss": "loss of a network that cannot tell its keys apart",
    "knn_chance": "accuracy of guessing",
    "probes": "images that an evaluation classifies",
}
"""what a column can mean; `grad.LAYER` beside these: the gradient of a layer"""
GRADIENT = "grad."

_TRAIN = r"(?:train|training|pretrain)"
_HELD_OUT = r"(?:val|valid|validation|eval|test)"
_ACCURACY = r"(?:accuracy|acc|top_?1|acc_?1|acc_top_?1|top_?1_acc(?:uracy)?|acc_1)"
_FORMS: Mapping[str, tuple[str, ...]] = {
    "step": (
        "step", f"(?:{_TRAIN}_|trainer_)?global_step|{_TRAIN}_step|steps",
        f"(?:{_TRAIN}_)?(?:iteration|iterations|iter|it|n_iter|num_updates|update)", "_step",
    ),
    "epoch": ("epoch", f"{_TRAIN}_epoch|epochs|current_epoch"),
    "loss": (
        "loss", f"{_TRAIN}_loss|loss_{_TRAIN}", "(?:total_loss|loss_total)",
        f"{_TRAIN}_(?:total_loss|loss_total)", f"(?:{_TRAIN}_)?loss_step",
        f"(?:{_TRAIN}_)?loss_epoch", f"{_TRAIN}_.*loss.*|loss_.*|.*_loss",
    ),
    "lr": ("lr", "learning_rate", f"{_TRAIN}_(?:lr|learning_rate)|(?:lr|learning_rate)_.*"),
    "knn": (
        "knn", f"knn_{_ACCURACY}|{_HELD_OUT}_knn|{_HELD_OUT}_knn_{_ACCURACY}|knn_{_HELD_OUT}",
        r"(?:.*_)?k_?nn(?:_.*)?", f"{_HELD_OUT}_{_ACCURACY}|{_ACCURACY}_{_HELD_OUT}",
        f"(?:linear_|probe_|linear_probe_){_ACCURACY}",
    ),
    "grad_norm": (
        "grad_norm", f"(?:{_TRAIN}_)?(?:global_|total_)?(?:grad|gradient)_norm(?:_total)?",
        "grad_2(?:_0)?_norm_total",
    ),
    "chance_loss": ("chance_loss",), "knn_chance": ("knn_chance",), "probes": ("knn_probes",),
}  # fmt: skip
"""what a column can mean -> forms of its name, the surest first"""
_OTHERS: Mapping[str, str] = {
    "loss": rf".*(?:{_HELD_OUT}|chance|knn|scale).*",
    "knn": r".*(?:loss|chance|probes|momentum|ema|teacher|full|time|seconds|_k)$|.*loss.*",
}
"""names of the widest forms that mean something else"""
_BARE = (_ACCURACY,)
"""forms of an accuracy that does not say of which images: of a training batch, mostly"""
_NAMED = 12


def find_columns(names: Iterable[str], given: Sequence[str] = ()) -> dict[str, str]:
    """What each column means that is understood.

    Args:
        names: names of the columns.
        given: the user's words, MEANING=NAME each; MEANING= leaves it out.

    Returns:
        A key of `ROLES`, or `grad.LAYER` -> name of the column.

    Raises:
        ValueError: a word is wrong, or several columns may mean the same.
    """
    column_names = list(names)
    columns = _read_given(column_names, given)
    for role, forms in _FORMS.items():
        if role not in columns:
            columns[role] = _find_role(role, forms, column_names)
    if not columns["knn"] and not columns["loss"] and not _is_said("knn", given):
        columns["knn"] = _find_role("knn", _BARE, column_names)
    return {role: name for role, name in columns.items() if name}


def describe_bare_accuracy(
    names: Iterable[str], given: Sequence[str], roles: Mapping[str, str]
) -> list[str]:
    """A clause about accuracies that do not say of which images they are.

    Beside a loss it is that of the training batches, mostly, which is no accuracy of the features.

    Args:
        names: names of the columns.
        given: the user's words, as `find_columns` takes them.
        roles: what that function understood of them.
    """
    if _is_said("knn", given):
        return []
    bare = [name for name in names if re.fullmatch(_ACCURACY, _plain(name))]
    if roles.get("knn") in bare:
        return [f"{roles['knn']} counts as that of held-out images, as no loss stands beside it"]
    if not bare or "knn" in roles:
        return []
    return [
        f"{list_names(bare)} may be of training batches and is left out; if it is of held-out "
        f"images, --columns knn={bare[0]} takes it"
    ]


def _is_said(role: str, given: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == role for word in given)


def _read_given(names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """The user's words; an empty name where a meaning is to be left out."""
    columns: dict[str, str] = {}
    for word in given:
        role, equals, name = word.partition("=")
        if not equals or not (role in ROLES or (role.startswith(GRADIENT) and role != GRADIENT)):
            raise ValueError(
                f"--columns {word!r}{did_you_mean(role, ROLES)}: each word is MEANING=COLUMN; a "
                f"meaning is one of {', '.join(ROLES)}, or grad.LAYER."
            )
        if name and name not in names:
            raise ValueError(
                f"--columns {word}: there is no column {name!r}{did_you_mean(name, names)}; there "
                f"are {list_names(names)}."
            )
        columns[role] = name
    return columns


def _find_role(role: str, forms: Sequence[str], names: Sequence[str]) -> str:
    """The one column with the surest form; empty without one."""
    for form in forms:
        fitting = [
            name
            for name in names
            if re.fullmatch(form, _plain(name)) and not _is_other(role, form, name)
        ]
        exact = [name for name in fitting if name == role]
        if len(fitting) > 1 and not exact:
            raise ValueError(
                f"{len(fitting)} columns may be the {ROLES[role]}: {list_names(fitting)}; say "
                f"which with --columns {role}={fitting[0]}, or --columns {role}= for none."
            )
        if fitting:
            return (exact or fitting)[0]
    return ""


def _is_other(role: str, form: str, name: str) -> bool:
    return ".*" in form and re.fullmatch(_OTHERS.get(role, "(?!)"), _plain(name)) is not None


def _plain(name: str) -> str:
    """A name in small letters with one kind of mark between its words; W&B's `_step` stays."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.strip().lower())
    return plain if plain == "_step" else plain.strip("_")


def list_names(names: Sequence[str]) -> str:
    """At most a dozen names for a sentence."""
    listed = ", ".join(names[:_NAMED])
    return f"{listed} and {len(names) - _NAMED} more" if len(names) > _NAMED else listed
