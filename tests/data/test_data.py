"""Package data: counts, schema, limits, near-duplicates and prompt variety."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import string
from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy import sparse

from jaxpersona.data.reading import fill
from jaxpersona.data.texts import (
    data_root,
    load_drift,
    load_questions,
    load_roles,
    load_traits,
)

ROOT = data_root()
ROLES = {role.name: role for role in load_roles() if role.name != "default"}
QUESTIONS = load_questions()
TRAITS = {trait.name: trait for trait in load_traits()}
DOMAINS = load_drift()
USERS = [user for domain in DOMAINS for user in domain.users]
TOPICS = [topic for user in USERS for topic in user.topics]
PROMPTS = [(name, prompt) for name, role in ROLES.items() for prompt in role.prompts]
SIDES = [(name, side) for name, trait in TRAITS.items() for pair in trait.pairs for side in pair]
POOLS = json.loads(ROOT.joinpath("trait_pools.json").read_text("utf-8"))
POOL_QUESTIONS = [text for pool in POOLS.values() for text in pool["questions"]]
TEMPLATES = json.loads(ROOT.joinpath("eval_templates.json").read_text("utf-8"))
TEXTS = ([prompt for _, prompt in PROMPTS] + [side for _, side in SIDES] + POOL_QUESTIONS
         + [q.text for q in QUESTIONS] + [u.card for u in USERS]
         + [text for t in TOPICS for text in (t.title, t.opening)]
         + [x.description for x in (*ROLES.values(), *TRAITS.values(), *DOMAINS)])


def words(text: str) -> int:
    return len(text.split())


def test_counts():
    assert len(ROLES) == 275 and all(len(role.prompts) == 5 for role in ROLES.values())
    assert len(QUESTIONS) == 240
    assert len(TRAITS) == 240 and all(len(t.pairs) == 5 for t in TRAITS.values())
    assert all(len(t.questions) == 40 for t in TRAITS.values())
    assert len(POOLS) == 12 and all(len(p["questions"]) == 60 for p in POOLS.values())
    assert [domain.name for domain in DOMAINS] == ["coding", "philosophy", "therapy", "writing"]
    assert all(len(domain.users) == 5 for domain in DOMAINS)
    assert all(len(user.topics) == 20 for user in USERS)


def test_schema():
    for kind, fields in (("roles", {"instruction", "eval_prompt"}),
                         ("traits", {"instruction", "questions", "eval_prompt"})):
        for file in ROOT.joinpath(kind).iterdir():
            raw = json.loads(file.read_text("utf-8"))
            assert set(raw) == (fields if file.name != "default.json" else {"instruction"})
            entry = {"pos"} if kind == "roles" else {"pos", "neg"}
            assert all(set(item) == entry for item in raw["instruction"])
    for line in ROOT.joinpath("questions.jsonl").read_text("utf-8").splitlines():
        assert set(json.loads(line)) == {"question", "id"}
    default = json.loads(ROOT.joinpath("roles/default.json").read_text("utf-8"))
    assert [item["pos"] for item in default["instruction"]] == [
        "", "You are an AI assistant.", "You are a large language model.",
        "You are {model_name}.", "Respond as yourself."]


def test_lists_name_what_there_is():
    assert set(json.loads(ROOT.joinpath("role_list.json").read_text("utf-8"))) == {
        "default", *ROLES}
    assert set(json.loads(ROOT.joinpath("trait_list.json").read_text("utf-8"))) == set(TRAITS)
    by_pool = [name for pool in POOLS.values() for name in pool["traits"]]
    assert sorted(by_pool) == sorted(TRAITS)
    categories = json.loads(ROOT.joinpath("question_categories.json").read_text("utf-8"))
    assert len(categories) == 8
    assert sorted(i for ids in categories.values() for i in ids) == [q.id for q in QUESTIONS]


def test_names_and_ids():
    names = [*ROLES, *TRAITS, *POOLS, *(d.name for d in DOMAINS), *(u.id for u in USERS),
             *(t.id for t in TOPICS)]
    assert not [name for name in names if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)]
    assert [q.id for q in QUESTIONS] == list(range(240))
    assert len({u.id for u in USERS}) == 20 and len({t.id for t in TOPICS}) == 400


@pytest.mark.parametrize("what, texts, low, high", [
    ("role prompts", [p for _, p in PROMPTS], 8, 40),
    ("role descriptions", [r.description for r in ROLES.values()], 8, 25),
    ("questions", [q.text for q in QUESTIONS], 5, 40),
    ("trait prompts", [s for _, s in SIDES], 8, 40),
    ("trait questions", POOL_QUESTIONS, 5, 40),
    ("openings", [t.opening for t in TOPICS], 15, 60),
    ("titles", [t.title for t in TOPICS], 3, 10),
    ("cards", [u.card for u in USERS], 40, 90),
])
def test_word_limits(what, texts, low, high):
    assert not [text for text in texts if not low <= words(text) <= high], what


def test_texts_are_whole():
    unfit = re.compile(r"[{}<>\[\]]|lorem|\btodo\b|\btbd\b|\bxxx|placeholder|  |\s$|^\s", re.I)
    # opening messages may quote code
    code = {t.opening for d in DOMAINS if d.name == "coding" for u in d.users for t in u.topics}
    assert not [text for text in TEXTS if text not in code and unfit.search(text)]
    assert not [text for text in TEXTS if not text.strip() or not text.isprintable()]
    repeated = Counter(text.lower() for text in TEXTS)
    assert not [text for text, n in repeated.items() if n > 1]


def test_eval_prompts_come_from_one_template():
    described = json.loads(ROOT.joinpath("role_list.json").read_text("utf-8"))
    for name, role in ROLES.items():
        assert role.eval_prompt == fill(TEMPLATES["role"], role=name.replace("_", " "),
                                        description=described[name])
    for name, trait in TRAITS.items():
        assert trait.eval_prompt == fill(TEMPLATES["trait"], trait=name.replace("_", " "),
                                         description=trait.description)
    for text in (*(x.eval_prompt for x in (*ROLES.values(), *TRAITS.values())),
                 TEMPLATES["coherence"]):
        fields = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
        assert sorted(fields) == ["answer", "question"]
    assert all(f"\n{grade} - " in TEMPLATES["role"] for grade in range(4))
    assert "REFUSAL" in TEMPLATES["trait"] and "from 0 to 100" in TEMPLATES["trait"]


def test_trait_questions_are_drawn_from_their_pool():
    for pool in POOLS.values():
        for name in pool["traits"]:
            order = sorted(pool["questions"],
                           key=lambda q: hashlib.sha256(f"{name}\n{q}".encode()).hexdigest())
            drawn = set(order[:40])
            assert TRAITS[name].questions == tuple(q for q in pool["questions"] if q in drawn)


def test_no_question_names_a_role():
    forms = []
    for name in ROLES:
        spoken = name.replace("_", "[ -]")
        plural = spoken[:-1] + "ies" if spoken.endswith("y") else spoken + "(?:e?s)?"
        forms.append(f"{spoken}|{plural}")
    named = re.compile(rf"\b(?:{'|'.join(forms)})\b", re.I)
    assert not [q.text for q in QUESTIONS if named.search(q.text)]
    assert not [q.text for q in QUESTIONS if re.search(r"\b(imagine|pretend) (that )?you are an? ",
                                                       q.text, re.I)]


def similarity(texts: list[str]) -> np.ndarray:
    """Return the Jaccard similarity of character 4-grams [n, n], 0 on the diagonal."""
    rows, columns, known = [], [], {}
    for i, text in enumerate(texts):
        text = re.sub(r"\s+", " ", text.lower()).strip()
        for gram in {text[k:k + 4] for k in range(len(text) - 3)}:
            rows.append(i)
            columns.append(known.setdefault(gram, len(known)))
    has = sparse.csr_array((np.ones(len(rows), np.int32), (rows, columns)))
    both = (has @ has.T).toarray()
    size = np.diag(both)
    out = both / (size[:, None] + size[None, :] - both)
    np.fill_diagonal(out, 0)
    return out


def test_similarity_is_jaccard():
    got = similarity(["abcdef", "abcdxx", "zzzzz"])
    # 4-grams abcd against abcd, bcde, cdef, bcdx, cdxx
    np.testing.assert_allclose(got[0, 1], 1 / 5)
    assert got[0, 2] == 0


@pytest.mark.parametrize("what, texts", [
    ("role prompts", [p for _, p in PROMPTS]),
    ("role descriptions", [r.description for r in ROLES.values()]),
    ("questions", [q.text for q in QUESTIONS]),
    ("trait questions", POOL_QUESTIONS),
    ("openings", [t.opening for t in TOPICS]),
    ("titles", [t.title for t in TOPICS]),
])
def test_no_near_duplicates(what, texts):
    top = float(similarity(texts).max())
    print(f"{what}: greatest similarity {top:.3f}")
    assert top <= 0.8, what


def test_prompts_are_not_templates():
    """At most 10 % of prompts share six or more consecutive words with a different role."""
    owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for i, (_, prompt) in enumerate(PROMPTS):
        run = re.findall(r"[a-z0-9']+", prompt.lower())
        for k in range(len(run) - 5):
            owners[tuple(run[k:k + 6])].add(i)
    shared = set(itertools.chain.from_iterable(
        who for who in owners.values() if len({PROMPTS[i][0] for i in who}) > 1))
    print(f"{len(shared)} of {len(PROMPTS)} prompts share six running words")
    assert len(shared) <= 0.1 * len(PROMPTS)


def test_card_names_its_facts():
    card = ROOT.joinpath("DATA_CARD.md").read_text("utf-8")
    for heading in ("How they were written", "Not meant for", "Blind reading", "Spread",
                    "Limits", "Licence"):
        assert f"\n## {heading}" in card
    assert ROOT.joinpath("spread.png").is_file()
