"""Kits run for real on this machine: two hosts are two loopback addresses, Slurm is Debian's.

Debian packages: pdsh, openssh-server; slurmctld, slurmd, slurm-client. Without them tests skip.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from mocov3_ds.distributed.ranks import free_port
from mocov3_ds.launch.kit import Kind, LaunchSettings, write_kit
from mocov3_ds.monitoring.metrics_file import read_rows
from tests.data.sets import make_set
from tests.test_train import SMALL, environment

pytestmark = pytest.mark.slow

HOSTS = ("127.0.0.1", "127.0.0.2")
SBIN = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"


def kit(kind: Kind, folder: Path, cluster: LaunchSettings, *flags: str) -> Path:
    """A kit that trains on 50 small images, 3 steps an epoch, into `folder/runs/tiny`."""
    make_set(str(folder / "train"), [50])
    data = ["--data.shards", str(folder / "train"), "--knn.probes", "0"]
    write_kit(kind, cluster, folder / kind, [*SMALL, *data, "--runs", str(folder / "runs"), *flags])
    return folder / kind


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "runs" / "tiny" / "metrics.jsonl")]


def until(true: Callable[[], bool], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


@contextlib.contextmanager
def running(*commands: list[str], **variables: str) -> Iterator[list[subprocess.Popen[str]]]:
    """One command a node, told its number and one port."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            command,
            env={**environment(), "NODE_RANK": str(node), "MASTER_PORT": port, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, command in enumerate(commands)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Status and output of each, once all have ended."""
    said = [process.communicate(timeout=400)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.parametrize("kind", ["torchrun", "accelerate"])
def test_two_nodes_meet(kind: Kind, tmp_path: Path) -> None:
    cluster = LaunchSettings(nodes=2, gpus=1, cores=1, cpu=True, hosts=HOSTS)
    script = str(kit(kind, tmp_path, cluster, "--stop_after_steps", "4") / "train.sh")
    with running([script], [script]) as nodes:
        ends = ended(nodes)
    assert [status for status, _ in ends] == [0, 0], "\n".join(said for _, said in ends)
    assert "global batch 16 on 2 ranks" in ends[0][1]
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_signal_to_the_rank_of_one_node_saves_the_run_of_both(tmp_path: Path) -> None:
    cluster = LaunchSettings(nodes=2, gpus=1, cores=1, cpu=True, hosts=HOSTS)
    script = str(kit("torchrun", tmp_path, cluster, "--epochs", "400") / "train.sh")
    with running([script], [script]) as nodes:
        until(lambda: len(steps(tmp_path)) >= 3, "the third step")
        for process in psutil.Process(nodes[1].pid).children(recursive=True):
            if "-m mocov3_ds.train" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGUSR1)
        ends = ended(nodes)
    assert [status for status, _ in ends] == [0, 0], "\n".join(said for _, said in ends)
    assert "asked to stop by SIGUSR1: checkpoint " in ends[0][1], ends
    done = steps(tmp_path)
    latest = tmp_path / "runs" / "tiny" / "checkpoints" / "latest"
    assert int("".join(filter(str.isdigit, latest.read_text()))) == done[-1]


def test_a_pod_that_must_go_saves_and_counts_as_failed(tmp_path: Path) -> None:
    cluster = LaunchSettings(nodes=1, gpus=2, cores=1, cpu=True)
    folder = kit("kubernetes", tmp_path, cluster, "--epochs", "400")
    job = list(yaml.safe_load_all((folder / "job.yaml").read_text()))[1]
    # what the kubelet does with it, and a name for the one pod there is
    command = [
        word.replace("$(NODE_RANK)", "0").replace("mocov3-tiny-0.mocov3-tiny", "127.0.0.1")
        for word in job["spec"]["template"]["spec"]["containers"][0]["command"]
    ]
    command[command.index("--master-port") + 1] = str(free_port())
    with running(command) as [pod]:
        until(lambda: len(steps(tmp_path)) >= 3, "the third step")
        pod.send_signal(signal.SIGTERM)
        [(status, said)] = ended([pod])
    assert status != 0, said
    assert "asked to stop by SIGTERM: checkpoint " in said


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[Path]:
    """An ssh server on both loopback addresses; yields the folder of an `ssh` that has its key."""
    missing = [name for name in ("sshd", "pdsh") if shutil.which(name, path=SBIN) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder, port = tmp_path / "ssh", free_port()
    folder.mkdir()
    for key in ("host", "key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True
        )
    lines = [
        *(f"Port {port}", *(f"ListenAddress {host}" for host in HOSTS), f"HostKey {folder}/host"),
        *(f"AuthorizedKeysFile {folder}/key.pub", "StrictModes no", "UsePAM no", "PidFile none"),
        *("PermitRootLogin yes", "PasswordAuthentication no"),
    ]
    (folder / "sshd.conf").write_text("\n".join(lines) + "\n")
    options = "StrictHostKeyChecking=no UserKnownHostsFile=/dev/null LogLevel=ERROR BatchMode=yes"
    flags = " ".join(f"-o {option}" for option in options.split())
    client = folder / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -p {port} -i {folder}/key {flags} "$@"\n'
    )
    client.chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    program = shutil.which("sshd", path=SBIN)
    assert program is not None
    server = subprocess.Popen([program, "-D", "-e", "-f", folder / "sshd.conf"])
    try:
        until(lambda: subprocess.run([client, HOSTS[1], "true"]).returncode == 0, "ssh", 30)
        yield client.parent
    finally:
        server.terminate()
        server.wait()


def test_deepspeed_starts_a_rank_on_each_host_of_the_file(tmp_path: Path, ssh: Path) -> None:
    cluster = LaunchSettings(nodes=2, gpus=1, cores=1, cpu=True, hosts=HOSTS)
    script = kit("hostfile", tmp_path / "a folder", cluster, "--stop_after_steps", "4") / "train.sh"
    path = f"{ssh}{os.pathsep}{environment()['PATH']}"
    with running([str(script)], PATH=path) as processes:
        [(status, said)] = ended(processes)
    assert status == 0, said
    assert "global batch 16 on 2 ranks" in said
    assert "127.0.0.2: " in said  # the second host spoke through pdsh
    assert steps(tmp_path / "a folder") == [1, 2, 3, 4]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A controller and a node with two cores; yields a function that runs a Slurm command."""
    names = ("slurmctld", "slurmd", "sbatch")
    missing = [name for name in names if shutil.which(name, path=SBIN) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"not installed: {', '.join(missing)}" if missing else "slurmd wants root")
    host, folder = socket.gethostname(), tmp_path / "daemons"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    lines = [
        *("ClusterName=one", f"SlurmctldHost={host}(127.0.0.1)", "SlurmUser=root"),
        *(f"SlurmctldPort={free_port()}", f"SlurmdPort={free_port()}"),
        *("AuthType=auth/none", "CredType=cred/none", "MpiDefault=none"),
        *(f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool"),
        *(f"SlurmctldPidFile={folder}/controller.pid", f"SlurmdPidFile={folder}/node.pid"),
        *("ProctrackType=proctrack/pgid", "TaskPlugin=task/none", "SelectType=select/cons_tres"),
        *("SelectTypeParameters=CR_Core", "ReturnToService=2"),
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs=2",
        "PartitionName=all Nodes=ALL Default=YES State=UP",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    variables = {**environment(), "SLURM_CONF": str(folder / "slurm.conf")}
    variables["PATH"] += f"{os.pathsep}/usr/sbin"

    def call(*command: str) -> str:
        done = subprocess.run(
            command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        return done.stdout + done.stderr

    with (folder / "log").open("w") as log:
        daemons = [
            subprocess.Popen(command, env=variables, stdout=log, stderr=log)
            for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D"])
        ]
        try:
            until(lambda: "idle" in call("sinfo"), "a free node", 60)
            yield call
        finally:
            call("scancel", "--user", "root")
            with contextlib.suppress(AssertionError):
                until(lambda: call("squeue", "-h") == "", "an empty queue", 20)
            for daemon in daemons:
                daemon.terminate()
            for daemon in daemons:
                daemon.wait(timeout=60)


def test_slurm_warns_the_job_and_starts_it_again(tmp_path: Path, slurm: Callable[..., str]) -> None:
    cluster = LaunchSettings(nodes=1, gpus=2, cores=1, cpu=True)
    folder = kit("slurm", tmp_path, cluster, "--epochs", "40", "--save.every_steps", "1000")
    job = slurm("sbatch", str(folder / "train.sbatch")).split()[-1]
    log = tmp_path / f"mocov3-tiny-{job}.log"
    until(lambda: len(steps(tmp_path)) >= 3, "the third step")
    # what --signal=B:USR1@300 does five minutes before the end
    slurm("scancel", "--signal=USR1", "--batch", job)
    until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job), "the queue again")
    assert "saved; back into the queue" in log.read_text()
    saved = steps(tmp_path)[-1]
    assert saved < 120
    # once the job is in the queue again, where it would wait for two minutes
    until(lambda: slurm("squeue", "-h", "-t", "PD", "-o", "%r").strip() == "BeginTime", "its place")
    slurm("scontrol", "update", f"jobid={job}", "StartTime=now")
    # bytes: a bar's last character may be half there
    until(lambda: b"finished; checkpoint in" in log.read_bytes(), "the end of the run")
    assert f"steps {saved} to 120" in log.read_text()
    assert steps(tmp_path) == [*range(1, 121)]
    until(lambda: slurm("squeue", "-h") == "", "an empty queue", 30)
    assert "JobState=COMPLETED" in slurm("scontrol", "show", "job", job)
