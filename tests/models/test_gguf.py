"""GGUF models, written from transformers models with llama.cpp's conventions, and damaged files."""

from __future__ import annotations

import functools
import struct
import tracemalloc
import types
import warnings

import gguf_files
import hf
import jax
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import gguf_config, gguf_model, gguf_tokenizer
from jaxpersona.ckpts.gguf_header import HeaderReader
from jaxpersona.ckpts.loading import load
from tokenizers import pre_tokenizers

import jaxpersona as jp
from jaxpersona.distributed.sharding import make_mesh
from jaxpersona.errors import UserError
from jaxpersona.models.config import Rope
from jaxpersona.models.nn import rope_frequencies

gguf = pytest.importorskip("gguf")
FIELDS = {  # windows shorter than the longest row
    "llama": {"attention_bias": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 16},
    "gemma3": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2,
               "num_hidden_layers": 4, "query_pre_attn_scalar": 16},
}
LETTERS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def run(params, config, batch):
    return jp.forward(params, config, batch).logits


def half(name, value):
    return value.astype(np.float16), gguf.GGMLQuantizationType.F16


def named(family):
    return "Mistral 7B" if family == "mistral" else "test"


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_float32_gives_the_parameters_and_the_configuration_of_the_folder(family, tmp_path):
    made = hf.model(family, seed=3, **FIELDS[family])
    params, config = hf.params(made, tmp_path / "folder")
    path = gguf_files.write(tmp_path / "m.gguf", made, name=named(family))
    checkpoint = gguf_model.open_checkpoint(path)
    assert checkpoint.config == config
    for tensor, want in zip(jax.tree.leaves(gguf_model.names.tensors(config)),
                            jax.tree.leaves(params), strict=True):
        got = checkpoint.source.read(tensor.name, None, None).reshape(want.shape)
        offset = 2e-7 if family.startswith("gemma") and "norm" in tensor.name else 0
        np.testing.assert_allclose(got, want, rtol=0, atol=offset, err_msg=tensor.name)
        part = tuple(slice(1, n - 1) for n in tensor.shape)  # as for a shard, in another dtype
        got = checkpoint.source.read(tensor.name, part, np.dtype(np.float16))
        assert got.dtype == np.float16
        np.testing.assert_allclose(got, np.reshape(want, tensor.shape)[part], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 3), ("gemma3", 7)])
def test_a_gemma_file_without_a_pattern_has_the_layers_of_transformers(family, layers, tmp_path):
    """llama.cpp writes no pattern for Gemma 2, and older versions none for Gemma 3."""
    fields = {k: v for k, v in FIELDS[family].items() if k != "layer_types"}
    made = hf.model(family, seed=3, **fields | {"sliding_window": 9, "num_hidden_layers": layers})
    assert set(made.config.layer_types) == {"sliding_attention", "full_attention"}
    _, config = hf.params(made, tmp_path / "folder")
    path = gguf_files.write(tmp_path / "m.gguf", made, skip=("attention.sliding_window_pattern",))
    assert gguf_model.open_checkpoint(path).config == config
    assert [window is not None for window in config.windows] == [
        kind == "sliding_attention" for kind in made.config.layer_types]
    for source in (path, tmp_path / "folder"):
        with pytest.raises(UserError, match="activations is 'float16', but the activations"):
            load(source, dtype="int8", activations="float16")


def test_a_file_with_another_alignment_has_the_same_tensors(tmp_path):
    made = hf.model("qwen2", num_hidden_layers=1)
    path = gguf_files.write(tmp_path / "m.gguf", made, fields={"general.alignment": 1 << 14})
    source = gguf_model.open_checkpoint(path).source
    for name, want in made.state_dict().items():
        np.testing.assert_array_equal(source.read(name, None, None), want, err_msg=name)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_float16_gives_the_logits_of_pytorch(family, tmp_path):
    import torch

    made = hf.model(family, seed=3, **FIELDS[family])
    with torch.no_grad():
        for value in made.parameters():
            if value.ndim > 1:
                value.copy_(value.half().float())
    path = gguf_files.write(tmp_path / "m.gguf", made, half, name=named(family))
    sizes = []
    model = load(path, progress=lambda done, total: sizes.append((done, total)))
    rows = hf.prompts([31, 5, 18], 199)
    _, want = hf.residuals(made, rows)
    got = np.asarray(run(model.params, model.config, jp.batch([np.array(row) for row in rows])))
    for b, row in enumerate(rows):
        assert hf.distance(got[b, :len(row)], want[b, :len(row)]) <= 1e-4
    assert model.tokenizer is None and model.stop_ids == ()
    assert sizes[-1][0] == sizes[-1][1] <= path.stat().st_size
    assert len(sizes) == len(jax.tree.leaves(model.params))


