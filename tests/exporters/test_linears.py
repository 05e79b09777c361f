"""GPTQ, AWQ and int8: files bit by bit, the arithmetic of the papers, families, what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, pack_process
from tests.exporters import unpackers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from exporters.gptq.solve import Settings, solve  # noqa: E402
from exporters.linears.quantized import Grid, rounded  # noqa: E402
from exporters.linears.run import run_linears  # noqa: E402
from exporters.linears.scheme import parse_scheme  # noqa: E402
from exporters.linears.store import LayerStore  # noqa: E402
from exporters.targets import Wanted, plan_target  # noqa: E402
from mergekit_lite.adapters.tensors import read_float  # noqa: E402
from mergekit_lite.cli.progress import make_progress  # noqa: E402
from mergekit_lite.dtypes import DTYPES  # noqa: E402
from mergekit_lite.errors import PackError  # noqa: E402
from mergekit_lite.evaluate.forward import LayerwiseModel  # noqa: E402
from mergekit_lite.evaluate.text import Text, Windows  # noqa: E402
from mergekit_lite.kernels.bits import pack as pack_bits  # noqa: E402
from mergekit_lite.kernels.bits import unpack  # noqa: E402
from mergekit_lite.merge.model import open_whole  # noqa: E402
from tests.evaluate.test_forward import NAMES  # noqa: E402

Pack = Callable[..., Any]
SILENT = make_progress(True)
TRAINED = ROOT / "examples" / "models" / "base"
COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "head_dim": 16, **MOE}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", {}),
    "olmo2": ("Olmo2", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
}  # fmt: skip


def tiny(folder: Path, family: str, dtype: Any = torch.float32) -> Any:
    """A random model, saved; whole, in float32."""
    name, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **more})
    model = getattr(transformers, NAMES.get(name, f"{name}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return model.float()


def windows(count: int = 24, length: int = 32) -> Windows:
    """Random text."""
    made = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 96, (count, length), generator=made).tolist()
    return Windows(ids, Text("random", "0" * 64, [""]), 0)


def make(model: Path, folder: Path, target: str, scheme: str, **more: Any) -> Any:
    """Quantize a model on random text."""
    whole = open_whole(str(model))
    try:
        wanted = Wanted(target, scheme, **{"threads": 2, **more})
        return run_linears(whole, plan_target(wanted, whole, windows(), folder, False), SILENT)
    finally:
        whole.close()


def logits(folder: Path, ids: Any) -> Any:
    """Of a checkpoint, dequantized, layer by layer."""
    whole = open_whole(str(folder))
    try:
        model = LayerwiseModel(whole.checkpoint)
        return next(model.logits([ids], model.hidden([ids], SILENT)))
    finally:
        whole.close()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (71, 5)).astype(np.uint8)
    words = pack_bits(codes, bits)
    assert words.shape == (-(-71 * bits // 32), 5)
    assert np.array_equal(unpack(words, bits, 71), codes)
    assert unpackers.stream(words[:, 3], bits, 71) == codes[:, 3].tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_files_bit_by_bit(bits: int, kind: str, form: str, tmp_path: Path) -> None:
    """What an independent reader makes of the file is what pack reads back, and near the model."""
    from safetensors.torch import load_file

    model = tiny(tmp_path / "model", "llama", torch.bfloat16)
    make(tmp_path / "model", tmp_path / "out", "gptq", f"w{bits}g32-{kind}", format=form,
         calibrated=False)  # fmt: skip
    whole = open_whole(str(tmp_path / "out"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        module = f"model.layers.1.{name}"
        parts = {
            key.removeprefix(f"{module}."): value.float().numpy()
            if value.is_floating_point() else value.numpy()
            for key, value in stored.items() if key.startswith(f"{module}.")
        }  # fmt: skip
        if form == "gptq":
            found = unpackers.gptq(parts, bits, 1 if kind == "sym" else 0)
        else:
            found = unpackers.packed(parts, bits)
        assert np.array_equal(found, read_float(whole.checkpoint, f"{module}.weight"))
        exact = model.get_submodule(module).weight.detach().numpy()
        assert np.abs(found - exact).max() < 1.1 * np.abs(exact).max() / (1 << bits) * 2
    whole.close()


def test_awq_bit_by_bit(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tiny(tmp_path / "model", "llama")
    make(tmp_path / "model", tmp_path / "out", "awq", "w4g32")
    whole = open_whole(str(tmp_path / "out"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        parts = {k.removeprefix(f"{module}."): v for k, v in stored.items() if k.startswith(module)}
        assert np.array_equal(
            unpackers.awq(parts), read_float(whole.checkpoint, f"{module}.weight")
        )
    whole.close()


def papers_gptq(weights: Any, gram: Any, scales: Any, lows: Any, size: int, top: int) -> Any:
    """Algorithm 1 of arXiv 2210.17323 in float64, one column at a time, with given grids."""
    w, h = weights.double().clone(), gram.double().clone()
    h += torch.eye(len(h), dtype=h.dtype) * 0.01 * h.diagonal().mean()
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes = torch.empty(weights.shape, dtype=torch.int64)
    for j in range(w.shape[1]):
        scale, low = scales[:, j // size].double(), lows[:, j // size].double()
        code = (torch.round(w[:, j] / scale) - low).clamp(0, top)
        codes[:, j] = code.long()
        error = (w[:, j] - (code + low) * scale) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:][None]
    return codes


@pytest.mark.parametrize("scheme", ["w4g32", "w3g32-asym", "w8"])
def test_gptq_of_the_paper(scheme: str) -> None:
    """Columns in their order, and grids found beforehand: the codes of the paper's algorithm."""
    torch.manual_seed(1)
    mixing = torch.randn(256, 256) * torch.rand(256)
    inputs = torch.randn(2000, 256) @ mixing
    weights, gram = torch.randn(96, 256), inputs.T @ inputs
    kind = Grid(parse_scheme(scheme, True))
    # As `static` finds grids, but with columns that already lie in the order of their activation.
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    weights, gram = weights[:, order].contiguous(), gram[order][:, order].contiguous()
    found = solve(weights.T.contiguous, gram.clone, kind, Settings("static"), 2, "w")
    size = kind.scheme.size(256)
    expected = papers_gptq(
        weights, gram, torch.from_numpy(found.scales.T.copy()),
        -torch.from_numpy(found.zeros.T.astype(np.float32)), size, kind.scheme.top,
    )  # fmt: skip
    # Where a value lies between two codes, float32 and float64 may part; the rest follows it.
    same = (torch.from_numpy(found.codes.T.astype(np.int64)) == expected).float().mean()
    assert float(same) > 0.99

    def lost(values: Any) -> float:
        change = torch.from_numpy(values).double() - weights.double()
        return float((change @ gram.double() * change).sum())

    plain = rounded(weights.T.contiguous().numpy(), gram.diagonal().numpy(), kind, 1)
    assert lost(found.values()) < 0.6 * lost(plain.values())


