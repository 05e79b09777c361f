"""Random Llama checkpoints of a given shape, written as a stream.

Speed and memory of a merge depend on the shapes and on the spread of the deltas, not on what a
model has learned, so a random base with noisy copies stands in for a real family: weights of
standard deviation 0.02, norms around 1, and fine-tunes whose deltas have the size that a short
fine-tuning leaves behind (about a tenth of the weights). The bytes follow from the seed alone.
"""

import contextlib
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.tokenizer import write_tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
Dtype = Literal["BF16", "F32"]

WEIGHT_SIGMA = 0.02
# Standard deviation of the fine-tunes' deltas, one per fine-tune.
DELTA_SIGMAS = (2e-3, 3e-3, 4e-3)
NAMES = ("base", "tune-1", "tune-2", "tune-3")
FILE = "model.safetensors"
_MARKER = "benchmark.json"
_BLOCK = 1 << 19  # elements drawn at a time, so that memory stays small


@dataclass(frozen=True)
class LlamaShape:
    """The sizes that make up a Llama; the defaults are those of TinyLlama-1.1B."""

    hidden: int = 2048
    layers: int = 22
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name to shape, `(out_features, in_features)`, in alphabetical order."""
        kv = self.hidden // self.heads * self.kv_heads
        layer = {
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "lm_head.weight": (self.vocabulary, self.hidden),
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for number in range(self.layers):
            shapes |= {f"model.layers.{number}.{name}": size for name, size in layer.items()}
        return dict(sorted(shapes.items()))

    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(math.prod(size) for size in self.tensors().values())

    def config(self, dtype: Dtype) -> dict[str, object]:
        """Return the content of `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": WEIGHT_SIGMA,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16" if dtype == "BF16" else "float32",
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }


TINYLLAMA = LlamaShape()
TINY = LlamaShape(hidden=256, layers=3, intermediate=704, heads=8, kv_heads=2, vocabulary=2000)


def encode_bf16(values: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even.

    Args:
        values: Finite float32 of any shape.

    Returns:
        The bfloat16 bit patterns as uint16, of the same shape.
    """
    bits = values.view(np.uint32)
    carry = (bits >> np.uint32(16)) & np.uint32(1)
    carry += np.uint32(0x7FFF)
    carry += bits
    return (carry >> np.uint32(16)).astype(np.uint16)


def decode_bf16(bits: Array) -> Array:
    """Widen bfloat16 bit patterns (uint16) to float32 of the same shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _header(shapes: dict[str, tuple[int, ...]], dtype: Dtype) -> bytes:
    width = 2 if dtype == "BF16" else 4
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in shapes.items():
        stop = start + width * math.prod(size)
        entries[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensors(file: Path, tensors: dict[str, Array]) -> None:
    """Write float32 tensors into one file."""
    ordered = dict(sorted(tensors.items()))
    with file.open("wb") as target:
        target.write(_header({name: value.shape for name, value in ordered.items()}, "F32"))
        for value in ordered.values():
            target.write(value.tobytes())


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Read a safetensors header.

    Args:
        file: A `.safetensors` file.

    Returns:
        The offset of the first tensor's bytes in the file, and name to entry (`dtype`, `shape`,
        `data_offsets`) without `__metadata__`.
    """
    with file.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        entries = json.loads(source.read(length))
    entries.pop("__metadata__", None)
    return 8 + length, entries


def _random(seed: int, model: str, tensor: str) -> np.random.Generator:
    key = zlib.crc32(f"{model}/{tensor}".encode())
    return np.random.Generator(np.random.SFC64([seed, key]))


def _blocks(
    seed: int, name: str, elements: int, dtype: Dtype
) -> Iterator[tuple[Array, list[Array]]]:
    """Yield a tensor's storage bits block by block: the base's, and one for each fine-tune."""
    base_random = _random(seed, NAMES[0], name)
    tunes = [(_random(seed, model, name), sigma) for model, sigma in _tunes()]
    centre = np.float32(1 if name.endswith("norm.weight") else 0)
    for start in range(0, elements, _BLOCK):
        count = min(_BLOCK, elements - start)
        values = base_random.standard_normal(count, dtype=np.float32)
        values *= np.float32(WEIGHT_SIGMA)
        values += centre
        stored = encode_bf16(values) if dtype == "BF16" else values
        exact = decode_bf16(stored) if dtype == "BF16" else stored
        noisy = []
        for random, sigma in tunes:
            tuned = random.standard_normal(count, dtype=np.float32)
            tuned *= np.float32(sigma)
            tuned += exact
            noisy.append(encode_bf16(tuned) if dtype == "BF16" else tuned)
        yield stored, noisy


def _tunes() -> list[tuple[str, float]]:
    return list(zip(NAMES[1:], DELTA_SIGMAS, strict=True))


def _folders(root: Path, want: dict[str, object], fill: Callable[[Path], None]) -> dict[str, Path]:
    """Return the family's folders under `root`, filling them unless they are already complete."""
    marker = root / _MARKER
    if not marker.exists() or json.loads(marker.read_text()) != want:
        partial = root.with_name(root.name + ".partial")
        for stale in (root, partial):
            shutil.rmtree(stale, ignore_errors=True)
        for name in NAMES:
            (partial / name).mkdir(parents=True)
        fill(partial)
        (partial / _MARKER).write_text(json.dumps(want, indent=1) + "\n")
        partial.rename(root)
    return {name: root / name for name in NAMES}


def _write_small_files(folder: Path, shape: LlamaShape, dtype: Dtype) -> None:
    text = json.dumps(shape.config(dtype), indent=2) + "\n"
    (folder / "config.json").write_text(text)
    write_tokenizer(folder, shape.vocabulary)


def _require_space(root: Path, needed: int) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root.parent).free
    if free < needed:
        raise SystemExit(
            f"{root.name} needs {needed / 1e9:.1f} GB of free disk, {free / 1e9:.1f} GB are free"
        )


def make_family(root: Path, shape: LlamaShape, dtype: Dtype, seed: int = 0) -> dict[str, Path]:
    """Write a base and three fine-tunes, or find them where an earlier run wrote them.

    Args:
        root: Folder that will hold one folder per model.
        shape: Sizes of the models.
        dtype: Storage type.
        seed: The same seed gives the same bytes.

    Returns:
        Model name (`base`, `tune-1` …) to folder.

    Raises:
        SystemExit: Too little free disk for the models and one merged output.
    """
    shapes = shape.tensors()

    def fill(partial: Path) -> None:
        _require_space(root, (len(NAMES) + 1) * shape.parameters() * (2 if dtype == "BF16" else 4))
        with contextlib.ExitStack() as stack:
            files = []
            for name in NAMES:
                _write_small_files(partial / name, shape, dtype)
                file = stack.enter_context((partial / name / FILE).open("wb"))
                file.write(_header(shapes, dtype))
                files.append(file)
            for name, size in shapes.items():
                for base, noisy in _blocks(seed, name, math.prod(size), dtype):
                    for file, block in zip(files, [base, *noisy], strict=True):
                        file.write(block.data)

    want: dict[str, object] = {"shape": asdict(shape), "dtype": dtype, "seed": seed}
    return _folders(root, want, fill)


def repeat_layers(source: Path, root: Path, shape: LlamaShape, times: int) -> dict[str, Path]:
    """Write a deeper family whose layers are those of a bfloat16 family, repeated.

    Args:
        source: Root of a family that `make_family` wrote with `shape`.
        root: Folder for the deeper family.
        shape: Sizes of the source family.
        times: How many times deeper.

    Returns:
        Model name to folder.

    Raises:
        SystemExit: Too little free disk for the models and one merged output.
    """
    deep = LlamaShape(**(asdict(shape) | {"layers": shape.layers * times}))
    shapes = deep.tensors()

    def origin(name: str) -> str:
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) % shape.layers)
        return ".".join(parts)

    def fill(partial: Path) -> None:
        _require_space(root, (len(NAMES) + 1) * deep.parameters() * 2)
        for model in NAMES:
            _write_small_files(partial / model, deep, "BF16")
            start, entries = read_header(source / model / FILE)
            with (
                (source / model / FILE).open("rb") as reader,
                (partial / model / FILE).open("wb") as writer,
            ):
                writer.write(_header(shapes, "BF16"))
                writer.flush()
                for name in shapes:
                    first, stop = entries[origin(name)]["data_offsets"]
                    _copy(reader.fileno(), writer.fileno(), start + first, stop - first)

    want: dict[str, object] = {"shape": asdict(deep), "repeated": shape.layers}
    return _folders(root, want, fill)


def _copy(source: int, target: int, offset: int, count: int) -> None:
    """Append `count` bytes from `offset` of one file to another."""
    while count:
        moved = os.sendfile(target, source, offset, count)
        if not moved:
            raise EOFError(f"{count} bytes short at offset {offset}")
        offset += moved
        count -= moved
