"""Seeded damage: to any bytes, to JSON, to tar headers, inside safetensors and torch files."""

import contextlib
import copy
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

from numpy.random import Generator

ODD_NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 10**30, 1e308, -0.5)
ODD_VALUES: tuple[Any, ...] = (
    *ODD_NUMBERS,
    *(None, True, False, "", " ", "\0", "../../etc/passwd", "/", "x" * 5000, "ü\ud800", "nan"),
    *([], {}, [None], {"": ""}, [[[[]]]], float("nan"), float("inf")),
)


def mutated(name: str, data: bytes, rng: Generator) -> bytes:
    """A damaged copy of a file, by what its name says it is."""
    structured = next((make for end, make in _BY_NAME.items() if name.endswith(end)), None)
    if structured is not None and rng.random() < 0.6:
        # a file that is damaged already may not have its structure any more, in any way
        with contextlib.suppress(Exception):
            return structured(data, rng)
    return bytes_damage(data, rng)


def bytes_damage(data: bytes, rng: Generator) -> bytes:
    """One to five cuts, overwrites, insertions, repetitions and bit flips."""
    spoilt = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(spoilt) + 1))
        length = int(rng.integers(1, 1 + min(64, 1 + len(spoilt))))
        kind = int(rng.integers(8))
        if kind == 0:
            del spoilt[at:]
        elif kind == 1:
            del spoilt[at : at + length]
        elif kind == 2:
            spoilt[at : at + length] = rng.bytes(length)
        elif kind == 3:
            spoilt[at:at] = rng.bytes(length)
        elif kind == 4:
            spoilt[at:at] = spoilt[at : at + length] * int(rng.integers(1, 4))
        elif kind == 5:
            spoilt[at : at + length] = bytes(length)
        elif kind == 6:
            spoilt[at : at + 4] = b"\xff" * 4
        elif at < len(spoilt):
            spoilt[at] ^= 1 << int(rng.integers(8))
    return bytes(spoilt)


def json_damage(data: bytes, rng: Generator) -> bytes:
    """One to three values of the tree become odd ones, vanish, or move."""
    tree = json.loads(data)
    for _ in range(int(rng.integers(1, 4))):
        places = _places(tree)
        if not places:
            break
        parent, key = places[int(rng.integers(len(places)))]
        kind = rng.random()
        if kind < 0.15:
            del parent[key]
        elif kind < 0.3:
            other, other_key = places[int(rng.integers(len(places)))]
            parent[key] = json.loads(json.dumps(other[other_key]))
        elif kind < 0.35 and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        elif kind < 0.4:
            parent[key] = _deep(int(rng.integers(2, 3000)))
        else:
            # a copy: further damage must not reach the next input, nor a value lie inside itself
            parent[key] = copy.deepcopy(ODD_VALUES[int(rng.integers(len(ODD_VALUES)))])
    try:
        return json.dumps(tree).encode()
    except RecursionError:
        return b"[" * 100_000


def _deep(levels: int) -> Any:
    tree: Any = 0
    for _ in range(min(levels, 500)):
        tree = [tree]
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        found += [(node, key) for key in keys]
        waiting += [node[key] for key in keys if isinstance(node[key], dict | list)]
    return found


def lines_damage(data: bytes, rng: Generator) -> bytes:
    """Damage to one line of JSON lines."""
    lines = data.splitlines()
    at = int(rng.integers(len(lines)))
    lines[at] = json_damage(lines[at], rng) if rng.random() < 0.7 else b"[1, 2"
    return b"\n".join(lines) + b"\n" * int(rng.integers(2))


def tar_damage(data: bytes, rng: Generator) -> bytes:
    """A field of a member's header, with the header's checksum made right again."""
    spoilt = bytearray(data)
    heads = [
        at for at in range(0, len(spoilt) - 511, 512) if spoilt[at + 257 : at + 262] == b"ustar"
    ]
    if not heads:
        return bytes_damage(data, rng)
    at = heads[int(rng.integers(len(heads)))]
    fields = {
        "name": (0, 100),
        "size": (124, 12),
        "type": (156, 1),
        "link": (157, 100),
        "prefix": (345, 155),
    }
    start, length = fields[list(fields)[int(rng.integers(len(fields)))]]
    odd = [
        b"7" * length,
        b"00000000000\0"[:length],
        b"\x80" + b"\xff" * (length - 1),
        b"../../x.jpg\0"[:length],
        b"\0" * length,
        b"x"[:length],
        b"5", b"L", b"K", b"x", b"g", b"S", b"2",
        rng.bytes(length),
    ]  # fmt: skip
    value = odd[int(rng.integers(len(odd)))]
    spoilt[at + start : at + start + len(value)] = value
    spoilt[at + 148 : at + 156] = b" " * 8
    spoilt[at + 148 : at + 156] = b"%06o\0 " % sum(spoilt[at : at + 512])
    return bytes(spoilt)


def safetensors_damage(data: bytes, rng: Generator) -> bytes:
    """The header's JSON, with its length made right again."""
    length = int.from_bytes(data[:8], "little")
    header = json_damage(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def zip_damage(data: bytes, rng: Generator) -> bytes:
    """A member of a torch file, with the archive made right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        spoilt = names[int(rng.integers(len(names)))]
        if rng.random() < 0.5:  # what builds the tensors is the interesting member
            spoilt = next(n for n in names if n.endswith("data.pkl"))
        for name in names:
            content = old.read(name)
            new.writestr(name, bytes_damage(content, rng) if name == spoilt else content)
    return out.getvalue()


_BY_NAME: dict[str, Callable[[bytes, Generator], bytes]] = {
    ".json": json_damage,
    ".jsonl": lines_damage,
    ".tar": tar_damage,
    ".safetensors": safetensors_damage,
    ".pth": zip_damage,
    ".pt": zip_damage,
}
