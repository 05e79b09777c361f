"""pack inspect, against transformers, PEFT, tokenizers and the files themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.adapters.models import load_base, save_base, save_lora
from tests.conftest import write_model, write_recipe


def _seen(pack: Callable, path: object, *words: object) -> dict:
    ran = pack("inspect", path, "--json", *words)
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def _write_lora(folder: Path, a: torch.Tensor, b: torch.Tensor | None, **config: object) -> Path:
    """A LoRA of one module, as a careless program would write it."""
    folder.mkdir()
    path = "base_model.model.m.q_proj.lora_"
    factors = {f"{path}A.weight": a} | ({} if b is None else {f"{path}B.weight": b})
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **config})
    )
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "vit"])
def test_a_model(pack: Callable, tmp_path: Path, family: str) -> None:
    base = save_base(tmp_path / "base", family, torch.bfloat16)
    model = load_base(base)
    seen = _seen(pack, base, "--tensors")
    assert seen["kind"] == "model"
    assert seen["architecture"] == type(model).__name__
    parameters = {id(p): p.numel() for p in model.parameters()}
    assert seen["parameters"] == sum(parameters.values())
    assert seen["layers"] == model.config.num_hidden_layers
    assert seen["dtypes"] == {
        "BF16": {"elements": seen["parameters"], "bytes": 2 * seen["parameters"]}
    }
    held = load_file(base / "model.safetensors")
    assert [t["name"] for t in seen["tensor_list"]] == sorted(held)
    for tensor in seen["tensor_list"]:
        assert tensor["shape"] == list(held[tensor["name"]].shape)
        assert tensor["bytes"] == held[tensor["name"]].nbytes
        assert tensor["file"] == "model.safetensors"
    assert seen["size"] == sum(t.nbytes for t in held.values())
    assert seen["files"] == ["model.safetensors"]
    assert seen["metadata"] == {"format": "pt"}
    assert seen["tokenizer"]["kind"] is None
    if family == "llama":
        assert seen["dimensions"]["key-value heads"] == 2
        assert seen["tied"] is False


def test_shards_and_names_with_spaces(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    load_base(base).save_pretrained(tmp_path / "shards", max_shard_size="40kB")
    seen = _seen(pack, tmp_path / "shards", "--tensors")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert seen["files"] == sorted(set(index["weight_map"].values()))
    assert {t["name"]: t["file"] for t in seen["tensor_list"]} == index["weight_map"]
    assert seen["parameters"] == _seen(pack, base)["parameters"]
    spaced = write_model(tmp_path / "m", {"x": torch.ones(2)}, name="my model.safetensors")
    assert _seen(pack, spaced)["files"] == ["my model.safetensors"]


def test_one_file_tells_its_metadata(pack: Callable, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "one.safetensors", {"made": "by hand"})
    seen = _seen(pack, tmp_path / "one.safetensors")
    assert seen["metadata"] == {"made": "by hand"}
    assert seen["architecture"] is None
    out = pack("inspect", tmp_path / "one.safetensors", "--tensors").out
    assert "made=by hand" in out
    assert "a       F32     2×3  24 B  one.safetensors" in out


def test_a_pytorch_file(pack: Callable, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    torch.save({"a": torch.ones(3, 4).half()}, tmp_path / "m" / "pytorch_model.bin")
    seen = _seen(pack, tmp_path / "m", "--tensors")
    assert seen["tensor_list"] == [
        {"name": "a", "dtype": "F16", "shape": [3, 4], "bytes": 24, "file": "pytorch_model.bin"}
    ]


def test_the_tokenizer(pack: Callable, example_models: Path, tmp_path: Path) -> None:
    folder = example_models / "base"
    seen = _seen(pack, folder)["tokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert seen["kind"] == "BPE"
    assert seen["tokens"] == len(tokenizer)
    assert seen["special"] == {
        "bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token,
    }  # fmt: skip
    assert seen["chat_template"] is bool(tokenizer.chat_template)
    assert seen["context"] == tokenizer.model_max_length
    tokenizer.add_tokens(["<new>", "<newer>"])
    more = write_model(tmp_path / "m", {"x": torch.ones(2)}, {"vocab_size": 2048})
    tokenizer.save_pretrained(more)
    seen = _seen(pack, more)
    assert seen["tokenizer"]["tokens"] == len(tokenizer)
    assert seen["tokenizer"]["added"] == 2
    assert f"the tokenizer has {len(tokenizer)} tokens, the model embeds 2048" in seen["notes"]


def test_the_card_and_the_licence(pack: Callable, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"x": torch.ones(2)})
    assert _seen(pack, folder)["licence"] is None
    (folder / "LICENSE.txt").write_text("do as you like")
    assert _seen(pack, folder)["licence"] == "see LICENSE.txt"
    card = folder / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: llama3\nbase_model: [a/b, c/d]\n---\ntext")
    seen = _seen(pack, folder)
    assert seen["licence"] == "llama3"
    assert seen["base"] == ["a/b", "c/d"]


@pytest.mark.parametrize(
    "front", ["license: [mit", "date: 2024-99-99", "a: " + "[" * 3000, "license: {a: b}", "- 1"]
)
def test_broken_small_files_are_noted(pack: Callable, tmp_path: Path, front: str) -> None:
    """A card, a tokenizer or a config that cannot be read hides nothing of the rest."""
    folder = write_model(tmp_path / "m", {"x": torch.ones(2)})
    (folder / "README.md").write_text(f"---\n{front}\n---\n")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": "b"}}}')
    (folder / "tokenizer_config.json").write_text("{")
    seen = _seen(pack, folder)
    assert seen["licence"] is None
    assert any("tokenizer.json" in note for note in seen["notes"])
    assert any("tokenizer_config.json" in note for note in seen["notes"])
    assert seen["parameters"] == 2


def test_quantized_weights_are_no_parameters(pack: Callable, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "hqq", "bits": 4, "group_size": 128}}
    folder = write_model(tmp_path / "m", {"x.qweight": torch.ones(2, dtype=torch.int32)}, config)
    seen = _seen(pack, folder)
    assert seen["quantized"] == "hqq, 4 bits, groups of 128"
    assert any("packed" in note for note in seen["notes"])


def test_an_adapter(pack: Callable, tmp_path: Path) -> None:
    """Rank, alpha and scale of every module as PEFT's own layers have them."""
    base = save_base(tmp_path / "base", "llama")
    keys = {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 16}, "alpha_pattern": {r"layers\.1\..*up_proj": 3},
        "use_rslora": True, "modules_to_save": ["lm_head"],
    }  # fmt: skip
    adapter = save_lora(tmp_path / "lora", base, **keys)
    from peft import LoraConfig

    model = get_peft_model(load_base(base), LoraConfig(**keys))
    expected: dict[tuple, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            key = (
                name.rpartition(".")[2],
                layer.r["default"],
                layer.lora_alpha["default"],
                layer.scaling["default"],
            )
            expected[key] = expected.get(key, 0) + 1
    seen = _seen(pack, adapter)
    found = {(g["kind"], g["rank"], g["alpha"], g["scale"]): g["modules"] for g in seen["modules"]}
    assert found == expected
    assert len(found) == 3
    assert (seen["kind"], seen["adapter_type"], seen["merges"]) == ("adapter", "LORA", "streamed")
    assert seen["base"] == str(base)
    assert seen["options"] == {"use_rslora": True, "modules_to_save": ["lm_head"]}
    assert seen["whole"] == ["lm_head.weight"]
    assert seen["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert seen["notes"] == []
    together = _seen(pack, f"{base}+{adapter}", "--tensors")
    assert together["parameters"] == _seen(pack, base)["parameters"]
    files = {t["name"]: t["file"] for t in together["tensor_list"]}
    assert files["model.layers.0.self_attn.q_proj.weight"] is None
    assert files["model.layers.0.self_attn.k_proj.weight"] == "model.safetensors"


def test_experts_of_one_parameter_have_their_rank(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral")
    adapter = save_lora(
        tmp_path / "lora", base, r=2, target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
    )  # fmt: skip
    seen = _seen(pack, adapter)
    assert seen["notes"] == []
    assert {g["rank"] for g in seen["modules"]} == {2}


@pytest.mark.parametrize(("kind", "count"), [("LOHA", 2), ("IA3", 1)])
def test_other_adapters(pack: Callable, tmp_path: Path, kind: str, count: int) -> None:
    base = save_base(tmp_path / "base", "llama")
    if kind == "LOHA":
        config = LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "v_proj"])
    else:
        config = IA3Config(target_modules=r".*\.k_proj", feedforward_modules=[])
    model = get_peft_model(load_base(base), config)
    model.save_pretrained(tmp_path / "adapter")
    seen = _seen(pack, tmp_path / "adapter")
    assert seen["adapter_type"] == kind
    assert [g["modules"] for g in seen["modules"]] == [3] * count
    assert seen["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if kind == "LOHA":
        assert (seen["options"]["r"], seen["options"]["alpha"]) == (3, 6)


@pytest.mark.parametrize(
    ("a", "b", "config", "said"),
    [
        (torch.tensor(1.0), torch.ones(4, 8), {}, "m.q_proj: factors of shapes [] and [4, 8]"),
        (torch.ones(16, 4), torch.ones(4, 16), {}, "m.q_proj: rank 16, its config says 8"),
        (torch.ones(8, 4), torch.ones(4, 9), {}, "m.q_proj: rank 8 in lora_A, 9 in the other"),
        (torch.ones(8, 4), None, {}, "m.q_proj: has no lora_B"),
        (torch.ones(8, 4), torch.ones(4, 8), {"r": "x"}, "gives 'r' as 'x'"),
    ],
)
def test_factors_are_checked_against_the_config(
    pack: Callable,
    tmp_path: Path,
    a: torch.Tensor,
    b: torch.Tensor | None,
    config: dict,
    said: str,
) -> None:
    adapter = _write_lora(tmp_path / "lora", a, b, **config)
    assert any(said in note for note in _seen(pack, adapter)["notes"])
    ran = pack("inspect", adapter)
    assert ran.code == 0, ran.err
    assert said in ran.out


def test_what_cannot_be_merged_says_why(pack: Callable, tmp_path: Path) -> None:
    ones = torch.ones(8, 4), torch.ones(4, 8)
    adapter = _write_lora(tmp_path / "lora", *ones, alora_invocation_tokens=[1])
    assert _seen(pack, adapter)["merges"].startswith("no: cannot be merged; aLoRA")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text('{"peft_type": "PROMPT_TUNING"}')
    assert _seen(pack, adapter)["merges"] == "no: it is a trained prompt, not a change of weights"


def test_a_recipe(pack: Callable, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_lora(tmp_path / "lora", base, target_modules=["q_proj"])
    both = f"{base}+{adapter}"
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties", {"base": {"density": 0.5}, "gone": {}, both: {}},
        base_model=str(base), parameters={"lambda": 0.7}, out_dtype="bfloat16",
    )  # fmt: skip
    seen = _seen(pack, recipe)
    assert (seen["kind"], seen["method"], seen["output"]) == ("recipe", "ties", "model")
    assert seen["parameters"] == {"lambda": 0.7}
    assert seen["dtype"] == "bfloat16"
    inputs = {each["name"]: each for each in seen["inputs"]}
    count = sum(p.numel() for p in load_base(base).parameters())
    for name in (str(base), "base", both):
        assert inputs[name]["what"] == "LlamaForCausalLM"
        assert inputs[name]["elements"] == count
        assert inputs[name]["dtype"] == "F32"
    assert inputs[str(base)]["base"] is True
    assert inputs["base"]["parameters"] == [{"density": 0.5}]
    assert "no such file or folder" in inputs["gone"]["problem"]
    ran = pack("inspect", recipe)
    assert "gone: no such file or folder" in ran.out
    assert "\ufffd" not in ran.out
    assert pack("inspect", recipe, "--tensors").code == 2


def test_what_cannot_be_inspected(pack: Callable, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    for path in (tmp_path / "m.gguf", tmp_path):
        ran = pack("inspect", path)
        assert ran.code == 1
        assert "is no GGUF file" in ran.err
    ran = pack("inspect", tmp_path / "nothing")
    assert ran.code == 1
    assert "no such file" in ran.err


def test_names_cannot_move_the_cursor(pack: Callable, tmp_path: Path) -> None:
    config = {"architectures": ["X\x1b]0;title\x07\ud800\u202e"]}
    folder = write_model(tmp_path / "m", {"a\x1b[2Jb": torch.ones(2)}, config)
    ran = pack("inspect", folder, "--tensors")
    assert ran.code == 0, ran.err
    assert not {"\x1b", "\x07", "\u202e"} & set(ran.out)
    assert pack("inspect", folder, "--json").code == 0


def test_no_weight_is_read(pack: Callable, tmp_path: Path) -> None:
    """Terabytes that are a hole in a file: only the header can be read in time."""
    from mergekit_lite.checkpoint.header import write_header
    from mergekit_lite.dtypes import DTYPES

    tensors = [(f"layers.{i}.w", DTYPES["BF16"], (1 << 17, 1 << 17)) for i in range(40)]
    prefix, header = write_header(tensors, {})
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(prefix)
        file.truncate(header.entries["layers.39.w"].end)
    seen = _seen(pack, path)
    assert seen["parameters"] == 40 << 34
    assert seen["layers"] == 40
