"""Importance matrices that pack measures: sums of squared inputs, in llama.cpp's form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from exporters.gguf.imatrix import read_imatrix
from mergekit_lite.checkpoint.locate import open_checkpoint
from mergekit_lite.cli.progress import make_progress
from mergekit_lite.evaluate.inputs import squared_inputs
from tests.evaluate.test_forward import batches, tiny

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

Pack = Callable[..., Any]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3"])
def test_sums_as_hooks_see_them(family: str, tmp_path: Path) -> None:
    """Of every matrix of the layers, by hooks on the whole model."""
    whole = tiny(tmp_path, family)
    expected: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def seen(_module: Any, inputs: Any) -> None:
            rows = inputs[0].detach().double().reshape(-1, inputs[0].shape[-1])
            expected[name] = expected.get(name, 0) + rows.square().sum(0).numpy()

        return seen

    for name, module in whole.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in name:
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    texts = batches()
    with torch.no_grad():
        for batch in texts:
            whole(batch)
    source = open_checkpoint(str(tmp_path), Path())
    found = squared_inputs(source.checkpoint, texts, make_progress(True))
    assert found.keys() == expected.keys()
    for name, sums in expected.items():
        [(expert, own)] = found[name].items()
        assert expert is None
        assert own.tokens == sum(batch.numel() for batch in texts)
        np.testing.assert_allclose(own.sums, sums, rtol=1e-4)


def test_experts(tmp_path: Path) -> None:
    """Each expert has the tokens that were sent to it: twice all of them, together."""
    tiny(tmp_path, "mixtral")
    source = open_checkpoint(str(tmp_path), Path())
    texts = batches()
    found = squared_inputs(source.checkpoint, texts, make_progress(True))
    tokens = sum(batch.numel() for batch in texts)
    for kind in ("w1", "w2", "w3"):
        each = [
            sums.tokens
            for name, parts in found.items() for sums in parts.values()
            if name.startswith("model.layers.1.") and name.endswith(f"{kind}.weight")
        ]  # fmt: skip
        assert sum(each) == 2 * tokens


def test_the_file(pack: Pack, example_models: Path, tmp_path: Path) -> None:
    """Read by gguf's own reader, by ours, and used by quantize as measuring on the spot is."""
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n\nA list is a sequence of items.\n" * 200)
    model = example_models / "base"
    path = tmp_path / "base.imatrix.gguf"
    words = ("imatrix", model, "--text", text, "--windows", 8, "--context", 128, "-o", path)
    ran = pack(*words)
    assert ran.code == 0, ran.err
    assert "14 tensors, on 8 windows of 128 tokens of text.txt" in ran.out
    stored = gguf.GGUFReader(path)
    assert stored.fields["general.type"].contents() == "imatrix"
    assert stored.fields["imatrix.chunk_count"].contents() == 8
    tensors = {tensor.name: tensor.data for tensor in stored.tensors}
    assert tensors["blk.0.attn_q.weight.counts"].reshape(-1)[0] == 8 * 128
    found = read_imatrix(path)
    name = "blk.1.ffn_down.weight"
    np.testing.assert_allclose(found[name], tensors[f"{name}.in_sum2"] / (8 * 128), rtol=1e-6)
    assert "blk.1.ffn_down.weight" in pack("imatrix", path).out
    ran = pack(*words)
    assert ran.code == 1
    assert "already exists" in ran.err
    quantize = ("quantize", "--to", "gguf", "q4_0", model, "--no-verify", "-q")
    assert pack(*quantize, "--imatrix", path, "-o", tmp_path / "a").code == 0
    assert pack(*quantize, "-o", tmp_path / "plain").code == 0
    errors = {}
    for folder in ("a", "plain"):
        [file] = (tmp_path / folder).glob("*.gguf")
        errors[folder] = _weighted_errors(file, model, found)
    assert all(errors["a"][n] < errors["plain"][n] for n in errors["a"])
    ran = pack(*quantize, "--calibration", text, "-o", tmp_path / "b")
    assert ran.code == 0, ran.err
    ran = pack(*quantize, "--calibration", text, "--imatrix", path, "-o", tmp_path / "c")
    assert ran.code == 2
    ran = pack("imatrix", next((tmp_path / "a").glob("*.gguf")), "--text", text)
    assert ran.code == 1
    assert "is a GGUF file" in ran.err


def _weighted_errors(file: Path, model: Path, means: dict[str, Any]) -> dict[str, float]:
    """Squared error of matrices whose rows GGUF leaves in their order, weighted by column."""
    source = open_checkpoint(str(model), Path())
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found = {}
    for layer in (0, 1):
        for short, name in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
            tensor = stored[f"blk.{layer}.{short}.weight"]
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            bits = source.checkpoint.read(f"model.layers.{layer}.{name}.weight")
            exact = (bits.astype(np.uint32) << 16).view(np.float32)
            weights = means[f"blk.{layer}.{short}.weight"]
            found[tensor.name] = float((weights * (values - exact) ** 2).sum())
    return found
