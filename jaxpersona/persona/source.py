"""Read and check an output folder of the published Assistant Axis code before the import."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from jaxpersona.ckpts import torchfile
from jaxpersona.data.reading import Faults
from jaxpersona.data.texts import DEFAULT, Question, Role
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json, require_folder
from jaxpersona.models.params import SCHEME
from jaxpersona.persona.exporting import ORIGIN
from jaxpersona.persona.prepare import check_prompts
from jaxpersona.persona.reread import reread
from jaxpersona.runs import published
from jaxpersona.runs.imported import IMPORTED
from jaxpersona.runs.manifest import manifest
from jaxpersona.runs.names import check_names
from jaxpersona.runs.rollouts import Settings
from jaxpersona.runs.seal import digest
from jaxpersona.vectors.vector import Axis

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

# largest accepted median relative distance between stored and recomputed response means
FARTHEST = 0.5
_COMPARED = 4  # maximum number of response means that are recomputed with the model
Report = Callable[[str, int, int, int], None]


class Source:
    """An output folder of the published code, checked when the object is created.

    Attributes:
      folder, model: the arguments of `Source`.
      faults: the list of errors found so far.
      roles: role name → `Role`: the given role or, if `given` is None, a role with the prompts of
        the responses.
      gaps: names of roles whose prompt indices in the responses are not 0, 1, 2, …; [] if `given`
        is not None.
      questions: question index in the responses → text.
      extra: unknown field of the responses → number of rollouts that have it.
      rollouts: role name → number of rollouts.
      held: "scores" and "activations" → names of the roles with a file in this subfolder.
      shape: (L, D), the shape of a response mean.
      distance: the median relative distance between stored and recomputed response means; None if
        no means were compared.
      axis: the axis in the folder, or None.
    """

    def __init__(self, folder: pathlib.Path, given: Mapping[str, Role] | None,
                 model: Model | None, report: Report | None) -> None:
        """Read and check the folder.

        Args:
          folder: the published folder.
          given: role name → `Role`, whose prompts the responses must have; None: any prompts.
          model: the model that generated the responses, or None.
          report: a function that is called with (step, done, total, 0); the steps are "checking"
            and "comparing".

        Raises:
          UserError: the folder does not exist, has no responses or contains invalid data (the
            message lists all errors), `model` is not the model that generated the responses, or
            neither `model` nor the folder determines the shape of response means.
        """
        require_folder(folder)
        names = published.roles_in(folder, published.RESPONSES)
        if not names:
            raise UserError(f"{folder}: contains no file {published.RESPONSES}/<role>.jsonl; give "
                            "the output folder of the published code")
        check_names(names)
        self.folder, self.model, self.faults = folder, model, Faults()
        self.roles: dict[str, Role] = {}
        self.gaps: list[str] = []
        self.questions: dict[int, str] = {}
        self.extra: Counter[str] = Counter()
        self.rollouts: dict[str, int] = {}
        self.held = {part: set(published.roles_in(folder, part))
                     for part in (published.SCORES, published.ACTIVATIONS)}
        for part, held in self.held.items():
            for name in sorted(held - set(names)):
                self.faults.append(f"{folder / part / name}{published.SUFFIXES[part]}: the role "
                                   f"is unknown, because {published.RESPONSES} has no file for it")
        for i, name in enumerate(names):
            self._check(name, given)
            if report is not None:
                report("checking", i + 1, len(names), 0)
        self.axis = self._axis()
        self.faults.raise_if_any(folder)
        self._report = report
        self.shape, self.distance = self._fitted()

    def texts(self, name: str) -> published.Texts:
        """Read the rollouts of a role; errors are added to `faults`."""
        return published.read_responses(self.folder, name, self.faults)

    def scores(self, name: str, texts: published.Texts) -> dict[str, int]:
        """Return rollout key → score of a role; {} for the default persona or without a file."""
        if name == DEFAULT or name not in self.held[published.SCORES]:
            return {}
        return published.read_scores(self.folder, name, texts, self.faults)

    def means(self, name: str, texts: published.Texts,
              shape: tuple[int, ...] | None) -> dict[str, np.ndarray]:
        """Return rollout key → response mean [L, D] of a role; {} without a file.

        `shape` is (L, D), or None if unknown: all means must then have the shape of the first.
        """
        if name not in self.held[published.ACTIVATIONS]:
            return {}
        return published.read_activations(self.folder, name, texts, shape, self.faults)

    def _check(self, name: str, given: Mapping[str, Role] | None) -> None:
        """Check the texts and scores of a role, and store its prompts and questions."""
        texts = self.texts(name)
        where = f"{self.folder / published.RESPONSES / name}.jsonl"
        prompts = texts.prompts()
        self.rollouts[name] = len(texts.records)
        self.extra.update(texts.extra)
        for index, question in texts.questions().items():
            if self.questions.setdefault(index, question) != question:
                self.faults.append(f"{where}: the question with question_index {index} differs "
                                   "from the question with this index of another role")
        if given is not None and name not in given:
            self.faults.append(f"{where}: the role {name!r} is unknown; add it to the given roles")
        elif given is not None:
            own = dict(enumerate(given[name].prompts))
            if wrong := [str(i) for i, text in prompts.items() if own.get(i) != text]:
                self.faults.append(f"{where}: the system prompts with prompt_index "
                                   f"{', '.join(wrong[:5])} differ from the prompts of the given "
                                   "role")
        elif list(prompts) != list(range(len(prompts))):
            self.gaps.append(name)
        self.roles[name] = (Role(name, tuple(prompts.values()), "") if given is None
                            else given.get(name, Role(name, (), "")))
        self.scores(name, texts)

    def _axis(self) -> Axis | None:
        """Read the axis in the folder, if there is one; record an error if the file is damaged."""
        path = self.folder / published.AXIS
        if not path.exists():
            return None
        try:
            found = torchfile.read(path, "axis")
        except UserError as error:
            self.faults.append(str(error))
            return None
        return found if isinstance(found, Axis) else None

    def _fitted(self) -> tuple[tuple[int, int], float | None]:
        """Check that the model generated the responses; return (L, D) and `distance`.

        Raises:
          UserError: a response mean is invalid, the first file of response means is empty, the
            model did not generate the responses, or L and D are unknown.
        """
        model, origin = self.model, self.origin()
        mark = origin.get("fingerprint") if origin.get("fingerprint_scheme") == SCHEME else ""
        if model is not None and mark and mark != model.fingerprint:
            raise UserError(f"{self.folder / ORIGIN}: the responses are from the model "
                            f"{origin.get('model')!r:.80} with the fingerprint {mark!r:.40}, but "
                            f"{model.name} has {model.fingerprint}; give the model that generated "
                            "the responses")
        wanted = None if model is None else (model.config.n_layers, model.config.d_model)
        with_means = sorted(self.held[published.ACTIVATIONS], key=lambda name: name != DEFAULT)
        if not with_means:
            known = self.axis.values.shape if self.axis is not None else None
            if wanted is None and known is None:
                raise UserError(f"{self.folder}: contains neither {published.ACTIVATIONS} nor "
                                "an axis, so the number of layers and the width of the model are "
                                "unknown; give the model that generated the responses (model=, "
                                "--model)")
            return wanted or cast(Any, known), None
        texts = self.texts(with_means[0])
        means = self.means(with_means[0], texts, None)
        self.faults.raise_if_any(self.folder)
        if not means:
            raise UserError(f"{self.folder / published.ACTIVATIONS / with_means[0]}.pt is empty; "
                            "delete it")
        shape = next(iter(means.values())).shape
        if wanted is not None and shape != wanted:
            raise UserError(f"{self.folder}: its response means have {shape[0]} layers and the "
                            f"width {shape[1]}, but {model.name} has "  # type: ignore[union-attr]
                            f"{wanted[0]} layers and the width {wanted[1]}; give the model that "
                            "generated the responses, and response means of all layers")
        return cast(Any, shape), None if model is None else self._distance(model, texts, means)

    def _distance(self, model: Model, texts: published.Texts, means: Mapping[str, np.ndarray],
                  ) -> float | None:
        """Return the median relative distance between stored and recomputed response means.

        At most `_COMPARED` means are recomputed. The result is None if no reply can be compared.

        Raises:
          UserError: the distance exceeds `FARTHEST`.
        """
        replies = {key: texts.records[key]["conversation"][-1]["content"] for key in means}
        # a text with U+FFFD, which replaces invalid UTF-8, does not encode to the generated ids
        keys = [key for key, text in replies.items() if text and "\ufffd" not in text][:_COMPARED]
        if self._report is not None:
            self._report("comparing", 0, len(keys), 0)
        again = list(reread(model, [texts.records[key] for key in keys]))
        if self._report is not None:
            self._report("comparing", len(keys), len(keys), 0)
        far = [np.linalg.norm(own - means[key], axis=-1) / np.linalg.norm(means[key], axis=-1)
               for key, own in zip(keys, again, strict=True)]
        if not far:
            return None
        distance = float(np.median(far))
        if not distance <= FARTHEST:
            raise UserError(f"{self.folder}: the response means do not match {model.name} "
                            f"(median relative distance {distance:.2g}, over {len(keys)} rollouts "
                            f"and all layers; the limit is {FARTHEST}); give the model that "
                            "generated the responses")
        return distance

    def origin(self) -> dict[str, Any]:
        """Return the contents of `jaxpersona.json`, which `export_reference` writes, or {}."""
        path = self.folder / ORIGIN
        found: Any = read_json(path) if path.exists() else {}
        return found if isinstance(found, dict) else {}

    def manifest(self, judge: str, settings: Settings, **last: Any) -> dict[str, Any]:
        """Return the manifest of the imported run, with the fields `last` in its part "last"."""
        roles = list(self.roles.values())
        questions = [Question(i, text) for i, text in sorted(self.questions.items())]
        if self.model is not None:
            value = manifest(self.model, roles, questions, judge, settings,
                             check_prompts(self.model, roles, questions), **last)
        else:
            value = {
                "model": {"fingerprint": "", "fingerprint_scheme": SCHEME, "dtype": "",
                          "layers": self.shape[0], "width": self.shape[1], "stop_ids": []},
                "arguments": dataclasses.asdict(settings),
                "roles": {role.name: digest([list(role.prompts)]) for role in roles},
                "questions": {str(q.id): digest([q.text]) for q in questions},
                "numerics": {}, "judges": {judge: {}},
                "last": {"model": "", "judge": judge, **last, "versions": {}}}
        for name in self.gaps:  # `extract_axis` raises an error: no role can have this digest
            value["roles"][name] = digest(["gaps", list(self.roles[name].prompts)])
        return value | {IMPORTED: {"folder": os.fspath(self.folder), "distance": self.distance,
                                   "rollouts": sum(self.rollouts.values())}}
