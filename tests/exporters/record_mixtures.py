"""Records which types llama-quantize gives the tensors of many shapes of models.

``python -m tests.exporters.record_mixtures PATH_OF_LLAMA_QUANTIZE VERSION`` writes
``mixtures.json`` beside this file: for each model and mixture the types of its tensors, as runs of
one letter. Only headers are needed: files are written without data (sparse), and llama-quantize is
asked for its plan (``--dry-run``).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf.export import GgufModel, Scheme
from exporters.gguf.mixtures import MIXTURES, find_mixture
from exporters.gguf.write import lay_out
from mergekit_lite.checkpoint.protocol import Checkpoint, TensorReader, TensorSpec
from mergekit_lite.dtypes import DTYPES
from mergekit_lite.kernels.blocks.types import TYPES

RECORDED = Path(__file__).with_name("mixtures.json")
_SIZES = {"vocab_size": 512, "max_position_embeddings": 128}
_LLAMA = {**_SIZES, "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_LLAMA, "num_hidden_layers": 32, "num_key_value_heads": 8}),
    "llama, two share": ("Llama", {**_LLAMA, "num_hidden_layers": 28, "num_key_value_heads": 4}),
    "llama, four share": ("Llama", {**_LLAMA, "num_hidden_layers": 16, "num_key_value_heads": 2}),
    "llama, tied": ("Llama", {**_LLAMA, "num_hidden_layers": 18, "num_key_value_heads": 1,
                              "tie_word_embeddings": True}),
    "llama, 70B": ("Llama", {**_LLAMA, "num_hidden_layers": 80, "num_key_value_heads": 1}),
    "llama, 65B": ("Llama", {**_LLAMA, "num_hidden_layers": 80, "num_key_value_heads": 8}),
    "llama, odd rows": ("Llama", {**_LLAMA, "hidden_size": 288, "intermediate_size": 768,
                                  "num_hidden_layers": 9, "num_key_value_heads": 2}),
    "mixtral": ("Mixtral", {**_LLAMA, "num_hidden_layers": 32, "num_key_value_heads": 2,
                            "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {**_SIZES, "hidden_size": 896, "intermediate_size": 1216,
                        "num_attention_heads": 14, "num_key_value_heads": 2,
                        "num_hidden_layers": 24, "tie_word_embeddings": True}),
    "qwen2, 72B": ("Qwen2", {**_LLAMA, "num_hidden_layers": 80, "num_key_value_heads": 1}),
    "qwen2_moe": ("Qwen2Moe", {**_LLAMA, "num_hidden_layers": 24, "num_key_value_heads": 8,
                               "num_experts": 60, "num_experts_per_tok": 4,
                               "moe_intermediate_size": 256,
                               "shared_expert_intermediate_size": 512}),
    "gpt2": ("GPT2", {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 128,
                      "vocab_size": 512}),
    "falcon": ("Falcon", {**_SIZES, "hidden_size": 512, "num_attention_heads": 8,
                          "num_hidden_layers": 32}),
    "gemma": ("Gemma", {**_LLAMA, "num_hidden_layers": 18, "num_key_value_heads": 1,
                        "head_dim": 64}),
    "phi3": ("Phi3", {**_LLAMA, "num_hidden_layers": 32, "num_key_value_heads": 8,
                      "pad_token_id": 0}),
    "bert": ("Bert", {**_LLAMA, "num_hidden_layers": 12}),
}  # fmt: skip


class HeadersOnly(Checkpoint):
    """The tensors' names and shapes of a model that transformers would make."""

    def __init__(self, kind: str, keys: Mapping[str, Any]) -> None:
        import torch
        import transformers

        config = getattr(transformers, f"{kind}Config")(**keys)
        head = {"GPT2": "LMHeadModel", "Bert": "Model"}.get(kind, "ForCausalLM")
        with torch.device("meta"):
            model = getattr(transformers, kind + head)(config)
        tied = getattr(model, "all_tied_weights_keys", {})
        self.label, self.folder, self.config = kind, None, config.to_dict()
        self._shapes = {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if name not in tied
        }

    def names(self) -> Sequence[str]:
        return sorted(self._shapes)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(self._shapes[name], DTYPES["F32"])

    def open(self, name: str) -> TensorReader:
        raise NotImplementedError(name)


def gguf_model(name: str) -> GgufModel:
    """A model of the list under GGUF's names."""
    kind, keys = MODELS[name]
    return GgufModel.convert(HeadersOnly(kind, keys), None)


def write_headers(model: GgufModel, path: Path) -> None:
    """A float32 file without data."""
    scheme = Scheme(find_mixture("f32"))
    kinds = dict.fromkeys(model.names, TYPES["F32"])
    [shard] = lay_out(model.metadata(scheme.mixture), model.tensors, kinds, path.stem)
    with path.open("wb") as file:
        file.write(shard.prefix)
        file.truncate(shard.size)


def write_importance(model: GgufModel, path: Path) -> None:
    """An importance matrix of ones, in llama.cpp's older form."""
    entries = [
        (name, model.tensors.spec(name).columns * (shape[0] if len(shape) == 3 else 1))
        for name in model.names
        if len(shape := model.tensors.spec(name).shape) > 1
    ]
    with path.open("wb") as file:
        file.write(np.int32(len(entries)).tobytes())
        for name, count in entries:
            file.write(np.int32(len(name)).tobytes() + name.encode())
            file.write(np.array([1, count], np.int32).tobytes())
            file.write(np.ones(count, np.float32).tobytes())


def asked(program: str, file: Path, mixture: str, importance: Path | None) -> dict[str, str]:
    """Types by tensor, as llama-quantize says it would write them."""
    extra = [] if importance is None else ["--imatrix", str(importance)]
    ran = subprocess.run(
        [program, *extra, "--dry-run", str(file), str(file) + ".out", mixture],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    found = {}
    for line in (ran.stdout + ran.stderr).splitlines():
        match = re.match(r"\[ *\d+/ *\d+\] (\S+) .*type = +(\w+),.*?(?:\((\w+)\)\s*)?$", line)
        if match:
            found[match[1]] = (match[3] or match[2]).upper()
    return found


def by_role(names: Sequence[str]) -> list[str]:
    """Tensors of one role together, by layer: so runs of equal types are long."""
    parts = [(re.sub(r"^blk\.\d+\.", "", name), name) for name in names]
    layer = lambda name: int(re.sub(r"\D*(\d*).*", r"\1", name) or 0)  # noqa: E731
    return [name for _, name in sorted(parts, key=lambda part: (part[0], layer(part[1])))]


def packed(types: Mapping[str, str], order: Sequence[str]) -> str:
    """Types in an order of tensors, runs of equal ones counted: ``3*Q4_K Q6_K``."""
    runs = [(name, len(list(run))) for name, run in groupby(types[tensor] for tensor in order)]
    return " ".join(name if count == 1 else f"{count}*{name}" for name, count in runs)


def main() -> None:
    program, version = sys.argv[1:]
    tables: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            model = gguf_model(name)
            file, importance = Path(folder) / "m.gguf", Path(folder) / "m.dat"
            write_headers(model, file)
            write_importance(model, importance)
            order = by_role(list(model.names))
            tables[name] = {}
            for mixture in MIXTURES:
                if mixture in ("f32", "f16", "bf16"):
                    continue
                plain = asked(program, file, mixture, None)
                tables[name][mixture] = packed(plain, order)
                weighted = asked(program, file, mixture, importance)
                if weighted != plain:
                    tables[name][mixture + " with importance"] = packed(weighted, order)
            print(name, len(order))
    RECORDED.write_text(json.dumps({"llama-quantize": version, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
