"""A process that judges 200 replies with an endpoint: `judging.py URL JOURNAL OUT [SIZE]`.

With a size, the requests are sent in batches of this size.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

from jaxpersona.data.texts import Role
from jaxpersona.judges.endpoint import Endpoint
from jaxpersona.judges.http import HttpJudge
from jaxpersona.judges.limits import Batch
from jaxpersona.judges.protocol import Item, in_order

COUNT = 200
ROLE = Role("ghost", ("You are a ghost.",), "Asked: {question} Said: {answer} Grade 0-3.")
ITEMS = [Item(f"q{i}", ROLE, "Who?", f"Boo number {i}.") for i in range(COUNT)]


def main(url: str, journal: str, out: str, size: str = "") -> None:
    """Judge all items and write their scores, through a temporary file."""
    batch = Batch(int(size), poll=0.02) if size else None
    judge = HttpJudge(Endpoint("judge-1", url=url, timeout=20), journal, backoff=0.01, batch=batch)
    found = [[v.key, v.score, v.error] for v in in_order(judge, ITEMS)]
    judge.close()
    temporary = pathlib.Path(out + ".tmp")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
