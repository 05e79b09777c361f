"""llama.cpp, out of the xllamacpp wheel, as an oracle: what it makes of a GGUF.

Run as a program in a process of its own, so that a crash of it fails one test:
``python -m tests.llama_cpp logits MODEL OUT TOKENS [ADAPTER SCALE]…`` writes float32 logits of the
last token of every prefix of TOKENS (numbers separated by commas), then of 16 that it chooses
itself; ``… embeddings MODEL OUT TOKENS`` writes the hidden state of every token;
``python -m tests.llama_cpp tokens MODELS OUT TEXTS`` writes, for every one of the models (a JSON
list of paths), the token ids of every text of a JSON file, with special tokens read and those added
that begin and end a text; only their vocabularies are loaded.
"""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf.metadata import Metadata, encode_metadata, text

ROOT = Path(__file__).parents[1]
_VOCABULARY_ONLY = 72  # bytes from the start of llama_model_params, the first of its truth values
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
    _program("logits", *words)
    return np.load(out)[: len(tokens)]


def greedy(model: Path, tokens: Sequence[int]) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Logits of a prompt, and the 16 likeliest tokens that follow it."""
    out = model.parent / "logits.npy"
    _program("logits", str(model), str(out), ",".join(map(str, tokens)))
    found = np.load(out)
    return found[: len(tokens)], [int(row.argmax()) for row in found[len(tokens) - 1 : -1]]


def embeddings(model: Path, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """Hidden states ``(len(tokens), width)`` of an encoder."""
    out = model.parent / "embeddings.npy"
    _program("embeddings", str(model), str(out), ",".join(map(str, tokens)))
    return np.load(out)


def tokens_of(model: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts by the vocabulary of a GGUF model."""
    return _tokens(model.parent, [model], texts)[0]


def tokens_by(
    vocabularies: Mapping[str, Metadata], texts: Sequence[str], folder: Path
) -> dict[str, list[list[int]]]:
    """Token ids of texts by vocabularies, as they would stand in a file."""
    paths = []
    for number, vocabulary in enumerate(vocabularies.values()):
        described = {"general.architecture": text("llama"), **vocabulary}
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(described))
        paths.append(folder / f"{number}.gguf")
        paths[-1].write_bytes(head + encode_metadata(described))
    return dict(zip(vocabularies, _tokens(folder, paths, texts), strict=True))


def _tokens(folder: Path, models: Sequence[Path], texts: Sequence[str]) -> list[list[list[int]]]:
    listed, source, out = (folder / f"{name}.json" for name in ("models", "texts", "tokens"))
    listed.write_text(json.dumps([str(model) for model in models]))
    source.write_text(json.dumps(texts))
    _program("tokens", str(listed), str(out), str(source))
    found: list[list[list[int]]] = json.loads(out.read_text())
    return found


