"""Functions that draw results on a matplotlib Axes and return the Axes.

Each function accepts `ax=`, the axes to draw on. Without `ax`, the function creates a pyplot
figure, which a notebook displays. All figures share one style with a colour-blind-safe palette, and
the caller's rcParams remain unchanged. matplotlib is imported when the first figure is drawn. If it
is not installed, the functions raise a `UserError` with the command that installs it.
"""

from __future__ import annotations

from jaxpersona.report.benches import bench
from jaxpersona.report.curves import drift, layers, steering, turns
from jaxpersona.report.roles import pca, ranking, variance
from jaxpersona.report.tokens import projections

__all__ = ["bench", "drift", "layers", "pca", "projections", "ranking", "steering", "turns",
           "variance"]
