"""The JAX context of the package's public functions, independent of the caller's settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxpersona.distributed.sharding import unset_mesh
from jaxpersona.runtime import own_rules


@contextlib.contextmanager
def own_context() -> Iterator[None]:
    """Unset the mesh (`unset_mesh`), and disable debug flags and the transfer guard (`own_rules`).

    Use this function as a context manager or as a decorator, `@own_context()`.

    Raises:
      UserError: this process was forked from a process that had used JAX.
    """
    with unset_mesh(), own_rules():
        yield
