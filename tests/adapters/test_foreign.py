"""Adapters that PEFT's layers merge: their options, what they carry of the base, their memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from mergekit_lite.adapters.foreign import ForeignAdapter
from mergekit_lite.adapters.lending import Lender
from mergekit_lite.adapters.locate import open_model
from mergekit_lite.adapters.types import MERGED
from mergekit_lite.checkpoint.safetensors import SafetensorsFile
from tests.adapters.models import load_base, peft_merged, randomise, save_base, tensors_of, worst
from tests.adapters.test_every_type import KEYS

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
QV = {"target_modules": ["q_proj", "v_proj"]}
C_ATTN = {"target_modules": ["c_attn"]}
BIASED = {"attention_bias": True}
TIED = {"tie_word_embeddings": True}


def _save(folder: Path, model: Any, base: Path, kind: str, seed: int = 1, **keys: Any) -> Path:
    keys = {"task_type": "CAUSAL_LM", **keys}
    model = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]](**keys))
    model.peft_config["default"].base_model_name_or_path = str(base)
    randomise(model, scale=0.05, seed=seed)
    model.save_pretrained(folder)
    return folder


def _merge(pack: Callable, base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    ran = pack("merge", "adapter", f"{base}+{adapter}", "-o", out, "--dtype", "float32", "-q")
    assert ran.code == 0, ran.err
    return tensors_of(out)


OPTIONS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # name: family, type, keys of the base's config, keys of the adapter's
    "oft all biases": ("llama", "OFT", BIASED, {"r": 0, "oft_block_size": 4, "bias": "all", **QV}),
    "boft own biases": (
        "llama", "BOFT", BIASED, {"boft_block_size": 4, "bias": "boft_only", **QV}
    ),
    "vera all biases": ("gpt2", "VERA", {}, {"bias": "all", **C_ATTN}),
    "fourierft own biases": (
        "gpt2", "FOURIERFT", {}, {"bias": "fourierft_only", "n_frequency": 50, **C_ATTN}
    ),
    "adalora all biases": ("llama", "ADALORA", BIASED, {"total_step": 5, "bias": "all", **QV}),
    "only top vectors": (
        "llama", "VBLORA", {},
        {"num_vectors": 16, "vector_length": 8, "topk": 2, "save_only_topk_weights": True, **QV},
    ),
    "projection by seed": (
        "llama", "VERA", {}, {"save_projection": False, "projection_prng_key": 7, **QV}
    ),
    "bases by seed": ("llama", "RANDLORA", {}, {"save_projection": False, "sparse": True, **QV}),
    "indices by seed": ("llama", "UNILORA", {}, {"save_indices": False, **QV}),
    "shared of one shape": (
        "llama", "VERA", {}, {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    ),
    "whole modules": ("llama", "LOHA", {}, {"r": 4, "modules_to_save": ["lm_head", "norm"], **QV}),
    "whole modules, one by one": ("llama", "OSF", {}, {"modules_to_save": ["lm_head"], **QV}),
    "whole router": (
        "mixtral", "IA3", {},
        {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["mlp.gate"]},
    ),
    "some layers": ("llama", "HRA", {}, {"layers_to_transform": [0, 2], **QV}),
    "patterns": (
        "llama", "LOHA", {},
        {"r": 4, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 32}, **QV},
    ),
    "all but": (
        "llama", "LOKR", {},
        {"r": 4, "target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    ),
    "expression": ("llama", "LOKR", {}, {"r": 4, "target_modules": r".*\.[01]\..*(q|down)_proj"}),
    "embedding": ("llama", "HIRA", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tokens of tied": (
        "llama", "TRAINABLE_TOKENS", TIED,
        {"token_indices": [1, 70], "target_modules": ["embed_tokens"]},
    ),
    "convolution": (
        "vit", "LOHA", {},
        {"r": 2, "task_type": None, "target_modules": ["projection"], "use_effective_conv2d": True},
    ),
    "fed forward": (
        "gpt2", "IA3", {},
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "constrained, shared block": (
        "llama", "OFT", {},
        {"r": 4, "oft_block_size": 0, "coft": True, "eps": 0.5, "block_share": True, **QV},
    ),
    "butterfly": ("llama", "BOFT", {}, {"boft_block_size": 4, "boft_n_butterfly_factor": 2, **QV}),
    "bat": ("llama", "MISS", {}, {"r": 4, "init_weights": "bat", **QV}),
    "clustered base": ("llama", "ADAMSS", {}, {"r": 8, "num_subspaces": 3, **QV}),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options(pack: Callable, tmp_path: Path, case: str) -> None:
    """Largest difference to PEFT at most 1e-5 of each tensor's largest value, in float32."""
    family, kind, model, keys = OPTIONS[case]
    if kind == "ADAMSS" and find_spec("sklearn") is None:
        pytest.skip("AdaMSS needs scikit-learn")
    base = save_base(tmp_path / "base", family, **model)
    adapter = _save(tmp_path / "adapter", load_base(base), base, kind, **keys)
    theirs = peft_merged(base, adapter, tmp_path / "theirs")
    ours = _merge(pack, base, adapter, tmp_path / "ours")
    assert worst(ours, theirs) <= 1e-5
    before = tensors_of(base)
    assert any((ours[name] - before[name]).abs().max() > 1e-4 for name in before)


