"""ONNX folders in the programs that run them: the same tokens and numbers as transformers'.

onnxruntime-genai is installed with pack. Two others are asked where the environment names them:
``PACK_TESTS_OPTIMUM`` a Python that has optimum-onnx, ``PACK_TESTS_BROWSER`` a folder in which the
packages of tests/browser/package.json are installed, for transformers.js in Chromium.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
genai = pytest.importorskip("onnxruntime_genai")

from exporters.onnx.run import OnnxRequest, run_onnx  # noqa: E402
from exporters.onnx.schemes import Route, find_scheme  # noqa: E402
from exporters.onnx.session import GraphRun  # noqa: E402
from mergekit_lite.cli.progress import make_progress  # noqa: E402
from mergekit_lite.merge.model import open_whole  # noqa: E402
from tests.evaluate.test_forward import NAMES  # noqa: E402
from tests.exporters.test_linears import COMMON, FAMILIES  # noqa: E402

SILENT = make_progress(True)
TOKENS = 32
END = COMMON["eos_token_id"]
PROMPT = list(range(5, 17))
TEXT = "def add(a, b):"
# An embedding that is the head as well, and scaled, would give one token for ever.
UNTIED = {"tie_word_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **FAMILIES,
    "gemma2": ("Gemma2", {**FAMILIES["gemma2"][1], **UNTIED}),
    "gemma3": ("Gemma3Text", {**FAMILIES["gemma3"][1], **UNTIED}),
    # Their configurations have other names for sizes.
    "gpt_neo": ("GPTNeo", {"num_layers": 2, "num_heads": 4, "window_size": 8,
                           "attention_types": [[["global", "local"], 1]]}),
    "mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 96,
                    **UNTIED}),
}  # fmt: skip

Export = Callable[..., Path]


def decoder(folder: Path, family: str) -> Any:
    """A random model with weights of bfloat16, saved, whose choices of tokens are clear."""
    name, more = MODELS[family]
    torch.manual_seed(4)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, "eos_token_id": END, **more})
    model = getattr(transformers, NAMES.get(name, f"{name}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.05 if parameter.ndim == 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * scale)
    model.to(torch.bfloat16).save_pretrained(folder)
    return model.float()


def export(model: Path, folder: Path, scheme: str = "fp32", route: Route = "auto") -> Path:
    """Export a model."""
    whole = open_whole(str(model))
    try:
        asked = {"to": "onnx", "scheme": scheme}
        run_onnx(whole, OnnxRequest(find_scheme(scheme), folder, asked, route=route, threads=2),
                 SILENT)  # fmt: skip
    finally:
        whole.close()
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random Llama: where it lies, and transformers' model."""
    folder = tmp_path_factory.mktemp("llama")
    return folder, decoder(folder, "llama")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export a model once for all tests of this file."""
    made: dict[tuple[Path, str, Route], Path] = {}

    def get(model: Path, scheme: str, route: Route) -> Path:
        key = model, scheme, route
        if key not in made:
            made[key] = export(model, tmp_path_factory.mktemp("out") / "out", scheme, route)
        return made[key]

    return get


def expected(model: Any, ids: Sequence[int], tokens: int = TOKENS) -> list[int]:
    """What transformers generates if it must not end."""
    row = torch.tensor([list(ids)])
    found = model.generate(
        row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=tokens,
        min_new_tokens=tokens,
    )  # fmt: skip
    return [int(token) for token in found[0, len(ids) :]]


def by_genai(
    folder: Path, rows: Sequence[Sequence[int]], tokens: int = TOKENS, least: int = TOKENS
) -> list[list[int]]:
    """What onnxruntime-genai generates; it must not end before so many tokens."""
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    start = len(rows[0])
    params.set_search_options(
        do_sample=False, max_length=start + tokens, min_length=start + min(least, tokens),
        batch_size=len(rows),
    )  # fmt: skip
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(rows, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(t) for t in generator.get_sequence(at)[start:]] for at in range(len(rows))]


def by_onnxruntime(graph: Path, ids: Sequence[int], tokens: int) -> list[int]:
    """The largest logit of onnxruntime, again and again, if it must not end."""
    run = GraphRun(graph, 1 << 30, 2)
    given, past, found = np.array([list(ids)]), None, []
    for _ in range(tokens):
        logits, past = run.step(given, past)
        logits[..., END] = -np.inf
        found.append(int(logits[0, -1].argmax()))
        given = np.array([found[-1:]])
    return found


def graph_of(folder: Path) -> Path:
    """The one graph of a folder."""
    [found] = (folder / "onnx").glob("*.onnx")
    return found


@pytest.mark.parametrize(
    ("family", "route"),
    [("llama", "genai"), ("llama", "torch"), ("llama tied", "auto"), ("qwen3", "auto"),
     ("gemma2", "auto"), ("gpt2", "torch"), ("gemma3", "torch"), ("olmo2", "torch"),
     ("mixtral", "torch"), ("mistral", "auto"), ("phi3", "auto"), ("gpt_neo", "torch"),
     ("mpt", "torch")],
)  # fmt: skip
def test_genai(family: str, route: Route, tmp_path: Path) -> None:
    """Beyond sliding windows, and of families that name their sizes otherwise."""
    model = decoder(tmp_path / "model", family)
    folder = export(tmp_path / "model", tmp_path / "out", "fp32", route)
    tokens = expected(model, PROMPT)
    assert len(set(tokens)) > 4
    assert by_genai(folder, [PROMPT]) == [tokens]


@pytest.mark.parametrize("route", ["genai", "torch"])
@pytest.mark.parametrize("scheme", ["fp16", "bf16", "int8", "int4", "int4-fp16"])
def test_genai_of_every_scheme(
    scheme: str, route: Route, llama: tuple[Path, Any], exported: Export
) -> None:
    """The tokens of onnxruntime alone; bfloat16 is what the model holds, so also the model's."""
    folder = exported(llama[0], scheme, route)
    found = by_genai(folder, [PROMPT], 8)[0]
    assert found == by_onnxruntime(graph_of(folder), PROMPT, 8)
    if scheme in ("fp16", "bf16"):
        assert found == expected(llama[1], PROMPT, 8)


