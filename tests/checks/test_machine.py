"""What a machine brings: other versions, low limits, bad cards and slow paths are named."""

from types import SimpleNamespace

import pytest
import torch

from mocov3_ds.checks import machine
from mocov3_ds.data.views import decode

CPU = torch.device("cpu")


def test_versions_that_differ_are_named_with_their_ranks() -> None:
    same = {"torch": "2.14.1", "python": "3.11"}
    assert machine.check_versions([same, same]).status == "pass"
    finding = machine.check_versions([same, {**same, "torch": "2.14.0"}, same])
    assert finding.status == "fail"
    assert finding.measured == "torch is 2.14.1 on ranks 0, 2; 2.14.0 on rank 1"
    assert {"torch", "deepspeed", "python", "mocov3-ds"} <= {*machine.read_versions()}


def test_limits() -> None:
    files, shared = machine.check_limits(files=256, shared=64 << 20)
    assert (files.status, shared.status) == ("fail", "note")
    assert "ulimit -n" in files.remedy
    assert [f.status for f in machine.check_limits(files=1024, shared=8 << 30)] == ["note", "pass"]
    assert [f.status for f in machine.check_limits(files=2**20, shared=8 << 30)] == ["pass"] * 2


@pytest.mark.parametrize(
    ("free", "errors", "major", "status", "words"),
    [
        (79, "0", 9, "pass", ""),
        (79, "3", 9, "fail", "memory is failing"),
        (40, "0", 9, "note", "another process"),
        (79, "[N/A]", 7, "note", "fp16"),
    ],
)
def test_cards(
    monkeypatch: pytest.MonkeyPatch, free: int, errors: str, major: int, status: str, words: str
) -> None:
    card = SimpleNamespace(name="H100", major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 80 << 30))
    finding = machine.check_accelerator(torch.device("cuda", 0), ecc_errors=errors)
    assert finding.status == status
    assert words in finding.remedy
    assert machine.check_accelerator(CPU).status == "note"


def test_a_slower_decoder_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "current_decoder", lambda: "pillow")
    monkeypatch.setattr(decode, "describe_decoder", lambda: "pillow; not native: no compiler")
    monkeypatch.setattr(machine.native, "is_built", lambda: False)
    decoder, kernels = machine.check_fast_paths(CPU)
    assert (decoder.status, kernels.status) == ("note", "note")
    assert "no compiler" in decoder.measured
    assert "compiler" in kernels.remedy


def test_a_card_that_torch_cannot_use_fails() -> None:
    finding = machine.check_accelerator(CPU, unusable="the NVIDIA driver is too old")
    assert (finding.status, finding.remedy) == ("fail", "the NVIDIA driver is too old")


@pytest.mark.parametrize("problem", ["", "install gcc"])
def test_the_doctor_asks_what_the_kernels_ask(
    monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    monkeypatch.setattr(machine.devices, "triton_problem", lambda device: problem)
    _, kernels = machine.check_fast_paths(torch.device("cuda"))
    assert kernels.status == ("note" if problem else "pass")
    assert ("colour work: torch" in kernels.measured) is bool(problem)
    assert problem in kernels.remedy
