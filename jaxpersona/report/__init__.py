"""Figures of results, drawn with matplotlib, and the HTML page of a run."""

from __future__ import annotations

from jaxpersona.report.run_page import page, write_page

__all__ = ["page", "write_page"]