@pytest.mark.parametrize("route", ["genai", "torch"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int4-fp16"])
def test_genai_tied(scheme: str, route: Route, tmp_path: Path) -> None:
    """A head that is the embedding; of 4 bits, stored once."""
    decoder(tmp_path / "model", "llama tied")
    folder = export(tmp_path / "model", tmp_path / "out", scheme, route)
    graph = onnx.load(graph_of(folder), load_external_data=False).graph
    if scheme != "int8":
        blocks = [list(tensor.dims) for tensor in graph.initializer if tensor.dims[:1] == [96]]
        assert blocks.count([96, 2, 32]) == 1
        assert [96, 64] not in blocks
    assert by_genai(folder, [PROMPT], 8)[0] == by_onnxruntime(graph_of(folder), PROMPT, 8)


@pytest.mark.parametrize("route", ["genai", "torch"])
def test_genai_batch(route: Route, llama: tuple[Path, Any], exported: Export) -> None:
    """genai pads on the right; each row is generated as if it were alone."""
    rows = [[5, 6, 7, 8, 0, 0, 0], [9, 10, 11, 12, 13, 14, 15]]
    found = by_genai(exported(llama[0], "fp32", route), rows, 16)
    for row, tokens in zip(rows, found, strict=True):
        assert tokens == expected(llama[1], [token for token in row if token], 16)


@pytest.mark.parametrize("route", ["genai", "torch"])
def test_genai_end(route: Route, llama: tuple[Path, Any], exported: Export, tmp_path: Path) -> None:
    """A list of ending tokens, out of generation_config.json, is heeded, but for absent ones."""
    path, model = llama
    tokens = expected(model, PROMPT)
    end = tokens[9]
    shutil.copytree(path, tmp_path / "model")
    stated = {"eos_token_id": [END, end, 96], "do_sample": True, "top_p": 0.9, "bos_token_id": 1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(stated))
    folder = export(tmp_path / "model", tmp_path / "out", "fp32", route)
    # genai's sequence is without the token that ends it.
    assert by_genai(folder, [PROMPT], least=0) == [tokens[: tokens.index(end)]]


def test_genai_example(example_models: Path, exported: Export) -> None:
    """A trained model, from text to text, by genai's own tokenizer and chat template."""
    path = example_models / "reference"
    folder = exported(path, "fp32", "auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    own = genai.Tokenizer(genai.Model(str(folder)))
    for text in (TEXT, "Ünïcode — 漢字 🙂  x", "  two\t\ttabs\n\n", "1234.5e-6 don't"):
        assert own.encode(text).tolist() == tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": "Write a loop."}]
    assert own.apply_chat_template(json.dumps(chat), add_generation_prompt=True) == (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = tokenizer(TEXT)["input_ids"]
    assert by_genai(folder, [ids]) == [expected(model, ids)]


# ---- optimum


def bert(folder: Path, kind: str, vocabulary: int = 96) -> Any:
    """A random BERT, saved."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def by_optimum(jobs: Sequence[dict[str, Any]], folder: Path) -> list[Any]:
    """Results of tests/exporters/optimum_runs.py; skipped where there is no optimum."""
    python = os.environ.get("PACK_TESTS_OPTIMUM")
    if not python:
        pytest.skip("PACK_TESTS_OPTIMUM names no Python that has optimum-onnx")
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [python, ROOT / "tests" / "exporters" / "optimum_runs.py", "jobs.json", "results.json"],
        cwd=folder, env={**kept, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.skipif("PACK_TESTS_OPTIMUM" not in os.environ, reason="needs optimum-onnx")
def test_optimum_decoders(
    llama: tuple[Path, Any], exported: Export, example_models: Path, tmp_path: Path
) -> None:
    """Both kinds of graphs; those of torch.onnx with sequences that are padded on the left."""
    jobs: list[dict[str, Any]] = []
    wanted: list[list[list[int]]] = []

    def ask(folder: Path, rows: list[list[int]], **more: Any) -> None:
        wanted.append(rows)
        jobs.append({"folder": folder, "kind": "decoder", "tokens": TOKENS, **more})

    for family in ("gpt2", "gemma3", "qwen3_moe"):
        model = decoder(tmp_path / family, family)
        folder = export(tmp_path / family, tmp_path / f"{family}-out", "fp32", "torch")
        ask(folder, [expected(model, PROMPT)], ids=[PROMPT])
    path, model = llama
    for route in ("genai", "torch"):
        alone = expected(model, PROMPT)
        ask(exported(path, "fp32", route), [alone], ids=[PROMPT])
        ask(exported(path, "bf16", route), [alone], ids=[PROMPT])
        for scheme in ("int8", "int4", "int4-fp16"):
            folder = exported(path, scheme, route)
            ask(folder, [by_onnxruntime(graph_of(folder), PROMPT, 8)], ids=[PROMPT], tokens=8)
    short = expected(model, PROMPT[:8])
    ask(exported(path, "fp32", "torch"), [short, alone], ids=[[0] * 4 + PROMPT[:8], PROMPT],
        mask=[[0] * 4 + [1] * 8, [1] * 12])  # fmt: skip
    trained = example_models / "reference"
    whole = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(trained)(TEXT)["input_ids"]
    ask(exported(trained, "fp32", "auto"), [expected(whole, ids)], text=TEXT)
    for job, rows, found in zip(jobs, wanted, by_optimum(jobs, tmp_path), strict=True):
        assert found == rows, job["folder"]


@pytest.mark.skipif("PACK_TESTS_OPTIMUM" not in os.environ, reason="needs optimum-onnx")
def test_optimum_encoders(tmp_path: Path) -> None:
    """Features and classes of a padded batch."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
    mask = (ids != 0).long()
    jobs, wanted = [], []
    for name, kind in (("BertModel", "features"), ("BertForSequenceClassification", "classes")):
        model = bert(tmp_path / kind, name)
        with torch.no_grad():
            exact = model(input_ids=ids, attention_mask=mask)[0].numpy()
        for scheme, apart in (("fp32", 1e-5), ("int8", 0.05)):
            folder = export(tmp_path / kind, tmp_path / f"{kind}-{scheme}", scheme)
            jobs.append({"folder": folder, "kind": kind, "ids": ids.tolist(),
                         "mask": mask.tolist()})  # fmt: skip
            wanted.append((exact, apart))
    seen = mask.numpy() == 1
    for (exact, apart), found in zip(wanted, by_optimum(jobs, tmp_path), strict=True):
        difference = np.abs(np.array(found) - exact)
        assert (difference[seen] if exact.ndim == 3 else difference).max() < apart


# ---- a browser


def by_browser(*words: object) -> dict[str, Any]:
    """Answer of tests/browser/generate.mjs; skipped where its packages are not installed."""
    folder = os.environ.get("PACK_TESTS_BROWSER")
    if not folder or not (Path(folder) / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip("PACK_TESTS_BROWSER names no folder with transformers.js")
    script = ROOT / "tests" / "browser" / "generate.mjs"
    done = subprocess.run(
        ["node", script, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def exact_products(folder: Path, to: Path) -> Path:
    """A copy whose products of 4 bits do not round what they multiply, as those of browsers."""
    shutil.copytree(folder, to)
    path = graph_of(to)
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(model, path)
    return path


@pytest.mark.skipif("PACK_TESTS_BROWSER" not in os.environ, reason="needs transformers.js")
@pytest.mark.parametrize("route", ["genai", "torch"])
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [("fp32", "fp32"), ("fp16", "fp16"), ("int8", "q8"), ("int4", "q4"), ("int4-fp16", "q4f16")],
)
def test_browser(
    scheme: str, dtype: str, route: Route, example_models: Path, exported: Export, tmp_path: Path
) -> None:
    path = example_models / "reference"
    folder = exported(path, scheme, route)
    ids = transformers.AutoTokenizer.from_pretrained(path)(TEXT)["input_ids"]
    if scheme in ("fp32", "fp16"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokens = expected(model.eval(), ids, 16)
    else:
        tokens = by_onnxruntime(exact_products(folder, tmp_path / "exact"), ids, 16)
    found = by_browser(folder, dtype, TEXT, 16)
    assert found["prompt_tokens"] == ids
    assert found["tokens"] == tokens


@pytest.mark.skipif("PACK_TESTS_BROWSER" not in os.environ, reason="needs transformers.js")
def test_browser_encoder(example_models: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(example_models / "reference")
    model = bert(tmp_path / "model", "BertModel", len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    given = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        exact = model(given["input_ids"], given["attention_mask"]).last_hidden_state.numpy()
    for scheme, dtype, apart in (("fp32", "fp32", 1e-5), ("int8", "q8", 0.05)):
        folder = export(tmp_path / "model", tmp_path / scheme, scheme)
        found = by_browser("--encode", folder, dtype, TEXT)
        assert found["shape"] == list(exact.shape)
        assert np.abs(np.array(found["values"]) - exact.reshape(-1)[:8]).max() < apart