@pytest.mark.parametrize("order", ["static", "groups", "columns", "none"])
def test_orders(order: Any) -> None:
    """Any order loses less than rounding, with any number of threads the same codes."""
    torch.manual_seed(2)
    inputs = torch.randn(500, 128) @ torch.randn(128, 128)
    weights, gram = torch.randn(64, 128), inputs.T @ inputs
    kind = Grid(parse_scheme("w3g32", True))
    one, two = (
        solve(weights.T.contiguous, gram.clone, kind, Settings(order), n, "w") for n in (1, 2)
    )
    assert np.array_equal(one.codes, two.codes)
    assert one.in_order is (order != "columns")
    plain = rounded(weights.T.contiguous().numpy(), None, kind, 1)
    costs = [
        float((change @ gram * change).sum())
        for change in (torch.from_numpy(q.values()) - weights for q in (one, plain))
    ]
    assert costs[0] < 0.7 * costs[1]


def test_grids_are_searched_for() -> None:
    """No grid of a fine sweep over ranges is much better; half of float16's steps is allowed."""
    rng = np.random.default_rng(5)
    weights = rng.standard_t(4, (32, 40)).astype(np.float32)
    importance = rng.uniform(0.1, 10, 32).astype(np.float32)
    for word in ("w4g32", "w3g32-asym", "w2g32"):
        kind = Grid(parse_scheme(word, True))
        found = rounded(weights, importance, kind, 1)
        error = ((found.values().T - weights) ** 2 * importance[:, None]).sum(0)
        best = np.full(40, np.inf)
        top, middle = kind.scheme.top, kind.scheme.middle
        for share in np.linspace(0.2, 1.2, 101):
            low, high = weights.min(0) * share, weights.max(0) * share
            if kind.scheme.symmetric:
                largest = np.abs(weights).max(0) * share
                grids = [(largest / middle, middle), (-largest / middle, middle)]
            else:
                scale = (high.clip(0) - low.clip(max=0)) / top
                grids = [(scale, np.round(-low.clip(max=0) / scale))]
            for scale, zero in grids:
                codes = (np.round(weights / scale) + zero).clip(0, top)
                lost = (((codes - zero) * scale - weights) ** 2 * importance[:, None]).sum(0)
                best = np.minimum(best, lost)
        assert error.sum() < 1.03 * best.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    """8 bits by each method: the model is nearly what it was, so scales are where they belong."""
    whole = tiny(tmp_path / "model", family)
    ids = torch.tensor(windows().ids[:4])
    with torch.no_grad():
        expected = whole(ids).logits
    experts = family in ("mixtral", "qwen3_moe")  # a route that changes its mind changes a lot
    refused: list[str] = []
    told = ""
    for target, scheme, form in (
        ("gptq", "w8g32", None),
        ("awq", "w8g32-asym", "compressed-tensors"),
        ("int8", "w8a8", None),
    ):
        folder = tmp_path / f"{target}-{scheme}"
        try:
            make(tmp_path / "model", folder, target, scheme, format=form)
        except PackError as error:
            told = error.message
            refused.append(target)
            assert not folder.exists()
            continue
        change = (logits(folder, ids) - expected).abs()
        limit = float(expected.abs().max()) * (0.05 if not experts else 0.3)
        assert float(change.max()) < limit, target
        assert float(change.mean()) < limit / (5 if not experts else 20), target
    assert refused == {"gpt2": ["awq", "int8"], "olmo2": ["int8"]}.get(family, [])
    assert not told or any(t in told for t in ("inputs first, which", "takes the scales of any"))


