"""ONNX: graphs that compute what transformers computes, in all kinds of files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_lite.cli.progress import make_progress
from mergekit_lite.errors import PackError
from mergekit_lite.merge.model import open_whole
from tests.conftest import ROOT, digests

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_genai")

from exporters.onnx.check import check_places  # noqa: E402
from exporters.onnx.run import MadeOnnx, OnnxRequest, run_onnx  # noqa: E402
from exporters.onnx.schemes import SCHEMES  # noqa: E402
from exporters.onnx.session import GraphRun  # noqa: E402

Pack = Callable[..., Any]
SILENT = make_progress(True)
WHOLE = 1 << 40
COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
WINDOW = {"head_dim": 16, "sliding_window": 8}
GENAI, TORCH = "onnxruntime-genai", "torch.onnx"
DECODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", {}, GENAI),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, GENAI),
    "llama 3 rope": ("LlamaForCausalLM", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }}, GENAI),
    "qwen2": ("Qwen2ForCausalLM", {}, GENAI),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}, GENAI),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}, GENAI),
    "granite": ("GraniteForCausalLM", {
        "embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    }, GENAI),
    "gemma": ("GemmaForCausalLM", {"head_dim": 16}, GENAI),
    "gemma2": ("Gemma2ForCausalLM", WINDOW, GENAI),
    "phi3": ("Phi3ForCausalLM", {"original_max_position_embeddings": 128}, GENAI),
    "ernie": ("Ernie4_5ForCausalLM", {"head_dim": 16}, GENAI),
    "mistral, sliding window": ("MistralForCausalLM", {"sliding_window": 8}, TORCH),
    "gemma3": ("Gemma3ForCausalLM", {**WINDOW, "sliding_window_pattern": 2}, TORCH),
    "phi3, sliding window": ("Phi3ForCausalLM", {"sliding_window": 8}, TORCH),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
             TORCH),
    "gpt_neox": ("GPTNeoXForCausalLM", {}, TORCH),
    "olmo2": ("Olmo2ForCausalLM", {}, TORCH),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 1, 0]}, TORCH),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, TORCH),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, **MOE}, TORCH),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {
        "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4, **MOE, "head_dim": 8,
    }, TORCH),
}  # fmt: skip
BERT = {"num_labels": 3}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "bert, classes": ("BertForSequenceClassification", BERT),
    "bert, spans": ("BertForQuestionAnswering", {}),
    "distilbert": ("DistilBertForTokenClassification", {
        "dim": 64, "hidden_dim": 160, "n_layers": 3, "n_heads": 4, **BERT,
    }),
    "roberta": ("RobertaForSequenceClassification", {
        "type_vocab_size": 1, "pad_token_id": 0, **BERT,
    }),
    "modernbert": ("ModernBertForMaskedLM", {
        "local_attention": 8, "global_attn_every_n_layers": 3, "cls_token_id": 1,
        "sep_token_id": 2,
    }),
    "mpnet": ("MPNetModel", {}),
}  # fmt: skip


def random_model(folder: Path, name: str, more: dict[str, Any], dtype: Any = torch.float32) -> Any:
    """A random model, saved; returns it as transformers has it, in float32."""
    made = getattr(transformers, name)
    torch.manual_seed(0)
    model = made(made.config_class(**{**COMMON, **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that none is left out
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return model.float()


def export(model: Path, folder: Path, scheme: str = "fp32", **more: Any) -> MadeOnnx:
    """Export a model."""
    whole = open_whole(str(model))
    try:
        return run_onnx(
            whole, OnnxRequest(SCHEMES[scheme], folder, {}, **{"threads": 2, **more}), SILENT
        )
    finally:
        whole.close()


def graph_of(folder: Path) -> Path:
    """The graph of a result."""
    [path] = folder.glob("onnx/*.onnx")
    return path


def runner(folder: Path, budget: int = WHOLE) -> GraphRun:
    """What runs it."""
    return GraphRun(graph_of(folder), budget, 2)


def ids_of(rows: int, length: int, seed: int = 1) -> Any:
    """Random tokens."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (rows, length), generator=made)


def apart(found: Any, expected: Any) -> float:
    """Largest difference."""
    return float(np.abs(found - expected.numpy()).max())


