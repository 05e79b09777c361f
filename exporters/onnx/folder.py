"""The small files beside a graph: what runtimes look for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from exporters.onnx.graph import Cache
from mergekit_lite.errors import FileFormatError
from mergekit_lite.merge.config import to_json

__all__ = ["genai_config", "small_files"]

_LEFT_OUT = ("quantization_config", "torch_dtype")


def small_files(
    files: Mapping[str, bytes], config: Mapping[str, Any], stem: str, chunks: int
) -> dict[str, bytes]:
    """Config, tokenizer and templates, as runtimes of ONNX read them.

    transformers.js is told in ``config.json`` how many files of weights there are, and finds a chat
    template in ``tokenizer_config.json`` alone.

    Args:
        files: Of the model.
        config: Its config.json.
        stem: Name of the graph without ``.onnx``.
        chunks: Number of files of weights.
    """
    found = {name: content for name, content in files.items() if name != "README.md"}
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    stated = kept.get("transformers.js_config")
    kept["transformers.js_config"] = {
        **(stated if isinstance(stated, dict) else {}),
        "use_external_data_format": {f"{stem}.onnx": chunks},
    }
    found["config.json"] = to_json(kept)
    if "tokenizer.json" in found:
        settings = _object(found, "tokenizer_config.json")
        if "chat_template.jinja" in found and "chat_template" not in settings:
            settings["chat_template"] = _text(found, "chat_template.jinja")
        _as_before(settings)
        found["tokenizer_config.json"] = to_json(settings)
    return found


def _as_before(settings: dict[str, Any]) -> None:
    """Say what transformers 5 says in a new way as transformers 4 reads it; both know the old way.

    optimum's runtime for ONNX comes with transformers 4, which does not read a tokenizer otherwise.
    """
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        extra = settings.pop("extra_special_tokens")
        settings.setdefault("additional_special_tokens", extra)


def genai_config(
    config: Any,
    files: Mapping[str, bytes],
    cache: Cache,
    names: tuple[list[str], list[str]],
    path: str,
) -> bytes:
    """``genai_config.json``, by which onnxruntime-genai runs a decoder.

    Args:
        config: transformers' configuration of the model, which knows sizes by one name where files
            have several.
        files: Its small files.
        cache: Shapes of its cache.
        names: Inputs and outputs of the graph.
        path: Of the graph, below the folder.
    """
    stated = _object(files, "generation_config.json")

    def either(key: str, default: Any) -> Any:
        found = stated.get(key)
        found = getattr(config, key, None) if found is None else found
        return default if found is None else found

    heads, size, _ = cache.layers[0]
    inputs, _ = names
    known = {"input_ids", "attention_mask", "position_ids"}
    end = either("eos_token_id", [])
    # genai refuses a model with an ending token outside of the vocabulary.
    ends = [token for token in (end if isinstance(end, list) else [end])
            if isinstance(token, int) and 0 <= token < config.vocab_size]  # fmt: skip
    first_end = ends[0] if ends else 0
    lengths = (getattr(config, key, None) for key in ("max_position_embeddings", "max_seq_len"))
    length = next((size for size in lengths if isinstance(size, int) and size > 0), 2048)
    return to_json({
        "model": {
            "bos_token_id": either("bos_token_id", first_end),
            "context_length": length,
            "decoder": {
                "filename": path,
                "head_size": size,
                "hidden_size": config.hidden_size,
                "inputs": {
                    **{name: name for name in inputs if name in known},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": len(cache.layers),
                "num_key_value_heads": heads,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            },
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": either("pad_token_id", first_end),
            "type": "decoder",
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": bool(stated.get("do_sample", False)),
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": _number(stated, "repetition_penalty", 1.0),
            "temperature": _number(stated, "temperature", 1.0),
            "top_k": int(_number(stated, "top_k", 50)),
            "top_p": _number(stated, "top_p", 1.0),
        },
    })  # fmt: skip


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A small file that holds one JSON object; empty where there is none.

    Raises:
        FileFormatError: It holds something else.
    """
    try:
        found = json.loads(files.get(name, b"{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FileFormatError(f"{name}: is not a JSON object", "Correct it, or copy it again.")
    return found


def _text(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError:
        raise FileFormatError(f"{name}: is not text in UTF-8", "Copy it again.") from None


def _number(stated: Mapping[str, Any], key: str, usual: float) -> float:
    found = stated.get(key)
    return float(found) if isinstance(found, (int, float)) and found else usual