def test_ranks_that_adalora_cut(pack: Callable, tmp_path: Path) -> None:
    """PEFT saves only the ranks that are left, and says in the config which they are."""
    base = save_base(tmp_path / "base", "llama")
    keys = {"total_step": 5, "init_r": 6, "task_type": "CAUSAL_LM", **QV}
    model = get_peft_model(load_base(base), PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ADALORA](**keys))
    randomise(model)
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(base)
    ranks = [name for name, _ in model.named_parameters() if "lora_E" in name]
    config.rank_pattern = {
        name.removeprefix("base_model.model.").removesuffix(".default"): [
            i % (n + 2) > 0 for i in range(6)
        ]
        for n, name in enumerate(ranks)
    }
    model.save_pretrained(tmp_path / "adapter")
    shapes = {tuple(t.shape) for n, t in load_file(tmp_path / "adapter" / WEIGHTS).items()
              if "lora_E" in n}  # fmt: skip
    assert len(shapes) > 1
    theirs = peft_merged(base, tmp_path / "adapter", tmp_path / "theirs")
    assert worst(_merge(pack, base, tmp_path / "adapter", tmp_path / "ours"), theirs) <= 1e-5


TIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "output": ("llama", "LOHA", {"r": 4, "target_modules": ["lm_head"]}),
    "output, Conv1D": ("gpt2", "VERA", {"target_modules": ["lm_head"]}),
    "input": ("llama", "HIRA", {"target_modules": ["embed_tokens"]}),
    "output saved": ("gpt2", "VERA", {"modules_to_save": ["lm_head"], **C_ATTN}),
    "input saved": ("llama", "MISS", {"r": 4, "modules_to_save": ["embed_tokens"], **QV}),
    "both saved": ("llama", "MISS", {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"], **QV}),
    "tokens": ("gpt2", "TRAINABLE_TOKENS", {"token_indices": [1, 5]}),
}


@pytest.mark.parametrize("case", TIES)
def test_tied_embeddings_give_the_logits_of_the_adapter_beside_its_base(
    pack: Callable, tmp_path: Path, case: str
) -> None:
    """PEFT, merging in place, would change the other embedding too."""
    family, kind, keys = TIES[case]
    base = save_base(tmp_path / "base", family, **(TIED if family == "llama" else {}))
    adapter = _save(tmp_path / "adapter", load_base(base), base, kind, **keys)
    tokens = torch.arange(1, 75).reshape(2, 37)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load_base(base), adapter).eval()(tokens).logits
        plain = load_base(base)(tokens).logits
        _merge(pack, base, adapter, tmp_path / "ours")
        found = load_base(tmp_path / "ours")(tokens).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()


