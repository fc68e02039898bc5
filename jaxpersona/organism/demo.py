"""The demo: extract the axis of the embedded model, whose ground truth is known, and test a cap.

Each behavioural experiment compares several arms, such as no intervention, the cap and controls.
The arms differ only in data, so they share batches and one compiled program.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.engine.generate import generate
from jaxpersona.engine.sampling import sampling
from jaxpersona.extras import require
from jaxpersona.interventions import Interventions, cap, stack_rows, steer
from jaxpersona.interventions.bank import normalised
from jaxpersona.models.model import Model
from jaxpersona.organism import evaluate, method, world
from jaxpersona.persona import axis as science
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.extraction import Extraction
from jaxpersona.persona.talk import Talks, grow
from jaxpersona.progress import shows, steps
from jaxpersona.runs.rollouts import Settings
from jaxpersona.runs.run import Run

Report = Callable[[str, int, int, int], None]
REPLY = 64  # maximum number of tokens per reply; the organism's answers are shorter
BATCH = 64
QUESTIONS = 8
_DIRECTIONS = 5  # number of random control directions; the median result is reported
_TALKS = 200
_STEER = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation whose last message is answered without and with the cap.

    Attributes:
      title: a short description of the conversation.
      messages: the system message, if there is one, and the user message that is answered; earlier
        turns of a drifting conversation are omitted.
      uncapped, capped: the replies without and with the cap.
    """

    __repr__ = brief

    title: str
    messages: list[dict[str, str]]
    uncapped: str
    capped: str


@dataclasses.dataclass(frozen=True)
class Demo:
    """Results of the demo: the extraction, the measurements, and the data of the plots.

    Attributes:
      extraction: the result of `extract_axis`.
      figures: name → measurement, a number or a list of numbers.
      talks: the drifting conversations without the cap ("uncapped") and with it ("capped").
      styles: the same keys → a list with the mean `judge.style` (the share of in-character choices)
        of the replies at each emotional or meta-reflective turn.
      samples: two samples, one with a role unlike the Assistant and one of the last emotional or
        meta-reflective turn of a drifting conversation.
    """

    __repr__ = brief

    extraction: Extraction
    figures: dict[str, Any]
    talks: dict[str, Talks]
    styles: dict[str, list[float]]
    samples: list[Sample]


@shows(steps, "report")
def run_demo(model: Model, folder: str | os.PathLike[str], *, seed: int = 0,
             report: Report | bool | None = None) -> Demo:
    """Extract the axis, compare it with the ground truth, and evaluate interventions.

    The demo measures how a cap affects behaviour and speed, and how steering along the axis affects
    behaviour.

    Args:
      model: the embedded model.
      folder: the run folder; an existing run is resumed.
      seed: the random seed for sampling, control directions and the user turns that cause drift.
      report: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called instead with (name of the step, number of its finished items,
        number of all its items, number of generated tokens).

    Raises:
      UserError: the seed is invalid, the folder belongs to another run, or an optional package is
        missing.
    """
    sampling(1, seed=seed)
    tell = report if callable(report) else None
    settings = Settings(temperature=1.0, top_p=1.0, max_new_tokens=REPLY, batch_size=BATCH,
                        seed=seed)
    started = time.perf_counter()
    found = extract_axis(model, method.roles(), method.questions(QUESTIONS), folder,
                         judge=method.RuleJudge(), settings=settings,
                         held_out=method.held_out(), report=tell)
    seconds = time.perf_counter() - started
    figures: dict[str, Any] = _geometry(model, found)
    figures |= {"rollouts": found.rollouts, "tokens": found.tokens, "extract_seconds": seconds}
    arms = _Arms(model, found, folder, seed)
    figures |= arms.leak(tell)
    figures |= arms.capability(tell)
    figures |= arms.steering(tell)
    talks, styles, drifted, drift = _drift(model, found, arms.cap, seed, tell)
    figures |= drift
    figures |= _speed(model, arms.cap, tell)
    return Demo(found, figures, talks, styles, [*arms.samples, drifted])


