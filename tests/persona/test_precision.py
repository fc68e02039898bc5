"""Split-half reliability: hand-computed numbers, and the coverage of the interval by simulation."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from scipy.stats import t as student

from jaxpersona.cli import quota
from jaxpersona.data.texts import Question
from jaxpersona.errors import UserError
from jaxpersona.persona import precision as p


def cells(rows, counts=None):
    rows = np.array(rows, np.float32)
    return p.Cells(rows, np.ones(len(rows), int) if counts is None else np.array(counts))


def nothing(size, width=2):
    return cells(np.zeros((size, width)))


def cosine(a, b):
    return a @ b / math.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("module", [p, quota], ids=["precision", "quota"])
def test_the_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted >= 4 and not found.failed


def test_spearman_brown_is_that_of_the_papers():
    assert p.spearman_brown(0.6) == pytest.approx(0.75)  # 1.2 / 1.6
    assert p.spearman_brown(1.0) == 1.0 and p.spearman_brown(0.0) == 0.0
    assert p.spearman_brown(-0.5) == pytest.approx(-2.0)


def test_the_reliability_of_an_axis_by_hand():
    """Two roles whose means are (3, 4) and (4, 3) in half 0 and (4, 3) and (4, 3) in half 1."""
    one = cells([[3, 4], [4, 3], [3, 4], [4, 3]])
    two = cells([[4, 3], [4, 3], [4, 3], [4, 3]])
    axis, roles = p.measure(nothing(4), {"one": one, "two": two}, ["one", "two"])
    a, b = np.array([3.5, 3.5]), np.array([4.0, 3.0])  # the negative axes of the halves
    c = cosine(a, b)
    assert axis.value == pytest.approx(2 * c / (1 + c))
    # the centred vectors of half 1 have length 0 and no direction
    assert all(math.isnan(found.value) for found in roles.values())


def test_the_interval_is_the_jackknife_of_the_logarithm():
    """All values are computed again, question by question, from the definition."""
    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=(6, 5)) + 2 * rng.normal(size=5) for name in ("a", "b", "c")}
    counts = {name: rng.integers(1, 4, 6) for name in rows}
    own, own_counts = rng.normal(size=(6, 5)), rng.integers(1, 4, 6)
    axis, roles = p.measure(cells(own, own_counts), {
        name: cells(rows[name], counts[name]) for name in rows}, list(rows))

    def vectors(kept):  # [2, D] for the axis and each role, from the kept questions
        out = {"axis": [], **{name: [] for name in rows}}
        for h in (0, 1):
            half = [j for j in kept if j % 2 == h]

            def mean(values, numbers, half=half):
                return values[half].astype(np.float32).sum(0) / numbers[half].sum()

            d = {name: mean(rows[name], counts[name]) - mean(own, own_counts) for name in rows}
            middle = sum(d.values()) / 3
            out["axis"].append(-middle)
            for name in rows:
                out[name].append(d[name] - middle)
        return out

    def logit(two):
        c = cosine(*two)
        return math.log(2 * c / (1 + c) / (1 - 2 * c / (1 + c)))

    whole = vectors(range(6))
    left = [vectors([k for k in range(6) if k != j]) for j in range(6)]
    for name, found in {"axis": axis, **roles}.items():
        assert cosine(*whole[name]) > 0.3
        t = np.array([logit(one[name]) for one in left])
        square = sum(2 / 3 * ((t[h::2] - t[h::2].mean()) ** 2).sum() for h in (0, 1))
        radius = student.ppf(0.975, 4) * math.sqrt(square)
        for end, sign in ((found.low, -1), (found.high, 1)):
            expected = 1 / (1 + math.exp(-(logit(whole[name]) + sign * radius)))
            assert end == pytest.approx(expected, rel=1e-4)
    assert axis.low < axis.value < axis.high


def test_a_question_effect_on_all_replies_changes_nothing():
    """Also for a role with fewer questions, whose questions have another mean effect."""
    rng = np.random.default_rng(1)
    effects = 5 * rng.normal(size=(8, 4))
    rows = {name: rng.normal(size=(n, 4)) + 3 * rng.normal(size=4)
            for name, n in (("a", 8), ("b", 4), ("c", 8))}
    own = rng.normal(size=(8, 4))
    found = [p.measure(cells(own + by * effects), {
        name: cells(value + by * effects[: len(value)]) for name, value in rows.items()}, [*rows],
        slope=1.0)
        for by in (0, 1)]
    for plain, moved in zip([found[0][0], *found[0][1].values()],
                            [found[1][0], *found[1][1].values()], strict=True):
        np.testing.assert_allclose(
            [moved.value, moved.low, moved.high], [plain.value, plain.low, plain.high], rtol=1e-4)


def test_the_slope_is_that_of_a_regression_over_all_roles():
    """Small numbers, computed by hand."""
    own = cells([[0, 0], [4, 0], [12, 4], [4, 0]], [1, 2, 2, 1])
    one = cells([[5, 5], [7, 5]])  # x = (−1, 0), (1, 0); y = x
    assert p.question_slope(own, {"one": one}) == pytest.approx(1.0)
    assert p.question_slope(own, {"one": cells([[5, 5], [6, 5]])}) == pytest.approx(0.5)
    both = {"one": one, "two": cells([[9, 0], [0, 0], [3, 1], [0, 0]], [1, 0, 1, 0])}
    # role two: x = ∓(3, 1), y = ±(3, −0.5): ⟨x, y⟩ = 2 · (−9 + 0.5), |x|² = 2 · 10
    assert p.question_slope(own, both) == 0.0  # (2 − 17) / 22 is limited to 0
    assert p.question_slope(own, {"one": cells([[5, 5], [9, 5]])}) == 1.0  # 2 is limited to 1
    assert p.question_slope(own, {"one": cells([[5, 5]])}) == 0.0


def test_opposite_halves_and_noiseless_halves_have_an_interval_with_the_value():
    """The reliability of a cosine of −1 is 0; without noise, it is 1."""
    with np.errstate(all="raise"):
        up = cells([[2, 1], [-2, 1], [2, 1], [-2, 1]])
        down = cells([[-2, 1], [2, 1], [-2, 1], [2, 1]])
        _, roles = p.measure(nothing(4), {"up": up, "down": down}, ["up", "down"])
        assert roles["up"].value == 0 == roles["up"].low and roles["up"].high < 1e-5
        same = cells([[1, 2]] * 4)
        axis, roles = p.measure(nothing(4), {"a": same, "b": cells([[3, 1]] * 4)}, ["a", "b"])
        for found in (axis, *roles.values()):
            assert found.value == pytest.approx(1) and found.low <= found.value <= found.high
            assert found.reached(0.99)
        assert p.spearman_brown(-1.0) == -math.inf


def test_cells_of_some_questions_are_those_of_the_first_ones_in_their_order():
    """A mask of questions gives the numbers of a shorter list, at any place."""
    rng = np.random.default_rng(3)
    own, rows = rng.normal(size=(8, 3)), rng.normal(size=(8, 3)) + 2
    first, mask = cells(rows[:4]), np.arange(8) < 4
    some = p.Cells(np.where(mask[:, None], rows, 0).astype(np.float32), mask.astype(int), mask)
    cast = {"a": cells(rng.normal(size=(8, 3)) - 3)}
    one, two = (p.measure(cells(own), {**cast, "b": b}, ["a", "b"]) for b in (first, some))
    assert one == two
    places = [2, 3, 6, 7, 0, 1, 4, 5]  # the same halves, in another order
    moved = p.Cells(some.totals[places], some.counts[places], mask[places])
    _, roles = p.measure(cells(own[places]), {"a": cells(cast["a"].totals[places]), "b": moved},
                         ["a", "b"])
    assert roles["b"].value == pytest.approx(one[1]["b"].value, rel=1e-6)
    assert some.padded(9).asked.tolist() == [*mask, False] and some.first(2).asked.all()


def test_too_few_replies_have_no_reliability():
    full = cells([[1, 2], [2, 1], [1, 3], [2, 2]])
    few = cells([[1, 2], [0, 0], [1, 3], [0, 0]], [1, 0, 1, 0])
    cast = {"a": full, "b": full, "few": few}
    axis, roles = p.measure(nothing(4), cast, ["a", "b"])
    assert math.isnan(roles["few"].value) and not roles["few"].reached(0.01)
    assert p.measure(nothing(4), cast, list(cast))[0] == axis
    assert math.isfinite(axis.value)
    axis, roles = p.measure(nothing(4), {"a": full}, ["a"])
    assert math.isnan(axis.low) and math.isnan(roles["a"].low)


@pytest.mark.parametrize(("roles", "used", "said"), [
    ({"a": nothing(6)}, ["a"], "roles['a'] has 6 questions, but the default persona has 4"),
    ({"a": nothing(4)}, ["a", "b"], "used names 'b', which is not in roles")])
def test_mistakes_of_measure(roles, used, said):
    with pytest.raises(UserError) as error:
        p.measure(nothing(4), roles, used)
    assert said in str(error.value) and "\n" not in str(error.value)


def drawn(rng, n, width, rho, decay, roles=6):
    """Draw cells whose centred vectors and axis have a known reliability with n questions.

    The error of a question is normal with the spectrum j^-decay. Returns the cells of the default
    persona and of the roles, and the true reliabilities of the axis and of the first role.
    """
    spectrum = np.arange(1, width + 1) ** -float(decay)
    spectrum *= n * (1 - rho) / rho / spectrum.sum()
    mean = rng.normal(size=(roles, width))
    mean /= np.linalg.norm(mean - mean.mean(0), axis=-1).mean()
    errors = rng.normal(size=(roles, n, width)) * np.sqrt(spectrum)
    effects = 2 * rng.normal(size=(n, width))
    cast = {str(i): cells(mean[i] + errors[i] + effects) for i in range(roles)}
    total = spectrum.sum() / n
    centred = mean[0] - mean.mean(0)
    noise = total * (1 - 1 / roles)
    axis = mean.mean(0)
    return (cells(effects), cast, axis @ axis / (axis @ axis + total / roles),
            centred @ centred / (centred @ centred + noise))


@pytest.mark.parametrize(("n", "width", "rho", "decay"), [
    (4, 64, 0.95, 0), (8, 64, 0.9, 1), (8, 256, 0.99, 0.5), (24, 16, 0.95, 0), (48, 64, 0.9, 1)])
def test_the_interval_covers_the_true_reliability(n, width, rho, decay):
    """At least 92 % of the 95 % intervals cover; a percentile bootstrap covers far fewer."""
    rng, covered, too_high, draws = np.random.default_rng(n), 0, 0, 300
    for _ in range(draws):
        own, cast, of_axis, of_role = drawn(rng, n, width, rho, decay)
        axis, roles = p.measure(own, cast, list(cast))
        for found, true in ((axis, of_axis), (roles["0"], of_role)):
            covered += found.low <= true <= found.high
            too_high += found.low > true
    assert covered / draws / 2 >= 0.92
    assert too_high / draws / 2 <= 0.05  # a vector that is settled too early


def test_a_percentile_bootstrap_covers_too_little():
    """The reason for the jackknife: resampled halves have twice the error of the halves."""
    rng, covered, draws, n = np.random.default_rng(0), 0, 100, 16
    for _ in range(draws):
        rows = np.eye(1, 64)[0] + rng.normal(size=(n, 64)) * math.sqrt(n / 9 / 64)  # ρ = 0.9
        found = []
        for _ in range(200):
            a, b = (rows[h::2][rng.integers(0, n // 2, n // 2)].mean(0) for h in (0, 1))
            found.append(p.spearman_brown(cosine(a, b)))
        low, high = np.percentile(found, [2.5, 97.5])
        covered += low <= 0.9 <= high
    assert covered / draws < 0.6


def test_the_order_of_the_questions_depends_on_the_seed_and_the_ids():
    questions = [Question(i, f"What is {i}?") for i in range(20)]
    found = p.ordered(questions, 3)
    assert found == p.ordered(questions[::-1], 3) and found != p.ordered(questions, 4)
    assert sorted(found, key=lambda one: one.id) == questions
    kept = [one for one in found if one.id != 5]  # another set keeps the order of the others
    assert p.ordered([one for one in questions if one.id != 5], 3) == kept


def test_rounds_grow_by_half_and_end_with_all_questions():
    assert p.rounds_of(240) == [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 240]
    assert p.rounds_of(4) == [4] and p.rounds_of(8) == [4, 6, 8] and p.rounds_of(9)[-1] == 9
    assert p.check_precision(0.5, (6,), 7) == [6, 7] and p.check_precision(0.5, None, 4) == [4]
    assert p.check_precision(0.9, [4, 7], 7) == [4, 7]


@pytest.mark.parametrize(("target", "rounds", "questions", "said"), [
    (1.0, None, 8, "precision is 1.0; give a reliability between 0 and 1"),
    (0, None, 8, "precision is 0"), (math.nan, None, 8, "precision is nan"),
    ("0.9", None, 8, "precision is '0.9'"), (True, None, 8, "precision is True"),
    (0.9, None, 3, "precision needs at least 4 questions"),
    (0.9, [5], 8, "rounds contains 5; give even numbers of questions from 4 to 8"),
    (0.9, [2], 8, "rounds contains 2"), (0.9, [10], 8, "rounds contains 10"),
    (0.9, [6.0], 8, "rounds contains 6.0"), (0.9, [6, 4], 8, "rounds contains 4 after 6"),
    (0.9, [4, 4], 8, "rounds contains 4 after 4"), (0.9, 7, 8, "rounds is 7; give numbers of"),
    pytest.param(0.9, [10**5000], 8, "rounds contains an int with too many", id="digits"),
    pytest.param(10**5000, None, 8, "precision is an int with too many digits", id="large")])
def test_mistakes_of_the_arguments(target, rounds, questions, said):
    with pytest.raises(UserError) as error:
        p.check_precision(target, rounds, questions)
    assert said in str(error.value) and "\n" not in str(error.value)
