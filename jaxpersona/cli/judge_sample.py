"""The command `jaxpersona judge sample`: replies by score, to read or to score by hand."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from jaxpersona.cli.output import say
from jaxpersona.cli.support import check_output
from jaxpersona.errors import UserError


def sample(
    run: Annotated[pathlib.Path, typer.Argument(help="A run folder with scores.")],
    count: Annotated[int, typer.Option(help="Replies of each score.")] = 3,
    score: Annotated[str | None, typer.Option(
        show_default="all", help="Only this score, 0 to 3, or none for undecided replies.")] = None,
    role: Annotated[str | None, typer.Option(show_default="all", help="Only this role.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    csv: Annotated[pathlib.Path | None, typer.Option(show_default="print them", help=(
        "Write them to this new .csv file without their scores, in random order, for a person to "
        "score."))] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per reply."),
                       ] = False,
) -> None:
    """Print a sample of replies by score, or write it as a file to fill in."""
    import numpy as np

    from jaxpersona.judges import human
    from jaxpersona.persona import verdicts
    from jaxpersona.runs.run import Run

    if count < 1 or seed < 0:
        raise UserError(f"--count is {count} and --seed {seed}; give at least 1 reply, and a seed "
                        "of 0 or more")
    wanted = _score(score)
    if csv is not None:
        if csv.suffix.lower() != ".csv":
            raise UserError(f"--csv is {csv}; give the name of a .csv file")
        if csv.exists():  # it may contain a person's work
            raise UserError(f"--csv is {csv}, which exists; give the name of a new file")
        check_output("--csv", csv)
    replies = verdicts.replies_of(Run.read(run))
    scores = verdicts.scores_of(run)
    if role is not None and role not in {item.role.name for item in replies.values()}:
        raise UserError(f"--role is {role!r}, which is no role of {run}")
    scores = {key: value for key, value in scores.items()
              if role in (None, key.partition("/")[0]) and (score is None or value == wanted)}
    drawn = verdicts.sample(replies, scores, count, seed=seed)
    if not drawn:
        raise UserError(f"{run}: has no such reply; choose another --score or --role")
    if csv is not None:
        order = np.random.default_rng(seed).permutation(len(drawn))
        human.write_rows(csv, [human.row_of(drawn[i][0]) for i in order])
        say(f"{len(drawn)} replies in {csv}; fill in the column score with 0 to 3, or ?, then:",
            f"  jaxpersona judge agreement {run} {csv}")
        return
    if as_json:
        for item, value in drawn:
            print(json.dumps({"item": human.identity(item), "score": value,
                              "system_prompt": item.system_prompt, "question": item.question,
                              "answer": item.answer}, ensure_ascii=False))
        return
    last: object = ""
    for item, value in drawn:
        if value != last:
            say(f"== score {'none' if value is None else value} ==", "")
            last = value
        say(f"[{human.identity(item)}]", f"system: {item.system_prompt}",
            f"user: {item.question}", f"assistant: {item.answer}", "")


def _score(text: str | None) -> int | None:
    """Parse a score.

    Raises:
      UserError: it is not 0 to 3 or "none".
    """
    if text is None or text == "none":
        return None
    if text not in ("0", "1", "2", "3"):
        raise UserError(f"--score is {text!r:.40}; give 0, 1, 2, 3 or none")
    return int(text)
