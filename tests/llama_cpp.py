"""llama.cpp, out of the xllamacpp wheel, as an oracle: the logits of a GGUF with adapters on it.

Run as a program in a process of its own, so that a crash of it fails one test:
``python -m tests.llama_cpp MODEL OUT TOKENS [ADAPTER SCALE]…`` writes float32 logits of the last
token of every prefix of TOKENS (numbers separated by commas).
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
_FLASH_ATTENTION = 52  # bytes from the start of llama_context_params
_CACHE_TYPES = 104  # bytes from the start of llama_context_params to type_k and type_v


class _Opaque(ctypes.Structure):
    """A structure of llama.cpp that is passed on as it comes; larger than any of them."""

    _fields_ = [("bytes", ctypes.c_ubyte * 512)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    ]


def logits(
    model: Path, tokens: Sequence[int], adapters: Sequence[tuple[Path, float]] = ()
) -> np.ndarray[Any, Any]:
    """Logits ``(len(tokens), vocabulary)`` of a GGUF model."""
    out = model.parent / "logits.npy"
    words = [str(model), str(out), ",".join(map(str, tokens))]
    for path, scale in adapters:
        words += [str(path), str(scale)]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.llama_cpp", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return np.load(out)


def _library() -> Any:
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    [file] = Path(spec.origin).parent.glob("xllamacpp*.so")
    return ctypes.CDLL(str(file))


def _run(
    model: str, out: str, tokens: Sequence[int], adapters: Sequence[tuple[str, float]]
) -> None:
    lib = _library()
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(lib, name).restype = _Opaque
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_adapter_lora_init",
                 "llama_get_logits", "llama_model_get_vocab"):  # fmt: skip
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_batch_get_one.restype = _Batch
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Opaque]
    lib.llama_init_from_model.argtypes = [ctypes.c_void_p, _Opaque]
    lib.llama_adapter_lora_init.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    lib.llama_set_adapters_lora.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
    ]  # fmt: skip
    lib.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    lib.llama_get_logits.argtypes = [ctypes.c_void_p]
    lib.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    lib.llama_n_vocab.argtypes = [ctypes.c_void_p]
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    assert loaded, "llama.cpp cannot load the model"
    settings = lib.llama_context_default_params()
    kinds = (ctypes.c_int32 * 2).from_buffer(settings, _CACHE_TYPES)
    assert list(kinds) == [1, 1], "the structure has changed: these should be float16"
    kinds[:] = [0, 0]  # float32, so that nothing is rounded
    ctypes.c_int32.from_buffer(settings, _FLASH_ATTENTION).value = 0
    context = lib.llama_init_from_model(loaded, settings)
    assert context, "llama.cpp cannot make a context"
    if adapters:
        held = [lib.llama_adapter_lora_init(loaded, path.encode()) for path, _ in adapters]
        assert all(held), "llama.cpp cannot load the adapter"
        pointers = (ctypes.c_void_p * len(held))(*held)
        scales = (ctypes.c_float * len(held))(*[scale for _, scale in adapters])
        assert lib.llama_set_adapters_lora(context, pointers, len(held), scales) == 0
    width = lib.llama_n_vocab(lib.llama_model_get_vocab(loaded))
    rows = []
    for token in tokens:
        one = (ctypes.c_int32 * 1)(token)
        assert lib.llama_decode(context, lib.llama_batch_get_one(one, 1)) == 0
        pointer = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        rows.append(np.ctypeslib.as_array(pointer, (width,)).copy())
    np.save(out, np.stack(rows))


def write_gguf(folder: Path, path: Path) -> None:
    """Write a small Llama as a float32 GGUF without a vocabulary, straight with gguf-py."""
    import gguf

    from exporters.gguf.families import Naming
    from tests.adapters.models import tensors_of

    config = json.loads((folder / "config.json").read_text())
    naming = Naming(config, str(folder))
    writer = gguf.GGUFWriter(path, naming.family.architecture)
    head = config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or head)
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors_of(folder).items():
        writer.add_tensor(naming.name(name), naming.ordered(name, tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    _model, _out, _tokens, *_rest = sys.argv[1:]
    _run(_model, _out, [int(t) for t in _tokens.split(",")],
         [(p, float(s)) for p, s in zip(_rest[::2], _rest[1::2], strict=True)])  # fmt: skip