def quantized(kind, seed=0):
    """Encode matrices in a quantized type, with the gguf package or as random blocks."""
    draw = np.random.default_rng(seed)
    columns, size = gguf.GGML_QUANT_SIZES[kind]

    def encode(name, value):
        try:
            return gguf.quantize(value, kind), kind
        except NotImplementedError:
            shape = (value.shape[0], value.shape[1] // columns * size)
            return draw.integers(0, 256, shape, np.uint8), kind

    return encode


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K",
                                  "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_quantized_tensors_equal_those_that_the_package_dequantizes(kind, tmp_path):
    """Test whole tensors and slices that cross heads and blocks, in both row orders of Q."""
    kind = gguf.GGMLQuantizationType[kind]
    made = hf.model("llama", hidden_size=256, num_hidden_layers=1, head_dim=64,
                    intermediate_size=512)
    encode, stored = quantized(kind), {}

    def keep(name, value):
        stored[name] = encode(name, value)[0]
        return stored[name], kind

    source = gguf_model.open_checkpoint(gguf_files.write(tmp_path / "m.gguf", made, keep)).source
    for name, stem, heads in (("mlp.down_proj", "ffn_down", 0), ("self_attn.q_proj", "attn_q", 4),
                              ("self_attn.k_proj", "attn_k", 2)):
        with np.errstate(all="ignore"):
            want = gguf.dequantize(stored[f"blk.0.{stem}.weight"], kind)
        if heads:  # llama.cpp interleaves the two halves of each head
            split = want.reshape(heads, want.shape[0] // heads // 2, 2, want.shape[1])
            want = split.swapaxes(1, 2).reshape(want.shape)
        full = f"model.layers.0.{name}.weight"
        np.testing.assert_array_equal(source.read(full, None, None), want)
        for index in ((slice(0, 64), slice(0, 256)), (slice(5, 100), slice(0, 256)),
                      (slice(64, 128), slice(32, 160)), (slice(3, 4), slice(7, 250))):
            np.testing.assert_array_equal(source.read(full, index, None), want[index])


def test_a_large_tensor_takes_little_more_memory_than_its_result(tmp_path):
    made = hf.model("qwen2", hidden_size=64, num_hidden_layers=1, vocab_size=1 << 17,
                    tie_word_embeddings=True)
    encode = quantized(gguf.GGMLQuantizationType.Q8_0)
    made.config.intermediate_size = 96
    # the file has the rows of the tensor, not those of the configuration
    with pytest.raises(UserError, match="ffn_gate"):
        gguf_model.open_checkpoint(gguf_files.write(tmp_path / "wrong.gguf", made))
    made.config.intermediate_size = 80

    def large(name, value):
        return encode(name, value) if "embd" in name else (value, None)

    path = gguf_files.write(tmp_path / "m.gguf", made, large)
    source = gguf_model.open_checkpoint(path).source
    tracemalloc.start()
    try:
        read = source.read(gguf_model.names.EMBED, None, np.dtype(np.float32))
        assert tracemalloc.get_traced_memory()[1] <= 1.25 * read.nbytes + (8 << 20)
    finally:
        tracemalloc.stop()


def test_a_mesh_leaves_the_weights_and_their_fingerprint(tmp_path):
    made = hf.model("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=96)
    path = gguf_files.write(tmp_path / "m.gguf", made,
                            quantized(gguf.GGMLQuantizationType.Q4_0))
    plain, spread = load(path), load(path, mesh=make_mesh(2, 2))
    for one, other in zip(jax.tree.leaves(plain.params), jax.tree.leaves(spread.params),
                          strict=True):
        np.testing.assert_array_equal(one, other)
    assert plain.fingerprint == spread.fingerprint and spread.mesh is not None


def test_split_files(tmp_path):
    made = hf.model("qwen3")
    gguf_files.write(tmp_path / "m.gguf", made, split_max_tensors=12)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    whole = gguf_files.write(tmp_path / "whole.gguf", made)
    one, many = (gguf_model.open_checkpoint(path) for path in (whole, parts[0]))
    assert one.config == many.config
    for tensor in jax.tree.leaves(gguf_model.names.tensors(one.config)):
        np.testing.assert_array_equal(one.source.read(tensor.name, None, None),
                                      many.source.read(tensor.name, None, None))
    with pytest.raises(UserError, match=f"not the first of the 3 parts; give {parts[0].name}"):
        gguf_model.open_checkpoint(parts[1])
    first = parts[0].read_bytes()
    for key, kind, number, words in (
            ("split.no", "H", 2, f"{parts[0].name}: split.no is 2, but .* whose split.no is 0"),
            ("split.tensors.count", "i", 7, "tensors; split.tensors.count is 7"),
            ("split.count", "H", 2, "one of 2 parts, but its name does not end in .*; rename"),
            ("split.count", "H", 2000, "split.count is 2000; it must be in 0…1024")):
        at = first.index(key.encode()) + len(key) + 4  # after the type
        parts[0].write_bytes(first[:at] + struct.pack(f"<{kind}", number)
                             + first[at + struct.calcsize(kind):])
        with pytest.raises(UserError, match=words):
            gguf_model.open_checkpoint(parts[0])
    parts[0].write_bytes(first)
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(UserError, match=f"{parts[1].name}: split.no is 2 and .*; expected 1 and 3"):
        gguf_model.open_checkpoint(parts[0])
    parts[1].write_bytes(second)
    parts[1].unlink()
    with pytest.raises(UserError, match=f"{parts[1].name}: no such file"):
        gguf_model.open_checkpoint(parts[0])


def test_a_file_that_llama_cpp_merged_from_parts(tmp_path):
    """`llama-gguf-split --merge` sets `split.count` to 0 and keeps the other fields of a split."""
    made = hf.model("qwen3", num_hidden_layers=1)
    source = gguf_model.open_checkpoint(gguf_files.write(tmp_path / "m.gguf", made, fields={
        "split.no": 0, "split.count": 0, "split.tensors.count": 14})).source
    for name, want in made.state_dict().items():
        np.testing.assert_array_equal(source.read(name, None, None), want, err_msg=name)


@pytest.mark.parametrize(("factor", "low", "high", "context", "head"), [
    (8.0, 1.0, 4.0, 8192, 128), (32.0, 1.0, 4.0, 8192, 64), (4.0, 2.0, 7.0, 4096, 128),
    (16.0, 1.0, 3.0, 300, 96)])
def test_llama_3_scaling_is_recovered_from_its_divisors(factor, low, high, context, head):
    rope = Rope(500_000.0, "llama3", factor, low, high, context)
    config = types.SimpleNamespace(head_dim=head, rope_parameters={
        "rope_type": "llama3", "rope_theta": rope.theta, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, "original_max_position_embeddings": context})
    raw = gguf_config._llama3(gguf_files.llama3_divisors(config), rope.theta, head)
    found = Rope(rope.theta, "llama3", raw["factor"], raw["low_freq_factor"],
                 raw["high_freq_factor"], raw["original_max_position_embeddings"])
    np.testing.assert_allclose(rope_frequencies(found, head), rope_frequencies(rope, head),
                               rtol=2e-5)
    if low == 1:
        assert found == rope


def test_other_divisors_are_an_error():
    divisors = np.linspace(1, 9, 32, dtype=np.float32) ** 2
    with pytest.raises(UserError, match="does not match Llama 3's scaling"):
        gguf_config._llama3(divisors, 1e4, 64)


def chat_model(tmp_path, **options):
    """Write a small model with the tokenizer from `support.byte_tokenizer`."""
    tokenizer = s.byte_tokenizer()
    tokens = [*LETTERS, "ĠĠ"]
    made = hf.model("qwen2", num_hidden_layers=1, vocab_size=len(tokens))
    kinds = [3 if token.startswith("<|") else 1 for token in tokens]
    fields = {"tokenizer.ggml.eos_token_id": LETTERS.index("<|im_end|>")}
    fields |= options.pop("fields", {})
    return gguf_files.write(tmp_path / "chat.gguf", made, tokens=tokens, merges=["Ġ Ġ"],
                            kinds=kinds, template=tokenizer.chat_template, fields=fields,
                            **options)


def test_the_tokenizer_and_the_template_are_those_of_the_file():
    reference = s.byte_tokenizer()
    fields = {"general.architecture": "qwen2", "tokenizer.ggml.model": "gpt2",
              "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": [],
              "tokenizer.ggml.tokens": LETTERS,
              "tokenizer.ggml.token_type": np.array([3 if t.startswith("<|") else 1
                                                     for t in LETTERS]),
              "tokenizer.ggml.eos_token_id": LETTERS.index("<|im_end|>"),
              "tokenizer.chat_template": reference.chat_template}
    tokenizer = gguf_tokenizer.build(fields)
    for text in ("Hello,  world! 12", "<|im_start|>user\nÜñ 東京 🌊<|im_end|>\n", " \t\n"):
        assert tokenizer(text).input_ids == reference(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    talk = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert rendered == reference.apply_chat_template(talk, tokenize=False,
                                                     add_generation_prompt=True)
    assert gguf_tokenizer.stop_ids(fields) == (LETTERS.index("<|im_end|>"),)


@pytest.mark.parametrize(("options", "words"), [
    ({"skip": ("block_count",)}, "field qwen2.block_count is missing"),
    ({"skip": ("blk.0.ffn_up.weight",)}, "missing tensors: blk.0.ffn_up.weight"),
    ({"fields": {"qwen2.feed_forward_length": 96}}, "ffn_gate.weight has shape [80, 48]"),
    ({"fields": {"qwen2.attention.head_count": 0}}, "head_count is 0"),
    ({"fields": {"qwen2.expert_count": 8}}, "qwen2.expert_count is 8"),
    ({"fields": {"qwen2.rope.scaling.type": "yarn"}}, "rope.scaling.type is 'yarn'"),
    ({"fields": {"qwen2.block_count": 1 << 30}}, "the maximum is 1024"),
    ({"fields": {"qwen2.rope.dimension_count": 8}}, "must equal the head dimension"),
    ({"fields": {"split.count": 3}}, "one of 3 parts"),
    ({"fields": {"tokenizer.ggml.pre": "bailingmoe"}}, "tokenizer.ggml.pre is 'bailingmoe'"),
    ({"fields": {"tokenizer.ggml.model": "rwkv"}}, "tokenizer.ggml.model is 'rwkv'"),
    ({"fields": {"tokenizer.ggml.eos_token_id": 999}}, "eos_token_id is 999"),
], ids=str)
def test_a_wrong_field_is_one_line(tmp_path, capsys, options, words):
    refused(capsys, chat_model(tmp_path, **options), words)


@pytest.mark.parametrize(("change", "words"), [
    (lambda data: data[:200], "truncated or damaged"),
    (lambda data: data[:-100], "truncated: "),
    (lambda data: b"GGML" + data[4:], "truncated or damaged"),
    (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "GGUF version 1"),
    (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
    (lambda data: data[:8] + struct.pack("<Q", 1 << 40) + data[16:], "declares 1099511627776"),
    (lambda data: data.replace(b"qwen2", b"qwen9", 1),
     "architecture is 'qwen9'; it must be one of"),
    (lambda data: entry(data, b"output.weight", kind=8 + 15 * 2), "type 38; it must be one of F32"),
    (lambda data: entry(data, b"output.weight", kind=27), "has type I64; it must be one of F32"),
    (lambda data: entry(data, b"output.weight", offset=0), "overlaps another tensor"),
    (lambda data: entry(data, b"output.weight", columns=1 << 60), "truncated: output.weight"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_damaged_header_is_one_line(tmp_path, capsys, change, words):
    path = chat_model(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    refused(capsys, path, words)


def header(*fields):
    """Return a header with fields of the given keys, types and encoded values."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(
        struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
        for key, kind, value in fields)


def test_a_header_s_fields_are_read_once_and_only_chosen_texts_are_kept():
    words = struct.pack("<IQQ1sQ2s", 8, 2, 1, b"x", 2, b"yz")
    numbers = struct.pack("<IQ3h", 3, 3, -1, 2, 300)
    data = header((b"kept", 9, words), (b"other", 9, words), (b"numbers", 9, numbers),
                  (b"flag", 7, b"\1"), (b"real", 6, struct.pack("<f", -0.5)))
    reader = HeaderReader(data, 7)  # as many elements as there are
    found = reader.read_fields(lambda name: None, keep=("kept",))
    assert found.pop("numbers").tolist() == [-1, 2, 300]
    assert found == {"kept": ["x", "yz"], "flag": True, "real": -0.5} and reader.at == len(data)
    with pytest.raises(UserError, match="the arrays declare at least 7 elements; the limit is 6"):
        HeaderReader(data, 6).read_fields(lambda name: None)
    twice = header(*[(b"a", 4, struct.pack("<I", n)) for n in (1, 2)])
    with pytest.raises(UserError, match="field 'a' is declared twice"):
        HeaderReader(twice, 9).read_fields(lambda name: None)


def entry(data, name, kind=None, offset=None, columns=None):
    """Change a matrix's entry in the table of tensors."""
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    values = list(struct.unpack_from("<QQIQ", data, at))
    for place, value in ((0, columns), (2, kind), (3, offset)):
        values[place] = values[place] if value is None else value
    return data[:at] + struct.pack("<QQIQ", *values) + data[at + 28:]


def refused(capsys, path, words):
    capsys.readouterr()
    assert s.run_command(["generate", "Hi", "--model", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and path.name in lines[0], lines
    assert words in lines[0], lines[0]


def test_random_changes_of_the_header_raise_only_user_errors(tmp_path):
    """No change may allocate much more memory than the size of the file."""
    path = chat_model(tmp_path)
    data = path.read_bytes()
    end = data.index(b"output_norm.weight") + 60
    draw = np.random.default_rng(0)
    opened = 0
    for _ in range(300):
        changed = bytearray(data)
        for at in draw.integers(4, end, draw.integers(1, 4)):
            changed[at] = draw.integers(0, 256)
        path.write_bytes(changed)
        tracemalloc.start()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about unknown fields
                gguf_model.open_checkpoint(path)
            opened += 1
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error)
        finally:
            assert tracemalloc.get_traced_memory()[1] < 40 << 20
            tracemalloc.stop()
    assert 0 < opened < 300