def greedy(run: GraphRun, ids: Any, count: int) -> list[int]:
    """Tokens that a graph goes on with, one by one with its cache."""
    logits, past = run.step(ids.numpy())
    found = [int(logits[0, -1].argmax())]
    while len(found) < count:
        logits, past = run.step(np.array([found[-1:]], np.int64), past)
        found.append(int(logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family: str, tmp_path: Path) -> None:
    """Logits of transformers, for several batches and lengths, without a cache and with one."""
    name, more, route = DECODERS[family]
    model = random_model(tmp_path / "model", name, more)
    made = export(tmp_path / "model", tmp_path / "out")
    assert made.route.startswith(route)
    run = runner(tmp_path / "out")
    for rows, length, before in ((1, 9, 4), (3, 21, 20), (1, 21, 13)):
        ids = ids_of(rows, length)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        logits, _ = run.step(ids.numpy())
        assert apart(logits, expected) < 1e-4
        _, past = run.step(ids[:, :before].numpy())
        logits, _ = run.step(ids[:, before:].numpy(), past)
        assert apart(logits, expected[:, before:]) < 1e-4
    ids = ids_of(1, 5)
    with torch.no_grad():
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=32,
            max_new_tokens=32, eos_token_id=None,
        )[0, 5:]  # fmt: skip
    assert greedy(run, ids, 32) == expected.tolist()
    if route == TORCH:  # the builder's operator of attention cannot leave tokens at the left out
        ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.int64)
        mask[0, :5] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            given = {} if family == "deepseek_v3" else {"position_ids": positions}
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
        logits, _ = run.step(ids.numpy(), None, mask.numpy())
        assert apart(logits[1], expected[1]) < 1e-4
        assert apart(logits[0, 5:], expected[0, 5:]) < 1e-4


ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "as many inner outputs as tokens": ("LlamaForCausalLM", {"intermediate_size": 96}),
    "linear rope": ("LlamaForCausalLM", {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0,
    }}),
    "heads of 24": ("LlamaForCausalLM", {"head_dim": 24}),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_what_the_builder_gets_wrong(
    odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not asked; where it is, the graph is refused or made another way, of codes too."""
    name, more = ODD[odd]
    model = random_model(tmp_path / "model", name, more)
    made = export(tmp_path / "model", tmp_path / "fp32")
    assert made.route.startswith(TORCH)
    assert made.notes == []
    with pytest.raises(PackError):
        export(tmp_path / "model", tmp_path / "genai", "int4", route="genai")
    assert not (tmp_path / "genai").exists()
    monkeypatch.setattr("exporters.onnx.build._trusted", lambda _: True)
    made = export(tmp_path / "model", tmp_path / "int4", "int4")
    assert made.route.startswith(TORCH)
    assert "torch.onnx makes it" in made.notes[0]
    ids = ids_of(1, 40)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    assert apart(runner(tmp_path / "fp32").step(ids.numpy())[0], expected) < 1e-4


def test_a_config_without_the_sizes_of_a_decoder() -> None:
    """The builder is not trusted with what it does not know; nothing of it is asked for."""
    from exporters.onnx.build import _trusted

    assert not _trusted(transformers.PretrainedConfig())


def test_a_window_that_no_file_states(tmp_path: Path) -> None:
    """transformers' default counts, though the few tokens of the comparison do not reach it."""
    random_model(tmp_path / "model", "MistralForCausalLM", {"sliding_window": 4096})
    path = tmp_path / "model" / "config.json"
    stated = json.loads(path.read_text())
    del stated["sliding_window"]
    path.write_text(json.dumps(stated))
    assert export(tmp_path / "model", tmp_path / "out").route.startswith(TORCH)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family: str, tmp_path: Path) -> None:
    """Outputs of transformers, for several batches and lengths, with padding."""
    import onnxruntime

    name, more = ENCODERS[family]
    model = random_model(tmp_path / "model", name, more)
    assert export(tmp_path / "model", tmp_path / "out").route.startswith(TORCH)
    session = onnxruntime.InferenceSession(str(graph_of(tmp_path / "out")))
    names = [value.name for value in session.get_inputs()]
    for rows, length in ((1, 7), (3, 19)):
        ids, mask = ids_of(rows, length), torch.ones(rows, length, dtype=torch.int64)
        mask[0, 5:] = 0
        ids[mask == 0] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in names:
            given["token_type_ids"] = (torch.arange(length) > 3).long().expand(rows, length)
        assert names == list(given)
        with torch.no_grad():
            expected = model(**given)
        found = session.run(None, {key: value.numpy() for key, value in given.items()})
        outputs = [value.name for value in session.get_outputs()]
        assert "pooler_output" not in outputs
        for output, values in zip(outputs, found, strict=True):
            wanted = expected[output].numpy()
            kept = mask.numpy() == 1 if values.shape[:2] == mask.shape else slice(None)
            assert np.abs(values[kept] - wanted[kept]).max() < 1e-4


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    """By name, before anything is written."""
    for name, more, told in (
        ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4},
         "a T5ForConditionalGeneration has an encoder and a decoder"),
        ("MambaForCausalLM", {}, "a MambaForCausalLM has layers of 'linear_attention'"),
    ):  # fmt: skip
        random_model(tmp_path / name, name, more)
        with pytest.raises(PackError, match=told):
            export(tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    random_model(tmp_path / "gpt2", "GPT2LMHeadModel", DECODERS["gpt2"][1])
    with pytest.raises(PackError, match="builder cannot make it"):
        export(tmp_path / "gpt2", tmp_path / "out", route="genai")


LIMITS = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.01, "int8": 0.15, "int4": 0.8, "int4-fp16": 0.8}


