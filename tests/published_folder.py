"""Output folders of the published Assistant Axis code, and its steps 4 and 5."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxpersona.data.texts import Role

torch = pytest.importorskip("torch")

L, D = 3, 4  # shape of the response means in the folders that `write` makes


def write(folder, *, dtype=torch.float32, without=(), unscored=(), lost=(), names=("a", "b", "c")):
    """Write a folder as the published pipeline does, with random response means.

    `without` are roles without activations; `unscored` and `lost` are keys of role "a" without a
    score or a response mean.
    """
    rng = np.random.default_rng(0)
    for part in ("responses", "scores", "activations"):
        (folder / part).mkdir(parents=True)
    for name in ("default", *names):
        lines, scores, means = [], {}, {}
        for p in range(2):
            for q in range(4):
                prompt = f"You are {name}{p}." if (name, p) != ("default", 0) else ""
                system = [{"role": "system", "content": prompt}] if prompt else []
                key = f"pos_p{p}_q{q}"
                lines.append({
                    "system_prompt": prompt, "prompt_index": p, "question_index": q,
                    "question": f"Why {q}?", "label": "pos", "conversation": [
                        *system, {"role": "user", "content": f"Why {q}?"},
                        {"role": "assistant", "content": f"I am {name}\u2028{q}."}]})
                if not (name == "a" and key in lost):
                    value = torch.tensor(rng.normal(len(name), 1, (L, D)), dtype=torch.float64)
                    means[key] = value.to(dtype)
                if not (name == "a" and key in unscored):
                    scores[key] = 3 if (p + q) % 3 else 1
        (folder / "responses" / f"{name}.jsonl").write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        if name != "default":
            (folder / "scores" / f"{name}.json").write_text(json.dumps(scores, indent=2))
        if name not in without:
            torch.save(means, folder / "activations" / f"{name}.pt")
    return folder


def steps_4_and_5(folder, least, dtype=torch.float64):
    """Compute the vectors and the axis of a folder as 4_vectors.py and 5_axis.py do."""
    vectors = {}
    for path in sorted((folder / "activations").glob("*.pt")):
        means = torch.load(path, weights_only=True)
        kept = list(means.values())
        if path.stem != "default":
            scores = json.loads((folder / "scores" / f"{path.stem}.json").read_text())
            kept = [mean for key, mean in means.items() if scores.get(key) == 3]
        if len(kept) >= (1 if path.stem == "default" else least):
            vectors[path.stem] = torch.stack(kept).to(dtype).mean(0)
    roles = torch.stack([vector for name, vector in vectors.items() if name != "default"])
    return {name: vector.numpy() for name, vector in vectors.items()}, (
        vectors["default"] - roles.mean(0)).numpy()


def near(one, two):
    """Return whether two arrays have a relative distance of at most 1e-6."""
    return np.linalg.norm(np.asarray(one) - two) / np.linalg.norm(two) <= 1e-6


def role_of(name):
    """Return the role whose prompts the responses of `write` have."""
    return Role(name, (f"You are {name}0.", f"You are {name}1."), "")
