"""Seeded damage to files: bytes flipped, cut, moved or inserted, and values replaced."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from typing import Any

ESCAPE = "\x1b]0;title\x07\x1b[2J\x9b"
HUGE = 10**400
# replacements for any value in a JSON text or a pickle
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**64), HUGE, -HUGE, 0.5, 1e300, 1e-300,
    math.inf, -math.inf, math.nan, "", "x", ESCAPE, "x" * 10_000, "\ud800", "../../x", "a\0b", [],
    {}, [[]], [1], ["x"], [None], {"a": 1}, {"": []}, [HUGE], "NaN", "1e999",
)
DEEP = (50, 450, 700, 5000)  # levels of nesting: readable, at the limit, and above it
TOKENS = (b"9" * 400, b"9" * 5000, b"-", b"null", b'"', b"{", b"}", b"[]", b"1e999", b"NaN",
          b"\xff", b"\0", b",", b":", b"\x1b[2J", b"\n", b"true", "\u2028".encode(), b"[" * 3000,
          b"\xff" * 8, b"\0" * 64)


def damage(data: bytes, draw: random.Random, head: int = 4096) -> bytes:
    """Return damaged bytes; half of the damage falls on the first `head` bytes."""
    out = bytearray(data)
    limit = len(out) if draw.random() < 0.5 else min(len(out), head)
    if not limit:
        return draw.choice(TOKENS)
    kind = draw.choice(("flip", "flip", "cut", "insert", "drop", "swap", "number", "twice"))
    at = draw.randrange(limit)
    end = min(len(out), at + draw.choice((1, 2, 4, 8, 40, 400)))
    if kind == "flip":
        for _ in range(draw.choice((1, 1, 4, 32))):
            out[draw.randrange(limit)] = draw.randrange(256)
    elif kind == "cut":
        del out[at:]
    elif kind == "insert":
        out[at:at] = draw.choice(TOKENS)
    elif kind == "drop":
        del out[at:end]
    elif kind == "swap":
        out[at:end] = out[at:end][::-1]
    elif kind == "number":  # a count or a length, of any magnitude
        number = draw.choice((0, 1, 255, 2**31 - 1, 2**31, 2**62, 2**63, 2**64 - 1))
        form = draw.choice(("<Q", "<I", ">Q"))
        out[at : at + struct.calcsize(form)] = struct.pack(
            form, number & (2**32 - 1 if form == "<I" else 2**64 - 1))
    else:
        out[at:at] = out[at:end] * draw.choice((1, 50))
    return bytes(out)


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) for every value in a nested structure."""
    found: list[tuple[Any, Any]] = []
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        found.append((value, key))
        if isinstance(item, (dict, list)):
            found += nodes(item)
    return found


def replaced(value: Any, draw: random.Random, others: tuple[Any, ...] = ()) -> Any:
    """Return a nested structure with one value replaced or removed, or one key renamed."""
    out = copy.deepcopy(value)
    container, key = draw.choice(nodes({"": out} if not isinstance(out, (dict, list)) else out)
                                 or [({"": out}, "")])
    kind = draw.random()
    if kind < 0.15:
        del container[key]
    elif kind < 0.25 and isinstance(container, dict):
        container[draw.choice(("x", ESCAPE, "", "__metadata__"))] = container.pop(key)
    elif kind < 0.3 and isinstance(container, list):
        container += container * 3
    elif kind < 0.35:
        new: Any = []
        for _ in range(draw.choice(DEEP[:2])):
            new = [new]
        container[key] = new
    else:
        container[key] = draw.choice(VALUES + others)
    return out


def json_text(value: Any, draw: random.Random) -> bytes:
    """Return nested JSON with one value replaced; sometimes nested too deeply for any parser."""
    if draw.random() < 0.05:
        depth = draw.choice(DEEP)
        return b"[" * depth + b"]" * depth
    # written by hand, because json.dumps rejects integers of more than 4,300 digits
    return json.dumps(replaced(value, draw)).encode("utf-8", "surrogatepass")


def damaged_json(data: bytes, draw: random.Random) -> bytes:
    """Damage JSON or JSON Lines text, by its values or by its bytes."""
    if draw.random() < 0.4:
        return damage(data, draw)
    lines = data.decode().split("\n") if data[:1] == b"{" and b"}\n{" in data else None
    if lines is None:
        return json_text(json.loads(data), draw)
    at = draw.randrange(len(lines))
    if not lines[at] or draw.random() < 0.2:  # lines removed, duplicated or reordered
        del lines[at : at + draw.choice((1, len(lines)))]
    elif draw.random() < 0.2:
        lines.insert(at, lines[draw.randrange(len(lines))])
    else:
        lines[at] = json_text(json.loads(lines[at]), draw).decode("utf-8", "surrogatepass")
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def damaged_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Damage a safetensors file, by the values in its header or by its bytes."""
    if draw.random() < 0.4:
        return damage(data, draw)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    notes = header.get("__metadata__", {}).get("notes")
    if notes and draw.random() < 0.3:
        damaged = json_text(json.loads(notes), draw)
        header["__metadata__"]["notes"] = damaged.decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = json_text(header, draw)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