def _program(*words: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.llama_cpp", *words], cwd=ROOT, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr.decode("utf-8", "replace")[-3000:]


def _library() -> Any:
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    [file] = Path(spec.origin).parent.glob("xllamacpp*.so")
    return ctypes.CDLL(str(file))


def _run(
    what: str, model: str, out: str, tokens: Sequence[int], adapters: Sequence[tuple[str, float]]
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
    if what == "embeddings":
        _embed(lib, loaded, context, out, tokens)
        return
    if adapters:
        held = [lib.llama_adapter_lora_init(loaded, path.encode()) for path, _ in adapters]
        assert all(held), "llama.cpp cannot load the adapter"
        pointers = (ctypes.c_void_p * len(held))(*held)
        scales = (ctypes.c_float * len(held))(*[scale for _, scale in adapters])
        assert lib.llama_set_adapters_lora(context, pointers, len(held), scales) == 0
    width = lib.llama_n_vocab(lib.llama_model_get_vocab(loaded))
    rows = []
    for at in range(len(tokens) + (0 if adapters else 16)):
        token = tokens[at] if at < len(tokens) else int(rows[-1].argmax())
        one = (ctypes.c_int32 * 1)(token)
        assert lib.llama_decode(context, lib.llama_batch_get_one(one, 1)) == 0
        pointer = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        rows.append(np.ctypeslib.as_array(pointer, (width,)).copy())
    np.save(out, np.stack(rows))


def _embed(lib: Any, loaded: Any, context: Any, out: str, tokens: Sequence[int]) -> None:
    lib.llama_set_embeddings.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    lib.llama_get_embeddings_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    lib.llama_get_embeddings_ith.restype = ctypes.c_void_p
    lib.llama_model_n_embd.argtypes = [ctypes.c_void_p]
    lib.llama_set_embeddings(context, True)
    width = lib.llama_model_n_embd(loaded)
    every = (ctypes.c_int32 * len(tokens))(*tokens)
    assert lib.llama_decode(context, lib.llama_batch_get_one(every, len(tokens))) == 0
    rows = []
    for at in range(len(tokens)):
        pointer = ctypes.cast(
            lib.llama_get_embeddings_ith(context, at), ctypes.POINTER(ctypes.c_float)
        )
        rows.append(np.ctypeslib.as_array(pointer, (width,)).copy())
    np.save(out, np.stack(rows))


def write_gguf(folder: Path, path: Path, *, vocabulary: bool = False) -> None:
    """Write a model as a float32 GGUF with our own exporter, without a vocabulary."""
    from exporters.gguf.export import GgufModel, Scheme
    from exporters.gguf.mixtures import find_mixture
    from exporters.gguf.write import write_file
    from mergekit_lite.checkpoint.safetensors import SafetensorsCheckpoint
    from mergekit_lite.merge.model import small_files_of

    checkpoint = SafetensorsCheckpoint(folder, folder.name)
    scheme = Scheme(find_mixture("f32"))
    try:
        model = GgufModel.convert(checkpoint, small_files_of(folder) if vocabulary else None)
        metadata = model.metadata(scheme.mixture)
        write_file(path, metadata, model.tensors, model.kinds(scheme))
    finally:
        checkpoint.close()


def _tokenize(models: Sequence[str], out: str, texts: Sequence[str]) -> None:
    lib = _library()
    lib.llama_model_default_params.restype = _Opaque
    for name in ("llama_model_load_from_file", "llama_model_get_vocab"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Opaque]
    lib.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    lib.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32,
        ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    lib.llama_backend_init()
    found = []
    for model in models:
        settings = lib.llama_model_default_params()
        flags = (ctypes.c_ubyte * 4).from_buffer(settings, _VOCABULARY_ONLY)
        assert list(flags) == [0, 0, 1, 0], "the structure has changed: these are its defaults"
        flags[0] = 1
        loaded = lib.llama_model_load_from_file(model.encode(), settings)
        assert loaded, f"llama.cpp cannot load {model}"
        vocabulary = lib.llama_model_get_vocab(loaded)
        found.append([_ids(lib, vocabulary, text) for text in texts])
    Path(out).write_text(json.dumps(found))


def _ids(lib: Any, vocabulary: Any, text: str) -> list[int]:
    raw = text.encode()
    room = (ctypes.c_int32 * (2 * len(raw) + 16))()
    count = lib.llama_tokenize(vocabulary, raw, len(raw), room, len(room), True, True)
    assert count >= 0, text
    return list(room[:count])


if __name__ == "__main__":
    _what, _model, _out, _words, *_rest = sys.argv[1:]
    if _what == "tokens":
        _tokenize(json.loads(Path(_model).read_text()), _out, json.loads(Path(_words).read_text()))
    else:
        _run(_what, _model, _out, [int(t) for t in _words.split(",")],
             [(p, float(s)) for p, s in zip(_rest[::2], _rest[1::2], strict=True)])  # fmt: skip