def test_a_weight_and_two_adapters_of_a_tied_output(pack: Callable, tmp_path: Path) -> None:
    """base + Σ weight · (what PEFT merges into the output of an untied base - base)."""
    base = save_base(tmp_path / "base", "llama", **TIED)
    untied = load_base(base)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.save_pretrained(tmp_path / "untied")
    before = tensors_of(tmp_path / "untied")
    expected = {name: tensor.clone() for name, tensor in before.items()}
    keys = {"r": 4, "target_modules": ["lm_head", "q_proj"]}
    for number, (kind, weight) in enumerate({"LOHA": 0.5, "LOKR": -2.0}.items()):
        adapter = _save(tmp_path / kind, load_base(base), base, kind, seed=number, **keys)
        theirs = peft_merged(tmp_path / "untied", adapter, tmp_path / f"theirs {kind}")
        for name in expected:
            expected[name] += weight * (theirs[name] - before[name])
    reference = f"{base}+0.5*{tmp_path}/LOHA+-2*{tmp_path}/LOKR"
    ran = pack("merge", "adapter", reference, "-o", tmp_path / "ours", "--dtype", "float32")
    assert ran.code == 0, ran.err
    assert "'lm_head.weight' becomes a tensor of its own" in ran.err + ran.out
    assert worst(tensors_of(tmp_path / "ours"), expected) <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_were_saved_beside_the_adapter(
    pack: Callable, tmp_path: Path, tied: bool
) -> None:
    """They take the place of the base's, as when PEFT loads the adapter."""
    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=tied)
    model = load_base(base)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    keys = {"r": 4, "task_type": "CAUSAL_LM", **QV}
    model = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOHA](**keys))
    model.peft_config["default"].base_model_name_or_path = str(base)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "adapter" / WEIGHTS))
    theirs = peft_merged(base, tmp_path / "adapter", tmp_path / "theirs")
    ours = _merge(pack, base, tmp_path / "adapter", tmp_path / "ours")
    assert worst(ours, theirs) <= 1e-5
    name = "model.embed_tokens.weight"
    assert torch.equal(ours[name], tensors_of(base)[name] * 1.5)


