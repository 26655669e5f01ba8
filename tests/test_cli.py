"""The mocov3 command: what it prints and writes, and one sentence for what cannot be."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mocov3_ds import cli, train
from mocov3_ds.data import manifest as manifests
from mocov3_ds.distributed import ranks
from mocov3_ds.evaluation import finetune, linear
from mocov3_ds.evaluation.flags import LinearConfig
from mocov3_ds.version import __version__
from tests.data.sets import make_set
from tests.evaluation.runs import make_run, make_splits


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mocov3", *map(str, arguments)])
    return cli.main()


def test_bad_input_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = make_splits(tmp_path)
    run = make_run(tmp_path / "run", train=train, val=val)
    unlabelled = make_set(str(tmp_path / "bare"), [4])
    rows = unlabelled.index_N.copy()
    rows["label"] = -1
    manifests.write(unlabelled.url, unlabelled.shards, rows)
    lone = make_run(tmp_path / "lone", train=train)
    for arguments, sentence in [
        (("knn", tmp_path / "nothing"), "there is no"),
        (("knn", lone), "names no held-out shards"),
        (("knn", run, "--val", unlabelled.url), "4 of 4 samples in"),
        (("knn", run, "--val", tmp_path), "holds no manifest.json; make shards with python -m"),
        (("knn", run, "--image_size", 15), "image size 15 is not a multiple of the patch size 4"),
        (("knn", run, "--k", 0), "k 0, batch 256, temperature 0.07 must be positive"),
        (("look", run, "--images", 0), "images 0"),
        (("export", tmp_path), "it is no run"),
        (("export", run, "--out", tmp_path), "is not empty"),
    ]:
        assert call(monkeypatch, *arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("mocov3: error: ")
        assert sentence in told
        assert told.count("\n") == 1


def test_a_path_that_cannot_be_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--recipe", "vit_l16", "--data.shards", "s3://bucket/set"]
    assert call(monkeypatch, "launch", "slurm", "--out", "/proc/foo", "--", *flags) == 2
    assert capsys.readouterr().err == "mocov3: error: /proc/foo: No such file or directory.\n"


def test_the_front_door_imports_nothing_heavy() -> None:
    """Help, the version and a typo answer at once: none of them waits for torch."""
    code = (
        "import sys; from mocov3_ds import cli; "
        "status = cli._run_command(sys.argv[1:]); "
        "print(status, sorted({'torch', 'numpy', 'tyro', 'deepspeed', 'timm'} & {*sys.modules}))"
    )
    for arguments, words, status in [
        (["--help"], "finetune   fine-tune an encoder", 0),
        ([], "usage: mocov3 COMMAND", 0),
        (["--version"], f"mocov3-ds {__version__}", 0),
        (["knnn"], "no command 'knnn' (did you mean knn?)", 2),
        (["--hlep"], "no option '--hlep'", 2),
        (["help", "nothing"], "no command 'nothing'", 2),
    ]:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
        )
        assert words in done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == f"{status} []", done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["train", "--batch", "1"], ["plan", "--nodes", "x"], ["stability", "run", "--scale", "tin"]],
)
def test_what_is_wrong_with_flags_is_told_before_torch_is_imported(arguments: list[str]) -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        "from mocov3_ds import cli; sys.exit(cli._run_command(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (2, ["False"]), done.stderr
    assert "Traceback" not in done.stderr


def test_flags_of_commands_on_an_encoder_are_read_before_torch_is_imported() -> None:
    code = """if True:
        import contextlib, sys
        from mocov3_ds import cli
        for name in ("knn", "look", "export", "embed", "linear", "finetune"):
            for flag, status in (("--help", 0), ("--hlep", 2)):
                try:
                    cli._run_command([name, flag])
                except SystemExit as ended:
                    assert (ended.code or 0) == status, (name, flag, ended.code)
                else:
                    raise AssertionError((name, flag))
        assert not {"torch", "numpy", "timm", "deepspeed"} & {*sys.modules}
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "attention heads" in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_name_leads_somewhere(name: str) -> None:
    assert callable(cli._find_target(cli.COMMANDS[name].target))


def test_a_bad_environment_is_told_before_anything_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOCOV3_STORAGE_PATIENCE_S", "15min")
    assert call(monkeypatch, "plan", "--list") == 2
    assert capsys.readouterr().err.startswith("mocov3: error: MOCOV3_STORAGE_PATIENCE_S='15min'")
    for main in (linear.main, finetune.main, train.main):
        monkeypatch.setattr(sys, "argv", ["program"])
        assert main() == 2
        assert "error: MOCOV3_STORAGE_PATIENCE_S='15min' is no number" in capsys.readouterr().err


def test_completion_is_a_script_of_the_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--tyro-print-completion", "bash")
    assert ended.value.code in (0, None)
    script = capsys.readouterr().out
    assert script.startswith("#")
    assert {"plan", "train", "knn"} <= {*re.findall(r"'(\w+)': {'description'", script)}
    assert "interconnect" in script


def test_stdout_of_a_command_for_programs_is_json_and_nothing_else(tmp_path: Path) -> None:
    """Whatever libraries say while they are imported, and DeepSpeed about the accelerator."""
    environment = {name: text for name, text in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "mocov3_ds.cli", "plan", "--gpus", "8xH100-80GB", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert json.loads(done.stdout)["hardware"]["cards"] == 8
    code = "import mocov3_ds.distributed.engine, logging; logging.getLogger('DeepSpeed').error('x')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, env=environment
    )
    assert done.stdout == ""
    assert "[ERROR]" in done.stderr


@pytest.mark.parametrize("arguments", [["plan", "--list"], ["plan", "--help"]])
def test_a_reader_that_leaves_early(arguments: list[str]) -> None:
    """As `mocov3 ... | head`: silence, and the status of a tool that SIGPIPE ended."""
    command = [sys.executable, "-m", "mocov3_ds.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, env=environment
        )
    finally:
        os.close(write)
    assert ended.returncode == 141
    assert "Broken" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_modules_are_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Help that teaches, one sentence and status 2 for bad input."""
    for name, module in (("linear", linear), ("finetune", finetune)):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        assert "the paper" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "nothing")])
        assert module.main() == 2
        assert capsys.readouterr().err == f"{name}: error: there is no {tmp_path / 'nothing'}.\n"


def test_started_as_a_user_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mocov3_ds.evaluation.finetune", str(tmp_path / "nothing")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert refused.returncode == 2
    assert f"finetune: error: there is no {tmp_path / 'nothing'}." in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_accelerate_launches_two_ranks(tmp_path: Path) -> None:
    train, val = make_splits(tmp_path)
    run = make_run(tmp_path / "run", train=train, val=val)
    options = ["--epochs", "2", "--batch", "16", "--workers", "0"]
    alone = linear.train_probe(LinearConfig(run=run, epochs=2, batch=16, workers=0))
    ranks.stop()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    out = ["--out", str(tmp_path / "two")]
    # without what this process joined a group of one rank with
    environment = {n: v for n, v in os.environ.items() if n not in ranks.LAUNCHER_VARIABLES}
    subprocess.run(
        [*launch, "-m", "mocov3_ds.evaluation.linear", str(run), *options, *out],
        check=True,
        timeout=300,
        env=environment,
    )
    entry = json.loads((tmp_path / "two/results.json").read_text())["linear base"]
    assert entry == alone
