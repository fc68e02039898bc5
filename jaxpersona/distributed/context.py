"""The JAX context of the package's public calls: no caller's mesh, debugging flags or guards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxpersona.distributed.sharding import unset_mesh
from jaxpersona.runtime import own_rules


@contextlib.contextmanager
def own_context() -> Iterator[None]:
    """Disable the caller's mesh (`unset_mesh`), debugging flags and transfer guard (`own_rules`).

    A context manager, and a decorator as `@own_context()`.

    Raises:
      UserError: this process was forked from one that has used JAX.
    """
    with unset_mesh(), own_rules():
        yield
