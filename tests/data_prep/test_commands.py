"""The command line as a user meets it: real processes, exit codes, one sentence a mistake."""

import errno
import gzip
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from data_prep import commands
from mocov3_ds.data import manifest
from tests.data_prep import forms


@pytest.fixture
def tree(tmp_path):
    return forms.write_tree(tmp_path / "tree", forms.imagenet(6))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process; returns exit code, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data_prep", *map(str, arguments)])
        code = commands.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_from_images_to_a_checked_set(tree, tmp_path):
    """As the README shows it, with worker processes."""

    def command(*arguments):
        line = [sys.executable, "-m", "data_prep", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=tmp_path)

    (tree / "n01440764" / "bad.jpg").write_bytes(b"x")
    (tree / "n01440764" / "notes.txt").write_text("x")
    made = command("shard", "tree", "sets", "--split", "train", "--shard-size", 5, "--workers", 2)
    assert made.returncode == 0, made.stderr
    for words in (
        "sets/train: 18 samples of 3 classes in 4 shards",
        "1 images rejected (all in rejects.jsonl): 1 x not an image",
        "classes: 3, 0 = n01440764 ... 2 = n02102040, from folder 1 of the path",
        "left out: 1 x ends in .txt, so no image by its name, e.g. n01440764/notes.txt",
        "balance: 20 files seen = 18 images kept + 1 rejected + 0 label and side files + 1 left",
        "images/s",
        "verify sets/train",
    ):
        assert words in made.stdout
    assert (tmp_path / "sets" / "train" / "train-000003.tar").exists()
    checked = command("verify", "sets/train", "--workers", 2)
    assert checked.returncode == 0 and checked.stdout.endswith("sound\n")


def test_looking_says_what_sharding_would_do_and_writes_nothing(run, tree, tmp_path):
    before = forms.files_of(tmp_path)
    code, looked, _ = run("look", tree)
    assert code == 0 and forms.files_of(tmp_path) == before
    code, said, _ = run("shard", tree, tmp_path / "o", "--workers", 1)
    assert code == 0 and said.startswith(looked)
    facts = json.loads(run("look", tree, "--json")[1])
    assert facts["classes"] == [*forms.CLASSES] and facts["endings"] == {"jpeg": 18}
    assert facts["balance"] == manifest.load(str(tmp_path / "o")).provenance["balance"]


def test_names_do_not_decide_how_the_work_ends(run, tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9")
    tree = forms.write_tree(tmp_path / "t", {"dog/1.jpg": forms.picture(1), "dog/x\ny.txt": b""})
    (tree / name).mkdir()
    (tree / name / "2.jpg").write_bytes(forms.picture(2))
    strict = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", strict)
    monkeypatch.setattr(
        sys, "argv", ["x", "shard", str(tree), str(tmp_path / "o"), "--workers", "1"]
    )
    assert commands.main() == 0
    said = strict.buffer.getvalue().decode()
    assert "'caf\\udce9'" in said and "'dog/x\\ny.txt'" in said
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    monkeypatch.setattr(sys, "argv", ["x", "look", str(tree)])
    assert commands.main() == 0


class ClosedPipe(io.StringIO):
    """Standard output whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_request_to_end_removes_scratch_files(run, tree, tmp_path, monkeypatch):
    archive = tmp_path / "t.tar.gz"
    archive.write_bytes(gzip.compress(forms.tar_bytes(forms.files_of(tree))))
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def end(*_, **__):
        assert [*scratch.rglob("*.tar")]
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(commands, "make_shards", end)
    with pytest.raises(SystemExit) as ended:
        run("shard", archive, tmp_path / "o", "--scratch", scratch)
    assert ended.value.code == 128 + signal.SIGTERM and not [*scratch.iterdir()]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_strong_resize_is_warned_of(run, tree, tmp_path):
    assert (
        "--resize 256 changes what the network sees"
        in (run("shard", tree, tmp_path / "a", "--resize", 256)[2])
    )
    assert "changes" not in run("shard", tree, tmp_path / "b", "--resize", 384)[2]


def test_verify_fails_on_damage_and_speaks_json(run, tree, tmp_path):
    assert run("shard", tree, tmp_path / "o", "--workers", 1)[0] == 0
    path = tmp_path / "o" / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    code, out, _ = run("verify", tmp_path / "o", "--workers", 1)
    assert code == 1 and "cut short" in out and "NOT sound: 3 problems" in out
    code, out, _ = run("verify", tmp_path / "o", "--json", "--no-decode", "--workers", 1)
    assert code == 1 and json.loads(out)["sound"] is False


def test_index_and_stats(run, tmp_path):
    forms.write_tar(tmp_path / "w" / "0.tar", {"a.jpg": forms.picture(0), "a.cls": b"1"})
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    code, out, _ = run("index", tmp_path / "w", "--classes", tmp_path / "names.txt", "--workers", 1)
    assert code == 0 and "1 samples in 1 shards, manifest written" in out
    assert manifest.load(str(tmp_path / "w")).classes == ("cat", "dog")
    code, out, err = run("stats", tmp_path / "w", "--picture", tmp_path / "p.png")
    assert code == 0 and "2 classes: 0 (cat) to 1 (dog) samples each" in out and "p.png" in err
    tree = json.loads(run("stats", tmp_path / "w", "--json")[1])
    assert tree["classes"] == {"cat": 0, "dog": 1} and tree["shorter_side"] == [24] * 5
    assert tree["pixels"]["images"] == 1 and tree["pixels"]["flags"] in out
    assert "--views.mean" not in run("stats", tmp_path / "w", "--pixels", 0)[1]
    assert tree == json.loads(run("stats", tmp_path / "w", "--json", "--pixels", "all")[1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("shard", "nowhere", "out"), "there is no nowhere;"),
        (("shard", "tree", "out", "--shard-size", "big"), "--shard-size 'big' is neither"),
        (("shard", "tree", "out", "--under", "val"), "there is no folder val"),
        (("verify", "tree"), "holds no manifest.json"),
        (("stats", "tree"), "holds no manifest.json"),
        (("index", "tree"), "holds no file that ends in .tar"),
        (("shard", "tree", "/proc/nothing/here"), "/proc/nothing"),
        (("shard", "tree", "out", "--scratch", "absent"), "absent"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    run, tree, tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2 and (out == "" or "/proc" in sentence)
    assert err.startswith("data_prep: error: ") and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_help_teaches(run, capsys):
    for words, arguments in (
        (("look", "shard", "verify", "stats", "index"), ("--help",)),
        (("ILSVRC2012_img_train.tar", "goes on", "256MB", "rejects.jsonl"), ("shard", "--help")),
    ):
        with pytest.raises(SystemExit) as end:
            run(*arguments)
        said = capsys.readouterr().out
        assert end.value.code == 0 and all(word in said for word in words)
