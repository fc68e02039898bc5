"""`docs/robustness.md` lists every cache, indexed access, reader, handler and mutable global.

The tests collect these from the source and compare them with the document, so that new ones are
reviewed before they are merged.
"""

from __future__ import annotations

import ast
import collections
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "robustness.md"
Found = dict[tuple[str, str], list[int]]  # (file, function) → lines

_CACHES = {"cache", "lru_cache", "cached_property", "program", "jit", "Program", "Kept", "Derived",
           "OrderedDict", "WeakKeyDictionary", "WeakValueDictionary", "ref"}
_SLICES = {"dynamic_slice", "dynamic_slice_in_dim", "dynamic_update_slice",
           "dynamic_update_slice_in_dim", "dynamic_index_in_dim", "take_along_axis"}
_READS = {"open", "read_bytes", "read_text", "memmap", "mmap", "fromfile", "load", "GGUFReader",
          "ZipFile", "from_pretrained", "from_file", "restore", "metadata", "item_metadata"}
# calls with immutable results, or that only define types
_IMMUTABLE = {"frozenset", "compile", "int", "float", "max", "tuple", "TypeVar", "getLogger",
              "ParamSpec", "Rope", "Where", "range", "Option", "Field", "AfterValidator", "dtype"}
_CHANGES = {"add", "append", "extend", "insert", "update", "setdefault", "pop", "popitem",
            "remove", "discard", "clear", "sort", "reverse"}


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Return the syntax tree of every module in the package, by path."""
    paths = [p for folder in ("jaxpersona", "kernels", "ckpts")
             for p in sorted((ROOT / folder).rglob("*.py"))]
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text("utf-8")) for p in paths}


def nodes(tree: ast.Module):
    """Yield every node of a module with the name of its enclosing function or class."""
    def walk(node, where):
        for child in ast.iter_child_nodes(node):
            inside = where
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inside = f"{where}.{child.name}" if where else child.name
                for decorator in child.decorator_list:
                    yield decorator, inside
                    yield from ((n, inside) for n in ast.walk(decorator) if n is not decorator)
            yield child, inside
            yield from walk(child, inside)

    seen = set()
    for node, where in walk(tree, ""):
        if id(node) not in seen:
            seen.add(id(node))
            yield node, where or "module"


def called(node: ast.AST) -> str:
    """Return the last component of a called function's name, or ""."""
    if not isinstance(node, ast.Call):
        return ""
    function = node.func
    return getattr(function, "attr", getattr(function, "id", ""))


def collect(test) -> Found:
    found: Found = collections.defaultdict(list)
    for path, tree in trees().items():
        for node, where in nodes(tree):
            if test(node):
                found[path, where].append(node.lineno)
    return dict(found)


def is_cache(node: ast.AST) -> bool:
    """Return whether a node is a decorator or call that caches results or programs."""
    if isinstance(node, ast.Call):
        return called(node) in _CACHES
    return (isinstance(node, ast.Attribute) and node.attr in ("cache", "jit")
            and getattr(node.value, "id", "") in ("functools", "jax")
            and not getattr(node, "is_called", False))


