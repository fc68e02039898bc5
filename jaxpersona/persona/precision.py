"""Split-half reliability of an axis and of role vectors, with jackknife intervals over questions.

All functions are pure NumPy. D is the width of the model; all values belong to one layer. The n
questions of a run are numbered from 0 in the order in which they are asked. Half 0 contains the
even questions and half 1 the odd ones.

**Centred vectors.** v(r, h) is the mean of role r's response means over the questions of half h.
With R roles, the centred vector is v(r, h) − Σₛ v(s, h) / R, and the axis is v(default, h) −
Σₛ v(s, h) / R.

**Unequal questions.** A question changes the response means of all personas. If role r was not
asked all questions of the default persona, b · (v(default, h) − u(r, h)) is therefore added to
v(r, h), where u(r, h) is the mean of the default persona over the questions of role r, and b is the
slope of the least-squares regression of the roles' means per question on the default persona's
means (`question_slope`).

**Reliability.** c is the cosine of the two halves of a vector. If question q gives the vector
μ + e(q), with independent errors of E|e(q)|² = σ², c estimates |μ|² / (|μ|² + 2σ²/n). The
reliability of the vector of all n questions, ρ = |μ|² / (|μ|² + σ²/n), is therefore 2c / (1 + c)
(Spearman 1910, Brown 1910). ρ is the expected cosine of the vectors of two independent runs with n
questions each. The expected cosine of a vector and the vector of a run with infinitely many
questions is √ρ.

**Interval.** The jackknife (Tukey 1958) leaves out one question at a time from its half, for all
roles together, and computes t = log(ρ / (1 − ρ)) again. tⱼ is the value without question j, t̄(h)
the mean of tⱼ over the m(h) questions of half h, and the squared standard error of t is
Σₕ (m(h) − 1) / m(h) · Σⱼ (tⱼ − t̄(h))². The interval uses the quantiles of Student's t distribution
with m(0) + m(1) − 2 degrees of freedom. A percentile bootstrap over questions is not used: drawing
with replacement doubles the error variance of each half, so that the interval is too low
(`tests/persona/test_precision.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxpersona.brief import brief, shown
from jaxpersona.data.texts import Question
from jaxpersona.errors import UserError
from jaxpersona.extras import require

LEVEL = 95  # confidence level of the intervals in percent
FIRST = 4  # number of questions of the first round: two in each half
_LEAST, _MOST = 1e-6, 1 - 1e-12  # limits of a reliability before the logarithm


@dataclasses.dataclass(frozen=True)
class Reliability:
    """The split-half reliability of a vector, and its interval at the confidence level `LEVEL`.

    All fields are NaN if the reliability is unknown, for example because fewer than two questions
    of a half have replies.

    Attributes:
      value: the estimate ρ, from 0 to 1.
      low, high: the ends of the interval, from 0 to 1.
    """

    value: float
    low: float
    high: float

    def reached(self, target: float) -> bool:
        """Return whether the lower end of the interval is at least `target`.

        Examples:
          >>> from jaxpersona.persona.precision import Reliability
          >>> Reliability(0.97, 0.93, 0.99).reached(0.95)
          False
        """
        return self.low >= target


@dataclasses.dataclass(frozen=True)
class Cells:
    """The sums of the response means of one role at one layer, one sum for each of n questions.

    Attributes:
      totals: [n, D], the sum of the response means of the role's replies to each question, in units
        of the residual stream. The questions are in the order in which they are asked.
      counts: [n], the number of replies in each sum.
      asked: [n] bool, the questions that the role was asked; None: all. The others have no replies.
    """

    __repr__ = brief

    totals: np.ndarray
    counts: np.ndarray
    asked: np.ndarray | None = None

    def first(self, questions: int) -> Cells:
        """Return the cells of the first `questions` questions."""
        return Cells(self.totals[:questions], self.counts[:questions],
                     None if self.asked is None else self.asked[:questions])

    def padded(self, questions: int) -> Cells:
        """Return the cells extended to `questions` questions; the added ones were not asked."""
        n = len(self.counts)
        more, asked = questions - n, np.ones(n, bool) if self.asked is None else self.asked
        return Cells(np.pad(self.totals, ((0, more), (0, 0))), np.pad(self.counts, (0, more)),
                     np.pad(asked, (0, more)))

    def within(self, asked: np.ndarray) -> Cells:
        """Return the cells with replies only to the questions that `asked`, [n] bool, selects."""
        return Cells(self.totals * asked[:, None], self.counts * asked, asked)


@dataclasses.dataclass(frozen=True)
class _Means:
    """The means of a role's replies, or a linear combination of such means of several roles.

    Attributes:
      halves: [2, D], the mean of each half; NaN without a reply.
      without: [n, D]; row j is the mean of question j's half without question j.
    """

    halves: np.ndarray
    without: np.ndarray

    def __sub__(self, other: _Means) -> _Means:
        return _Means(self.halves - other.halves, self.without - other.without)

    def plus(self, other: _Means, factor: float) -> _Means:
        """Return the sum of these means and of other means multiplied by `factor`."""
        return _Means(self.halves + factor * other.halves, self.without + factor * other.without)


def spearman_brown(cosine: np.ndarray | float) -> np.ndarray:
    """Return the reliability 2c / (1 + c) of a vector whose two halves have the cosine c.

    Args:
      cosine: c, of any shape, from -1 to 1.

    Returns:
      The reliabilities, float64, of the same shape; -inf for a cosine of -1.

    Examples:
      >>> from jaxpersona.persona.precision import spearman_brown
      >>> spearman_brown([0.0, 0.5, 0.98]).round(4).tolist()
      [0.0, 0.6667, 0.9899]
    """
    cosine = np.asarray(cosine, np.float64)
    with np.errstate(divide="ignore"):
        return 2 * cosine / (1 + cosine)


def question_slope(default: Cells, roles: Mapping[str, Cells]) -> float:
    """Return the regression slope of the roles' question effects on the default persona's effects.

    For role r, x(r, q) is the default persona's mean over its replies to question q, minus the
    average of these means over all questions with replies of both the default persona and the role.
    y(r, q) is the same difference for the replies of role r. The slope of the regression of y on x
    is Σ ⟨x(r, q), y(r, q)⟩ / Σ |x(r, q)|² over all roles and these questions.

    Args:
      default: the default persona's cells of n questions.
      roles: role r → its cells of the first n(r) ≤ n questions.

    Returns:
      The slope, limited to 0 … 1; 0 if no role has at least two questions with replies of both the
      default persona and the role.

    Examples:
      >>> import numpy as np
      >>> from jaxpersona.persona.precision import Cells, question_slope
      >>> own = Cells(np.array([[1.0, 0.0], [3.0, 2.0]]), np.ones(2))
      >>> question_slope(own, {"ghost": Cells(0.5 * own.totals + 7, np.ones(2))})
      0.5
    """
    shared = total = 0.0
    for cells in roles.values():
        n = len(cells.counts)
        both = (cells.counts > 0) & (default.counts[:n] > 0)
        if both.sum() >= 2:
            x, y = (one.totals[:n][both].astype(np.float64) / one.counts[:n][both, None]
                    for one in (default, cells))
            x = x - x.mean(0)
            shared, total = shared + float((x * y).sum()), total + float((x * x).sum())
    return min(max(shared / total, 0.0), 1.0) if total else 0.0


def measure(default: Cells, roles: Mapping[str, Cells], used: Sequence[str],
            slope: float | None = None) -> tuple[Reliability, dict[str, Reliability]]:
    """Return the reliabilities of the axis and of the roles' centred vectors.

    Args:
      default: the default persona's cells of n questions.
      roles: role r → its cells of the first n(r) ≤ n questions.
      used: the names of the roles whose mean defines the axis and centres the vectors. Roles with
        replies to fewer than two questions of a half are ignored.
      slope: the fraction of a question's effect that all personas share; default: the result of
        `question_slope`.

    Returns:
      (the reliability of the axis, a dict from role to the reliability of its centred vector). With
      fewer than two used roles, all are NaN.

    Raises:
      UserError: a role has more questions than the default persona, `used` names a role that is not
        in `roles`, or scipy is not installed.

    Examples:
      >>> import numpy as np
      >>> from jaxpersona.persona.precision import Cells, measure
      >>> rng, ones = np.random.default_rng(0), np.ones(8)
      >>> def cells(mean):  # eight questions, each with one reply
      ...     return Cells(mean + 0.1 * rng.normal(size=(8, 50)), ones)
      >>> roles = {name: cells(rng.normal(size=50)) for name in ("ghost", "pirate", "sage")}
      >>> axis, by_role = measure(cells(np.zeros(50)), roles, list(roles))
      >>> axis.value > 0.99, by_role["ghost"].reached(0.9)
      (True, True)
    """
    n = len(default.counts)
    for name, cells in roles.items():
        if len(cells.counts) > n:
            raise UserError(f"roles[{name!r}] has {len(cells.counts)} questions, but the default "
                            f"persona has {n}; give the cells of at most {n} questions")
    if unknown := sorted(set(used) - set(roles)):
        raise UserError(f"used names {unknown[0]!r}, which is not in roles; name only roles with "
                        "cells")
    nothing = Reliability(math.nan, math.nan, math.nan)
    used = [name for name in used if min(_answered(roles[name].counts)) >= 2]
    if len(used) < 2:
        return nothing, dict.fromkeys(roles, nothing)
    slope = question_slope(default, roles) if slope is None else slope
    roles = {name: cells.padded(n) for name, cells in roles.items()}
    full, own = _means(default), {}
    for cells in roles.values():
        if (key := cells.asked.tobytes()) not in own:  # type: ignore[union-attr]
            own[key] = _means(default.within(cells.asked))  # type: ignore[arg-type]

    def corrected(name: str) -> _Means:
        cells = roles[name]
        key = cells.asked.tobytes()  # type: ignore[union-attr]
        return _means(cells).plus(full - own[key], slope)

    mean = _Means(np.zeros((2, default.totals.shape[1])), np.zeros(default.totals.shape))
    for name in used:
        mean = mean.plus(corrected(name), 1 / len(used))
    return _reliability(full - mean, np.ones(n, bool)), {
        name: _reliability(corrected(name) - mean, cells.counts > 0)
        for name, cells in roles.items()}


def _means(cells: Cells) -> _Means:
    """Return the mean of each half, and for each question the mean of its half without it."""
    totals, counts = cells.totals.astype(np.float64), cells.counts.astype(np.float64)
    half = np.arange(len(counts)) % 2
    sums = np.stack([totals[h::2].sum(0) for h in (0, 1)])
    sizes = np.array([counts[h::2].sum() for h in (0, 1)])
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN (0 / 0) without replies
        return _Means(sums / sizes[:, None],
                      (sums[half] - totals) / (sizes[half] - counts)[:, None])


def _reliability(means: _Means, asked: np.ndarray) -> Reliability:
    """Return the reliability of a vector.

    Args:
      means: the means of the vector.
      asked: [n] bool, the questions that the jackknife leaves out, one at a time.
    """
    student = require("scipy.stats", "intervals of a reliability need scipy").t

    half = np.arange(len(means.without)) % 2
    sizes = _answered(asked)
    whole = float(spearman_brown(_cosines(means.halves[:1], means.halves[1:])[0]))
    left = spearman_brown(_cosines(means.without[asked], means.halves[1 - half[asked]]))
    if min(sizes) < 2 or np.isnan(whole) or np.isnan(left).any():
        return Reliability(math.nan, math.nan, math.nan)
    left = _logit(left)
    square = 0.0
    for h, m in enumerate(sizes):
        one = left[half[asked] == h]
        square += (m - 1) / m * float(((one - one.mean()) ** 2).sum())
    radius = float(student.ppf((100 + LEVEL) / 200, sum(sizes) - 2)) * math.sqrt(square)
    middle, value = float(_logit(np.array(whole))), max(whole, 0.0)
    # `_logit` clips its argument, so the interval is extended to contain the value
    return Reliability(value, min(_logistic(middle - radius), value),
                       max(_logistic(middle + radius), value))


def _answered(counts: np.ndarray) -> list[int]:
    """Return the number of questions with replies in each half, from the numbers of replies [n]."""
    return [int((counts[h::2] > 0).sum()) for h in (0, 1)]


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine [k] of each pair of rows of two arrays [k, D]; NaN if a row is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1)), -1, 1)


def _logit(values: np.ndarray) -> np.ndarray:
    kept = np.clip(values, _LEAST, _MOST)
    return np.log(kept / (1 - kept))


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def ordered(questions: Sequence[Question], seed: int) -> list[Question]:
    """Return the questions in the order in which a run with a precision asks them.

    The order is random but depends only on the seed and the ids, so that the questions of a round
    are a random sample of all questions.

    Args:
      questions: the questions, with unique ids.
      seed: the seed of the run.

    Examples:
      >>> from jaxpersona.data.texts import Question
      >>> from jaxpersona.persona.precision import ordered
      >>> [one.id for one in ordered([Question(i, "Why?") for i in range(6)], 0)]
      [2, 5, 3, 1, 0, 4]
    """
    return sorted(questions, key=lambda question: rank(seed, question.id))


def rank(seed: int, question: int) -> bytes:
    """Return the sort key of a question in `ordered`, from the seed and the question's id."""
    return hashlib.sha256(f"{seed}/question {question}".encode()).digest()


