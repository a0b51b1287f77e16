"""Damage of every kind to the bytes of a valid file, drawn from a seeded generator."""

import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

PNG = b"\x89PNG\r\n\x1a\n"
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    7,
    3.5,
    1e308,
    float("nan"),
    float("-inf"),
    10**30,
    "",
    "x",
    "null\0byte",
    "two\nlines",
    "\ud800",
    "Straße 東京",
    "../../outside",
    "/dev/zero",
    "~nobody/x",
    [],
    {},
    [[[1]]],
    [1, "a", None],
    {"a": {"b": {}}},
)
SNIPPETS = (
    b"&a [*a]",
    b"*a",
    b"!!python/object/apply:os.system ['true']",
    b"!!int x",
    b"!!timestamp x",
    b"2001-99-99",
    b"[" * 3000,
    b"{" * 300,
    b"\t",
    b"\0",
    b"\xff\xfe",
    b": :",
    b"? ",
    b"<<: {a: 1}\n",
    b"9" * 5000,
    b"NaN",
    b"1e999",
    b'"',
    b"'",
    b"\r",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b"a: 1\na: 2\n",
)


def mutated(seeds: Sequence[bytes], draw: random.Random) -> bytes:
    """One of ``seeds`` after one to four kinds of damage."""
    data = draw.choice(seeds)
    kinds = [*KINDS, _odd_value, _odd_value, _snippet] if _is_text(data) else KINDS
    for _ in range(draw.choice((1, 1, 2, 4))):
        data = draw.choice(kinds)(data, seeds, draw)
    return _with_checksums(data) if data.startswith(PNG) and draw.random() < 0.8 else data


def _with_checksums(data: bytes) -> bytes:
    """A PNG with the right checksum after each chunk, so that what follows is read at all."""
    done, at = bytearray(PNG), len(PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        done += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(done) + data[at:]


def _is_text(data: bytes) -> bool:
    return not data.startswith((b"P5", b"P6", b"PK")) and b"\0" not in data[:200]


def _flip(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 8, 64))):
        if changed:
            changed[_place(changed, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + (new := _number(draw)) + data[at + len(new) :]


def _insert(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + (_number(draw) if draw.random() < 0.5 else draw.randbytes(draw.randint(1, 40))) + data[at:]


def _cut(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    return data[: draw.randint(0, len(data))]


def _remove(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + data[at + draw.randint(1, 64) :]


def _repeat(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    first = _place(data, draw)
    return data[: first + draw.randint(1, 200)] + data[first:]


def _splice(data: bytes, seeds: Sequence[bytes], draw: random.Random) -> bytes:
    other = draw.choice(seeds)
    return data[: _place(data, draw)] + other[_place(other, draw) :]


def _snippet(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + draw.choice(SNIPPETS) + data[at:]


def _odd_value(data: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    """JSON of which one value is replaced or removed; of other text, the value of a line ``key: value``."""
    try:
        content = json.loads(data)
        places = list(_places(content))
    except (ValueError, RecursionError):
        return _odd_line(data, draw)
    if not places:
        return json.dumps(draw.choice(ODD_VALUES)).encode()
    holder, key = draw.choice(places)
    if draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(ODD_VALUES)
    return json.dumps(content).encode()


def _odd_line(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    key, colon, _ = lines[at].partition(b":")
    value = json.dumps(draw.choice(ODD_VALUES)).encode()
    lines[at] = key + colon + b" " + value if colon else value
    return b"\n".join(lines)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Where the values inside a JSON value are: (dict or list, key or index)."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _place(data: bytes | bytearray, draw: random.Random) -> int:
    """A place in the data, half of the time in the first 128 bytes, where headers are."""
    return draw.randrange(max(1, min(len(data), 128) if draw.random() < 0.5 else len(data)))


def _number(draw: random.Random) -> bytes:
    return struct.pack(draw.choice("<>") + draw.choice(("I", "Q")), draw.choice(NUMBERS))


Damage = Callable[[bytes, Sequence[bytes], random.Random], bytes]
KINDS: list[Damage] = [_flip, _overwrite, _insert, _cut, _remove, _repeat, _splice]