def is_access(node: ast.AST) -> bool:
    """Return whether a node is an array access with computed indices."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Attribute) and node.value.attr == "at"
    owner = getattr(getattr(node, "func", None), "value", None)
    owner = getattr(owner, "attr", getattr(owner, "id", ""))
    return (called(node), owner) in {("take", "jnp"), ("gather", "lax"), ("scatter", "lax")} or (
        called(node) in _SLICES)


def is_reader(node: ast.AST) -> bool:
    """Return whether a node is a call that opens or reads a file."""
    name = called(node)
    owner = getattr(getattr(getattr(node, "func", None), "value", None), "id", "")
    if name == "load":
        return owner in ("np", "torch")
    if name == "metadata":
        return owner == "orbax"
    return name in _READS


def is_handler(node: ast.AST) -> bool:
    """Return whether a node is an `except` clause or a call that suppresses exceptions."""
    ignores = isinstance(node, ast.Call) and any(
        k.arg == "ignore_errors" for k in node.keywords)
    return isinstance(node, ast.ExceptHandler) or called(node) == "suppress" or ignores


def is_mutable(value: ast.AST | None) -> bool:
    if isinstance(value, (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)):
        return True
    if isinstance(value, ast.BinOp):
        return is_mutable(value.left) or is_mutable(value.right)
    return isinstance(value, ast.Call) and called(value) not in _IMMUTABLE


def global_names() -> Found:
    """Return module-level names that have mutable values or that a function reassigns."""
    found: Found = collections.defaultdict(list)
    for path, tree in trees().items():
        for node in (n for statement in tree.body if not isinstance(
                statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                for n in ast.walk(statement)):
            # a statement that is run on import, and changes an object of this or another module
            changed = getattr(node, "targets", [getattr(node, "target", None)])
            for target in changed if isinstance(node, (ast.Assign, ast.AugAssign)) else ():
                if isinstance(target, (ast.Attribute, ast.Subscript)):
                    found[path, ast.unparse(target)].append(node.lineno)
        for node in tree.body:
            targets = (node.targets if isinstance(node, ast.Assign) else
                       [node.target] if isinstance(node, ast.AnnAssign) else [])
            for target in targets:
                for name in getattr(target, "elts", [target]):
                    value = node.value
                    if isinstance(value, ast.Tuple) and hasattr(target, "elts"):
                        value = value.elts[target.elts.index(name)]
                    if getattr(name, "id", "__all__") != "__all__" and is_mutable(value):
                        found[path, name.id].append(node.lineno)
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                for name in node.names:
                    lines = found[path, name]
                    if not lines:
                        lines.append(node.lineno)
    return dict(found)


def caches() -> Found:
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                node.func.is_called = True
    return collect(is_cache)


COLLECTED = {
    "Caches": caches, "Gathers, scatters and slices": lambda: collect(is_access),
    "Readers": lambda: collect(is_reader), "Handlers": lambda: collect(is_handler),
    "Mutable globals": global_names,
}


def listed(title: str) -> dict[tuple[str, str], int]:
    """Return a table in the document: (file, function) → number of occurrences."""
    text = DOCUMENT.read_text("utf-8")
    part = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert part is not None, f"{DOCUMENT.name} has no section {title!r}"
    rows: dict[tuple[str, str], int] = {}
    file = ""
    for line in part[1].splitlines():
        if matched := re.match(r"### `([^`]+)`$", line):
            file = matched[1]
        elif matched := re.match(r"\| `([^`]+)`(?: × (\d+))? \|", line):
            key = file, matched[1]
            assert key not in rows, f"{DOCUMENT.name}, {title}: {key} is listed twice"
            rows[key] = int(matched[2] or 1)
            assert len([c for c in line.split("|")[2:-1] if c.strip()]) >= 2, line
    return rows


@pytest.mark.parametrize("title", COLLECTED)
def test_the_document_lists_all_that_the_source_has(title):
    found, rows = COLLECTED[title](), listed(title)
    faults = []
    for key in sorted(set(found) | set(rows)):
        file, where = key
        lines = found.get(key, [])
        if len(lines) != rows.get(key, 0):
            at = ", ".join(f"{file}:{line}" for line in lines) or f"{file}: none"
            faults.append(f"{where}: {len(lines)} in the source ({at}), {rows.get(key, 0)} listed")
    assert not faults, (f"docs/robustness.md, section {title}, is out of date; look at each place "
                        "and describe it:\n" + "\n".join(faults))


def test_constant_tables_are_never_changed():
    """No statement changes a global that the document lists as constant."""
    text = DOCUMENT.read_text("utf-8").partition("## Mutable globals\n")[2]
    file, constant = "", set()
    for line in text.splitlines():
        if matched := re.match(r"### `([^`]+)`$", line):
            file = matched[1]
        elif matched := re.match(r"\| `([^`]+)` \| constant", line):
            constant.add((file, matched[1]))
    assert len(constant) > 20
    names = {name for _, name in constant}
    faults = []
    for path, tree in trees().items():
        top = {id(n) for n in tree.body}
        for node in ast.walk(tree):
            target = None
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)) and id(node) not in top:
                for one in getattr(node, "targets", [getattr(node, "target", None)]):
                    if isinstance(one, ast.Subscript):
                        target = one.value
            elif called(node) in _CHANGES and isinstance(node.func, ast.Attribute):
                target = node.func.value
            name = getattr(target, "id", getattr(target, "attr", None))
            if name in names and ((path, name) in constant or isinstance(target, ast.Attribute)):
                faults.append(f"{path}:{node.lineno} changes {name}")
    assert not faults, faults


def test_no_handler_is_bare():
    bare = [f"{path}:{node.lineno}" for path, tree in trees().items() for node in ast.walk(tree)
            if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert not bare, bare
