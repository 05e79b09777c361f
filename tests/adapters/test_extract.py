"""Adapters extracted from fine-tunes, against numpy's SVD, in PEFT and in our own merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.adapters.models import load_base, save_base, tensors_of, worst
from tests.conftest import digests


def _finetune(base: Path, folder: Path, *, only: str = "", scale: float = 0.02) -> Path:
    """A fine-tune whose changes have falling singular values, as real ones have."""
    generator = torch.Generator().manual_seed(3)
    model = load_base(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only not in name:
                continue
            if parameter.ndim == 2:
                rank = min(parameter.shape)
                left = torch.randn(parameter.shape[0], rank, generator=generator)
                right = torch.randn(rank, parameter.shape[1], generator=generator)
                falling = torch.logspace(0, -3, rank)
                parameter.add_((left * falling) @ right * scale)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "keys", "only"),
    [
        ("llama", {}, ""),
        ("llama", {"attention_bias": True}, ""),
        ("llama", {"tie_word_embeddings": True}, ""),
        ("gpt2", {}, ""),
        ("gpt2", {}, ".h."),
    ],
)
def test_full_rank_gives_the_finetune(
    pack: Callable, tmp_path: Path, family: str, keys: dict[str, Any], only: str
) -> None:
    """In PEFT (logits) and in our merge (weights), within 1e-5."""
    base = save_base(tmp_path / "base", family, **keys)
    tuned = _finetune(base, tmp_path / "tuned", only=only)
    ran = pack("extract", tuned, "--base", base, "--energy", 1, "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["energy"] == pytest.approx(1.0, abs=1e-9)
    _check_gives(pack, tmp_path / "out", base, tuned, tmp_path / "merged")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("saved", ["factors", "whole"])
def test_a_tied_embedding_stays_tied(
    pack: Callable, tmp_path: Path, family: str, saved: str
) -> None:
    """In PEFT the head gets what the embedding gets; merged, there is one tensor again."""
    base = save_base(tmp_path / "base", family, tie_word_embeddings=True)
    name = {"llama": "embed_tokens", "gpt2": "wte"}[family]
    tuned = _finetune(base, tmp_path / "tuned", only=name)
    share = {"factors": 0.0, "whole": 1.0}[saved]
    rank = {"factors": 10_000, "whole": 2}[saved]
    ran = pack("extract", tuned, "--base", base, "--rank", rank, "--save-below", share,
               "-o", tmp_path / "out")  # fmt: skip
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["modules_to_save"] is None) == (saved == "factors")
    _check_gives(pack, tmp_path / "out", base, tuned, tmp_path / "merged")
    assert tensors_of(tmp_path / "merged").keys() == tensors_of(base).keys()


def _check_gives(pack: Callable, adapter: Path, base: Path, tuned: Path, merged: Path) -> None:
    """An adapter on its base is the fine-tune: weights as we merge it, logits in PEFT."""
    ran = pack("merge", "adapter", f"{base}+{adapter}", "-o", merged, "--dtype", "float32", "-q")
    assert ran.code == 0, ran.err
    assert worst(tensors_of(merged), tensors_of(tuned)) <= 1e-5
    tokens = torch.arange(1, 75).reshape(2, 37)
    with torch.no_grad():
        expected = load_base(tuned)(tokens).logits
        beside = PeftModel.from_pretrained(load_base(base), adapter).eval()(tokens).logits
    assert (beside - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_reported_energy_is_the_measured_one(pack: Callable, tmp_path: Path, rank: int) -> None:
    """Per module: what numpy's SVD says is possible, and what the written factors keep."""
    base = save_base(tmp_path / "base", "llama")
    tuned = _finetune(base, tmp_path / "tuned", only="proj")
    ran = pack("extract", tuned, "--base", base, "--rank", rank, "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    before, after = tensors_of(base), tensors_of(tuned)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kept = total = 0.0
    for path, module in said["modules"].items():
        delta = (after[f"{path}.weight"] - before[f"{path}.weight"]).double().numpy()
        key = f"base_model.model.{path}.lora"
        low = (factors[f"{key}_B.weight"].double() @ factors[f"{key}_A.weight"].double()).numpy()
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        measured = 1 - ((delta - low) ** 2).sum() / squares.sum()
        assert module["rank"] == rank
        assert module["energy"] == pytest.approx(measured, abs=1e-6)
        assert module["energy"] == pytest.approx(squares[:rank].sum() / squares.sum(), abs=1e-6)
        kept += squares[:rank].sum()
        total += squares.sum()
    assert len(said["modules"]) == 21
    assert said["energy"] == pytest.approx(kept / total, abs=1e-6)


def test_randomised_factors_are_as_good_as_exact_ones() -> None:
    """For a rank far below full, on a matrix whose singular values fall slowly."""
    from mergekit_lite.adapters.factor import Target, factor_matrix

    random = np.random.default_rng(0)
    u = np.linalg.qr(random.standard_normal((700, 700)))[0]
    v = np.linalg.qr(random.standard_normal((900, 700)))[0]
    values = 1.0 / np.sqrt(np.arange(1, 701))
    matrix = (u * values) @ v.T
    for turned in (matrix, matrix.T):
        found = factor_matrix(turned, Target(rank=32))
        best = (values[:32] ** 2).sum() / (values**2).sum()
        assert found.rank == 32
        assert found.kept == pytest.approx(best, abs=1e-4)
        lost = np.linalg.norm(turned - found.b.astype(float) @ found.a) ** 2
        assert 1 - lost / (values**2).sum() == pytest.approx(found.kept, abs=1e-6)
        again = factor_matrix(turned, Target(rank=32))
        assert (again.a == found.a).all()


def test_energy_chooses_ranks(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    tuned = _finetune(base, tmp_path / "tuned", only="proj")
    ran = pack("extract", tuned, "--base", base, "--energy", 0.9, "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    before, after = tensors_of(base), tensors_of(tuned)
    for path, module in json.loads(ran.out)["modules"].items():
        delta = (after[f"{path}.weight"] - before[f"{path}.weight"]).double().numpy()
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        share = np.cumsum(squares) / squares.sum()
        assert module["rank"] == int(np.argmax(share >= 0.9)) + 1
    model = PeftModel.from_pretrained(load_base(base), tmp_path / "out")
    ranks = {m["rank"] for m in json.loads(ran.out)["modules"].values()}
    assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n} == ranks


def test_unchanged_modules_are_left_out(pack: Callable, tmp_path: Path) -> None:
    """One layer's change: names that mean only it, nothing saved whole."""
    base = save_base(tmp_path / "base", "llama")
    tuned = _finetune(base, tmp_path / "tuned", only="layers.1.self_attn.q_proj")
    ran = pack("extract", tuned, "--base", base, "--rank", 32, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert config["modules_to_save"] is None
    again = pack("extract", tuned, "--base", base, "--rank", 32, "-o", tmp_path / "again", "-q")
    assert again.code == 0
    one, other = digests(tmp_path / "out"), digests(tmp_path / "again")
    assert one["adapter_model.safetensors"] == other["adapter_model.safetensors"]


def test_equal_models(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    ran = pack("extract", base, "--base", base, "--rank", 4, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "changes nothing" in ran.err
    assert not (tmp_path / "out").exists()


def test_another_vocabulary(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    other = save_base(tmp_path / "other", "llama", vocab_size=96)
    ran = pack("extract", other, "--base", base, "--rank", 4, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "vocabularies differ" in ran.err
    deeper = save_base(tmp_path / "deeper", "llama", num_hidden_layers=4)
    ran = pack("extract", deeper, "--base", base, "--rank", 4, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "'model.layers.3.input_layernorm.weight' is in" in ran.err


def test_a_broken_finetune(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    tuned = _finetune(base, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    ran = pack("extract", tuned, "--base", base, "--rank", 4, "-o", tmp_path / "out")
    assert ran.code == 1
    assert "'model.layers.1.mlp.up_proj.weight' holds NaN" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--rank", 0], ["--energy", 2], ["--dtype", "int8"]])
def test_wrong_usage(pack: Callable, tmp_path: Path, words: list[object]) -> None:
    more = ["--rank", 4] if "--dtype" in words else []
    ran = pack("extract", tmp_path, "--base", tmp_path, *words, *more)
    assert ran.code == 2