@pytest.mark.parametrize(
    ("target", "scheme", "more"),
    [
        ("gptq", "w4g32", {}),
        ("gptq", "w3g64", {}),
        ("awq", "w4g32-sym", {}),
        ("int8", "w8a16", {}),
        ("gptq", "w4", {"calibrated": False}),
    ],
)
def test_transformers_loads_compressed_tensors(
    target: str, scheme: str, more: Any, tmp_path: Path
) -> None:
    """With the library of the format: the logits of what pack reads back."""
    pytest.importorskip("compressed_tensors")
    tiny(tmp_path / "model", "qwen2")
    out = tmp_path / "out"
    make(tmp_path / "model", out, target, scheme, format="compressed-tensors", **more)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.tensor(windows().ids[:2])
    with torch.no_grad():
        expected = loaded(ids).logits
    assert float((logits(out, ids) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("scheme", ["w4g32-asym", "w3g64-asym"])
def test_compressed_zero_points(scheme: str, tmp_path: Path) -> None:
    """As the format's own library decompresses them.

    transformers 5.23 loads none with zero points, not llmcompressor's either: it wants them
    unpacked.
    """
    packed = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    tiny(tmp_path / "model", "llama")
    make(tmp_path / "model", tmp_path / "out", "gptq", scheme, format="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    whole = open_whole(str(tmp_path / "out"))
    module = "model.layers.1.mlp.down_proj"
    parts = {k.removeprefix(f"{module}."): v for k, v in stored.items() if k.startswith(module)}
    found = packed.PackedQuantizationCompressor.decompress(
        parts, QuantizationScheme(**config["config_groups"]["group_0"])
    )
    mine = read_float(whole.checkpoint, f"{module}.weight")
    assert np.array_equal(found["weight"].float().numpy(), mine)
    whole.close()


def test_int8_with_activations_loads(tmp_path: Path) -> None:
    """transformers rounds the inputs as well, which changes little."""
    pytest.importorskip("compressed_tensors")
    whole = tiny(tmp_path / "model", "llama")
    make(tmp_path / "model", tmp_path / "out", "int8", "w8a8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    [group] = config["config_groups"].values()
    assert group["input_activations"]["dynamic"] is True
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    ids = torch.tensor(windows().ids[:2])
    with torch.no_grad():
        assert float((loaded(ids).logits - whole(ids).logits).abs().max()) < 0.1 * float(
            whole(ids).logits.abs().max()
        )


def test_nf4(tmp_path: Path) -> None:
    """Nearest of the paper's values, two in a byte; as bitsandbytes' own kernels, if installed."""
    from safetensors.numpy import load_file

    whole = tiny(tmp_path / "model", "llama")
    make(tmp_path / "model", tmp_path / "out", "bnb", "nf4")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    exact = whole.get_submodule(module).weight.detach().numpy()
    table, largest = (stored[f"{module}.weight.{end}"] for end in ("quant_map", "absmax"))
    blocks = exact.reshape(-1, 64)
    assert np.array_equal(largest, np.abs(blocks).max(1))
    shares = blocks / largest[:, None]
    codes = np.abs(shares[:, :, None] - table).argmin(2).reshape(-1, 2)
    assert np.array_equal(stored[f"{module}.weight"].reshape(-1), codes[:, 0] * 16 + codes[:, 1])
    read = open_whole(str(tmp_path / "out"))
    mine = read_float(read.checkpoint, f"{module}.weight")
    assert np.array_equal(mine, (table[codes].reshape(-1, 64) * largest[:, None]).reshape(64, 128))
    read.close()
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.from_numpy(exact), 64, quant_type="nf4")
    assert np.array_equal(functional.dequantize_4bit(packed, state).numpy(), mine)


def test_one_pass_and_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held in the middle of a layer, or run again for each matrix: the same bytes."""
    from exporters.gptq.rounder import GptqRounder

    tiny(tmp_path / "model", "gemma2")
    made = [make(tmp_path / "model", tmp_path / "one", "gptq", "w4g32")]
    monkeypatch.setattr(GptqRounder.__init__, "__defaults__", (0,))
    made.append(make(tmp_path / "model", tmp_path / "many", "gptq", "w4g32"))
    one, many = ({o.path: o.sha256 for o in m.outputs if o.path != "pack.lock"} for m in made)
    assert one == many


def test_a_recipe_and_an_adapter(pack: Pack, tmp_path: Path) -> None:
    """A merge that has not run gives the bytes of merging first; a base with an adapter runs."""
    recipe = tmp_path / "merge.yaml"
    base = TRAINED.parent
    recipe.write_text(
        f"merge_method: linear\nmodels: [{{model: {base}/code}}, {{model: {base}/docstrings}}]\n"
        "parameters: {weight: 0.5}\n"
    )
    text = ROOT / "README.md"
    more = ("--calibration", text, "--context", 64, "--windows", 8, "-q")
    assert pack("merge", "linear", recipe, "-q", cwd=tmp_path).code == 0
    assert pack("quantize", "--to", "gptq", "w4g128", *more, cwd=tmp_path).code == 0
    ran = pack("quantize", "--to", "gptq", "w4g128", recipe, "-o", "direct", *more, cwd=tmp_path)
    assert ran.code == 0, ran.err
    first = tmp_path / "dist" / "merge" / "gptq-w4g128"
    # What is quantized next is the model that was merged, not what was made of it.
    ran = pack("quantize", "--to", "gguf", "q8_0", "--no-verify", cwd=tmp_path)
    assert ran.code == 0, ran.err
    lock = json.loads((tmp_path / "dist" / "merge" / "gguf-q8_0" / "pack.lock").read_text())
    assert lock["model"] == "merged"
    seen = json.loads(pack("inspect", first, "--json", cwd=tmp_path).out)
    assert not any("packed" in note for note in seen["notes"])
    assert seen["quantized"] == "gptq, 4 bits, groups of 128"
    ran = pack("diff", tmp_path / "dist" / "merge" / "merged", first, "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    for name in ("model.safetensors", "config.json", "quantize_config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    lock = json.loads((tmp_path / "direct" / "pack.lock").read_text())
    assert lock["details"]["calibration"]["windows"] == 8
    ran = pack("quantize", "--to", "awq", "w4g128", f"{base}/base+{base}/lora-code", "-o", "lora",
               *more, cwd=tmp_path)  # fmt: skip
    assert ran.code == 0, ran.err


def test_better_than_rounding(pack: Pack, tmp_path: Path) -> None:
    """On the trained model, on text that it was not calibrated on; as pack eval measures it."""
    corpus = tmp_path / "text.txt"
    corpus.write_text((ROOT / "examples" / "make_models.py").read_text() * 3)
    options = ("--calibration", corpus, "--context", 256, "--windows", 24)
    for words in (
        ("gptq", "w3g128"), ("awq", "w3g128-asym", "--format", "compressed-tensors"),
    ):  # fmt: skip
        ran = pack("quantize", "--to", *words, *options, TRAINED, "-o", words[0], cwd=tmp_path)
        assert ran.code == 0, ran.err
    ran = pack("quantize", "--to", "gptq", "w3g128", "--no-calibration", TRAINED, "-o", "rtn",
               cwd=tmp_path)  # fmt: skip
    assert ran.code == 0, ran.err
    ran = pack("eval", "gptq", "awq", "rtn", "--reference", TRAINED, "--windows", 24, "--text",
               ROOT / "examples" / "corpus.py", "--json", cwd=tmp_path)  # fmt: skip
    found = {one["name"]: one.get("kl_mean") for one in json.loads(ran.out)["models"]}
    assert found["gptq"] < 0.7 * found["rtn"]
    assert found["awq"] < 0.7 * found["rtn"]


def test_killed_runs(tmp_path: Path) -> None:
    """SIGKILL in the middle: run again, it continues at that layer and gives the same bytes."""
    model = tmp_path / "model"
    tiny(model, "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((TRAINED / name).read_bytes())
    config = transformers.LlamaConfig(**{**COMMON, "vocab_size": 2048, "num_hidden_layers": 6})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    command = ("quantize", "--to", "awq", "w4g32", "--context", "128", "--windows", "64",
               "--calibration", ROOT / "README.md", model)  # fmt: skip
    process = pack_process(*command, "-o", "whole", cwd=tmp_path)
    assert process.wait() == 0
    done = 0
    for _ in range(50):
        process = pack_process(*command, "-o", "killed", cwd=tmp_path)
        layers = tmp_path / ".killed.layers"
        while process.poll() is None and len(list(layers.glob("layer-*.safetensors"))) <= done:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "killed").exists():
            break
        done = len(list(layers.glob("layer-*.safetensors")))
        if done == 6:
            break
    if not (tmp_path / "killed").exists():
        process = pack_process(*command, "-o", "killed", cwd=tmp_path)
        _, told = process.communicate()
        assert process.returncode == 0, told
    assert done >= 2
    files = {p.name for p in (tmp_path / "whole").iterdir()}
    assert files == {p.name for p in (tmp_path / "killed").iterdir()}
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


WRONG: dict[str, tuple[tuple[object, ...], str]] = {
    "group that does not divide": (("gptq", "w4g128", "narrow"), "which groups of 128 do not"),
    "no such scheme": (("gptq", "w5g128", TRAINED), "no scheme of weights on a grid"),
    "no such int8": (("int8", "w4a4", TRAINED), "no scheme of int8"),
    "AWQ of 3 bits": (("awq", "w3g128", TRAINED), "has 4 bits and groups"),
    "AWQ without zero points": (("awq", "w4g128-sym", TRAINED), "has zero points"),
    "AWQ without text": (("awq", "w4g128", TRAINED, "--no-calibration"), "looking at activations"),
    "AWQ as GPTQ": (("gptq", "w4g128", TRAINED, "--format", "awq"), "cannot be written as 'awq'"),
    "nearest GPTQ": (("gptq", "w4g128", TRAINED, "--nearest"), "--nearest is for AWQ"),
    "act order of AWQ": (("awq", "w4g128", TRAINED, "--act-order", "columns"), "awq has not"),
    "empty text": (("gptq", "w4g128", TRAINED, "--calibration", "empty.txt"), "holds no text"),
    "short text": (("gptq", "w4g128", TRAINED, "--calibration", "short.txt"), "too few for 2"),
    "chat without template": (
        ("gptq", "w4g128", "bare", "--calibration", "chat.jsonl"), "has no chat template",
    ),
    "quantized otherwise": (("gptq", "w4g128", "fp8"), "in a way that is not read here"),
    "weights that are NaN": (("gptq", "w4g32", "nan", "--no-calibration"), "holds NaN or infinity"),
    "inputs that are NaN": (("gptq", "w4g32", "nan"), "NaN or infinity"),
    "no such bnb": (("bnb", "nf5", TRAINED), "no scheme of bnb"),
    "no such text": (("gptq", "w4g128", TRAINED, "--calibration", "gone.txt"), "there is no file"),
    "text without effect": (
        ("bnb", "nf4", TRAINED, "--calibration", "short.txt"), "runs the model",
    ),
    "order of a GGUF": (("gguf", "q8_0", TRAINED, "--act-order", "none"), "of GPTQ and AWQ"),
    "few tokens": (
        ("gptq", "w4g128", TRAINED, "--context", "8", "--windows", "4"), "too few to calibrate on",
    ),
    "GGUF's option": (("gptq", "w4g128", TRAINED, "--pure"), "of GGUF, which is not made here"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(case: str, pack: Pack, tmp_path: Path) -> None:
    """One clear error each, and nothing is left."""
    from safetensors.torch import load_file, save_file

    words, message = WRONG[case]
    for name in ("narrow", "nan", "bare", "fp8"):
        if name in map(str, words):
            tiny(tmp_path / name, "llama")
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (tmp_path / name / file).write_bytes((TRAINED / file).read_bytes())
            config = transformers.LlamaConfig(**{**COMMON, "vocab_size": 2048})
            transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    if "nan" in map(str, words):
        path = tmp_path / "nan" / "model.safetensors"
        held = load_file(path)
        held["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(held, path, {"format": "pt"})
    if "fp8" in map(str, words):
        path = tmp_path / "fp8" / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
        path.write_text(json.dumps(config))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hello. " * 2000}]}) + "\n"
    )
    before = sorted(p.name for p in tmp_path.iterdir())
    ran = pack("quantize", "--to", *words, "-o", "out", cwd=tmp_path)
    assert ran.code in (1, 2)
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()
    left = [p.name for p in tmp_path.iterdir() if p.name not in before]
    assert all(name.startswith(".out.") for name in left)


def test_continued_with_its_own_settings_alone(tmp_path: Path) -> None:
    """What a stopped run left is not mixed with other settings, nor with a damaged layer."""
    import shutil

    tiny(tmp_path / "model", "llama")
    options: dict[str, Any] = {"format": "compressed-tensors", "calibrated": False}
    make(tmp_path / "model", tmp_path / "clean", "gptq", "w4g32", **options)
    expected = (tmp_path / "clean" / "model.safetensors").read_bytes()
    stopped = tmp_path / ".out.layers"
    for damage in (False, True):
        whole = open_whole(str(tmp_path / "model"))
        wanted = Wanted("gptq", "w4g32", threads=2, **{**options, "calibrated": not damage})
        request = plan_target(wanted, whole, windows(), tmp_path / "out", True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "exporters.linears.work.LinearsWork.jobs",
                lambda *_: (_ for _ in ()).throw(OSError),
            )
            with pytest.raises(OSError):  # noqa: PT011 (the one that is thrown)
                run_linears(whole, request, SILENT)
        whole.close()
        assert len(list(stopped.glob("layer-*.safetensors"))) == 2
        if damage:
            layer = stopped / "layer-00001.safetensors"
            layer.write_bytes(layer.read_bytes()[:-9])
        make(tmp_path / "model", tmp_path / "out", "gptq", "w4g32", **options)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
        assert not stopped.exists()
        shutil.rmtree(tmp_path / "out")


def test_layers_that_nobody_continues_go_with_the_next_result(
    pack: Any, example_models: Path, tmp_path: Path
) -> None:
    """Another format in the same place."""
    stopped = tmp_path / ".out.layers"
    stopped.mkdir()
    (stopped / "layer-00000.safetensors").write_bytes(b"what a run of another format left")
    words = ["--to", "gguf", "q8_0", example_models / "base", "--no-verify"]
    ran = pack("quantize", *words, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def broken(stored: dict[str, Any], how: str) -> dict[str, Any]:
    """A quantized file whose parts do not fit one another."""
    module = "model.layers.0.mlp.up_proj"
    if how == "words":
        stored[f"{module}.qweight"] = stored[f"{module}.qweight"][:-1].clone()
    elif how == "groups":
        stored[f"{module}.g_idx"] = stored[f"{module}.g_idx"] + 1000
    elif how == "zeros":
        stored[f"{module}.qzeros"] = stored[f"{module}.qzeros"][:, :-1].clone()
    elif how == "scales":
        stored[f"{module}.scales"] = stored[f"{module}.scales"][:0].clone()
    elif how == "types":
        stored[f"{module}.qweight"] = stored[f"{module}.qweight"].float()
    elif how == "missing":
        del stored[f"{module}.scales"]
    return stored


@pytest.mark.parametrize("how", ["words", "groups", "zeros", "scales", "types", "missing"])
def test_broken_files(how: str, pack: Pack, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny(tmp_path / "model", "llama")
    make(tmp_path / "model", tmp_path / "out", "gptq", "w4g32", calibrated=False)
    path = tmp_path / "out" / "model.safetensors"
    save_file(broken(load_file(path), how), path, {"format": "pt"})
    ran = pack("quantize", "--to", "int8", "w8a16", "out", "-o", "again", cwd=tmp_path)
    assert ran.code == 1
    assert "model.layers.0.mlp.up_proj" in ran.err
    assert "Traceback" not in ran.err


def test_a_layer_that_cannot_be_opened_just_now_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LayerStore(tmp_path / "out", "same", 1)
    store.begin()
    store.put(0, {"t": (DTYPES["F32"], np.zeros((2, 2), np.float32))}, [], tmp_path)
    really = os.open

    def stale(path: Any, *more: Any, **options: Any) -> int:
        if str(path).endswith(".safetensors"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return really(path, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", stale)
        assert store.done == []
    assert store.done == [0]
    store.close()
