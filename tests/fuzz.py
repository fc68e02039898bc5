"""Seeded damage to files: bytes flipped, cut, moved or inserted, and values replaced.

`check` damages one file many times and runs a reader after each damage. The reader must succeed, or
fail with one line that names the file or its folder. No control characters may be printed.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pathlib
import random
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest

from jaxpersona.errors import UserError
from jaxpersona.inputs import printable

SECONDS = 60  # time limit for one call of a reader
COUNTS = [pytest.param(12, id="few"), pytest.param(1000, id="many", marks=pytest.mark.slow)]

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


def pickled(value: Any) -> bytes:
    """Return a value as PyTorch writes it."""
    import torch

    kept = io.BytesIO()
    torch.save(value, kept)
    return kept.getvalue()


def damaged_pickle(value: Any) -> Callable[[bytes, random.Random], bytes]:
    """Return a function that damages a .pt file, by the values in it or by its bytes."""
    def make(data: bytes, draw: random.Random) -> bytes:
        if draw.random() < 0.4:
            return damage(data, draw)
        import torch

        others = (torch.ones(3), torch.ones(2, 2, dtype=torch.int32), torch.ones(1).expand(9, 9),
                  torch.tensor(float("nan")), torch.zeros(0, 4), torch.ones(4, 4).to_sparse(),
                  torch.ones(2, 3, dtype=torch.float8_e4m3fn), {"q": torch.ones(3)})
        return pickled(replaced(value, draw, others))
    return make


def called(function: Callable[[], Any]) -> int:
    """Call a function as a command would: return 2 and print one line if it raises a UserError."""
    try:
        function()
    except UserError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return 0


def _guarded(act: Callable[[], Any]) -> Any:
    """Call a reader; if it exceeds the time limit, fail the test."""
    def late(*_: Any) -> None:
        raise AssertionError(f"ran for {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return act()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _fault(code: Any, out: str, err: str, path: pathlib.Path, root: pathlib.Path) -> str | None:
    """Return what is wrong with the result of a reader, or None."""
    # count only errors; progress, warnings and self-tests have their own lines
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    marks = [c for c in out + err if ord(c) < 32 and c not in "\n\t\r" or 126 < ord(c) < 160]
    if code not in (0, 2):
        return f"exit code {code}"
    if marks:
        return f"control characters {set(marks)}"
    if code == 0:
        return "an error with exit code 0" if lines else None
    if len(lines) != 1 or "Traceback" in err:
        return f"{len(lines)} lines of error"
    inside = path.relative_to(root).parts[:-1]  # the folder of a model or a run
    if path.name not in lines[0] and not (inside and str(root / inside[0]) in lines[0]):
        return f"the file is not named: {lines[0][:400]}"
    return None


def check(path: pathlib.Path, root: pathlib.Path, make: Callable[[bytes, random.Random], bytes],
          act: Callable[[], Any], count: int, capsys: Any, *,
          after: Callable[[], Any] = lambda: None, least: float = 0.2, seed: str = "") -> None:
    """Damage a file `count` times, and run a reader after each damage.

    Args:
        path: the file. Its content is restored at the end.
        root: a parent folder. If the file is in a subfolder of it, an error may name this
            subfolder instead of the file.
        make: (content, random generator) → damaged content.
        act: the reader; it returns 0, or prints one line "error: …" and returns 2.
        after: called after each call of the reader, to undo its changes.
        least: the fraction of damaged files that the reader must refuse.
        seed: the seed of the generator; default: the path of the file below `root`.
    """
    data, faults, codes = path.read_bytes(), [], {}
    draw = random.Random(seed or path.relative_to(root).as_posix())
    try:
        for i in range(count):
            made = make(data, draw)
            path.write_bytes(made)
            capsys.readouterr()
            try:
                code = _guarded(act)
            except BaseException as error:  # noqa: BLE001 - any exception is a finding
                code = f"{type(error).__name__}: {str(error)[:300]}"
            codes[code] = codes.get(code, 0) + 1
            fault = _fault(code, *capsys.readouterr(), path, root)
            if fault is not None:
                faults.append((i, fault, made[:200]))
            after()
    finally:
        path.write_bytes(data)
    assert not faults, "\n".join(map(str, [len(faults), *faults[:12]]))
    assert codes.get(2, 0) >= count * least, codes


_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
          11: "<q", 12: "<d"}  # GGUF type → `struct` format
_NAMES = ("general.architecture", "split.count", "general.alignment", "tokenizer.ggml.pre",
          "tokenizer.ggml.model", "tokenizer.ggml.merges", "tokenizer.ggml.scores",
          "tokenizer.ggml.add_bos_token", "qwen3.rope.scaling.type", "llama.vocab_size", "", "x")


def damaged_gguf(data: bytes, draw: random.Random) -> bytes:
    """Damage a GGUF file, by one field or tensor of its header or by its bytes."""
    if draw.random() < 0.3:
        return damage(data, draw, head=1 << 14)
    at, version = 24, data[4:8]
    n_tensors, n_fields = struct.unpack("<QQ", data[8:24])

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    def text() -> bytes:
        return take(int.from_bytes(take(8), "little"))

    def item(kind: int) -> Any:
        return text() if kind == 8 else struct.unpack(_FORMS[kind], take(
            struct.calcsize(_FORMS[kind])))[0]

    fields: list[list[Any]] = []
    for _ in range(n_fields):
        key, kind = text(), item(4)
        inner = item(4) if kind == 9 else kind
        fields.append([key, kind, inner, [item(inner) for _ in range(item(10))] if kind == 9
                       else item(kind)])
    tensors = [[text(), [item(10) for _ in range(item(4))], item(4), item(10)]
               for _ in range(n_tensors)]
    rest = data[-(-at // 32) * 32 :]
    number = (0, 1, 2, 3, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
    if draw.random() < 0.3:
        tensor = draw.choice(tensors)
        part = draw.randrange(6)
        if part == 0:
            tensors.remove(tensor)
        elif part == 1:
            tensors.append(tensor)
        elif part == 2:
            tensor[0] = draw.choice((b"x", ESCAPE.encode("latin-1"), b"", b"\xff"))
        elif part == 3:
            tensor[1] = draw.choice(([], [draw.choice(number)], tensor[1][::-1], [1] * 9,
                                     [*tensor[1], 1], [2**32, 2**32]))
        else:
            tensor[part - 2] = draw.choice(number)
    else:
        field = draw.choice(fields)
        value, part = field[3], draw.randrange(5)
        if part == 0:
            fields.remove(field)
        elif part == 1:
            field[0] = draw.choice(_NAMES).encode()
        elif isinstance(value, list) and value and part < 4:
            place = draw.randrange(len(value))
            if field[2] == 8:
                value[place] = draw.choice((b"", b"a b", b"a", b" ", b"\xff", b"x" * 2000,
                                            ESCAPE.encode("latin-1"), value[0]))
            else:
                value[place] = draw.choice((0, 1, 3, 4))
            if draw.random() < 0.4:
                field[3] = draw.choice((value[:place], value * 2, []))
        elif part == 2:
            field[1:] = 8, 8, draw.choice((b"", b"x", b"default", b"llama", b"\xff\xfe", b"9" * 999,
                                           ESCAPE.encode(), b"{% for x in [] %}", b"{{ 1 / 0 }}"))
        elif part == 3:
            field[1:] = 10, 10, draw.choice(number)
        else:
            field[1:] = draw.choice(((6, 6, math.nan), (6, 6, math.inf), (12, 12, -1e300),
                                     (7, 7, True), (9, 4, [1]), (9, 8, [b"x"]), (11, 11, -1)))

    def out(kind: int, value: Any) -> bytes:
        return (len(value).to_bytes(8, "little") + value if kind == 8
                else struct.pack(_FORMS[kind], value))

    head = b"GGUF" + version + struct.pack("<QQ", len(tensors), len(fields))
    for key, kind, inner, value in fields:
        head += out(8, key) + out(4, kind)
        head += (out(4, inner) + out(10, len(value)) + b"".join(out(inner, v) for v in value)
                 if kind == 9 else out(kind, value))
    for name, shape, kind, offset in tensors:
        head += out(8, name) + out(4, len(shape)) + b"".join(out(10, n) for n in shape)
        head += out(4, kind % 2**32) + out(10, offset)
    return head + b"\0" * (-len(head) % 32) + rest


_JINJA = (b"{{ 1 / 0 }}", b"{% for m in messages %}", b"{% endfor %}", b"{% include 'x' %}",
          b"{{ messages[9].content }}", b"{{ raise_exception('no') }}", b"{% set x = 'a' * 99 %}",
          b"{{ ''.__class__.__mro__ }}", b"{{ messages }}", b"{{ '%c' % 27 }}[2J",
          b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", b"{{ x.y }}", b"{#", b"{{",
          b"{{ m }}", b"{% if %}", b"{{ 10 ** 400 }}", b"{{ range(3) | list }}",
          b"{{ 'a' * 10 ** 9 }}", b"{{ '\\ud800' }}")


def damaged_template(data: bytes, draw: random.Random) -> bytes:
    """Damage a Jinja template, by a statement that is inserted or by its bytes."""
    if draw.random() < 0.5:
        return damage(data, draw)
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice(_JINJA) + data[at + draw.choice((0, 0, 5, 50)) :]