@pytest.mark.parametrize("route", ["genai", "torch"])
def test_kinds_of_files(route: Any, tmp_path: Path) -> None:
    """All kinds, by both routes; what is not told to be different is equal."""
    model = random_model(tmp_path / "model", "LlamaForCausalLM", {})
    ids = ids_of(2, 17)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    for scheme, limit in LIMITS.items():
        out = tmp_path / scheme
        made = export(tmp_path / "model", out, scheme, route=route)
        logits, past = runner(out).step(ids.numpy())
        assert apart(logits, expected) < limit * float(expected.abs().max())
        assert graph_of(out).name == f"{SCHEMES[scheme].file}.onnx"
        half = SCHEMES[scheme].half
        assert next(iter(past.values())).dtype == (np.float16 if half else np.float32)
        stated = json.loads((out / "config.json").read_text())["transformers.js_config"]
        assert stated == {"use_external_data_format": {graph_of(out).name: 1}}
        lock = json.loads((out / "pack.lock").read_text())
        assert lock["verification"] == made.checked.describe()
        assert lock["graph"]["opset"] == 23
        onnx.checker.check_model(str(graph_of(out)), full_check=True)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts(family: str, tmp_path: Path) -> None:
    """Experts are one operator, which computes the chosen ones; of codes too."""
    name, more, _ = DECODERS[family]
    more = {**more, "moe_intermediate_size": 32}
    model = random_model(tmp_path / "model", name, more)
    ids = ids_of(2, 17)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    for scheme in ("fp32", "fp16", "int8", "int4", "int4-fp16"):
        export(tmp_path / "model", tmp_path / scheme, scheme)
        logits, _ = runner(tmp_path / scheme).step(ids.numpy())
        assert apart(logits, expected) < LIMITS[scheme] * float(expected.abs().max())
        graph = onnx.load(graph_of(tmp_path / scheme), load_external_data=False).graph
        operator = "MoE" if scheme.startswith("fp") else "QMoE"
        assert sum(node.op_type == operator for node in graph.node) == 3


