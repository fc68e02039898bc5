"""LoRA adapters that peft writes, compared with peft: tied models, Gemma, GGUF and patterns."""

from __future__ import annotations

import gguf_files
import hf
import jax
import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.models.weight import LowRank

peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")]

ROWS = hf.prompts([12, 5], 199)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GEMMA = {"tie_word_embeddings": True, "sliding_window": 9, "query_pre_attn_scalar": 16}
BASES = {
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3", GEMMA),
    "llama": ("llama", {"attention_bias": True}),
}


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    """Return a model of transformers, its folder and its GGUF file."""
    pytest.importorskip("gguf")
    family, fields = BASES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    made = hf.model(family, seed=6, **fields)
    made.save_pretrained(root / "base")
    return made, root / "base", gguf_files.write(root / "m.gguf", made)


@pytest.fixture
def copy(base):
    """Return a copy of the model, which peft changes in place."""
    return hf.architecture(base[0].config.model_type.removesuffix("_text")).from_pretrained(
        base[1], dtype=torch.float32, attn_implementation="eager", trust_remote_code=False).eval()


def tune(made, folder, **settings):
    """Save an adapter with random factors; return its logits after peft read it again.

    peft sorts the keys of patterns when it writes them, so another one may match first.
    """
    torch.manual_seed(1)
    tuned = peft.get_peft_model(made, peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=ALL, init_lora_weights=False, **settings)).eval()
    tuned.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(tuned.unload(), folder, trust_remote_code=False).eval()
    return hf.residuals(again.base_model.model, ROWS)[1]


def check(model, want, plain):
    got = jax.jit(jp.forward)(model.params, model.config,
                              jp.batch([np.array(row) for row in ROWS])).logits
    for b, row in enumerate(ROWS):
        assert hf.distance(got[b, :len(row)], want[b, :len(row)]) <= 1e-4
        assert hf.distance(plain[b, :len(row)], want[b, :len(row)]) > 0.05


def test_logits_with_an_adapter_are_those_of_peft(base, copy, tmp_path):
    """Merged into a folder's weights or kept apart, and merged into those of a GGUF file."""
    made, folder, file = base
    want, (_, plain) = tune(copy, tmp_path / "a"), hf.residuals(made, ROWS)
    for source, merge in ((folder, True), (folder, False), (file, True)):
        check(jp.load(source, adapter=tmp_path / "a", merge=merge), want, plain)


@pytest.mark.filterwarnings(
    "ignore:.*did not match any targeted module:RuntimeWarning")  # by peft
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_patterns_have_the_ranks_and_scales_of_peft(base, copy, tmp_path, rslora):
    """A key may be a part of a name or a regular expression; the first that matches applies."""
    made, folder, _ = base
    want = tune(copy, tmp_path / "a", use_rslora=rslora, rank_pattern={
        "layers.0.self_attn.q_proj": 2, "q_proj": 3, r"layers\.[12]\.mlp\..*": 5, "_proj": 7,
        "mlp.up": 6}, alpha_pattern={
        "q_proj": 9, "layers.0.self_attn.q_proj": 40, r".*\.1\.mlp\.(up|down)_proj": 2.5,
        "model.layers.2.self_attn.o_proj": 1})
    _, plain = hf.residuals(made, ROWS)
    for merge in (True, False):
        model = jp.load(folder, adapter=tmp_path / "a", merge=merge)
        check(model, want, plain)
    ranks = {len(w.a) for w in jax.tree.leaves(
        model.params, is_leaf=lambda x: isinstance(x, LowRank)) if isinstance(w, LowRank)}
    assert ranks == {2, 3, 4, 5}
