"""Intervals of the values by layer on the page of a run, from the response means that it stores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxpersona.data.texts import DEFAULT
from jaxpersona.errors import UserError
from jaxpersona.persona.bootstrap import PcaIntervals, pca_intervals
from jaxpersona.report.run_read import Contents
from jaxpersona.report.run_values import unplaced
from jaxpersona.runs.run import Run


def intervals(found: Contents, report: Callable[[str, int, int, int], None] | None = None,
              ) -> PcaIntervals | None:
    """Return the intervals of |cos(PC1, axis)| and of the explained variance at each layer.

    The files of the response means are read once for each group of layers, so that not all of them
    are in memory at once.

    Args:
      found: the content of the run folder.
      report: a progress function, called with ("intervals", done, total, 0) for each layer.

    Returns:
      The intervals; None if there is no axis, if a vector of the axis is missing or not finite, if
      the axis has fewer than two roles, or if neither the default persona nor any role has two
      stored response means.

    Raises:
      UserError: a file is damaged, or the run changed while the page was being written.
    """
    if found.analysis is None or unplaced(found):
        return None
    vectors = {name: vector for name, vector in found.vectors.items()
               if name in found.stored and name != DEFAULT}
    if len(vectors) < 2 or DEFAULT not in found.stored:
        return None
    run = Run.read(found.folder)

    def means(name: str, layers: slice) -> np.ndarray:
        sample = run.sample(name)
        place = {key: i for i, key in enumerate(sample.keys)}
        if not set(found.stored[name]) <= set(place):
            raise UserError(f"{found.folder}: the run changed while its page was being written; "
                            "run the same command again")
        rows = [place[key] for key in found.stored[name]]
        return sample.base[layers] + sample.differences[rows, layers].astype(np.float32)

    return pca_intervals(
        found.vectors[DEFAULT], vectors, {name: len(keys) for name, keys in found.stored.items()},
        found.averaged, means,
        report=None if report is None else lambda done, total: report("intervals", done, total, 0))