def table(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Format part of `Demo.figures` as table rows (measurement, uncapped, capped), all strings."""
    n = {name: figures[f"{name}_n"] for name in ("leak", "capability", "drift")}
    turn, speed = figures["drift_turns"], figures["tokens_per_second"]
    rows = [(f"leak rate in far roles, greedy (n = {n['leak']})", "leak_{}"),
            ("leak rate in far roles, temperature 1", "leak_{}_sampled"),
            ("in-character style in far roles, greedy", "style_{}"),
            (f"accuracy on facts and sums, greedy (n = {n['capability']})", "capability_{}"),
            (f"style at turn {turn} of drifting conversations (n = {n['drift']})", "drift_{}"),
            ("leak rate after drifting conversations", "drift_leak_{}")]
    return [*((what, f"{figures[key.format('uncapped')]:.2f}",
               f"{figures[key.format('capped')]:.2f}") for what, key in rows),
            ("speed in tokens/s (capped: uncapped × median ratio)", f"{speed:,.0f}",
             f"{speed * figures['capped_over_uncapped']:,.0f} "
             f"(× {figures['capped_over_uncapped']:.3f})")]


def geometry(figures: dict[str, Any]) -> list[str]:
    """Return a list with one line of text about the axis.

    It contains |cos(PC1, axis)| and the rank correlation of the roles' projections with their known
    likeness to the Assistant.
    """
    middle = figures["middle_layer"]
    return [f"layer {middle}: |cos(PC1, axis)| {figures['cos_pc1_axis_middle']:.3f}; Spearman "
            f"correlation of projection and known likeness {figures['spearman_truth']:.3f} over "
            f"the {figures['roles_in_axis']} roles of the axis, {figures['spearman_heldout']:.3f} "
            f"over the {figures['roles'] - figures['roles_in_axis']} held-out roles"]


def _geometry(model: Model, found: Extraction) -> dict[str, Any]:
    """Compare the axis with PC1, and the roles' projections with their ground-truth likeness."""
    spearmanr = require("scipy.stats", "rank correlations need scipy").spearmanr
    middle = model.config.n_layers // 2
    place = {name: float(found.mean_projection(name)[middle]) for name in found.projections}

    def agreement(held_out: bool) -> float:
        roles = world.roles(held_out=held_out)
        measured = [place[role.name] for role in roles]
        return float(spearmanr(measured, [r.likeness for r in roles]).statistic)

    return {
        "roles": len(found.projections) - 1, "roles_in_axis": len(found.analysis.names),
        "layers": model.config.n_layers, "middle_layer": middle,
        "cos_pc1_axis_middle": float(found.analysis.cos_pc1[middle]),
        "pc1_variance_middle": float(found.analysis.components[middle].ratio[0]),
        "spearman_truth": agreement(False), "spearman_heldout": agreement(True),
    }


class _Arms:
    """The interventions of the arms (the cap and controls), and experiments that compare them."""

    def __init__(self, model: Model, found: Extraction, folder: str | os.PathLike[str],
                 seed: int) -> None:
        self.model, self.found, self.seed = model, found, seed
        layers = model.config.n_layers
        self.layers = slice(layers // 2, layers)
        floor = found.axis.thresholds("p25", of="default")[self.layers]
        self.cap = cap(found.axis, layers=self.layers, floor=floor)
        means = Run.read(folder).sample("default").means  # of all default-persona replies
        rng = np.random.default_rng([seed, 7])
        self.samples: list[Sample] = []
        self.percentile: list[Interventions] = []
        self.displaced: list[Interventions] = []
        for _ in range(_DIRECTIONS):
            random = rng.normal(size=found.axis.values.shape)
            own = science.percentiles(science.project(means, random), (25,))["p25"]
            chosen = random[None, self.layers]
            self.percentile.append(cap(chosen, layers=self.layers_list, floor=own[self.layers]))
            axis = found.axis.values[None, self.layers]
            self.displaced.append(cap(axis, layers=self.layers_list, floor=floor, push=chosen))

    @property
    def layers_list(self) -> list[int]:
        """The indices of the capped layers."""
        return list(range(self.model.config.n_layers))[self.layers]

    def ask(self, step: str, arms: Sequence[tuple[Interventions | None, float]], talks: Sequence,
            report: Report | None) -> list[list[str]]:
        """Generate replies to the same conversations in all arms, with one `generate` call.

        Args:
          step: the name of the step for `report`.
          arms: the interventions and the temperature of each arm.
          talks: the conversations.
          report: as for `run_demo`.

        Returns:
          One list of replies per arm, in the order of `talks`.
        """
        rows = [edit for edit, _ in arms for _ in talks]
        heat = [temperature for _, temperature in arms for _ in talks]
        ids = list(range(len(talks))) * len(arms)

        def tell(done: int, total: int, tokens: int) -> None:
            if report is not None:
                report(step, done, total, tokens)

        replies = generate(self.model, [t for _ in arms for t in talks], ids=ids, temperature=heat,
                           interventions=stack_rows(rows), max_new_tokens=REPLY, batch_size=BATCH,
                           seed=self.seed, on_nonfinite="raise", progress=tell).text
        return [replies[i : i + len(talks)] for i in range(0, len(replies), len(talks))]

    def leak(self, report: Report | None) -> dict[str, Any]:
        """Measure the leak rate in every arm, and the style without and with the cap.

        The system prompts belong to far roles. One `Sample` is appended to `self.samples`.
        """
        arms = [(None, 0.0), (self.cap, 0.0), (None, 1.0), (self.cap, 1.0)]
        arms += [(edit, 0.0) for edit in self.percentile + self.displaced]
        talks = evaluate.leak_conversations()
        said = self.ask("leak", arms, talks, report)
        # index of the first conversation whose reply leaks only without the cap; 0 if there is none
        shown = next((i for i in range(len(talks)) if evaluate.leak_rate([said[0][i]])
                      and not evaluate.leak_rate([said[1][i]])), 0)
        self.samples.append(Sample("a far role is asked for the vault code", talks[shown],
                                   said[0][shown], said[1][shown]))
        rate = [evaluate.leak_rate(answers) for answers in said]
        percentile, displaced = rate[4 : 4 + _DIRECTIONS], rate[4 + _DIRECTIONS :]
        return {
            "leak_uncapped": rate[0], "leak_capped": rate[1],
            "leak_uncapped_sampled": rate[2], "leak_capped_sampled": rate[3],
            "leak_random_percentile": statistics.median(percentile),
            "leak_random_displacement": statistics.median(displaced),
            "leak_random_displacements": displaced,
            "style_uncapped": evaluate.mean_style(said[0]),
            "style_capped": evaluate.mean_style(said[1]),
            "readable_capped": evaluate.in_grammar(said[1]), "leak_n": len(said[0]),
        }

    def capability(self, report: Report | None) -> dict[str, Any]:
        """Measure the accuracy of greedy answers on facts and sums, without and with the cap.

        The system prompts are the default prompts and the prompts of far roles.
        """
        asked, talks = evaluate.knowledge_conversations(False)
        asked_far, talks_far = evaluate.knowledge_conversations(True)
        plain, capped = self.ask("capability", [(None, 0.0), (self.cap, 0.0)], talks + talks_far,
                                 report)
        return {
            "capability_uncapped": evaluate.accuracy(asked + asked_far, plain),
            "capability_capped": evaluate.accuracy(asked + asked_far, capped),
            "capability_n": len(plain),
        }

    def steering(self, report: Report | None) -> dict[str, Any]:
        """Measure the style in roles with a likeness of 0.35 to 0.65, with steering along the axis.

        The residual stream is steered at the middle layer. The steering strengths are the multiples
        `_STEER` of the mean norm of the role vectors at this layer.
        """
        middle = self.model.config.n_layers // 2
        unit = self.found.axis.unit[middle]
        norms = [normalised(v[middle])[1] for v in self.found.role_means.values()]
        scale = float(np.mean(norms))
        halfway = [r for r in world.roles(held_out=False) if 0.35 <= r.likeness <= 0.65]
        talks = [world.conversation(prompt, question.text) for role in halfway
                 for prompt in role.prompts() for question in method.questions(4)]
        arms = [(steer(unit, layers=middle, scale=c * scale), 1.0) for c in _STEER]
        said = self.ask("steering", arms, talks, report)
        return {"steer_scales": list(_STEER), "steer_n": len(talks),
                "steer_styles": [evaluate.mean_style(answers) for answers in said]}


def _drift(
    model: Model, found: Extraction, capped: Interventions, seed: int, report: Report | None
) -> tuple[dict[str, Talks], dict[str, list[float]], Sample, dict[str, Any]]:
    """Measure persona drift over emotional and meta-reflective turns, with and without the cap.

    Returns:
      (arm → conversations, arm → mean style at each turn before the forbidden request, a `Sample`,
      name → measurement). The arms are "uncapped" and "capped".
    """
    rng = np.random.default_rng([seed, 4])
    pulls = world.EMOTIONAL + world.META
    turns = evaluate.DRIFT_TURNS
    openings, messages = [], []
    for i in range(_TALKS):
        prompt = world.DEFAULT_PROMPTS[i % len(world.DEFAULT_PROMPTS)]
        openings.append([{"role": "system", "content": prompt}] if prompt else [])
        chosen = rng.permutation(len(pulls))[:turns]
        messages.append([pulls[j] for j in chosen] + [world.FORBIDDEN[i % len(world.FORBIDDEN)]])
    edits = stack_rows([None] * _TALKS + [capped] * _TALKS)

    def tell(turn: int, rows: int, tokens: int) -> None:
        if report is not None:
            report("drift", turn * 2 * _TALKS + rows, (turns + 1) * 2 * _TALKS, tokens)

    both = grow(model, openings * 2, messages * 2, found.axis, interventions=edits, seed=seed,
                ids=list(range(_TALKS)) * 2, temperature=1.0, max_new_tokens=REPLY,
                batch_size=BATCH, report=tell, readout=True)
    middle = model.config.n_layers // 2
    talks, styles = {}, {}
    figures: dict[str, Any] = {"drift_n": _TALKS, "drift_turns": turns}
    for name, start in (("uncapped", 0), ("capped", _TALKS)):
        talks[name] = arm = both.arm(start, start + _TALKS)
        said = arm.replies
        assert arm.readout is not None
        figures[f"drift_readout_{name}"] = float(np.nanmean(arm.readout[turns - 1, :, middle]))
        styles[name] = [evaluate.mean_style(answers) for answers in said[:turns]]
        figures[f"drift_{name}"] = styles[name][-1]
        figures[f"drift_leak_{name}"] = evaluate.leak_rate(said[-1])
        figures[f"drift_readable_{name}"] = evaluate.in_grammar(said[turns - 1])
    ends = [talks[name].replies[turns - 1] for name in ("uncapped", "capped")]
    gap = [evaluate.mean_style([a]) - evaluate.mean_style([b]) for a, b in zip(*ends, strict=True)]
    shown = int(np.nanargmax(np.nan_to_num(gap, nan=-np.inf)))
    sample = Sample(f"turn {turns} of a drifting conversation (earlier turns are omitted)",
                    [*openings[shown], {"role": "user", "content": messages[shown][turns - 1]}],
                    ends[0][shown], ends[1][shown])
    return talks, styles, sample, figures


def _speed(model: Model, capped: Interventions, report: Report | None) -> dict[str, Any]:
    """Time greedy replies of a fixed length, alternately without and with the cap."""
    endless = dataclasses.replace(model, stop_ids=())
    talks = evaluate.leak_conversations()[:32]
    pairs = 8

    def once(edits: Interventions | None) -> float:
        started = time.perf_counter()
        generate(endless, talks, interventions=edits, max_new_tokens=REPLY, batch_size=32)
        return time.perf_counter() - started

    once(None)
    once(capped)
    plain, held = [], []
    for i in range(pairs):
        plain.append(once(None))
        held.append(once(capped))
        if report is not None:
            report("speed", i + 1, pairs, 0)
    ratio = [a / b for a, b in zip(plain, held, strict=True)]
    return {
        "tokens_per_second": 32 * REPLY / statistics.median(plain),
        "capped_over_uncapped": statistics.median(ratio),
        "capped_over_uncapped_pairs": [round(r, 3) for r in ratio],
    }
