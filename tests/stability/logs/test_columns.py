"""Columns are known by their names, the user's word comes first, and doubt is refused."""

import pytest

from mocov3_ds.stability.logs.columns import describe_bare_accuracy, find_columns


@pytest.mark.parametrize(
    ("names", "understood"),
    [
        # one after the other: this program's own, DINO's log.txt, Lightning, W&B, Trainer, timm
        (
            "step epoch loss lr knn knn_momentum knn_full knn_chance chance_loss grad_norm",
            "step=step epoch=epoch loss=loss lr=lr knn=knn grad_norm=grad_norm "
            "chance_loss=chance_loss knn_chance=knn_chance",
        ),
        (
            "train_loss train_lr train_wd epoch test_acc1 test_acc5 test_loss",
            "epoch=epoch loss=train_loss lr=train_lr knn=test_acc1",
        ),
        (
            "epoch step train_loss_step train_loss_epoch val_acc val_loss lr-AdamW",
            "epoch=epoch step=step loss=train_loss_step knn=val_acc lr=lr-AdamW",
        ),
        (
            "_step _runtime train/loss val/knn_top1 val/knn_top5 trainer/global_step",
            "step=trainer/global_step loss=train/loss knn=val/knn_top1",
        ),
        (
            "loss grad_norm learning_rate epoch step eval_loss eval_accuracy",
            "step=step epoch=epoch loss=loss lr=learning_rate knn=eval_accuracy "
            "grad_norm=grad_norm",
        ),
        (
            "epoch train_loss eval_loss eval_top1 eval_top5 lr",
            "epoch loss=train_loss knn=eval_top1 lr",
        ),
        ("Step Loss Acc@1", "step=Step loss=Loss"),
        ("Step Acc@1", "step=Step knn=Acc@1"),
        ("step loss linear_acc", "step loss knn=linear_acc"),
        ("_step contrastive_loss", "step=_step loss=contrastive_loss"),
        ("iter val_loss train_acc", "step=iter"),
    ],
)
def test_known_names(names: str, understood: str) -> None:
    pairs = (word.partition("=") for word in understood.split())
    assert find_columns(names.split()) == {role: name or role for role, _, name in pairs}


def test_doubt_is_refused_with_the_candidates() -> None:
    names = ["step", "val/acc", "test/acc", "loss"]
    with pytest.raises(ValueError, match=r"2 columns may be .*val/acc, test/acc; say which with "):
        find_columns(names)
    assert find_columns(names, ["knn=test/acc"])["knn"] == "test/acc"
    assert "knn" not in find_columns(names, ["knn="])


def test_a_layers_gradient_is_named_by_hand() -> None:
    found = find_columns(["step", "loss", "g/conv1"], ["grad.patch_embed=g/conv1"])
    assert found["grad.patch_embed"] == "g/conv1"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("acc=val", "each word is MEANING=COLUMN; a meaning is one of step, epoch"),
        ("knn", "each word is MEANING=COLUMN"),
        ("grad.=x", "each word is MEANING=COLUMN"),
        ("kn=loss", r"did you mean knn\?"),
        ("knn=los", r"there is no column 'los' \(did you mean loss\?\); there are step, loss"),
    ],
)
def test_wrong_words(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        find_columns(["step", "loss"], [word])


def test_an_accuracy_of_unknown_images_is_not_taken_beside_a_loss() -> None:
    """MoCo's `acc@1` beside its loss is how often a query finds its key in the training batch."""
    names = ["step", "loss", "acc@1", "acc@5"]
    found = find_columns(names)
    assert "knn" not in found
    assert describe_bare_accuracy(names, (), found) == [
        "acc@1 may be of training batches and is left out; if it is of held-out images, --columns "
        "knn=acc@1 takes it"
    ]
    given = ["knn=acc@1"]
    assert find_columns(names, given)["knn"] == "acc@1"
    assert describe_bare_accuracy(names, given, find_columns(names, given)) == []
    assert describe_bare_accuracy([*names, "val_acc"], (), {"knn": "val_acc"}) == []
    alone = find_columns(["step", "acc"])
    [words] = describe_bare_accuracy(["step", "acc"], (), alone)
    assert words == "acc counts as that of held-out images, as no loss stands beside it"
