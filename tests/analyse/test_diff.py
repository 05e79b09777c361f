"""Comparisons of models, against numpy in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import load, random_models, write_model


def _numbers(pack: Callable, *words: object) -> dict:
    ran = pack("diff", *words, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers(pack: Callable, tmp_path: Path, dtype: torch.dtype) -> None:
    random_models(tmp_path, dtype=dtype)
    found = _numbers(pack, *(tmp_path / n for n in ("base", "a", "b", "c")))
    base = {n: t.astype(np.float64) for n, t in load(tmp_path / "base").items()}
    models = [{n: t.astype(np.float64) for n, t in load(tmp_path / m).items()} for m in "abc"]
    for name, said in found["tensors"].items():
        deltas = np.stack([m[name].reshape(-1) - base[name].reshape(-1) for m in models])
        for i, model in enumerate(models):
            norm = np.linalg.norm(base[name])
            assert said["relative_change"][i] == pytest.approx(np.linalg.norm(deltas[i]) / norm)
            cosine = (model[name] * base[name]).sum() / norm / np.linalg.norm(model[name])
            assert said["cosine"][i] == pytest.approx(cosine, rel=1e-12)
            assert said["largest_change"][i] == np.abs(deltas[i]).max()
            assert said["changed_share"][i] == np.count_nonzero(deltas[i]) / deltas.shape[1]
        signs = np.sign(deltas)
        both = (signs != 0).sum(axis=0) >= 2
        conflict = (signs.max(axis=0) > 0) & (signs.min(axis=0) < 0)
        assert said["sign_conflict"] == pytest.approx((conflict & both).sum() / both.sum())
        expected = deltas[0] @ deltas[1] / np.linalg.norm(deltas[0]) / np.linalg.norm(deltas[1])
        assert said["change_cosine"][0][1] == pytest.approx(expected, rel=1e-9)
        assert said["change_cosine"][1][0] == said["change_cosine"][0][1]
    up = [n for n in base if n.endswith("up.weight")]
    change = np.sqrt(sum(((models[0][n] - base[n]) ** 2).sum() for n in up))
    size = np.sqrt(sum((base[n] ** 2).sum() for n in up))
    assert found["modules"]["up"]["relative_change"][0] == pytest.approx(change / size)


def test_threads_change_no_bit(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path, shapes={"layers.0.up.weight": (1500, 1000), "layers.0.n": (1000,)})
    words = [tmp_path / "base", tmp_path / "a", tmp_path / "b"]
    assert _numbers(pack, *words, "--threads", 1) == _numbers(pack, *words, "--threads", 4)


def test_tensors_that_differ_are_left_out(pack: Callable, tmp_path: Path) -> None:
    ones = torch.ones(4, 4)
    three = {name: ones.clone() for name in ("x", "only", "shape")}
    write_model(tmp_path / "a", {**three, "count": torch.arange(3)})
    write_model(tmp_path / "b", {"x": ones, "shape": torch.ones(5, 4), "count": torch.arange(3)})
    found = _numbers(pack, tmp_path / "a", tmp_path / "b")
    assert set(found["tensors"]) == {"x"}
    assert found["tensors"]["x"]["relative_change"] == [0.0]
    assert set(found["left_out"]) == {"only", "shape", "count"}
    ran = pack("diff", tmp_path / "a", tmp_path / "b")
    assert "left out: shape differs in shape: [4, 4], [5, 4]" in ran.out
    write_model(tmp_path / "c", {"y": ones})
    ran = pack("diff", tmp_path / "a", tmp_path / "c")
    assert ran.code == 1
    assert "no tensor in common" in ran.err


def test_adapters_and_zeros_and_nan(pack: Callable, tmp_path: Path, example_models: Path) -> None:
    base = example_models / "base"
    found = _numbers(pack, base, f"{base}+{example_models}/lora-code")
    assert found["modules"]["self_attn.q_proj"]["relative_change"][0] > 0.01
    assert found["tensors"]["lm_head.weight"]["relative_change"] == [0.0]
    write_model(tmp_path / "z", {"a": torch.zeros(3, 3), "b": torch.ones(2, 2)})
    write_model(tmp_path / "n", {"a": torch.ones(3, 3), "b": torch.full((2, 2), float("nan"))})
    found = _numbers(pack, tmp_path / "z", tmp_path / "n")
    assert found["tensors"]["a"]["relative_change"] == [None]
    assert found["tensors"]["b"]["relative_change"] == [None]
    assert found["tensors"]["b"]["largest_change"] == [None]


class _Page(HTMLParser):
    """Collects what a page would load, and the cells that tell their value."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.cells: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href"):
                self.loaded.append(str(value))
            if name == "data-at":
                self.cells.append(str(value))


def test_the_page(pack: Callable, tmp_path: Path) -> None:
    """It loads nothing, escapes names, and has a cell for every layer, module and model."""
    hostile = "layers.0.<script>alert(1)</script>\x1b[31m.weight"
    shapes = {hostile: (8, 8), "layers.0.up.weight": (8, 8), "layers.1.up.weight": (8, 8),
              "embed.weight": (9, 8)}  # fmt: skip
    random_models(tmp_path, shapes=shapes)
    page = tmp_path / "page.html"
    words = [tmp_path / n for n in ("base", "a", "b")]
    ran = pack("diff", *words, "--html", page)
    assert ran.code == 0, ran.err
    assert "\x1b" not in ran.out
    parsed = _Page()
    parsed.feed(page.read_text())
    assert parsed.loaded == []
    assert parsed.scripts == 1
    assert sum("up:" in cell for cell in parsed.cells) == 2 * (2 + 2 + 1)
    ran = pack("diff", *words, "--html", page)
    assert ran.code == 1
    assert "--force" in ran.err
    assert pack("diff", *words, "--html", page, "--force").code == 0
