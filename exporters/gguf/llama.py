"""llama.cpp, out of the xllamacpp wheel: the tokens and logits that it computes for a GGUF file.

The wheel's shared object exports the C interface of llama.cpp, reached here through ctypes. It runs
in a process of its own, so that a crash in it is an error message: ``python -m exporters.gguf.llama
MODEL REQUEST RESULT``. REQUEST is JSON: ``texts`` to be tokenized; ``tokens`` whose logits are
wanted, or None for those of the first text; ``windows``, of each of which the logits are wanted by
itself. RESULT is an npz.

Structures that llama.cpp passes by value are handed on as they come, in more room than they need.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lite.dtypes import Array
from mergekit_lite.errors import PackError
from mergekit_lite.kernels.blocks.ggml import shared_object

__all__ = ["Answer", "ask", "ask_windows", "version"]

_TIMEOUT = 1800


@dataclass(frozen=True)
class Answer:
    """What llama.cpp makes of a file.

    Attributes:
        tokens: Ids of each text, with the tokens that begin and end a text.
        logits: ``(tokens, vocabulary)`` float32 of the tokens that were asked for.
    """

    tokens: Sequence[Sequence[int]]
    logits: Array


def version() -> str:
    """The wheel's version."""
    from importlib.metadata import version as of

    return of("xllamacpp")


def ask(model: Path, texts: Sequence[str], tokens: Sequence[int] | None = None) -> Answer:
    """Load a file and let it tokenize texts and compute logits.

    Args:
        model: The file, or the first part of one that is split.
        texts: To be tokenized, special tokens read.
        tokens: Whose logits are wanted; those of the first text if None.

    Raises:
        PackError: llama.cpp cannot load or run it.
    """
    found = _asked(model, {"texts": list(texts), "tokens": tokens, "windows": []})
    ends = np.cumsum(found["counts"])[:-1]
    parts = [part.tolist() for part in np.split(found["tokens"], ends)]
    return Answer(parts if texts else [], found["logits"])


def ask_windows(model: Path, windows: Sequence[Sequence[int]]) -> tuple[Array, float]:
    """Let llama.cpp compute the logits of windows, each by itself.

    Args:
        model: The file, or the first part of one that is split.
        windows: Token ids, all of one length.

    Returns:
        ``(windows, tokens, vocabulary)`` float32, and the seconds that computing took.

    Raises:
        PackError: llama.cpp cannot load or run it.
    """
    asked = {"texts": [], "tokens": [], "windows": [list(window) for window in windows]}
    found = _asked(model, asked)
    return found["windows"], float(found["seconds"])


