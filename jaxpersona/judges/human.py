"""A judge that is a person: a CSV file to fill in and to read back."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from jaxpersona.ckpts.files import write_text
from jaxpersona.errors import UserError
from jaxpersona.inputs import TEXT_BYTES, read_bytes
from jaxpersona.judges.protocol import ROLE_SCALE, Item, Verdict

COLUMNS: tuple[str, ...] = ("item", "role", "description", "system_prompt", "question", "answer",
                            "score", "digest")
UNDECIDED = ("?", "none")  # in the column score: read, but not decidable
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run such a cell


class HumanJudge:
    """Read the scores that a person entered in a CSV file; add the items that it lacks.

    Args:
      path: the file; it is created if it is missing. A person fills in the column `score`, with an
        integer of the scale, or "?" if it cannot be decided.
      scale: the allowed integers.

    Examples:
      >>> import tempfile
      >>> from jaxpersona.data.texts import Role
      >>> from jaxpersona.judges.human import HumanJudge
      >>> from jaxpersona.judges.protocol import Item
      >>> ghost = Role("ghost", ("Be a ghost.",), "")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     judge = HumanJudge(f"{folder}/mine.csv")
      ...     [verdict] = judge.score([Item("a", ghost, "Who are you?", "Boo.")])
      >>> verdict.error
      'not scored yet in mine.csv'
    """

    def __init__(self, path: str | os.PathLike[str], scale: tuple[int, ...] = ROLE_SCALE) -> None:
        self.path, self.scale = pathlib.Path(path), scale
        self.name = f"human {self.path.name} scale {scale[0]}-{scale[-1]}"

    def score(self, items: Sequence[Item]) -> Iterator[Verdict]:
        """Yield one verdict per item, with an error for each that has no score yet.

        Raises:
          UserError: the file cannot be read or written, or has an invalid score.
        """
        rows = read_rows(self.path) if self.path.exists() else {}
        new = [item for item in items if identity(item) not in rows]
        if new:
            rows |= {identity(item): row_of(item) for item in new}
            write_rows(self.path, list(rows.values()))
        for item in items:
            row = rows[identity(item)]
            if row["digest"] != digest_of(item):
                yield Verdict(item.key, error=f"{self.path.name} has another text for "
                                              f"{identity(item)}; delete its row")
                continue
            score = score_of(row, self.scale, self.path)
            if isinstance(score, str):
                yield Verdict(item.key, error=f"not scored yet in {self.path.name}")
            else:
                yield Verdict(item.key, score, refused=score == 0 and self.scale == ROLE_SCALE,
                              raw=row["score"])


def identity(item: Item) -> str:
    """Return an item's key with its role, unique in a run."""
    return f"{item.role.name}/{item.key}"


def digest_of(item: Item) -> str:
    """Return 8 hexadecimal digits that identify an item's question and answer."""
    text = f"{item.question}\0{item.answer}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:8]


def row_of(item: Item) -> dict[str, str]:
    """Return an item as a row without a score."""
    cells = {"item": identity(item), "role": item.role.name, "description": item.role.description,
             "system_prompt": item.system_prompt, "question": item.question,
             "answer": item.answer, "score": "", "digest": digest_of(item)}
    return {name: (f"'{text}" if text.startswith(_FORMULA) else text)
            .encode("utf-8", "replace").decode() for name, text in cells.items()}  # half a pair


def score_of(row: Mapping[str, str], scale: Sequence[int], path: pathlib.Path) -> int | str | None:
    """Return the score of a row; None if it cannot be decided, "" if it is not filled in.

    Raises:
      UserError: it is something else.
    """
    text = (row.get("score") or "").strip().removesuffix(".0")  # as some spreadsheets write it
    if text.lower() in UNDECIDED:
        return None
    if not text:
        return ""
    if text.isascii() and text.isdigit() and len(text) < 9 and int(text) in scale:
        return int(text)
    raise UserError(f"{path}: the score of {row['item']:.80} is {text!r:.40}; give {scale[0]} to "
                    f"{scale[-1]}, or ? if it cannot be decided")


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as a CSV file that spreadsheets open.

    Raises:
      UserError: the file cannot be written.
    """
    text = io.StringIO()
    # all quoted: the module leaves a lone carriage return unquoted, which ends a row for readers
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n",
                            quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, "\ufeff" + text.getvalue())  # the mark tells spreadsheets that it is UTF-8


def read_rows(path: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """Read a CSV file of `write_rows`, also after a spreadsheet saved it; the keys are items.

    Raises:
      UserError: the file cannot be read, has no column `item`, `score` or `digest`, or has an item
        twice.
    """
    data = read_bytes(path, TEXT_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except ValueError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from None
    head = text.partition("\n")[0]
    marks = max(",;\t", key=head.count)  # a spreadsheet may save another separator
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=marks)
        found = [{name: value for name, value in row.items() if name and isinstance(value, str)}
                 for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}: is no CSV file ({error})") from None
    columns = reader.fieldnames or ()
    lacking = [name for name in ("item", "score", "digest") if name not in columns]
    if lacking:
        raise UserError(f"{path}: has no column {lacking[0]!r}; keep the columns of the file that "
                        "jaxpersona wrote")
    rows: dict[str, dict[str, str]] = {}
    for row in found:
        row = {name: row.get(name, "") for name in COLUMNS}
        if not row["item"]:
            continue
        if row["item"] in rows:
            raise UserError(f"{path}: has {row['item']:.80} twice; delete one of the rows")
        rows[row["item"]] = row
    return rows
