"""Every type of adapter that the installed PEFT knows: merged as PEFT merges it, or refused."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from peft import PeftType, PromptTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from mergekit_lite.adapters.types import MERGED, REFUSED
from tests.adapters.models import load_base, peft_merged, randomise, save_base, tensors_of, worst

_SOME = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
_SOME["mixtral"] = ["q_proj", "o_proj"]

KEYS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 6, "target_r": 4},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "BEFT": {"target_modules": ["q_proj", "v_proj"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 50},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 4},
    "PSOFT": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"num_vectors": 16, "vector_length": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 50},
}
_SCALED = {
    "llama": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    "mixtral": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
}
_EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "mixtral": "embed_tokens"}

BY_LINEAR_ONLY = frozenset({
    "ADAMSS", "BEFT", "BOFT", "C3A", "DELORA", "GLORA", "HRA", "LOHA", "LOKR", "MISS", "OFT",
    "PEANUT", "PSOFT", "ROAD", "SHIRA", "SUPERTUNING",
})  # fmt: skip
"""Types that PEFT does not put on Conv1D layers."""


def _config(kind: str, family: str) -> Any:
    keys = {"target_modules": _SOME[family], **KEYS.get(kind, {})}
    if kind == "IA3":
        keys = _SCALED[family]
    if kind == "BEFT" and family == "gpt2":
        keys = {"target_modules": _SOME[family]}
    if kind == "LN_TUNING":
        norms = {"gpt2": ["ln_1", "ln_f"], "mixtral": ["input_layernorm", "norm"]}
        keys = {"target_modules": norms[family]} if family in norms else {}
    if kind == "TRAINABLE_TOKENS":
        keys = {"token_indices": [1, 5, 60], "target_modules": [_EMBEDDING[family]]}
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]](task_type="CAUSAL_LM", **keys)


def _bases(family: str) -> dict[str, Any]:
    return {"attention_bias": True} if family == "llama" else {}


def test_no_type_is_missing() -> None:
    """The table is that of the installed PEFT, no more and no less."""
    assert {kind.name for kind in PeftType} == MERGED.keys() | REFUSED.keys()
    assert not MERGED.keys() & REFUSED.keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", sorted(MERGED.keys() - {"LORA"}))
def test_merged_as_peft_does(
    pack: Callable, tmp_path: Path, kind: str, family: str, record_property: Callable
) -> None:
    """Largest difference at most 1e-5 of each tensor's largest value, in float32."""
    record_property("peft", f"{kind}\t{family}\t-\tfailed")
    if kind == "ADAMSS" and find_spec("sklearn") is None:
        record_property("peft", f"{kind}\t{family}\tnot installed\tneeds scikit-learn")
        pytest.skip("AdaMSS needs scikit-learn")
    base = save_base(tmp_path / "base", family, **_bases(family))
    try:
        model = get_peft_model(load_base(base), _config(kind, family))
        model.peft_config["default"].base_model_name_or_path = str(base)
        randomise(model, scale=0.05)
        model.save_pretrained(tmp_path / "adapter")
        theirs = peft_merged(base, tmp_path / "adapter", tmp_path / "theirs")
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        without_bias = (kind, family) == ("BEFT", "mixtral") and "no bias" in reason
        assert without_bias or (family == "gpt2" and kind in BY_LINEAR_ONLY), reason
        record_property("peft", f"{kind}\t{family}\tnot by PEFT\t{reason[:60]}")
        return
    if (kind, family) == ("OSF", "gpt2"):  # PEFT leaves Conv1D as it is, without a word
        record_property("peft", f"{kind}\t{family}\tnot by PEFT\tpasses over Conv1D layers")
        return
    ran = pack(
        "merge", "adapter", f"{base}+{tmp_path}/adapter", "-o", tmp_path / "ours", "--dtype",
        "float32", "-q",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    error = worst(tensors_of(tmp_path / "ours"), theirs)
    record_property("peft", f"{kind}\t{family}\tmerged\t{error:.1e}")
    assert error <= 1e-5
    before = tensors_of(base)
    assert any((theirs[n] - before[n]).abs().max() > 1e-4 for n in before if n in theirs)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_refused_by_name(
    pack: Callable, tmp_path: Path, kind: str, record_property: Callable
) -> None:
    """The message names the type, says why, and what works instead."""
    base = save_base(tmp_path / "base", "llama")
    model = get_peft_model(
        load_base(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("PROMPT_TUNING", kind))
    ran = pack("merge", "adapter", f"{base}+{tmp_path}/adapter", "-o", tmp_path / "out")
    assert ran.code == 1
    assert kind in ran.err
    assert REFUSED[kind] in ran.err
    assert "pack adapters" in ran.err
    assert not (tmp_path / "out").exists()
    record_property("peft", f"{kind}\tall\trefused\t{REFUSED[kind]}")
