"""Tiny random models, and distances between results."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures import capture
from jaxpersona.engine.compiled import KEPT
from jaxpersona.interventions.where import everywhere
from jaxpersona.models.config import ModelConfig, Rope
from jaxpersona.models.forward import forward
from jaxpersona.models.params import Params, fingerprint, layout


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
    """A model as required by `generate` (`model.Model` without a folder)."""

    config: ModelConfig
    params: Params
    stop_ids: tuple[int, ...] = (3,)
    name: str = "tiny"
    fingerprint: str = ""
    tokenizer: Any = None
    mesh: Any = None


def tiny_config(**fields: Any) -> ModelConfig:
    """A Qwen 3 with 3 layers, D = 32 and 2 query heads per key head; `fields` override these."""
    base: dict[str, Any] = dict(
        family="qwen3", vocab_size=97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2,
        head_dim=12, d_ff=48, norm_eps=1e-6, max_context=512, rope=Rope(10_000.0),
        tied_embeddings=False, qk_norm=True,
    )
    base.update(fields)
    base.setdefault("attn_scale", base["head_dim"] ** -0.5)
    base.setdefault("windows", (None,) * base["n_layers"])
    return ModelConfig(**base)


def random_params(config: ModelConfig, seed: int = 0, dtype: Any = jnp.float32) -> Params:
    """Draw weights so large that attention and logits are far from uniform, and random norms."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, spec: Any) -> jax.Array:
        if spec.init is None:
            value = rng.uniform(0.3, 2.0, spec.shape) - config.norm_offset
        elif not spec.inner:
            value = rng.normal(0, 0.5, spec.shape)
        elif path[-1].name == "embed_vd":
            value = rng.normal(0, 1.0, spec.shape)
        else:
            value = rng.normal(0, 1.2 / math.sqrt(math.prod(spec.shape[-spec.inner:])), spec.shape)
        return jnp.asarray(value, dtype)

    return jax.tree_util.tree_map_with_path(draw, layout(config))


@functools.lru_cache
def tiny_model(seed: int = 0, dtype: Any = jnp.float32, stop_ids: tuple[int, ...] = (3,),
               **fields: Any) -> Tiny:
    """Return a random model of `tiny_config(**fields)`, cached by its arguments."""
    config = tiny_config(**fields)
    params = random_params(config, seed, dtype)
    return Tiny(config, params, stop_ids, fingerprint=fingerprint(config, params))


def prompts(lengths: Any, vocabulary: int = 97, seed: int = 0) -> list[list[int]]:
    """Draw random prompts of the given lengths, without the lowest ids (stop tokens, padding)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, vocabulary, int(n)).tolist() for n in lengths]


run = jax.jit(forward, static_argnames=("logits",))  # the configuration is an ordinary argument

READ = capture.full(everywhere)


def compiled(program: Any) -> int:
    """Count the cached compiled programs of one of the engine's functions.

    `KEPT` drops the least recently used programs: call `KEPT.clear()` before the first count.
    """
    held = list(KEPT._held.items())
    return sum(made._cache_size() for key, made in held if key[0] is program.__wrapped__)


def residuals(model: Any, batch: Any, edits: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Run a full forward pass; return residuals [B, L, T, D], NaN at padding, and logits."""
    out = run(model.params, model.config, batch, interventions=edits, capture=READ)
    return np.asarray(out.captured["full"].value), np.asarray(out.logits)


