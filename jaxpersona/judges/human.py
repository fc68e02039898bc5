"""A human judge: a person enters the scores in a CSV file of replies."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from jaxpersona.brief import line, quoted
from jaxpersona.ckpts.files import write_text
from jaxpersona.errors import UserError
from jaxpersona.inputs import TEXT_BYTES, read_bytes
from jaxpersona.judges.protocol import ROLE_SCALE, Item, Verdict

COLUMNS: tuple[str, ...] = ("item", "role", "description", "system_prompt", "question", "answer",
                            "score", "digest")
UNDECIDED = ("?", "none")  # texts in the column `score` that mark a reply as undecided
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet evaluates cells with these prefixes


class HumanJudge:
    """A judge that reads scores entered by a person in a CSV file, and adds rows for new items.

    Args:
      path: the CSV file; created if missing. The person enters an integer of the scale in the
        column `score`, or a text in `UNDECIDED`, such as "?", if the score cannot be decided.
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
        self._read: tuple[tuple[int, ...], dict[str, dict[str, str]]] | None = None

    def __repr__(self) -> str:
        return line("HumanJudge", quoted(str(self.path), 70),
                    f"scale {self.scale[0]} to {self.scale[-1]}")

    def score(self, items: Sequence[Item]) -> Iterator[Verdict]:
        """Yield one verdict per item.

        The verdict has an `error` if the item has no score yet, or if its row in the file has a
        different question or answer.

        Raises:
          UserError: the file cannot be read or written, or contains an invalid score.
        """
        rows = read_rows(self.path) if self.path.exists() else {}
        new = [item for item in items if identity(item) not in rows]
        if new:
            rows |= {identity(item): row_of(item) for item in new}
            write_rows(self.path, list(rows.values()))
        for item in items:
            row = rows[identity(item)]
            if row["digest"] != digest_of(item):
                yield Verdict(item.key, error=f"{self.path.name} has a different question or "
                                              f"answer for {identity(item)}; delete its row")
                continue
            score = score_of(row, self.scale, self.path)
            if isinstance(score, str):
                yield Verdict(item.key, error=f"not scored yet in {self.path.name}")
            else:
                yield Verdict(item.key, score, refused=score == 0 and self.scale == ROLE_SCALE,
                              raw=row["score"])


    def outdated(self, items: Sequence[Item], scores: Mapping[str, int | None]) -> set[str]:
        """Return the keys of the items in `scores` whose score in the file is now a different one.

        The score of such an item was changed or removed in the file, its row was deleted or belongs
        to another question or answer, or `scores` was read from another file with the same name.

        Args:
          items: the items to check; items whose keys are not in `scores` are ignored.
          scores: key of an item → its score in an earlier call, or None if it was undecided.

        Raises:
          UserError: the file cannot be read, or contains an invalid score.
        """
        rows = self._rows()
        found = set()
        for item in items:
            row = rows.get(identity(item))
            if item.key in scores and (row is None or row["digest"] != digest_of(item) or score_of(
                    row, self.scale, self.path) != scores[item.key]):
                found.add(item.key)
        return found

    def _rows(self) -> dict[str, dict[str, str]]:
        """Return the rows of the file, which is read again only if it has changed."""
        try:
            status = os.stat(self.path)
        except OSError:
            return read_rows(self.path) if self.path.exists() else {}
        now = status.st_ino, status.st_size, status.st_mtime_ns
        if self._read is None or self._read[0] != now:
            self._read = now, read_rows(self.path)
        return self._read[1]


def identity(item: Item) -> str:
    """Return "role/key", which identifies an item within a run."""
    return f"{item.role.name}/{item.key}"


def digest_of(item: Item) -> str:
    """Return 8 hexadecimal digits that identify an item's question and answer."""
    text = f"{item.question}\0{item.answer}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:8]


def row_of(item: Item) -> dict[str, str]:
    """Return a CSV row for an item: a dict from column to text, with an empty score.

    A text that a spreadsheet would evaluate as a formula is prefixed with an apostrophe.
    """
    cells = {"item": identity(item), "role": item.role.name, "description": item.role.description,
             "system_prompt": item.system_prompt, "question": item.question,
             "answer": item.answer, "score": "", "digest": digest_of(item)}
    # UTF-8 cannot encode lone surrogates, so they are replaced with "?"
    return {name: (f"'{text}" if text.startswith(_FORMULA) else text)
            .encode("utf-8", "replace").decode() for name, text in cells.items()}


def score_of(row: Mapping[str, str], scale: Sequence[int], path: pathlib.Path) -> int | str | None:
    """Return the score in a row: an integer, None for an undecided reply, or "" for an empty cell.

    Raises:
      UserError: the cell contains any other text.
    """
    text = (row.get("score") or "").strip().removesuffix(".0")  # some spreadsheets write 3 as 3.0
    if text.lower() in UNDECIDED:
        return None
    if not text:
        return ""
    if text.isascii() and text.isdigit() and len(text) < 9 and int(text) in scale:
        return int(text)
    raise UserError(f"{path}: the score of {row['item']:.80} is {text!r:.40}; give {scale[0]} to "
                    f"{scale[-1]}, or ? if it cannot be decided")


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows (`row_of`) as a CSV file that spreadsheet programs can open.

    Raises:
      UserError: the file cannot be written.
    """
    text = io.StringIO()
    # Quote all cells: before Python 3.11.9 and 3.12.3, the csv module does not quote a lone "\r"
    # with this line terminator, and readers treat it as the end of a row.
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n",
                            quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, "\ufeff" + text.getvalue())  # spreadsheets detect UTF-8 by the byte order mark


def read_rows(path: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """Read a CSV file written by `write_rows` and possibly edited in a spreadsheet program.

    Returns:
      A dictionary that maps each item (`identity`) to its row, which maps each column to its text.

    Raises:
      UserError: the file cannot be read, is not a CSV file in UTF-8, lacks the column `item`,
        `score` or `digest`, or contains an item twice.
    """
    data = read_bytes(path, TEXT_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from None
    head = text.partition("\n")[0]
    marks = max(",;\t", key=head.count)  # some spreadsheets use a semicolon or tab as separator
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=marks)
        found = [{name: value for name, value in row.items() if name and isinstance(value, str)}
                 for row in reader]
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file ({error})") from None
    columns = reader.fieldnames or ()
    lacking = [name for name in ("item", "score", "digest") if name not in columns]
    if lacking:
        raise UserError(f"{path} has no column {lacking[0]!r}; keep the columns of the file that "
                        "jaxpersona wrote")
    rows: dict[str, dict[str, str]] = {}
    for row in found:
        row = {name: row.get(name, "") for name in COLUMNS}
        if not row["item"]:
            continue
        if row["item"] in rows:
            raise UserError(f"{path} has {row['item']:.80} twice; delete one of the rows")
        rows[row["item"]] = row
    return rows
