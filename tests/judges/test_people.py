"""A person's scores in a CSV file, and the agreement of judges."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

import jaxpersona as jp
from jaxpersona.data.texts import Role
from jaxpersona.judges.agreement import agreement, kappa
from jaxpersona.judges.human import HumanJudge, read_rows
from jaxpersona.judges.protocol import ROLE_SCALE, TRAIT_SCALE, Item, in_order

GHOST = Role("ghost", ("Be one.",), "", "lingers")
TEXTS = ["Boo.", "Two\nlines, \"quoted\"; and é\u2028.", "=HYPERLINK(1)", "a\rb\0\ud800", "last"]
ITEMS = [Item(f"q{i}", GHOST, "Who?", text, "Be one.") for i, text in enumerate(TEXTS)]


def fill(path, scores, delimiter=",", **replaced):
    """Enter scores as a person with a spreadsheet does, which may change separator and mark."""
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    for row in rows:
        row["score"] = scores.get(row["item"], row["score"])
        row.update(replaced)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode())


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_file_is_written_filled_in_and_read_back(tmp_path, delimiter):
    path = tmp_path / "mine.csv"
    judge = HumanJudge(path)
    assert [v.error for v in in_order(judge, ITEMS[:4])] == ["not scored yet in mine.csv"] * 4
    before = path.read_bytes()
    in_order(judge, ITEMS[:4])
    assert path.read_bytes() == before
    assert read_rows(path)["ghost/q1"]["answer"] == TEXTS[1]
    assert read_rows(path)["ghost/q2"]["answer"] == "'=HYPERLINK(1)"  # no formula
    assert read_rows(path)["ghost/q3"]["answer"] == "a\rb\0?"
    fill(path, {"ghost/q0": "3", "ghost/q1": "0.0", "ghost/q2": " ? "}, delimiter)
    found = in_order(judge, ITEMS)
    assert [v.score for v in found] == [3, 0, None, None, None]
    assert [v.error is None for v in found] == [True, True, True, False, False]
    assert [v.refused for v in found] == [False, True, False, False, False]
    assert len(read_rows(path)) == 5  # the fifth item was added, and the scores stay
    assert [v.score for v in in_order(judge, ITEMS)][:2] == [3, 0]


def test_a_file_is_utf_8_with_a_mark_and_quoted_cells(tmp_path):
    """A spreadsheet program needs the byte order mark; the description helps the person."""
    in_order(HumanJudge(tmp_path / "mine.csv"), ITEMS[:1])
    assert (tmp_path / "mine.csv").read_bytes() == (
        b'\xef\xbb\xbf"item","role","description","system_prompt","question","answer","score",'
        b'"digest"\n"ghost/q0","ghost","lingers","Be one.","Who?","Boo.","","3bbdf4fc"\n')


@pytest.mark.parametrize(("head", "cells"), [
    ("item,score,digest", "a,3,x"), ("item;score;digest", "a;3;x"),
    ("item\tscore\tdigest", "a\t3\tx"), ("digest,notes;more,score,item", "x,y,3,a")])
def test_the_separator_is_the_most_frequent_one_of_the_first_line(tmp_path, head, cells):
    """Columns may have any order, and other columns are ignored."""
    (tmp_path / "mine.csv").write_text(f"{head}\n{cells}\n")
    (row,) = read_rows(tmp_path / "mine.csv").values()
    assert row == {name: {"item": "a", "score": "3", "digest": "x"}.get(name, "") for name in (
        "item", "role", "description", "system_prompt", "question", "answer", "score", "digest")}


def test_only_in_the_scale_of_roles_a_zero_is_a_refusal(tmp_path):
    for scale, refused in ((TRAIT_SCALE, False), (ROLE_SCALE, True)):
        path = tmp_path / f"{scale[-1]}.csv"
        in_order(HumanJudge(path, scale), ITEMS[:1])
        fill(path, {"ghost/q0": "0"})
        (found,) = in_order(HumanJudge(path, scale), ITEMS[:1])
        assert (found.score, found.refused) == (0, refused)


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\ta", "\ra"])
def test_no_cell_is_a_formula_for_a_spreadsheet(tmp_path, text):
    role = Role("ghost", (), "", text)
    judge = HumanJudge(tmp_path / "mine.csv")
    in_order(judge, [Item("q0", role, text, text, text)])
    row = read_rows(judge.path)["ghost/q0"]
    assert [row[name] for name in ("description", "system_prompt", "question", "answer")] == [
        f"'{text}"] * 4
    assert (row["item"], row["role"]) == ("ghost/q0", "ghost")


def test_rows_without_an_item_are_skipped_and_undecided_is_a_word_too(tmp_path):
    path = tmp_path / "mine.csv"
    judge = HumanJudge(path)
    in_order(judge, ITEMS[:2])
    fill(path, {"ghost/q0": "None", "ghost/q1": "0000003"})
    with path.open("ab") as file:
        file.write(2 * b",,,,,,,\r\n")
    found = in_order(judge, ITEMS[:2])
    assert [(v.score, v.error) for v in found] == [(None, None), (3, None)]
    fill(path, {"ghost/q1": "000000003"})  # too long to be a score
    with pytest.raises(jp.UserError, match="score of ghost/q1 is '000000003'; give 0 to 3, or"):
        in_order(judge, ITEMS[:2])


def test_wrong_scores_and_files_are_refused(tmp_path):
    path = tmp_path / "mine.csv"
    judge = HumanJudge(path)
    in_order(judge, ITEMS)
    for wrong in ("4", "x", "-1", "1.5", "٣"):
        fill(path, {"ghost/q0": wrong})
        with pytest.raises(jp.UserError, match="score of ghost/q0 is"):
            in_order(judge, ITEMS)
    fill(path, {"ghost/q0": "2"})
    for question, answer in (("Who?", "Another reply."), ("Why?", TEXTS[0])):
        other = [Item("q0", GHOST, question, answer, "Be one.")]
        assert "a different question or answer for ghost/q0" in in_order(judge, other)[0].error
    for text, wanted in (("item,score\na,1\n", "no column 'digest'"),
                         ("item,score,digest\na,1,x\na,1,x\n", "twice"), ("", "no column")):
        path.write_text(text)
        with pytest.raises(jp.UserError, match=wanted):
            in_order(judge, ITEMS)
    path.write_bytes(b"item,score,digest\n\xff,1,x\n")
    with pytest.raises(jp.UserError, match="UTF-8"):
        in_order(judge, ITEMS)


def test_kappa_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for top in (1, 3, 100):
        a = rng.integers(0, top + 1, 200)
        b = np.clip(a + rng.integers(-1, 2, 200), 0, top)
        theirs = cohen_kappa_score(a, b, weights="linear", labels=np.arange(top + 1))
        assert kappa(a.astype(float), b.astype(float)) == pytest.approx(theirs, abs=1e-12)
    same = np.array([1.0, 2.0, 2.0])
    assert kappa(same, same) == 1.0 and np.isnan(kappa(same[1:], same[1:]))
    assert np.isnan(kappa(same[:0], same[:0]))


def test_an_agreement_has_a_table_roles_and_an_interval():
    rng = np.random.default_rng(1)
    a = {f"{role}/q{i}": int(s) for role in ("ghost", "seer")
         for i, s in enumerate(rng.integers(0, 4, 60))}
    b = {key: min(3, s + (rng.random() < 0.2)) for key, s in a.items()}
    b["seer/q0"], a["seer/q1"] = None, None
    a["seer/q99"] = 3
    found = agreement(a, b)
    assert found.labels == ("0", "1", "2", "3", "none")
    assert found.table.sum() == 120 and found.both == 118 and found.only == (1, 0)
    assert found.table[:, 4].sum() == 1 and found.table[4].sum() == 1
    assert found.table[3, 2] == 0 and found.table[0, 1] > 0  # rows are A
    assert found.difference < 0 and found.equal == pytest.approx(
        np.trace(found.table[:4, :4]) / 118)
    low, high = found.interval
    assert low < found.kappa < high and high - low < 0.2
    assert agreement(a, b).interval == found.interval
    assert found.roles["ghost"][0] == 60 and found.roles["seer"][0] == 58
    assert agreement({"p/0": 57, "p/1": 9}, {"p/0": 50, "p/1": 100}).labels == (
        "0–9", "50–59", "100–109", "none")
    assert agreement({"p/0": 12}, {"p/0": 3}).labels == ("3", "12", "none")
    assert agreement({"p/0": 13}, {"p/0": 3}).labels == ("0–9", "10–19", "none")
    with pytest.raises(jp.UserError, match="no reply in common"):
        agreement({"a/b": 1}, {"c/d": 1})


def test_an_agreement_of_each_role_has_its_own_numbers():
    """Undecided replies are in the table only; one reply or equal scores give no interval."""
    found = agreement({"a/0": 3, "a/1": 0, "b/0": 2, "b/1": None, "c/0": None, "c/1": None},
                      {"a/0": 3, "a/1": 1, "b/0": 0, "b/1": 2, "c/0": None, "d/0": 1, "d/1": 1})
    assert found.roles["a"] == (2, 0.5, pytest.approx(1 - 0.5 / 1.5), -0.5)
    assert found.roles["b"] == (1, 0.0, 0.0, 2.0) and set(found.roles) == {"a", "b"}
    assert (found.both, found.difference, found.only) == (3, pytest.approx(1 / 3), (1, 2))
    assert found.equal == pytest.approx(1 / 3) and found.table.sum() == 5
    assert found.table[-1].tolist() == [0, 0, 1, 0, 1]  # those on which A is undecided
    for one, two in (({"a/0": 3}, {"a/0": 0}), ({"a/0": 3, "a/1": 3}, {"a/0": 3, "a/1": 3}),
                     ({"a/0": None}, {"a/0": 1})):
        assert np.isnan(agreement(one, two).interval).all()
    assert np.isnan(agreement({"a/0": None}, {"a/0": 1}).equal)
    some = {f"a/{i}": i % 3 for i in range(9)}
    other = {f"a/{i}": i // 3 for i in range(9)}
    assert agreement(some, other, seed=1).interval != agreement(some, other).interval


def test_the_interval_covers_the_kappa_of_the_population():
    """40 samples of 60 replies: about 95 % of the intervals cover it."""
    chances = np.array([[0.2, 0.05, 0], [0.05, 0.2, 0.1], [0, 0.1, 0.3]])
    cells = [(i, j) for i in range(3) for j in range(3)]
    rng, covered = np.random.default_rng(2), 0
    many = rng.choice(9, 200_000, p=chances.ravel())
    truth = kappa(*np.array(cells, float)[many].T)
    for _ in range(40):
        drawn = [cells[i] for i in rng.choice(9, 60, p=chances.ravel())]
        low, high = agreement({f"r/{n}": a for n, (a, _) in enumerate(drawn)},
                              {f"r/{n}": b for n, (_, b) in enumerate(drawn)}).interval
        covered += low <= truth <= high
    assert covered >= 34


def test_the_interval_has_95_percent_of_the_kappas_of_resampled_replies():
    """The ends agree with those of a resampling of the replies; 90 % would be 0.035 away."""
    rng = np.random.default_rng(5)
    a = rng.integers(0, 4, 30)
    b = np.where(rng.random(30) < 0.6, a, rng.integers(0, 4, 30))
    found = agreement(*({f"x/{i}": int(v) for i, v in enumerate(one)} for one in (a, b)))
    drawn = [kappa(a[rows], b[rows]) for rows in rng.integers(0, 30, (6000, 30))]
    np.testing.assert_allclose(found.interval, np.percentile(drawn, (2.5, 97.5)), atol=0.015)