def _initializers(folder: Path) -> dict[str, Any]:
    """Values of all initializers, by ONNX's own reader."""
    model = onnx.load(graph_of(folder))
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.mark.parametrize(("block", "symmetric"), [(32, True), (32, False), (128, True)])
def test_blocks(block: int, symmetric: bool, tmp_path: Path) -> None:
    """What the codes stand for, read without pack's code, and how near it is."""
    more = {"intermediate_size": 128, "hidden_size": 96, "head_dim": 16, "vocab_size": 97}
    model = random_model(tmp_path / "model", "LlamaForCausalLM", more)
    export(tmp_path / "model", tmp_path / "out", "int4", block=block, symmetric=symmetric)
    held = _initializers(tmp_path / "out")
    for base, layer in (("mlp.down_proj", "mlp.down_proj"), ("attn.o_proj", "self_attn.o_proj")):
        weights = model.get_submodule(f"model.layers.1.{layer}").weight.detach().numpy()
        base = f"model.layers.1.{base}.MatMul.weight"
        codes = held[f"{base}_Q4"]
        whole = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1).astype(np.float32)
        scales = np.repeat(held[f"{base}_scales"], block, 1)
        if symmetric:
            zeros = np.full_like(whole, 8)
            assert f"{base}_zero_points" not in held
        else:
            points = held[f"{base}_zero_points"]
            points = np.stack([points & 15, points >> 4], -1).reshape(len(points), -1)
            zeros = np.repeat(points[:, : scales.shape[1] // block].astype(np.float32), block, 1)
        values = ((whole - zeros) * scales)[:, : weights.shape[1]]
        assert np.sqrt(np.square(values - weights).mean()) < 0.13 * weights.std()
    head = held["lm_head.MatMul.weight_Q8"].reshape(97, 96).astype(np.float32) - 128
    head *= np.repeat(held["lm_head.MatMul.weight_scales"], 32, 1)
    assert np.abs(head - model.lm_head.weight.detach().numpy()).max() < 0.01


def test_codes_of_bytes(tmp_path: Path) -> None:
    """Dynamic bytes: rows of a matrix around 128, each with its scale."""
    model = random_model(tmp_path / "model", "LlamaForCausalLM", {})
    export(tmp_path / "model", tmp_path / "out", "int8", route="torch")
    held = _initializers(tmp_path / "out")
    weights = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    name = "model.layers.0.mlp.up_proj.weight"
    values = (held[f"{name}_uint8"].astype(np.float32) - 128) * held[f"{name}_uint8_scales"]
    assert np.abs(values.T - weights).max() <= np.abs(weights).max() / 127 / 2 * 1.01


def test_tied_heads(tmp_path: Path) -> None:
    """An embedding that is also the head lies in the file once, by both routes."""
    random_model(tmp_path / "model", "LlamaForCausalLM", DECODERS["llama tied"][1])
    for scheme in ("fp32", "int4", "int4-fp16"):
        for route in ("genai", "torch"):
            out = tmp_path / f"{scheme}-{route}"
            export(tmp_path / "model", out, scheme, route=route)
            graph = onnx.load(graph_of(out), load_external_data=False).graph
            shapes = [list(t.dims) for t in graph.initializer]
            assert sum(shape in ([96, 2, 32], [96, 64], [64, 96]) for shape in shapes) == 1


def test_pieces_of_a_graph(tmp_path: Path) -> None:
    """A graph that is run in pieces gives what it gives whole."""
    random_model(tmp_path / "model", "LlamaForCausalLM", {})
    for scheme in ("fp32", "int4"):
        export(tmp_path / "model", tmp_path / scheme, scheme)
        whole, cut = runner(tmp_path / scheme), runner(tmp_path / scheme, 30_000)
        assert whole.stages == 1
        assert cut.stages > 3
        ids = ids_of(2, 11).numpy()
        feeds = [whole.feed(ids[:, :10]), whole.feed(ids[:, 10:], 0, 10)]
        for one, other in zip(whole.run_all(feeds), cut.run_all(feeds), strict=True):
            assert set(one) == set(other)
            for name, values in one.items():
                assert np.abs(values - other[name]).max() < 1e-5


def test_bytes(tmp_path: Path) -> None:
    """The same, whatever the number of threads, by both routes."""
    random_model(tmp_path / "model", "LlamaForCausalLM", {})
    for scheme, route in (("int4", "genai"), ("int8", "torch"), ("fp16", "genai")):
        first, second = tmp_path / f"{scheme}-1", tmp_path / f"{scheme}-2"
        export(tmp_path / "model", first, scheme, route=route, threads=1)
        export(tmp_path / "model", second, scheme, route=route, threads=2)
        one, two = digests(first), digests(second)
        assert one == two


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("route", ["genai", "torch"])
def test_bytes_do_not_depend_on_the_comparison(
    scheme: str, route: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written while the graph runs in many pieces is what is written without that."""
    random_model(tmp_path / "model", "LlamaForCausalLM", {"tie_word_embeddings": True})
    monkeypatch.setattr("exporters.onnx.layout.CHUNK", 100_000)
    export(tmp_path / "model", tmp_path / "plain", scheme, route=route, verify=False)
    monkeypatch.setattr("exporters.onnx.run._BUDGET", 20_000)
    made = export(tmp_path / "model", tmp_path / "compared", scheme, route=route)
    assert made.checked is not None
    names = sorted(path.name for path in (tmp_path / "plain" / "onnx").iterdir())
    assert len(names) > 2 or scheme != "fp32"
    for name in names:
        files = [(tmp_path / folder / "onnx" / name) for folder in ("plain", "compared")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_weights_that_lie_elsewhere(tmp_path: Path) -> None:
    """A graph whose weights do not lie where it says is not published."""
    random_model(tmp_path / "model", "LlamaForCausalLM", {})
    export(tmp_path / "model", tmp_path / "out", verify=False)
    path = graph_of(tmp_path / "out")
    names = [t.name for t in onnx.load(path, load_external_data=False).graph.initializer]
    with pytest.raises(PackError, match="does not lie where the graph says"):
        check_places(path, dict.fromkeys(names, (b"\x01" * 8, b"\x01" * 8)))


def test_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in files no larger than browsers take."""
    monkeypatch.setattr("exporters.onnx.layout.CHUNK", 60_000)
    model = random_model(tmp_path / "model", "LlamaForCausalLM", {})
    export(tmp_path / "model", tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out" / "onnx").iterdir())
    count = len(files) - 1
    assert count > 3
    assert files[:3] == ["model.onnx", "model.onnx_data", "model.onnx_data_1"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": {"model.onnx": count}}
    ids = ids_of(1, 6)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    assert apart(runner(tmp_path / "out").step(ids.numpy())[0], expected) < 1e-4


def test_linked_weights(pack: Pack, tmp_path: Path) -> None:
    """Weights that the graph reads out of the model's own file: less on the disk, same logits."""
    for name, dtype, scheme in (("a", torch.bfloat16, "bf16"), ("b", torch.float32, "fp32")):
        model = random_model(tmp_path / name, "LlamaForCausalLM", {}, dtype)
        out = tmp_path / f"{name}-out"
        words = ("--to", "onnx", scheme, tmp_path / name, "-o", out, "--link-weights", "-q")
        ran = pack("quantize", *words)
        assert ran.code == 0, ran.err
        linked = out / "onnx" / "model.safetensors"
        assert linked.samefile(tmp_path / name / "model.safetensors")
        rest = sum(path.stat().st_size for path in (out / "onnx").glob("*.onnx_data*"))
        assert rest < 2000
        ids = ids_of(2, 9)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        assert apart(runner(out).step(ids.numpy())[0], expected) < 1e-4
        listed = json.loads((out / "pack.lock").read_text())["outputs"]
        assert "onnx/model.safetensors" in {one["path"] for one in listed}
        assert pack("quantize", *words, "--force").code == 0
        assert (tmp_path / name / "model.safetensors").is_file()
    ran = pack("quantize", "--to", "onnx", "fp32", tmp_path / "a", "-o", tmp_path / "c",
               "--link-weights")  # fmt: skip
    assert ran.code == 1
    assert "none of its weights" in ran.err


def test_codes_that_are_there(pack: Pack, tmp_path: Path) -> None:
    """A model that is quantized already keeps its codes: its graph is that model."""
    for name, layers in (("LlamaForCausalLM", {}), ("GPT2LMHeadModel", DECODERS["gpt2"][1])):
        model, rounded = tmp_path / name, tmp_path / f"{name}-gptq"
        random_model(model, name, layers)
        words = ("--no-calibration", "-o", rounded, "-q")
        ran = pack("quantize", "--to", "gptq", "w4g32-asym", model, *words)
        assert ran.code == 0, ran.err
        made = export(rounded, tmp_path / f"{name}-out", "int4")
        lock = json.loads((made.folder / "pack.lock").read_text())
        assert lock["matrices"]["with_codes_of_their_own"] >= 10
        # What remains is the head of 8 bits, and inputs that are multiplied as bytes.
        assert made.checked.difference < 0.05 * made.checked.largest


def test_groups_of_several_blocks(pack: Pack, tmp_path: Path) -> None:
    """A group of 64 is two blocks of 32 with one scale; columns in another order are told."""
    model = tmp_path / "model"
    random_model(model, "LlamaForCausalLM", {"intermediate_size": 128})
    for scheme, more, kept in (("w4g64", ("--no-calibration",), 10), ("w8", (), 0)):
        rounded = tmp_path / scheme
        ran = pack("quantize", "--to", "gptq", scheme, model, "-o", rounded, "-q",
                   *(more or ("--no-calibration",)))  # fmt: skip
        assert ran.code == 0, ran.err
        made = export(rounded, tmp_path / f"{scheme}-out", "int4")
        lock = json.loads((made.folder / "pack.lock").read_text())
        assert (lock["matrices"]["with_codes_of_their_own"] >= 10) == bool(kept)


def test_values_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", "LlamaForCausalLM", {})
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 1e8
    model.save_pretrained(tmp_path / "model")
    for scheme in ("fp16", "int4-fp16"):
        with pytest.raises(PackError, match="float16 cannot hold"):
            export(tmp_path / "model", tmp_path / "out", scheme)
        assert not (tmp_path / "out").exists()


def test_broken_small_files(pack: Pack, example_models: Path, tmp_path: Path) -> None:
    """Told before weights are written."""
    for name, content in (
        ("generation_config.json", "[1]"),
        ("generation_config.json", "{oops"),
        ("tokenizer_config.json", "[]"),
        ("chat_template.jinja", "\udcff"),
    ):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(example_models / "base", folder)
        (folder / name).write_text(content, errors="surrogateescape")
        ran = pack("quantize", "--to", "onnx", "fp32", folder, "-o", tmp_path / "out")
        assert ran.code == 1
        assert f"error: {name}" in ran.err
        assert not (tmp_path / "out").exists()


def test_from_a_recipe(pack: Pack, example_models: Path, tmp_path: Path) -> None:
    """A TIES merge becomes int4 with no merged model on disk; bytes as of merging first."""
    shutil.copytree(example_models, tmp_path / "models")
    (tmp_path / "r.yaml").write_text(
        "merge_method: ties\nbase_model: models/base\nname: made\n"
        "models:\n- {model: models/code}\n- {model: models/docstrings}\n"
    )
    assert pack("quantize", "--to", "onnx", "int4", "r.yaml", "-q", cwd=tmp_path).code == 0
    straight = tmp_path / "dist" / "made" / "onnx-int4"
    assert not list((tmp_path / "dist").rglob("*.safetensors"))
    assert pack("merge", "ties", "r.yaml", "-q", cwd=tmp_path).code == 0
    words = ("dist/made/merged", "-o", "second", "-q")
    assert pack("quantize", "--to", "onnx", "int4", *words, cwd=tmp_path).code == 0
    one, two = digests(straight), digests(tmp_path / "second")
    for name in ("onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "genai_config.json"):
        assert one[name] == two[name]


def test_calibrated(pack: Pack, example_models: Path, tmp_path: Path) -> None:
    """By text, int4 is nearer to the model than the builder's own int4, and than plain rounding."""
    from onnxruntime_genai.models import builder

    model = example_models / "reference"
    text = ROOT / "mergekit_lite" / "evaluate" / "default.txt"
    plain, better, own = tmp_path / "plain", tmp_path / "better", tmp_path / "own"
    assert pack("quantize", "--to", "onnx", "int4", model, "-o", plain, "-q").code == 0
    words = ("--calibration", text, "--windows", 64, "--context", 256, "-o", better, "-q")
    ran = pack("quantize", "--to", "onnx", "int4", model, *words)
    assert ran.code == 0, ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["better", "plain"]
    lock = json.loads((better / "pack.lock").read_text())
    assert lock["details"]["method"] == "gptq"
    assert lock["asked"]["calibration"]["windows"] == 64
    options = builder.parse_extra_options(
        None, str(model), str(own / "onnx"), "int4", "cpu", str(tmp_path / "cache"), []
    )
    builder.create_model(
        None, str(model), str(own / "onnx"), "int4", "cpu", str(tmp_path / "cache"), **options
    )
    shutil.copy(model / "config.json", own)
    held_out = ROOT / "CONTRIBUTING.md"
    words = ("--reference", model, "--text", held_out, "--context", 256, "--windows", 24, "--json")
    ran = pack("eval", own, plain, better, *words)
    assert ran.code == 0, ran.err
    theirs, ours, calibrated = (one["kl_mean"] for one in json.loads(ran.out)["models"][1:])
    assert calibrated < ours < theirs


def test_a_recipe_with_onnx(pack: Pack, example_models: Path, tmp_path: Path) -> None:
    """Merged, exported, evaluated, released, verified and made again."""
    shutil.copytree(example_models, tmp_path / "models")
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\nname: made\nversion: 1.0.0\nlicense: apache-2.0\ncompare: false\n"
        "models:\n- {model: models/code}\n- {model: models/docstrings}\n"
        "licenses: {models/code: apache-2.0, models/docstrings: apache-2.0}\n"
        "quantize:\n- {to: onnx, scheme: int4, block: 128}\n- {to: onnx, scheme: int8}\n"
        "evaluate: {context: 64, windows: 4}\n"
    )
    ran = pack("build", "r.yaml", "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    steps = {step["name"]: step["done"] for step in json.loads(ran.out)["steps"]}
    assert steps["onnx int4"]
    assert steps["onnx int8"]
    release = tmp_path / "dist" / "made" / "release" / "1.0.0"
    assert (release / "onnx-int4" / "onnx" / "model_q4.onnx_data").is_file()
    card = (release / "README.md").read_text()
    assert 'og.Model("onnx-int4")' in card
    assert "onnx-int8" in card
    assert pack("verify", release, "-q").code == 0
    ran = pack("build", "r.yaml", "--json", cwd=tmp_path)
    assert not any(step["done"] for step in json.loads(ran.out)["steps"])
    ran = pack("reproduce", release, cwd=tmp_path)
    assert ran.code == 0, ran.err


def test_snippet_of_the_page(example_models: Path, tmp_path: Path) -> None:
    """What the page says to do, done in the folder of the result."""
    export(example_models / "reference", tmp_path / "out", "int4")
    page = (tmp_path / "out" / "README.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "Once upon a time" in ran.stdout


def test_killed_runs(example_models: Path, tmp_path: Path) -> None:
    """Killed where it is writing, it leaves nothing under the final name; again, the same bytes."""
    model = example_models / "reference"
    export(model, tmp_path / "whole", "fp32")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mergekit_lite", "quantize", "--to", "onnx", "fp32",
               str(model), "-o", str(out), "-q"]  # fmt: skip
    for _ in range(2):
        run = subprocess.Popen(command, cwd=ROOT)
        while run.poll() is None and not (tmp_path / ".out.partial").exists():
            os.sched_yield()
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not out.exists()
    subprocess.run(command, cwd=ROOT, check=True)
    wanted = digests(tmp_path / "whole")
    found = digests(out)
    for name in ("onnx/model.onnx", "onnx/model.onnx_data"):
        assert found[name] == wanted[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_mistakes(pack: Pack, example_models: Path, tmp_path: Path) -> None:
    """One error each, with what to do, and nothing written."""
    model = example_models / "reference"
    for words, told in (
        (("onnx", "int5", model), "no scheme of onnx"),
        (("onnx", "int4", model, "--block", 64), "64"),
        (("gptq", "w4g32", model, "--block", 32), "--block: of ONNX"),
        (("onnx", "int8", model, "--imatrix", ROOT / "README.md"), "--imatrix: of GGUF"),
        (("onnx", "fp32", model, "--calibration", ROOT / "README.md"), "--calibration"),
        (("onnx", "int4", model, "--no-calibration"), "--no-calibration"),
    ):
        ran = pack("quantize", "--to", *words, cwd=tmp_path)
        assert ran.code != 0
        assert told in ran.err
        assert not (tmp_path / "dist").exists()


def test_missing_library(
    example_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters.onnx import session

    usual = session.find_spec
    monkeypatch.setattr(
        session, "find_spec", lambda name: None if name == "onnxruntime" else usual(name)
    )
    with pytest.raises(PackError, match="onnxruntime") as caught:
        session.require_onnxruntime("--to onnx")
    assert "pack-models[onnx]" in str(caught.value.hint)


def test_looking_at_graphs(pack: Pack, example_models: Path, tmp_path: Path) -> None:
    export(example_models / "reference", tmp_path / "out", "int4")
    ran = pack("inspect", tmp_path / "out", "--json", "--tensors")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert "MatMulNBits" in found["metadata"]["operators"]
    assert found["metadata"]["inputs"].endswith("the cache of 2 layers")
    assert {"U8", "F32"} <= set(found["dtypes"])
    assert found["tokenizer"]["chat_template"]
    ran = pack("quantize", "--to", "gguf", "q8_0", tmp_path / "out", cwd=tmp_path)
    assert ran.code == 1
    assert "Traceback" not in ran.err


def test_broken_graphs(pack: Pack, tmp_path: Path) -> None:
    """Hostile and damaged files: one error each."""
    random_model(tmp_path / "model", "LlamaForCausalLM", {})
    good = tmp_path / "good"
    export(tmp_path / "model", good)

    def cut(folder: Path) -> None:
        data = folder / "onnx" / "model.onnx_data"
        data.write_bytes(data.read_bytes()[:1000])

    def gone(folder: Path) -> None:
        (folder / "onnx" / "model.onnx_data").unlink()

    def garbage(folder: Path) -> None:
        graph_of(folder).write_bytes(b"\xff" * 300)

    def away(folder: Path) -> None:
        model = onnx.load(graph_of(folder), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../../../model/model.safetensors"
        onnx.save(model, graph_of(folder))

    def far(folder: Path) -> None:
        model = onnx.load(graph_of(folder), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "offset":
                    entry.value = "-5"
        onnx.save(model, graph_of(folder))

    for harm in (cut, gone, garbage, away, far):
        folder = tmp_path / harm.__name__
        shutil.copytree(good, folder)
        harm(folder)
        for words in (("inspect", folder), ("eval", folder)):
            ran = pack(*words)
            assert ran.code == 1, harm
            assert "Traceback" not in ran.err
            assert ran.err.count("error:") == 1


def test_measuring_what_is_no_language_model(pack: Pack, tmp_path: Path) -> None:
    """One error each: an encoder, inputs that nobody fills, caches of another shape."""
    random_model(tmp_path / "model", "LlamaForCausalLM", {})
    good = tmp_path / "good"
    export(tmp_path / "model", good)
    random_model(tmp_path / "bert", "BertForMaskedLM", {})
    export(tmp_path / "bert", tmp_path / "encoder")

    def more(model: Any) -> None:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1])
        )
        name = "use_cache_branch"
        model.graph.node.append(onnx.helper.make_node("Identity", [name], ["kept"]))
        model.graph.output.append(
            onnx.helper.make_tensor_value_info("kept", onnx.TensorProto.BOOL, [1])
        )

    def flat(model: Any) -> None:
        for value in model.graph.input:
            if value.name == "past_key_values.0.key":
                del value.type.tensor_type.shape.dim[2:]

    def half(model: Any) -> None:
        [at] = [i for i, v in enumerate(model.graph.input) if v.name == "past_key_values.0.value"]
        del model.graph.input[at]

    folders = [tmp_path / "encoder"]
    for harm in (more, flat, half):
        folder = tmp_path / harm.__name__
        shutil.copytree(good, folder)
        model = onnx.load(graph_of(folder), load_external_data=False)
        harm(model)
        onnx.save(model, graph_of(folder))
        folders.append(folder)
    for content in ("{oops", "[1]", '{"num_attention_heads": "x", "hidden_size": "y"}'):
        folder = tmp_path / f"config-{len(content)}"
        shutil.copytree(good, folder)
        (folder / "config.json").write_text(content)
        folders.append(folder)
    for folder in folders:
        ran = pack("eval", folder)
        assert ran.code == 1, folder
        assert ran.err.count("error:") == 1
        assert "pack itself failed" not in ran.err
