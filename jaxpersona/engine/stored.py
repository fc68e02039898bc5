"""Programs whose traces are stored on disk, so that later processes need not trace them again.

`jax.export` converts a traced program to StableHLO bytes. The bytes contain no Python objects, so
`pickle` is not used. A later process reads the bytes instead of tracing the program, and JAX's
compilation cache returns the executable for these bytes. The first process also compiles the
exported bytes, so that all processes use the same executable.

A program for a GPU, a program that cannot be exported, and a program whose arguments cannot be
described exactly are compiled by `jax.jit` as usual.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import logging
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.export
import numpy as np
from jax.extend.backend import get_backend
from jax.sharding import SingleDeviceSharding

from jaxpersona.distributed.sharding import default_device
from jaxpersona.engine.own_folder import OwnFolder
from jaxpersona.errors import UserError
from jaxpersona.runtime import is_traced, setting, thread_settings, tracing_settings

SUFFIX = ".trace"
_LOG = logging.getLogger("jaxpersona")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jaxpersona")


class Stored:
    """A jitted function whose traces are stored on disk.

    A stored trace is used only if every argument leaf is a NumPy array or an unsharded, concrete
    array on JAX's default device, and `jax_disable_jit` is off. Other calls use `jax.jit`.
    """

    def __init__(self, function: Callable, jitted: Any, *, static: Iterable[str],
                 donate: Iterable[str], result: Callable[..., Any], folder: OwnFolder) -> None:
        """Wrap the function; its traces are created or read from disk when it is called.

        Args:
          function: a function whose arguments can all be passed by name.
          jitted: the result of `jax.jit` for the function, for calls without a stored trace.
          static, donate: the names of the static and the donated arguments.
          result: a function with the same arguments that returns a pytree with the structure of
            `function`'s result, without computing this result.
          folder: the folder for traces.
        """
        self._function, self._jitted = function, jitted
        self._signature = inspect.signature(function)
        self._static, self._donate, self._result = set(static), set(donate), result
        self._folder, self._lock = folder, threading.Lock()
        # (key, trace) pairs. A key contains the argument types and JAX's settings. A trace is a
        # function of the leaves, paired with the structure of its result. It is None if the program
        # cannot be stored.
        self._made: list[tuple[Any, tuple[Callable, Any] | None]] = []
        self._chosen = _Chosen()
        # a jitted function that calls the stored trace in `_chosen.made` when it is traced; JAX's
        # fast dispatch handles repeated calls
        self._quick: Any = _quick(self._chosen, function, self._bound, static=self._static,
                                  donate=self._donate)
        self._never = False  # whether the program cannot be stored

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self._never or setting("jax_disable_jit"):
            return self._jitted(*args, **named)
        if self._made:
            try:
                return self._quick(*args, **named)
            except _Untraced:  # the arguments or JAX's settings differ from those of earlier calls
                pass
        arrays, static = self._bound(args, named)
        leaves, tree = jax.tree.flatten(arrays)
        made = None
        if _on_one(default_device(), leaves):
            made = self._get(arrays, static, tree, leaves)
            self._never = made is None
        if made is None:
            return self._jitted(*args, **named)
        self._chosen.made = made
        try:
            return self._quick(*args, **named)
        finally:
            self._chosen.made = None

    def lower(self, *args: Any, **named: Any) -> Any:
        """Trace and lower the function, like `jax.jit(…).lower`."""
        return self._jitted.lower(*args, **named)

    def _bound(self, args: tuple, named: Mapping[str, Any]) -> tuple[dict[str, Any], dict]:
        """Return the non-static and the static arguments, as two dictionaries by name."""
        bound = self._signature.bind(*args, **named)
        bound.apply_defaults()
        arrays = {k: v for k, v in bound.arguments.items() if k not in self._static}
        return arrays, {k: v for k, v in bound.arguments.items() if k in self._static}

    def _get(self, arrays: dict[str, Any], static: dict, tree: Any,
             leaves: list[Any]) -> tuple[Callable, Any] | None:
        """Return the trace for the arguments.

        A `Stored` object may be called with arguments of different structures, such as states with
        different captures, so the key in `_made` contains everything that `jax.jit` distinguishes.

        Returns:
          A pair: a function that takes the arguments' leaves, and the structure of its result. None
          if the program cannot be stored.
        """
        kinds = [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]
        asked = tree, kinds, static, thread_settings()
        with self._lock:
            for of, made in self._made:
                if of == asked:
                    return made
            self._made.append((asked, self._make(arrays, static)))
            return self._made[-1][1]

    def _make(self, arrays: dict[str, Any], static: dict) -> tuple[Callable, Any] | None:
        try:
            name = self._name(arrays, static)
        except Unknown as error:
            _LOG.info("%s is traced in every process: %s", self._function.__name__, error)
            return None
        leaves, tree = jax.tree.flatten(arrays)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=jax.typeof(x).weak_type)
                  for x in leaves]
        structure = jax.tree.structure(self._result(**arrays, **static))
        exported = self._read(name, shapes)
        if exported is None:
            exported = self._export(shapes, tree, static, structure)
            if exported is None:
                return None
            self._folder.write(name, bytes(exported.serialize()))
        return exported.call, structure

    def _export(self, shapes: list, tree: Any, static: dict,
                structure: Any) -> jax.export.Exported | None:
        """Trace and export the program as a function of leaves; None if it cannot be exported."""
        traced = []

        def flat(*leaves: Any) -> list[Any]:
            out, found = jax.tree.flatten(self._function(**jax.tree.unflatten(tree, leaves),
                                                         **static))
            traced.append(found)
            return out

        flat.__name__ = self._function.__name__
        where = default_device().platform
        platforms = None if where == jax.default_backend() else [where]  # None: default platform
        try:
            exported = jax.export.export(jax.jit(flat), platforms=platforms)(*shapes)
        except UserError:
            raise
        except (ValueError, NotImplementedError) as error:  # not exportable
            _LOG.info("%s is traced in every process: %s", self._function.__name__,
                      str(error).split("\n", 1)[0])
            return None
        if traced[-1] != structure:
            _LOG.info("%s is traced in every process: its result has an unexpected structure",
                      self._function.__name__)
            return None
        return exported

    def _read(self, name: str, shapes: list) -> jax.export.Exported | None:
        """Return the stored trace; None if it is missing, unreadable or does not match `shapes`."""
        content = self._folder.read(name)
        if content is None:
            return None
        try:
            exported = jax.export.deserialize(bytearray(content))
            wanted = [(x.shape, x.dtype) for x in shapes]
            if [(x.shape, x.dtype) for x in exported.in_avals] == wanted:
                return exported
        except Exception as error:  # the parser raises errors of many types
            _LOG.warning("%s: the trace cannot be read (%s) and will be replaced", name, error)
        return None

    def _name(self, arrays: dict[str, Any], static: dict) -> str:
        """Return the file name: a hash of everything that the trace and its result depend on.

        Raises:
          Unknown: the device is neither a CPU nor a TPU, or an argument has no exact description.
        """
        device = default_device()
        if device.platform not in ("cpu", "tpu"):
            raise Unknown("a trace for a GPU contains the choice of an attention kernel, which "
                          "depends on the installed cuDNN")
        described = (
            _source(), _VERSIONS,
            device.platform, device.device_kind, get_backend(device.platform).platform_version,
            tracing_settings(), f"{self._function.__module__}.{self._function.__qualname__}",
            described_value(arrays), described_value(static), sorted(self._donate))
        return hashlib.sha256(repr(described).encode()).hexdigest() + SUFFIX


class _Chosen(threading.local):
    """The stored trace that a call in this thread uses; None outside such a call."""

    made: tuple[Callable, Any] | None = None


class _Untraced(Exception):
    """Raised while `jax.jit` traces a call for which no stored trace was chosen."""


def _quick(chosen: _Chosen, function: Callable, bound: Callable, *, static: set[str],
           donate: set[str]) -> Any:
    """Return a jitted function that calls the stored trace in `chosen.made` when it is traced.

    JAX traces the function again only if the arguments' types or JAX's settings change, so other
    calls need no check in Python.
    """
    @functools.wraps(function)  # keeps the program's name and argument names
    def call(*args: Any, **named: Any) -> Any:
        if chosen.made is None:
            raise _Untraced
        trace, structure = chosen.made
        return jax.tree.unflatten(structure, trace(*jax.tree.leaves(bound(args, named)[0])))

    return jax.jit(call, static_argnames=static, donate_argnames=donate)


class Unknown(Exception):
    """Raised if the dependencies of a trace cannot be described exactly."""


def described_value(value: Any) -> Any:
    """Return an exact description of an argument, as nested tuples of strings and numbers.

    An array is described by shape, dtype and weak type, any other value by type and complete
    content. Equal descriptions therefore imply equal traces.

    Raises:
      Unknown: a value is not of a supported type. Classes outside this package are not supported,
        because a change to their source may change the trace.
    """
    if value is None or type(value) in (bool, int, float, str, bytes):
        return type(value).__name__, repr(value)
    if isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        kind = jax.typeof(value)
        return "array", kind.shape, str(kind.dtype), kind.weak_type
    if type(value) in (tuple, list):
        return type(value).__name__, tuple(map(described_value, value))
    if type(value) is dict:
        items = ((described_value(k), described_value(v)) for k, v in value.items())
        return "dict", tuple(sorted(items, key=repr))
    if isinstance(value, np.dtype):
        return "dtype", value.name
    if isinstance(value, type):
        return "type", _ours(value)
    if isinstance(value, range):
        return "range", repr(value)
    if isinstance(value, enum.Enum):
        return _ours(type(value)), value.name
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return _ours(type(value)), tuple(map(described_value, value))
    if dataclasses.is_dataclass(value):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _ours(type(value)), described_value(own)
    raise Unknown(f"{value!r:.60} is of type {type(value).__name__}, which has no exact "
                  "description")


def _ours(kind: type) -> str:
    """Return the name of a class whose source is included in the hash of `_source`.

    Raises:
      Unknown: the class belongs to another package or was defined inside a function.
    """
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.partition(".")[0] != "jaxpersona" or "<locals>" in name:
        raise Unknown(f"{name} is not a module-level class of jaxpersona")
    return name


def _on_one(device: Any, leaves: list[Any]) -> bool:
    """Return whether every leaf is a NumPy array or an unsharded, concrete array on `device`."""
    # a call may have hundreds of leaves, but few types and shardings, so check each of these once
    samples = {type(x): x for x in leaves}
    arrays = {kind for kind, x in samples.items() if isinstance(x, jax.Array)}
    if is_traced(list(samples.values())) or not all(
            kind in arrays or isinstance(x, np.ndarray) for kind, x in samples.items()):
        return False
    shardings = [x.sharding for x in leaves if type(x) in arrays]
    return all(isinstance(x, SingleDeviceSharding) and x.device_set == {device}
               for x in set(shardings))


@functools.cache
def _source() -> str:
    """Return a hash of this package's source files, which determine the traces."""
    import jaxpersona.kernels

    total = hashlib.sha256()
    for package in (jaxpersona, jaxpersona.kernels):
        root = pathlib.Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


_source()  # hash the files at import, because later edits do not affect the imported code
_VERSIONS = tuple(importlib.metadata.version(name) for name in _PACKAGES)
