"""GGUF model files: headers, tensors and dequantization.

The gguf package dequantizes each matrix in blocks of rows, and each block is cast directly into an
array of the target dtype. Two changes that llama.cpp's converter makes are reversed. For the
architecture "llama", the rows of the query and key weights are permuted back to Hugging Face's
order. For Gemma, the 1 that the converter adds to norm weights is subtracted.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxpersona.ckpts import gguf_config, gguf_header, names, tensorfile
from jaxpersona.ckpts.gguf_header import HeaderReader, TensorInfo
from jaxpersona.ckpts.shards import some
from jaxpersona.ckpts.tensorfile import Entry

from jaxpersona.errors import UserError
from jaxpersona.inputs import require_file
from jaxpersona.models.config import MAX_LAYERS, ModelConfig

SUFFIX = ".gguf"
TOKENIZER_ARRAYS = tuple(f"tokenizer.ggml.{key}" for key in
                         ("tokens", "scores", "token_type", "merges"))
ROPE_DIVISORS = "rope_freqs.weight"
_MAX_TENSORS = 32 * MAX_LAYERS  # maximum number of tensors; Gemma 3 has 13 per layer
# maximum total number of elements in the metadata arrays; Llama 4's tokenizer has 0.9 million
_MAX_ELEMENTS = 1 << 22
_MAX_PARTS = 1024
_BLOCK = 1 << 20  # approximate number of elements to dequantize at once
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_TOP = {names.EMBED: "token_embd.weight", names.HEAD: "output.weight",
        "model.norm.weight": "output_norm.weight"}
_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
_POST_NORMS = {"post_attention_layernorm": "post_attention_norm",
               "pre_feedforward_layernorm": "ffn_norm",
               "post_feedforward_layernorm": "post_ffw_norm"}


def gguf_name(name: str, post_norms: bool) -> str:
    """Return the GGUF name of a tensor.

    Args:
      name: the tensor's Hugging Face name.
      post_norms: whether the family normalizes attention and MLP outputs (`ModelConfig`).
    """
    if name in _TOP:
        return _TOP[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    stem, _, kind = rest.rpartition(".")
    table = _LAYER | _POST_NORMS if post_norms else _LAYER
    return f"blk.{layer}.{table[stem]}.{kind}"


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The quantization format, shape and location of a tensor in a GGUF file.

    Attributes:
      kind: the tensor's `gguf.GGMLQuantizationType`.
      shape: the shape in elements, in C order.
      block: the number of elements in a quantization block.
      block_bytes: the size of a block in bytes.
      entry: the location of the tensor's bytes, as an entry of dtype U8 [rows, bytes per row].
    """

    kind: Any
    shape: tuple[int, ...]
    block: int
    block_bytes: int
    entry: Entry


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The path, configuration, metadata (`fields`) and tensor source of a GGUF model."""

    path: pathlib.Path
    config: ModelConfig
    fields: Mapping[str, Any]
    source: GgufSource


def open_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Read and validate the headers of a GGUF model; return a `Checkpoint`.

    The only tensor that is read is `rope_freqs.weight` (if present), from which the RoPE scaling
    is computed.

    Args:
      path: the file, or the first of the parts `<name>-00001-of-0000N.gguf`.

    Raises:
      UserError: the package gguf is not installed, a file is missing, damaged or not supported, or
        its tensors do not match its configuration; the message names the file.
    """
    require_file(path)
    gguf = gguf_header.import_gguf(path)
    fields, tensors = _read_parts(path, gguf)
    try:
        divisors = None
        if ROPE_DIVISORS in tensors:
            divisors = _read_divisors(tensors[ROPE_DIVISORS], gguf)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        config = gguf_config.to_config(fields, shapes, divisors, path.name)
        source = GgufSource(tensors, config, fields[gguf_header.ARCHITECTURE_KEY], gguf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Checkpoint(path, config, fields, source)


def _read_divisors(tensor: Quantized, gguf: Any) -> np.ndarray:
    """Read the divisors of the rotary frequencies, [head_dim / 2] float32."""
    if len(tensor.shape) != 1 or not 1 <= tensor.shape[0] <= 1 << 16:
        raise UserError(f"{ROPE_DIVISORS} has shape {list(tensor.shape)}; it must be [head_dim/2]")
    with np.errstate(all="ignore"):
        return np.asarray(gguf.dequantize(tensorfile.read_slice(tensor.entry), tensor.kind)[0])


def _read_parts(path: pathlib.Path, gguf: Any) -> tuple[dict[str, Any], dict[str, Quantized]]:
    """Read the headers of all parts; return the first part's fields and all tensors by name."""
    fields, tensors = _read_part(path, gguf)
    count = fields.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= _MAX_PARTS:
        raise UserError(f"{path}: split.count is {count!r:.80}; it must be in 0…{_MAX_PARTS}")
    if count <= 1:  # `llama-gguf-split --merge` writes 0
        return fields, tensors
    matched = _PART.fullmatch(path.name)
    if matched is None or int(matched[3]) != count:
        raise UserError(f"{path}: the file is one of {count} parts, but its name does not end in "
                        f"-NNNNN-of-{count:05d}.gguf; rename the parts to "
                        f"NAME-00001-of-{count:05d}.gguf and so on")
    part_names = [f"{matched[1]}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    if path.name != part_names[0]:
        raise UserError(f"{path}: this is not the first of the {count} parts; give {part_names[0]}")
    if fields.get("split.no") != 0:
        raise UserError(f"{path}: split.no is {fields.get('split.no')!r:.40}, but the name is that "
                        f"of the first of {count} parts, whose split.no is 0; give each part the "
                        "name that it had when the model was split")
    for number, name in enumerate(part_names[1:], 1):
        part = path.with_name(name)
        require_file(part)
        of_part, more = _read_part(part, gguf)
        if of_part.get("split.no") != number or of_part.get("split.count") != count:
            raise UserError(f"{part}: split.no is {of_part.get('split.no')!r:.40} and split.count "
                            f"is {of_part.get('split.count')!r:.40}; expected {number} and {count}")
        if both := set(tensors) & set(more):
            raise UserError(f"{part}: contains {some(both)}, which another part also contains")
        tensors |= more
    declared = fields.get("split.tensors.count", len(tensors))
    if declared != len(tensors):
        raise UserError(f"{path}: the parts contain {len(tensors)} tensors; split.tensors.count is "
                        f"{declared!r:.40}")
    return fields, tensors


def _read_part(path: pathlib.Path, gguf: Any) -> tuple[dict[str, Any], dict[str, Quantized]]:
    """Read and check one file's header; return its fields and its tensors by name."""
    size = path.stat().st_size
    try:
        with gguf_header.mapped(path) as data:
            header = HeaderReader(data, _MAX_ELEMENTS)
            if header.version not in (2, 3):
                raise UserError(f"GGUF version {header.version} is not supported; the "
                                "supported versions are 2 and 3")
            if header.n_tensors > _MAX_TENSORS or header.n_fields > gguf_header.MAX_FIELDS:
                raise UserError(f"the header declares {header.n_tensors} tensors and "
                                f"{header.n_fields} fields; the limits are {_MAX_TENSORS} and "
                                f"{gguf_header.MAX_FIELDS}")
            fields = header.read_fields(gguf_config.check_architecture, keep=TOKENIZER_ARRAYS)
            infos = header.read_tensors()
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise UserError(f"general.alignment is {alignment!r:.40}; it must be a positive "
                            "integer up to 2²⁰")
        start = -(-header.at // alignment) * alignment
        return fields, _locate(path, infos, start, size, gguf)
    except (struct.error, OSError, UnicodeDecodeError):
        raise UserError(f"{path}: truncated or damaged, or not a GGUF file ({size} bytes)"
                        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _locate(path: pathlib.Path, infos: list[TensorInfo], start: int, size: int,
            gguf: Any) -> dict[str, Quantized]:
    """Check the tensors' types, shapes and byte ranges; return the tensors by name.

    Byte ranges must not overlap, because otherwise a small file could declare far more parameters
    than it contains.
    """
    tensors: dict[str, Quantized] = {}
    for info in infos:
        kind = _kind(info, gguf)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        columns = info.shape[-1] if info.shape else 1
        if columns % block:
            raise UserError(f"{info.name:.80}: the row length {columns} is not a multiple of "
                            f"{kind.name}'s block size {block}")
        rows, row_bytes = math.prod(info.shape[:-1]), columns // block * block_bytes
        at = start + info.offset
        if at + rows * row_bytes > size:
            raise UserError(f"truncated: {info.name:.80} ends at byte {at + rows * row_bytes}, but "
                            f"the file ends at byte {size}")
        if info.name in tensors:
            raise UserError(f"tensor {info.name:.80} is declared twice")
        entry = Entry(path, "U8", (rows, row_bytes), at, rows * row_bytes)
        tensors[info.name] = Quantized(kind, info.shape, block, block_bytes, entry)
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].entry.start):
        if tensor.entry.start < end:
            raise UserError(f"{name:.80} overlaps another tensor")
        end = tensor.entry.start + tensor.entry.size
    return tensors


def _kind(info: TensorInfo, gguf: Any) -> Any:
    """Return a tensor's `gguf.GGMLQuantizationType`; check that gguf can dequantize this type."""
    known = {int(kind): kind for kind in gguf.GGML_QUANT_SIZES}
    kind = known.get(info.kind)
    if kind is None or not _dequantizes(kind, gguf):
        shown = f"{info.kind}" if kind is None else kind.name
        supported = ", ".join(k.name for k in known.values() if _dequantizes(k, gguf))
        raise UserError(f"{info.name:.80} has type {shown}; it must be one of {supported}")
    return kind


def _dequantizes(kind: Any, gguf: Any) -> bool:
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


class GgufSource:
    """A `source.TensorSource` for the tensors of a GGUF model, by Hugging Face name."""

    def __init__(self, tensors: Mapping[str, Quantized], config: ModelConfig, architecture: str,
                 gguf: Any) -> None:
        """Check that the tensors match the configuration.

        Args:
          tensors: the model's tensors, by GGUF name.
          config: the model configuration.
          architecture: the GGUF architecture, such as "llama".
          gguf: the imported package gguf.

        Raises:
          UserError: tensors are missing or unexpected, or have the wrong shape.
        """
        self._gguf, self._head_dim = gguf, config.head_dim
        self._permuted = architecture == "llama"
        self._norm_offset = 1.0 if architecture in gguf_config.GEMMA else 0.0
        expected = {t.name: t for t in jax.tree.leaves(names.tensors(config))}
        stored = {name: gguf_name(name, config.post_norms) for name in expected}
        faults = []
        if missing := set(stored.values()) - set(tensors):
            faults.append(f"missing tensors: {some(missing)}")
        if extra := set(tensors) - set(stored.values()) - {ROPE_DIVISORS}:
            faults.append(f"unexpected tensors: {some(extra)}")
        faults += [f"{stored[name]} has shape {list(tensors[stored[name]].shape)}, expected "
                   f"{list(tensor.shape)}" for name, tensor in expected.items()
                   if stored[name] in tensors and tensors[stored[name]].shape != tensor.shape][:6]
        if faults:
            raise UserError("; ".join(faults))
        self._tensors = {name: tensors[stored[name]] for name in expected}

    def size(self, name: str) -> int:
        """Return the size of a tensor in the file, in bytes (see `TensorSource.size`)."""
        return self._tensors[name].entry.size

    def read(self, name: str, index: tuple[slice, ...] | None,
             dtype: np.dtype | None) -> np.ndarray:
        """Read and dequantize a tensor or a part of it (see `TensorSource.read`).

        From a matrix, only the quantization blocks that overlap `index` are read. If the rows of
        the matrix are permuted within heads, all rows of each selected head are read. If `dtype` is
        None, the result is float32.

        Raises:
          UserError: the file cannot be read, or was truncated after its header was read.
        """
        tensor = self._tensors[name]
        bounds = [s.indices(n)[:2] for s, n in zip(index or (), tensor.shape, strict=False)]
        bounds += [(0, n) for n in tensor.shape[len(bounds):]]
        out = tensorfile.aligned(tuple(stop - start for start, stop in bounds),
                                 dtype or np.dtype(np.float32))
        permuted = self._permuted and (".q_proj." in name or ".k_proj." in name)
        with np.errstate(all="ignore"):  # NaN and infinity are valid values here
            if len(bounds) == 1:
                values = self._dequantize(tensor, (0, 1), (0, tensor.shape[0]))[0]
                if permuted:
                    values = values[self._stored_rows(0, len(values))]
                if name.endswith("norm.weight"):
                    values = values - np.float32(self._norm_offset)
                np.copyto(out, values[slice(*bounds[0])], casting="unsafe")
                return out
            (first, last), columns = bounds
            unit = self._head_dim if permuted else 1  # number of rows that must be read together
            step = -(-_BLOCK // max(tensor.shape[1] * unit, 1)) * unit
            for start in range(first // unit * unit, last, step):
                stop = min(start + step, -(-last // unit) * unit)
                values = self._dequantize(tensor, (start, stop), columns)
                low, high = max(start, first), min(stop, last)
                if permuted:
                    values = values[self._stored_rows(low, high) - start]
                np.copyto(out[low - first : high - first], values, casting="unsafe")
        return out

    def blocks(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Read a matrix of type Q8_0 without dequantizing it; return None for any other tensor.

        Returns:
          The values, [rows, columns] int8, and the scales, [rows, columns / 32] float16, one for
          each block of 32 columns in a row. The rows are in Hugging Face's order.

        Raises:
          UserError: the file cannot be read, or was truncated after its header was read.
        """
        tensor = self._tensors[name]
        if tensor.kind.name != "Q8_0" or len(tensor.shape) != 2:
            return None
        rows, columns = tensor.shape
        stored = tensorfile.read_slice(tensor.entry).reshape(rows, -1, tensor.block_bytes)
        value = tensorfile.aligned((rows, columns), np.dtype(np.int8))
        scale = tensorfile.aligned(stored.shape[:2], np.dtype(np.float16))
        permuted = self._permuted and (".q_proj." in name or ".k_proj." in name)
        order = self._stored_rows(0, rows) if permuted else slice(None)
        value[:] = stored[order, :, 2:].view(np.int8).reshape(rows, columns)
        scale[:] = np.ascontiguousarray(stored[order, :, :2]).view("<f2")[..., 0]
        return value, scale

    def _stored_rows(self, first: int, last: int) -> np.ndarray:
        """Return the file's row indices for rows `first` to `last` − 1 of the Hugging Face tensor.

        In the file, the two halves of each head's rows are interleaved.
        """
        row = np.arange(first, last)
        head, within = np.divmod(row, self._head_dim)
        half, at = np.divmod(within, self._head_dim // 2)
        return head * self._head_dim + 2 * at + half

    def _dequantize(self, tensor: Quantized, rows: tuple[int, int],
                    columns: tuple[int, int]) -> np.ndarray:
        """Return a part of a tensor as float32, reading only the blocks that contain it."""
        first = columns[0] // tensor.block
        last = -(-columns[1] // tensor.block)
        part = tensorfile.read_slice(tensor.entry, (
            slice(*rows), slice(first * tensor.block_bytes, last * tensor.block_bytes)))
        values = self._gguf.dequantize(part, tensor.kind)
        offset = columns[0] - first * tensor.block
        return values[:, offset : offset + columns[1] - columns[0]]
