"""Figures of results, each drawn on a matplotlib Axes that the function returns.

All take `ax=`, axes to draw on; without it they make a pyplot figure, which notebooks show. They
share one style, with colours that colour-blind readers can tell apart, and leave the caller's
rcParams unchanged. matplotlib is imported by the first figure; if it is missing, a `UserError` says
how to install it.
"""

from __future__ import annotations

from jaxpersona.report.benches import bench
from jaxpersona.report.curves import drift, layers, steering, turns
from jaxpersona.report.roles import pca, ranking, variance
from jaxpersona.report.tokens import projections

__all__ = ["bench", "drift", "layers", "pca", "projections", "ranking", "steering", "turns",
           "variance"]