@pytest.mark.parametrize("kind", ["LOHA", "OSF"])
def test_a_head_that_the_base_has_not(pack: Callable, tmp_path: Path, kind: str) -> None:
    """An adapter of a classifier on a base that was saved as a language model."""
    base = save_base(tmp_path / "base", "llama")

    def classifier() -> Any:
        return LlamaForSequenceClassification.from_pretrained(base, num_labels=3)

    adapter = _save(tmp_path / "adapter", classifier(), base, kind, task_type="SEQ_CLS", **QV)
    merged = PeftModel.from_pretrained(classifier(), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    theirs = tensors_of(tmp_path / "theirs")
    ours = _merge(pack, base, adapter, tmp_path / "ours")
    assert ours.pop("lm_head.weight").equal(tensors_of(base)["lm_head.weight"])
    assert worst(ours, theirs) <= 1e-5


def test_names_without_the_prefix_of_the_model(pack: Callable, tmp_path: Path) -> None:
    """Files saved from the bare model, as the first GPT-2 on the Hub."""
    base = save_base(tmp_path / "base", "gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in tensors_of(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    keys = {"bias": "all", "modules_to_save": ["ln_f"], **C_ATTN}
    adapter = _save(tmp_path / "adapter", load_base(base), base, "VERA", **keys)
    theirs = peft_merged(base, adapter, tmp_path / "theirs")
    ours = _merge(pack, base, adapter, tmp_path / "ours")
    assert "h.0.attn.c_attn.weight" in ours
    renamed = {
        n if n.startswith("transformer.") else f"transformer.{n}": t for n, t in ours.items()
    }
    assert worst(renamed, theirs) <= 1e-5


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every read of weights fail."""

    def read(self: Any, offset: int, out: Any) -> None:
        raise AssertionError(f"weights of {self.path} are read")

    monkeypatch.setattr(SafetensorsFile, "read", read)


HADA = "base_model.model.model.layers.1.self_attn.q_proj.hada_w1_a"

BROKEN: dict[str, tuple[dict[str, Any], Callable[[dict[str, torch.Tensor]], Any], list[str]]] = {
    # name: keys of the config that are changed, what is done to the tensors, words of the message
    "missing": ({}, lambda t: t.pop(HADA), ["lacks 1 tensor(s)", HADA]),
    "leftover": ({}, lambda t: t.update(extra=torch.ones(3)), ["nothing there needs", "extra"]),
    "of a module that was not adapted": (
        {}, lambda t: t.update({HADA.replace("q_proj", "o_proj"): t[HADA].clone()}),
        ["nothing there needs", "o_proj"],
    ),
    "other shape": (
        {}, lambda t: t.update({HADA: torch.ones(33, 4)}), [HADA, "[33, 4]", "[32, 4]"],
    ),
    "other rank": ({"r": 6}, lambda t: None, ["[32, 4]", "[32, 6]"]),
    "other modules": ({"target_modules": ["k_proj"]}, lambda t: None, ["lacks", "k_proj"]),
    "no such module": (
        {"target_modules": ["z_proj"]}, lambda t: None, ["PEFT could not", "z_proj"],
    ),
    "rank is text": ({"r": "big"}, lambda t: None, ["PEFT could not", "TypeError"]),
    "key of a newer PEFT": (
        {"use_magic": True, "peft_version": "9.1.0"}, lambda t: None,
        ["use_magic", "9.1.0", "pip install -U peft"],
    ),
    "retired type": ({"peft_type": "BONE"}, lambda t: None, ["unknown type of adapter 'BONE'"]),
    "type is no text": ({"peft_type": 7}, lambda t: None, ["peft_type"]),
    "another type": ({"peft_type": "LOKR"}, lambda t: None, ["lokr_w1"]),
}  # fmt: skip


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", BROKEN)
def test_one_clear_error_before_any_weight_is_read(
    pack: Callable, tmp_path: Path, case: str
) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = _save(tmp_path / "adapter", load_base(base), base, "LOHA", r=4, **QV)
    keys, change, words = BROKEN[case]
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | keys))
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    ran = pack("merge", "adapter", f"{base}+{adapter}", "-o", tmp_path / "out")
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    for word in words:
        assert word in ran.err
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_was_made_larger(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    model = load_base(base)
    model.resize_token_embeddings(88)
    adapter = _save(tmp_path / "adapter", model, base, "LOHA", r=4, **QV)
    ran = pack("merge", "adapter", f"{base}+{adapter}", "-o", tmp_path / "out")
    assert ran.code == 1
    assert "[88, 32]" in ran.err
    assert "another vocabulary" in ran.err


def test_without_peft(pack: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, with the command that installs it."""
    import sys

    base = save_base(tmp_path / "base", "llama")
    adapter = _save(tmp_path / "adapter", load_base(base), base, "LOHA", r=4, **QV)
    monkeypatch.setitem(sys.modules, "peft", None)
    ran = pack("merge", "adapter", f"{base}+{adapter}", "-o", tmp_path / "out")
    assert ran.code == 1
    assert "'peft' is not installed" in ran.err
    assert "pip install 'pack-models[peft]'" in ran.err


def _storages(model: Any) -> Iterator[tuple[int, int]]:
    """Address and size of everything that a model holds, parameters or not."""
    for module in model.modules():
        held = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
        held += [v for own in held if isinstance(own, dict) for v in own.values()]
        for value in held:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                yield storage.data_ptr(), storage.nbytes()


@pytest.mark.parametrize("kind", sorted(MERGED.keys() - {"LORA", "FROD", "TRAINABLE_TOKENS"}))
def test_memory_is_that_of_the_adapter_and_one_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """While modules are merged and after, the model holds no weights of others.

    FRoD decomposes all layers together, and trained tokens keep the rows that they replace.
    """
    if kind == "ADAMSS" and find_spec("sklearn") is None:
        pytest.skip("AdaMSS needs scikit-learn")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8, "vocab_size": 70}
    base = save_base(tmp_path / "base", "llama", attention_bias=True, **sizes)
    keys = {"IA3": {**QV, "feedforward_modules": []}, "LN_TUNING": {}}
    keys |= {"BEFT": QV, "UNILORA": {**QV, "r": 2}}
    adapter = _save(
        tmp_path / "adapter",
        load_base(base),
        base,
        kind,
        **keys.get(kind, {**QV, **KEYS.get(kind, {})}),
    )
    planned: list[ForeignAdapter] = []
    most = 0

    class Watched(ForeignAdapter):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            planned.append(self)

    def measure() -> None:
        nonlocal most
        if planned:
            most = max(most, sum(dict(_storages(planned[0]._model)).values()))

    lent = Lender.lent

    @contextmanager
    def watch(self: Lender, module: Any, path: str) -> Iterator[None]:
        with lent(self, module, path):
            measure()
            yield
            measure()

    monkeypatch.setattr(Lender, "lent", watch)
    monkeypatch.setattr("mergekit_lite.adapters.foreign.ForeignAdapter", Watched)
    model = open_model(f"{base}+{adapter}", tmp_path).checkpoint
    for name in model.names():
        model.read(name)
    measure()
    adapted = sum(
        t.nbytes
        for n, t in tensors_of(base).items()
        if n.endswith(("q_proj.weight", "v_proj.weight"))
    )
    own = (adapter / WEIGHTS).stat().st_size
    assert most < own + adapted / 2