def _asked(model: Path, asked: dict[str, Any]) -> dict[str, Array]:
    """Run this module in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="pack-") as folder:
        request, result = Path(folder) / "request.json", Path(folder) / "result.npz"
        request.write_text(json.dumps(asked))
        words = [
            sys.executable,
            "-P",
            "-m",
            "exporters.gguf.llama",
            str(model),
            str(request),
            str(result),
        ]
        try:
            ran = subprocess.run(  # noqa: S603 (our own module)
                words, capture_output=True, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            raise PackError(f"llama.cpp took more than {_TIMEOUT // 60} minutes for {model.name}",
                            "Leave it out: --no-verify") from None  # fmt: skip
        if ran.returncode or not result.is_file():
            lines = ran.stderr.decode("utf-8", "replace").strip().splitlines()
            said = "; ".join(line.strip() for line in lines if "error" in line.lower())
            raise PackError(
                f"llama.cpp cannot run {model.name}: "
                f"{said[-400:] or f'it ended with code {ran.returncode}'}",
                "Please report this; --no-verify writes the file all the same.",
            )
        with np.load(result) as found:
            return dict(found)


class _Opaque(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 1024)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in
          ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")],
    ]  # fmt: skip


def _library() -> Any:
    lib = ctypes.CDLL(str(shared_object()))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    for name, result, *arguments in (
        ("llama_backend_init", None),
        ("llama_model_default_params", _Opaque),
        ("llama_context_default_params", _Opaque),
        ("llama_model_load_from_file", pointer, text, _Opaque),
        ("llama_init_from_model", pointer, pointer, _Opaque),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_n_vocab", number, pointer),
        ("llama_tokenize", number, pointer, text, number, pointer, number, ctypes.c_bool,
         ctypes.c_bool),
        ("llama_batch_get_one", _Batch, pointer, number),
        ("llama_decode", number, pointer, _Batch),
        ("llama_get_logits", pointer, pointer),
        ("llama_free", None, pointer),
    ):  # fmt: skip
        function = getattr(lib, str(name))
        function.restype, function.argtypes = result, arguments
    return lib


def _answer(model: str, request: dict[str, Any], result: str) -> None:
    lib = _library()
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    if not loaded:
        raise SystemExit("error: llama.cpp cannot load the file")
    vocabulary = lib.llama_model_get_vocab(loaded)
    texts = [_tokenize(lib, vocabulary, text) for text in request["texts"]]
    wanted = request["tokens"] if request["tokens"] is not None else texts[0]
    logits = _logits(lib, loaded, vocabulary, wanted)
    began = time.monotonic()
    windows = [_window(lib, loaded, vocabulary, ids) for ids in request["windows"]]
    np.savez(
        result,
        windows=np.array(windows, np.float32),
        seconds=np.array(time.monotonic() - began),
        counts=np.array([len(ids) for ids in texts], np.int64),
        tokens=np.array([i for ids in texts for i in ids], np.int64),
        logits=logits,
    )


def _tokenize(lib: Any, vocabulary: Any, text: str) -> list[int]:
    raw = text.encode()
    room = (ctypes.c_int32 * (len(raw) + 8))()
    count = lib.llama_tokenize(vocabulary, raw, len(raw), room, len(room), True, True)
    if count < 0:
        raise SystemExit("error: llama.cpp cannot tokenize a text")
    return list(room[:count])


def _logits(lib: Any, loaded: Any, vocabulary: Any, tokens: Sequence[int]) -> Array:
    width = lib.llama_n_vocab(vocabulary)
    if not tokens:
        return np.empty((0, width), np.float32)
    context = lib.llama_init_from_model(loaded, lib.llama_context_default_params())
    if not context:
        raise SystemExit("error: llama.cpp cannot make a context for the model")
    rows = np.empty((len(tokens), width), np.float32)
    for row, token in zip(rows, tokens, strict=True):
        one = (ctypes.c_int32 * 1)(token)
        if lib.llama_decode(context, lib.llama_batch_get_one(one, 1)) != 0:
            raise SystemExit("error: llama.cpp cannot compute the model")
        pointer = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        row[:] = np.ctypeslib.as_array(pointer, (width,))
    return rows


def _window(lib: Any, loaded: Any, vocabulary: Any, ids: Sequence[int]) -> Array:
    """Logits of every token of a window, in a context of its own."""
    width, count = lib.llama_n_vocab(vocabulary), len(ids)
    parameters = lib.llama_context_default_params()
    # The first three numbers: tokens of the context, of a batch, and of a batch in one go.
    ctypes.memmove(
        ctypes.byref(parameters), (ctypes.c_uint32 * 3)(count, count, min(count, 512)), 12
    )
    context = lib.llama_init_from_model(loaded, parameters)
    if not context:
        raise SystemExit("error: llama.cpp cannot make a context for the model")
    one = ctypes.pointer(ctypes.c_int32(0))
    arrays = (
        (ctypes.c_int32 * count)(*ids),
        (ctypes.c_int32 * count)(*range(count)),
        (ctypes.c_int32 * count)(*[1] * count),
        (ctypes.POINTER(ctypes.c_int32) * count)(*[one] * count),
        (ctypes.c_int8 * count)(*[1] * count),
    )
    tokens, positions, counts, sequences, wanted = (ctypes.addressof(a) for a in arrays)
    batch = _Batch(count, tokens, None, positions, counts, sequences, wanted)
    if lib.llama_decode(context, batch) != 0:
        raise SystemExit("error: llama.cpp cannot compute the model")
    pointer = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    rows: Array = np.ctypeslib.as_array(pointer, (count, width)).copy()
    lib.llama_free(context)
    return rows


if __name__ == "__main__":
    _answer(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3])
