"""What a copy to a GPU asks of streams and events, in order."""

from typing import Any

import pytest
import torch

from mocov3_ds.data import device_copy
from mocov3_ds.data.device_copy import DeviceCopy

CALLS: list[str] = []


class Stream:
    """A stream that notes what is asked of it."""

    device = torch.device("cpu")

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_event(self, _event: Any) -> None:
        CALLS.append(f"{self.name} waits")

    def __enter__(self) -> None:
        CALLS.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        CALLS.append(f"off {self.name}")


class Event:
    """An event whose copy is over once somebody waited for it."""

    def __init__(self) -> None:
        self.is_over = False

    def record(self, stream: Stream) -> None:
        CALLS.append(f"recorded on {stream.name}")

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        CALLS.append("host waits")
        self.is_over = True


class Crops(torch.Tensor):
    """Crops whose memory notes who uses it."""

    def to(self, *_: Any, non_blocking: bool = False, **__: Any) -> "Crops":
        CALLS.append(f"copied, {non_blocking}")
        return self

    def record_stream(self, stream: Any) -> None:
        CALLS.append(f"used on {stream.name}")


def test_who_needs_the_crops_waits_and_who_needs_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    CALLS.clear()
    monkeypatch.setattr(device_copy, "_new_event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream("main"))
    crops = torch.zeros(2, 3).as_subclass(Crops)
    stream: Any = Stream("copies")
    copy = DeviceCopy(crops, stream)
    assert CALLS == ["on copies", "copied, True", "recorded on copies", "off copies"]
    assert copy.take() is crops
    assert CALLS[4:] == ["main waits", "used on main"]
    with pytest.raises(AssertionError, match="once"):
        copy.take()
    copy.wait()
    copy.wait()  # over by now
    assert CALLS[6:] == ["host waits"]