def rounds_of(questions: int) -> list[int]:
    """Return the default rounds: the cumulative number of questions after each round, ascending.

    The numbers begin with `FIRST` and grow by the factors 1.5 and 4/3 in turn while they are below
    `questions`, which is the last number.

    Args:
      questions: the number of questions.

    Examples:
      >>> from jaxpersona.persona.precision import rounds_of
      >>> rounds_of(40), rounds_of(3)
      ([4, 6, 8, 12, 16, 24, 32, 40], [3])
    """
    steps = sorted(base * 2**i for base in (FIRST, FIRST + FIRST // 2)
                   for i in range(questions.bit_length()))
    return [*[step for step in steps if step < questions], questions]


def check_precision(precision: float, rounds: Sequence[int] | None, questions: int) -> list[int]:
    """Validate the target reliability and the rounds of a run, and return the rounds.

    Args:
      precision: the target reliability, at which a vector is settled: it gets no more questions.
      rounds: the cumulative number of questions after each round, or None for `rounds_of`.
      questions: the number of questions of the run.

    Returns:
      The rounds as a list, to which `questions` is appended if it is missing.

    Raises:
      UserError: `precision` is not between 0 and 1, there are fewer than `FIRST` questions, or
        `rounds` is not an ascending list of even integers from `FIRST` to `questions` (`questions`
        itself may be odd).

    Examples:
      >>> from jaxpersona.persona.precision import check_precision
      >>> check_precision(0.9, [8, 16], 20)
      [8, 16, 20]
    """
    if isinstance(precision, bool) or not isinstance(precision, (int, float)) or not (
            0 < precision < 1):
        raise UserError(f"precision is {shown(precision)}; give a reliability between 0 and 1, "
                        "such as 0.99")
    if questions < FIRST:
        raise UserError(f"precision needs at least {FIRST} questions, two in each half, but the "
                        f"run has {questions}; add questions or omit precision")
    if rounds is None:
        return rounds_of(questions)
    if not isinstance(rounds, Iterable):
        raise UserError(f"rounds is {shown(rounds)}; give numbers of questions in ascending order, "
                        "such as [8, 16, 32]")
    sizes = list(rounds)
    for before, size in zip([0, *sizes], sizes, strict=False):
        if isinstance(size, bool) or not isinstance(size, int) or not (
                FIRST <= size <= questions) or (size % 2 and size < questions):
            raise UserError(f"rounds contains {shown(size)}; give even numbers of questions from "
                            f"{FIRST} to {questions}")
        if size <= before:
            raise UserError(f"rounds contains {size} after {before}; give the numbers of questions "
                            "in ascending order")
    return sizes if sizes and sizes[-1] == questions else [*sizes, questions]
