"""The command `jaxpersona judge agreement`: compare the scores of two judges."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from jaxpersona.cli.output import say
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.judges.agreement import Agreement


def agreement(
    a: Annotated[str, typer.Argument(
        help="A run folder with scores, or a .csv file in which a person entered scores "
             "(from `judge sample --csv` or `--judge human:FILE.csv`).")],
    b: Annotated[str, typer.Argument(
        help="Another run folder or file with scores of the same replies.")],
    seed: Annotated[int, typer.Option(
        help="Random seed for the bootstrap of the confidence interval.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Compare two judges' scores: confusion matrix, linearly weighted kappa, agreement by role."""
    from jaxpersona.judges.agreement import agreement as compare
    from jaxpersona.persona.verdicts import scores_of

    if seed < 0:
        raise UserError(f"--seed is {seed}; give 0 or more")
    first, second = scores_of(a), scores_of(b)
    if not set(first) & set(second):
        raise UserError(f"{a} and {b} have no reply in common; compare judges of the same run")
    found = compare(first, second, seed=seed)
    if as_json:
        print(json.dumps(_value(found)))
        return
    say(*lines(found))


def lines(found: Agreement) -> list[str]:
    """Format an `Agreement` as lines of text."""
    width = max(6, *(len(label) + 1 for label in found.labels))
    low, high = found.interval
    return [
        f"{int(found.table.sum()):,} replies judged by both, {found.only[0]:,} only by A, "
        f"{found.only[1]:,} only by B",
        "rows: scores of A; columns: scores of B",
        " " * 8 + "".join(f"{label:>{width}}" for label in found.labels),
        *(f"{label:>8}" + "".join(f"{n:>{width},}" for n in row)
          for label, row in zip(found.labels, found.table.tolist(), strict=True)),
        f"of {found.both:,} replies that both scored: equal {found.equal:.1%}, kappa (linear "
        f"weights) {_number(found.kappa)} with the 95 % confidence interval {_number(low)} to "
        f"{_number(high)}, mean of A − B {found.difference:+.3f}",
        f"{'role':<24}{'replies':>8}{'equal':>8}{'kappa':>8}{'A − B':>8}",
        *(f"{role:<24}{n:>8,}{equal:>8.0%}{_number(kappa):>8}{far:>+8.2f}"
          for role, (n, equal, kappa, far) in sorted(found.roles.items())),
    ]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _value(found: Agreement) -> dict[str, object]:
    """Return an `Agreement` as a JSON object; undefined numbers are null."""
    def known(value: float) -> float | None:
        return None if math.isnan(value) else round(value, 6)

    return {
        "labels": list(found.labels), "table": found.table.tolist(), "both": found.both,
        "only": list(found.only), "equal": known(found.equal), "kappa": known(found.kappa),
        "interval": [known(value) for value in found.interval],
        "difference": known(found.difference),
        "roles": {role: {"replies": n, "equal": known(equal), "kappa": known(kappa),
                         "difference": known(far)}
                  for role, (n, equal, kappa, far) in found.roles.items()},
    }
