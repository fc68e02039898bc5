"""The command `jaxpersona judge sample`: print replies by score, or export them for scoring."""

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
    count: Annotated[int, typer.Option(
        help="Maximum number of replies to draw for each score.")] = 3,
    score: Annotated[str | None, typer.Option(
        show_default="all",
        help="Use only replies with this score (0 to 3), or `none` for undecided replies.")] = None,
    role: Annotated[str | None, typer.Option(
        show_default="all", help="Use only replies of this role.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed for drawing the sample.")] = 0,
    csv: Annotated[pathlib.Path | None, typer.Option(show_default="print the replies", help=(
        "Write the replies to this new .csv file, in random order and without their scores, so "
        "that a person can score them."))] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per reply."),
                       ] = False,
) -> None:
    """Print a sample of replies by score, or write the replies to a .csv file for scoring."""
    import numpy as np

    from jaxpersona.judges import human
    from jaxpersona.persona import verdicts
    from jaxpersona.runs.run import Run

    if count < 1 or seed < 0:
        raise UserError(f"--count is {count} and --seed is {seed}; give a count of at least 1 and "
                        "a seed of at least 0")
    wanted = _score(score)
    if csv is not None:
        if csv.suffix.lower() != ".csv":
            raise UserError(f"--csv is {csv}; give the name of a .csv file")
        if csv.exists():  # do not overwrite scores that a person entered
            raise UserError(f"--csv is {csv}, which already exists; give the name of a new file")
        check_output("--csv", csv)
    replies = verdicts.replies_of(Run.read(run))
    scores = verdicts.scores_of(run)
    if role is not None and role not in {item.role.name for item in replies.values()}:
        raise UserError(f"--role is {role!r}; give the name of a role in {run}")
    scores = {key: value for key, value in scores.items()
              if role in (None, key.partition("/")[0]) and (score is None or value == wanted)}
    drawn = verdicts.sample(replies, scores, count, seed=seed)
    if not drawn:
        raise UserError(f"{run}: contains no matching reply; choose another --score or --role")
    if csv is not None:
        order = np.random.default_rng(seed).permutation(len(drawn))
        human.write_rows(csv, [human.row_of(drawn[i][0]) for i in order])
        say(f"wrote {csv} (replies: {len(drawn)}); enter 0 to 3 or ? in the score column and run:",
            f"  jaxpersona judge agreement {run} {csv}")
        return
    if as_json:
        for item, value in drawn:
            print(json.dumps({"item": human.identity(item), "score": value,
                              "system_prompt": item.system_prompt, "question": item.question,
                              "answer": item.answer}))
        return
    last: object = ""
    for item, value in drawn:
        if value != last:
            say(f"== score {'none' if value is None else value} ==", "")
            last = value
        say(f"[{human.identity(item)}]", f"system: {item.system_prompt}",
            f"user: {item.question}", f"assistant: {item.answer}", "")


def _score(text: str | None) -> int | None:
    """Parse the value of `--score`; return None for "none" or if the option was not given.

    Raises:
      UserError: the value is not 0, 1, 2, 3 or "none".
    """
    if text is None or text == "none":
        return None
    if text not in ("0", "1", "2", "3"):
        raise UserError(f"--score is {text!r:.40}; give 0, 1, 2, 3 or none")
    return int(text)