def relative(a: Any, b: Any) -> np.ndarray:
    """Return ‖a − b‖₂ / ‖b‖₂ over the last two axes: [B, L] for [B, L, T, D].

    Entries that are NaN in both (padding) are ignored; NaN in only one of them is a failure.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"{a.shape} against {b.shape}"
    nothing = np.isnan(a) & np.isnan(b)
    a, b = np.where(nothing, 0, a), np.where(nothing, 0, b)
    far = np.linalg.norm(a - b, axis=(-2, -1))
    return far / np.maximum(np.linalg.norm(b, axis=(-2, -1)), 1e-30)


def rowwise(a: Any, b: Any) -> np.ndarray:
    """Return `relative` over only the last axis: [B, L] for means [B, L, D]."""
    return relative(np.asarray(a)[..., None, :], np.asarray(b)[..., None, :])


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two pytrees have the same structure and bit-identical arrays."""
    chex.assert_trees_all_equal_structs(a, b)
    pairs = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(pairs))


def differing(a: Any, b: Any) -> list[str]:
    """Return the names of the arrays that differ between two pytrees in any bit."""
    left, right = (jax.tree_util.tree_leaves_with_path(x) for x in (a, b))
    return [
        jax.tree_util.keystr(path) for (path, x), (_, y) in zip(left, right, strict=True)
        if np.asarray(x).tobytes() != np.asarray(y).tobytes()
    ]


def top2_margin(logits: Any) -> np.ndarray:
    """Return the largest logit minus the second largest: [...] for [..., V]."""
    two = np.partition(np.asarray(logits, np.float64), -2, axis=-1)
    return two[..., -1] - two[..., -2]


# a transformers model with the vocabulary of `byte_tokenizer`
BYTE_MODEL: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48,
    "max_position_embeddings": 256, "initializer_range": 0.2, "eos_token_id": 257,
    "bos_token_id": None, "pad_token_id": None,
}


def byte_tokenizer(*, template: bool = True) -> Any:
    """Return a byte-level tokenizer: 256 byte tokens, a start-of-turn and an end-of-turn token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>")
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    return tokenizer


def random_checkpoint(folder: pathlib.Path, kind: Any, config: Any) -> pathlib.Path:
    """Save a random transformers model of class `kind`."""
    import torch

    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    return folder


class Scored:
    """A judge whose scores are a function of the role's name and the rollout's key."""

    scale = (0, 1, 2, 3)

    def __init__(self, score: Any = lambda role, key: 3, name: str = "test") -> None:
        self.name, self._score = name, score

    def score(self, items: Any) -> Any:
        """Yield the verdicts, the last item first; if a score is an exception, the judge failed."""
        from jaxpersona.judges.protocol import Verdict

        for item in reversed(list(items)):
            score = self._score(item.role.name, item.key)
            if isinstance(score, Exception):
                yield Verdict(item.key, error=str(score))
            else:
                yield Verdict(item.key, score)


def write_texts(folder: pathlib.Path, roles: Any, questions: Any) -> pathlib.Path:
    """Write roles and questions in the layout that `jaxpersona axis` reads."""
    (folder / "roles").mkdir()
    for role in roles:
        value = {"instruction": [{"pos": p} for p in role.prompts],
                 "eval_prompt": "{question} {answer}?"}
        (folder / "roles" / f"{role.name}.json").write_text(json.dumps(value))
    lines = [json.dumps({"question": q.text, "id": q.id}) for q in questions]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def axis_command(checkpoint: Any, texts: pathlib.Path, out: Any, *more: str) -> list[str]:
    """Return the arguments of a small `jaxpersona axis` run."""
    return ["axis", "--model", str(checkpoint), "--roles", str(texts / "roles"), "--questions",
            str(texts / "questions.jsonl"), "--out", str(out), "--max-new-tokens", "6",
            "--batch-size", "8", "--min-count", "1", "--temperature", "1", "--top-p", "1", "--json",
            *more]


def run_command(arguments: list[str]) -> Any:
    """Run the `jaxpersona` command; return its exit code."""
    import pytest

    from jaxpersona.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def write_control(path, directions, architecture="controlvector"):
    """Write a control vector like other programs, without our own keys."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "qwen3")
    writer.add_uint32(f"{architecture}.layer_count", len(directions))
    for name, value in directions.items():
        writer.add_tensor(name, value)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, step)()
    writer.close()
    return path
