"""A real object store for tests: Ceph's radosgw from Debian's packages, installed nowhere.

The packages are downloaded and unpacked into a folder; a monitor, one storage daemon in memory and
the gateway run from there as plain processes on loopback.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from mocov3_ds.distributed.ranks import free_port
from tests.object_store import Server

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw")

_COMMAND = """
import ctypes, sys
rados = ctypes.CDLL("librados.so.2")
cluster = ctypes.c_void_p()
assert rados.rados_create(ctypes.byref(cluster), b"admin") == 0
assert rados.rados_conf_read_file(cluster, sys.argv[1].encode()) == 0
rados.rados_conf_set(cluster, b"client_mount_timeout", b"30")
assert rados.rados_connect(cluster) == 0, "no monitor answers"
command = (ctypes.c_char_p * 1)(sys.argv[2].encode())
out, status = ctypes.c_char_p(), ctypes.c_char_p()
out_size, status_size = ctypes.c_size_t(), ctypes.c_size_t()
code = rados.rados_mon_command(
    cluster, command, 1, None, 0, ctypes.byref(out), ctypes.byref(out_size),
    ctypes.byref(status), ctypes.byref(status_size))
print(ctypes.string_at(out, out_size.value).decode())
sys.exit(f"{code} {status.value}" if code else 0)
"""


class Missing(Exception):  # noqa: N818 - the machine lacks something; the test says what
    """This machine cannot run the gateway; the message says why."""


def unpack(folder: Path) -> Path:
    """Download and unpack the packages; the folder that holds their files.

    Raises:
        Missing: this is no Debian with these packages, or they cannot be had.
    """
    root = folder / "root"
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise Missing(f"no {program}: not a Debian")
    if platform.machine() != "x86_64":
        raise Missing("only tried on x86-64")
    for name in ("packages", "lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    # lists of our own: images of Debian often carry none, and the machine's are not ours to renew
    apt = ["apt-get", "-q", "-o", f"Dir::State::lists={folder / 'lists'}",
           "-o", f"Dir::Cache={folder / 'cache'}"]  # fmt: skip
    _run([*apt, "update"], cwd=folder)
    simulated = _run([*apt, "install", "-s", "-y", "--no-install-recommends", *PROGRAMS], folder)
    names = re.findall(r"^Inst (\S+)", simulated, re.MULTILINE)
    if not set(PROGRAMS) <= set(names):
        raise Missing("apt-get plans no such packages")
    _run([*apt, "download", *names], cwd=folder / "packages")
    for package in sorted((folder / "packages").glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(root)], cwd=folder)
        package.unlink()
    return root


def _run(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=True
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no word"])[-1]
        raise Missing(f"{' '.join(command)[:200]}: {last}") from None
    except subprocess.TimeoutExpired:
        raise Missing(f"{' '.join(command)[:200]} takes too long") from None
    return done.stdout


class RadosGateway(Server):
    """Ceph's S3 gateway with its cluster of one; its objects outlive `stop`, not `close`.

    Args:
        root: what `unpack` returned.
        folder: for the cluster's state.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        super().__init__()
        self._root, self._folder = root, folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        libraries = sorted({str(p.parent) for p in root.rglob("*.so.*")})
        self._env = os.environ | {"LD_LIBRARY_PATH": ":".join(libraries)}
        try:
            self._make_cluster()
        except BaseException:
            self.close()
            raise

    def _make_cluster(self) -> None:
        folder, fsid, port = self._folder, str(uuid.uuid4()), free_port()
        for name in ("run", "osd"):
            (folder / name).mkdir(parents=True)
        lib = self._root / "usr/lib/x86_64-linux-gnu"
        self._conf = folder / "ceph.conf"
        settings = {
            "fsid": fsid,
            "mon host": f"v1:127.0.0.1:{port}",
            "ms bind msgr2": "false",
            "public addr": "127.0.0.1",
            "keyring": folder / "keyring",
            "run dir": folder / "run",
            "admin socket": folder / "run/$name.asok",
            "log file": folder / "run/$name.log",
            "pid file": folder / "run/$name.pid",
            "mon data": folder / "mon",
            "osd data": folder / "osd",
            "osd objectstore": "memstore",
            "memstore device bytes": 1 << 30,
            "osd class dir": lib / "rados-classes",
            "erasure code dir": lib / "ceph/erasure-code",
            "plugin dir": lib / "ceph",
            "osd pool default size": 1,
            "osd pool default min size": 1,
            "osd pool default pg num": 4,
            "osd pool default pg autoscale mode": "off",
            "osd crush chooseleaf type": 0,
            "mon allow pool size one": "true",
            "mon max pg per osd": 1000,
            "auth allow insecure global id reclaim": "true",
            "rgw frontends": f"beast endpoint=127.0.0.1:{self.port}",
            "rgw enable usage log": "false",
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        self._conf.write_text("[global]\n" + "\n".join(lines) + "\n")
        rights = {
            "mon.": ["mon", "allow *"],
            "client.admin": ["mon", "allow *", "osd", "allow *", "mgr", "allow *"],
            "osd.0": ["mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd"],
        }  # fmt: skip
        create = ["--create-keyring"]
        for name, allowed in rights.items():
            caps = [x for pair in zip(allowed[::2], allowed[1::2], strict=True)
                    for x in ("--cap", *pair)]  # fmt: skip
            self._call("ceph-authtool", *create, folder / "keyring", "--gen-key", "-n", name, *caps)
            create = []
        self._call("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{port}]",
                   "--fsid", fsid, folder / "monmap")  # fmt: skip
        self._call("ceph-mon", "--mkfs", "-i", "a", "--monmap", folder / "monmap",
                   "--keyring", folder / "keyring")  # fmt: skip
        self._begin("ceph-mon", "-f", "-i", "a")
        osd = str(uuid.uuid4())
        self._until(lambda: self._ask({"prefix": "osd new", "uuid": osd}))
        self._call("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd)
        self._begin("ceph-osd", "-f", "-i", "0")
        self._call("radosgw-admin", "user", "create", "--uid", "tests", "--display-name", "tests",
                   "--access-key", "key", "--secret-key", "secret")  # fmt: skip

    def command(self) -> list[str]:
        program = str(self._root / "usr/bin/radosgw")
        return [program, "-f", "-n", "client.admin", "-c", str(self._conf)]

    def _call(self, program: str, *arguments: object) -> str:
        command = [str(self._root / "usr/bin" / program), *map(str, arguments)]
        if (
            program.startswith("ceph-") and program != "ceph-authtool"
        ) or program == "radosgw-admin":
            command += ["-c", str(self._conf)]
        return _run(command, cwd=self._folder, env=self._env)

    def _begin(self, program: str, *arguments: str) -> None:
        command = [str(self._root / "usr/bin" / program), *arguments, "-c", str(self._conf)]
        self._daemons.append(
            subprocess.Popen(
                command, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )

    def _ask(self, command: dict[str, object]) -> str:
        arguments = [sys.executable, "-c", _COMMAND, str(self._conf), json.dumps(command)]
        return _run(arguments, cwd=self._folder, env=self._env)

    def _until(self, attempt: Callable[[], str]) -> str:
        deadline = time.monotonic() + 60
        while True:
            try:
                return attempt()
            except Missing:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)

    def close(self) -> None:
        """End everything."""
        self.stop()
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
