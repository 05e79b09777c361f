"""pack eval: perplexity and divergence, against plain loops over whole models."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Pack = Callable[..., Any]
WINDOWS, CONTEXT = 12, 64


@pytest.fixture
def home(example_models: Path, tmp_path: Path) -> Path:
    """A folder with the example models, a recipe, and a text."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "models").symlink_to(example_models)
    shutil.copyfile(ROOT / "recipes" / "ties-release.yaml", tmp_path / "r.yaml")
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    (tmp_path / "text.txt").write_text("\n".join(topics[name] for name in sorted(topics)[:6]))
    return tmp_path


def _eval(pack: Pack, home: Path, *words: object) -> dict[str, dict[str, Any]]:
    ran = pack("eval", *words, "--text", "text.txt", "--context", CONTEXT, "--windows", WINDOWS,
               "--json", cwd=home)  # fmt: skip
    assert ran.code == 0, ran.err
    return {one["name"]: one for one in json.loads(ran.out)["models"]}


def _logits(folder: Path, home: Path) -> tuple[Any, Any]:
    """Windows as `pack eval` takes them, and logits of the whole model on them."""
    from mergekit_lite.evaluate.text import cut, read_text

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows = cut(read_text(home / "text.txt"), tokenizer, "m", CONTEXT, WINDOWS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(windows.ids)
    with torch.no_grad():
        return ids, torch.cat([model(batch).logits for batch in ids.split(4)]).double()


def test_as_a_plain_loop(pack: Pack, home: Path) -> None:
    """Perplexity, interval, divergence and agreement of two models of the examples."""
    base, code = "examples/models/base", "examples/models/code"
    found = _eval(pack, home, code, "--reference", base)
    ids, theirs = _logits(home / base, home)
    _, ours = _logits(home / code, home)
    loss = torch.nn.functional.cross_entropy
    each = [loss(row[:-1], window[1:]).item() for row, window in zip(ours, ids, strict=True)]
    mean, error = np.mean(each), np.std(each, ddof=1) / math.sqrt(WINDOWS)
    assert found[code]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)
    assert found[code]["low"] == pytest.approx(math.exp(mean - 1.96 * error), rel=1e-3)
    assert found[code]["high"] == pytest.approx(math.exp(mean + 1.96 * error), rel=1e-3)
    p, q = torch.log_softmax(theirs, -1), torch.log_softmax(ours, -1)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert found[code]["kl_mean"] == pytest.approx(divergence.mean().item(), rel=1e-3)
    assert found[code]["kl_median"] == pytest.approx(np.median(divergence.numpy()), rel=1e-3)
    assert found[code]["kl_p99"] == pytest.approx(np.quantile(divergence.numpy(), 0.99), rel=1e-3)
    same = (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    assert found[code]["agreement"] == pytest.approx(same, abs=2e-3)
    before = math.exp(
        np.mean([loss(r[:-1], w[1:]).item() for r, w in zip(theirs, ids, strict=True)])
    )
    assert found[base]["perplexity"] == pytest.approx(before, rel=1e-3)
    change = found[code]["perplexity"] / before - 1
    assert found[code]["perplexity_change"] == pytest.approx(change, rel=2e-2, abs=1e-3)


def test_a_recipe_that_has_not_run(pack: Pack, home: Path) -> None:
    """The same as what it writes, but for its rounding; and base+adapter as what that merges to."""
    assert pack("merge", "r.yaml", "-q", cwd=home).code == 0
    merged = "dist/ties-release/merged"
    found = _eval(pack, home, "r.yaml", "--reference", merged)
    assert found["r.yaml"]["kl_mean"] < 1e-4
    adapted = "examples/models/base+examples/models/lora-code"
    assert pack("merge", "adapter", adapted, "--dtype", "float32", "-q", cwd=home).code == 0
    found = _eval(pack, home, adapted, "--reference", "dist/lora-code/merged")
    assert found[adapted]["kl_mean"] < 1e-8


def test_gguf_by_llama_cpp(pack: Pack, home: Path) -> None:
    """What llama.cpp computes of an unquantized file is what the model computes."""
    pytest.importorskip("xllamacpp")
    model = "examples/models/base"
    for scheme in ("bf16", "q4_0"):
        ran = pack("quantize", "--to", "gguf", scheme, model, "-o", scheme, "--no-verify", "-q",
                   cwd=home)  # fmt: skip
        assert ran.code == 0, ran.err
    whole, quantized = (next((home / s).glob("*.gguf")).relative_to(home) for s in ("bf16", "q4_0"))
    found = _eval(pack, home, whole, quantized, "--reference", model)
    assert found[str(whole)]["kl_mean"] < 1e-5
    assert found[str(whole)]["kl_mean"] < found[str(quantized)]["kl_mean"] < 0.5
    assert found[str(quantized)]["tokens_per_second"] > 0
    assert "llama.cpp" in found[str(quantized)]["by"]
    ran = pack("eval", quantized, cwd=home)
    assert ran.code == 1
    assert "no tokenizer" in ran.err


def test_text(pack: Pack, home: Path) -> None:
    """JSON lines with texts or conversations, the text that comes along, and mistakes."""
    model = "examples/models/base"
    lines = [{"text": "def f(x):\n    return x\n" * 20},
             {"messages": [{"role": "user", "content": "What is a list? " * 30}]}]  # fmt: skip
    (home / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    words = ("eval", model, "--context", 32, "--json")
    ran = pack(*words, "--text", "t.jsonl", cwd=home)
    assert ran.code == 0, ran.err
    ran = pack(*words, cwd=home)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["text"]["text"] == "default.txt"
    (home / "short.txt").write_text("short")
    (home / "empty.txt").write_text(" \n")
    (home / "broken.jsonl").write_text('{"text": "a"}\n{"messages": 3}')
    (home / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in {
        "short.txt": "too few for 2 windows of 32", "empty.txt": "holds no text",
        "broken.jsonl": "broken.jsonl, line 2: has neither", "binary.txt": "cannot be read",
    }.items():  # fmt: skip
        ran = pack(*words, "--text", name, cwd=home)
        assert ran.code == 1
        assert message in ran.err
    ran = pack(*words, "--device", "cuda:9", cwd=home)
    assert ran.code == 1
    assert "sees no such device" in ran.err


def test_a_model_without_chat_template(pack: Pack, home: Path, tmp_path: Path) -> None:
    shutil.copytree((home / "examples" / "models" / "base").resolve(), home / "plain")
    for name in ("chat_template.jinja",):
        (home / "plain" / name).unlink(missing_ok=True)
    config = home / "plain" / "tokenizer_config.json"
    document = json.loads(config.read_text())
    document.pop("chat_template", None)
    config.write_text(json.dumps(document))
    (home / "t.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    ran = pack("eval", "plain", "--text", "t.jsonl", cwd=home)
    assert ran.code == 1
    assert "has no chat template" in ran.err


def test_other_vocabularies(pack: Pack, home: Path) -> None:
    """A model that does not know the tokens of the first is refused."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(home / "small")
    ran = pack("eval", "examples/models/base", "small", "--text", "text.txt", cwd=home)
    assert ran.code == 1
    assert "small: knows 40 tokens" in ran.err
