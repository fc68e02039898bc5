"""Counts of kernels and collectives in compiled HLO text.

Only operations in the entry computation and in the loops, branches and calls that it reaches are
counted. A fusion is one kernel.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

_OPERATION = re.compile(r"\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_HEADER = re.compile(r"(ENTRY )?%?(\S+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:body|condition|to_apply|true_computation|false_computation)=%?([^\s,)]+)"
                     r"|branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+)(\d+)?[a-z0-9]*\[([\d,]*)\]")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
               "collective-broadcast", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One HLO operation.

    Attributes:
      kind: the HLO opcode. An asynchronous start/done pair is one operation, without "-start" in
        its opcode.
      scope: the `op_name` metadata, a path of named scopes.
      bytes: the size of the result in bytes.
      looped: whether the operation is inside a loop.
    """

    kind: str
    scope: str
    bytes: int
    looped: bool


def operations(text: str) -> list[Operation]:
    """Return the operations in a module's HLO text; an operation in a loop is listed only once."""
    bodies, entry = _computations(text)
    out: list[Operation] = []
    waiting, seen = [(entry, False)], set()
    while waiting:
        name, looped = waiting.pop()
        if name in seen or name not in bodies:
            continue
        seen.add(name)
        for line in bodies[name]:
            matched = _OPERATION.match(line)
            if matched is None:
                continue
            _, shape, kind, rest = matched.groups()
            if kind in ("while", "conditional", "call"):
                waiting += [(called, looped or kind == "while") for called in _called(rest)]
            if kind.endswith("-done"):
                continue
            scope = re.search(r'op_name="([^"]*)"', rest)
            out.append(Operation(kind.removesuffix("-start"), scope.group(1) if scope else "",
                                 _size(shape), looped))
    return out


def collectives(text: str) -> list[Operation]:
    """Return the collectives in the HLO text of a compiled module."""
    return [op for op in operations(text) if op.kind in COLLECTIVES]


def by_layer(found: list[Operation], layer: int) -> list[Operation]:
    """Return the operations in the named scope of one layer, such as `layer3`."""
    return [op for op in found if f"layer{layer}" in op.scope.split("/")]


def reductions(found: list[Operation]) -> int:
    """Count collectives; a reduce-scatter and the all-gather that completes it count as one."""
    kinds = [op.kind for op in found]
    scattered = kinds.count("reduce-scatter")
    return scattered + len(kinds) - scattered - min(scattered, kinds.count("all-gather"))


def fusions(found: Iterable[Operation]) -> int:
    """Count the fusions inside loops; a fusion counts once, not once per iteration."""
    return sum(op.kind == "fusion" and op.looped for op in found)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if matched := _HEADER.match(line):
            current = bodies.setdefault(matched.group(2), [])
            if matched.group(1):
                entry = matched.group(2)
        elif line.startswith(" "):
            current.append(line)
    return bodies, entry


def _called(rest: str) -> Iterator[str]:
    for one, several in _CALLED.findall(rest):
        yield from [one] if one else [name.strip().lstrip("%") for name in several.split(",")]


def _size(shape: str) -> int:
    total = 0
    for kind, bits, extents in _SHAPE.findall(shape):
        width = 8 if kind == "pred" else int(bits or 0)
        total += math.prod(int(n) for n in extents.split(",") if n) * width // 8
    return total
