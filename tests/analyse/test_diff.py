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


def test_float64_is_compared_as_such(pack: Callable, tmp_path: Path) -> None:
    """A change that float32 cannot hold."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(9, 1100, dtype=torch.float64, generator=generator)
    tuned = base * (1 + 1e-12)
    write_model(tmp_path / "base", {"x": base})
    write_model(tmp_path / "tuned", {"x": tuned})
    found = _numbers(pack, tmp_path / "base", tmp_path / "tuned")["tensors"]["x"]
    delta = (tuned - base).numpy()
    norm = np.linalg.norm(base.numpy())
    assert found["relative_change"][0] == pytest.approx(np.linalg.norm(delta) / norm, rel=1e-12)
    assert found["largest_change"][0] == np.abs(delta).max()


@pytest.mark.parametrize("elements", [1, 7, 8, 1023, 1024, 1025, 5000])
def test_the_kernel_at_its_edges(elements: int) -> None:
    """Lengths that fill no tile and no lane, elements that stayed, and signs of five models."""
    from mergekit_lite.analyse.sums import Sums
    from mergekit_lite.kernels.differ import compare

    random = np.random.default_rng(elements)
    values = random.standard_normal((6, elements)).astype(np.float32)
    values[1:][random.random((5, elements)) < 0.4] = 0
    values[1:] += values[0]
    found = Sums.empty(5)
    compare(values[1:], values[0], found.each, found.pairs, found.common)
    wide = values.astype(np.float64)
    deltas = wide[1:] - wide[0]
    assert np.allclose(found.each[:, 0], (deltas**2).sum(axis=1), rtol=1e-13)
    assert np.allclose(found.each[:, 1], (wide[1:] * wide[0]).sum(axis=1), rtol=1e-11)
    assert np.allclose(found.each[:, 2], (wide[1:] ** 2).sum(axis=1), rtol=1e-13)
    assert (found.each[:, 3] == np.abs(deltas).max(axis=1)).all()
    assert (found.each[:, 4] == (deltas != 0).sum(axis=1)).all()
    assert np.allclose(found.pairs, np.triu(deltas @ deltas.T, 1), rtol=1e-11, atol=1e-12)
    moved = (deltas != 0).sum(axis=0) > 1
    against = (deltas > 0).any(axis=0) & (deltas < 0).any(axis=0)
    assert found.common[1:3].tolist() == [moved.sum(), against.sum()]
    assert found.common[0] == pytest.approx((wide[0] ** 2).sum(), rel=1e-13)


def test_nan_and_infinity_are_counted_and_told(pack: Callable, tmp_path: Path) -> None:
    base = torch.randn(4, 600, generator=torch.Generator().manual_seed(1))
    tuned = base.clone()
    tuned[0, 3] = float("nan")
    tuned[3, 599] = float("inf")
    write_model(tmp_path / "base", {"x": base, "y": base.clone()})
    write_model(tmp_path / "tuned", {"x": tuned, "y": base})
    found = _numbers(pack, tmp_path / "base", tmp_path / "tuned")
    assert found["tensors"]["x"]["not_finite"] == {"base": 0, "models": [2]}
    assert found["tensors"]["y"]["not_finite"] == {"base": 0, "models": [0]}
    ran = pack("diff", tmp_path / "base", tmp_path / "tuned")
    assert "1 tensor(s) hold NaN or infinity, first 'x' of " in ran.err
    rows = {line.split()[0]: line.split()[1:] for line in ran.out.splitlines() if line}
    assert rows["x"][1] == "NaN"
    assert rows["y"][1] == "0.00%"


def test_stacks_and_names_that_are_alike_stay_apart(pack: Callable, tmp_path: Path) -> None:
    """Two stacks, a tensor outside called as one inside, and experts that count as one kind."""
    ones = torch.ones(4, 4)
    names = [f"{stack}.{i}.up.weight" for stack in ("enc", "dec") for i in (0, 1)]
    names += [f"dec.{i}.moe.{e}.down.weight" for i in (0, 1) for e in (0, 1, 2)]
    base = {"up.weight": ones, **dict.fromkeys(names, ones)}
    tuned = {**base, "enc.1.up.weight": 3 * ones, "dec.0.moe.2.down.weight": 2 * ones}
    write_model(tmp_path / "base", {n: t.clone() for n, t in base.items()})
    write_model(tmp_path / "tuned", {n: t.clone() for n, t in tuned.items()})
    modules = _numbers(pack, tmp_path / "base", tmp_path / "tuned")["modules"]
    assert set(modules) == {"up.weight", "enc.*.up", "dec.*.up", "dec.*.moe.*.down"}
    assert modules["enc.*.up"]["by_layer"]["relative_change"] == [{"0": 0.0, "1": 2.0}]
    assert modules["dec.*.up"]["relative_change"] == [0.0]
    assert modules["up.weight"]["layers"] == 0
    experts = modules["dec.*.moe.*.down"]
    assert experts["layers"] == 2
    assert experts["by_layer"]["relative_change"][0]["0"] == pytest.approx(np.sqrt(1 / 3))


def test_the_table_fits_a_terminal_and_is_whole_in_a_pipe(pack: Callable, tmp_path: Path) -> None:
    from mergekit_lite.cli.table import table_lines

    long = "a_module_with_quite_a_long_name_that_tells_something.at_its_end"
    shapes = {f"layers.{i}.{long}.weight": (8, 8) for i in (0, 1)}
    random_models(tmp_path, shapes=shapes)
    ran = pack("diff", *(tmp_path / n for n in ("base", "a", "b", "c")))
    assert f"\n{long}  " in ran.out
    assert "\x1b" not in ran.out
    rows = [[long, "80", "10.25%", "9.26%", "7.31%", "12.38%", "79", "64.66%"]]
    header = ["module", "layers", "Δ1", "Δ2", "Δ3", "max", "at", "conflict"]
    lines = list(table_lines(header, rows, 80))
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("…")
    assert "at_its_end" in lines[1]


def test_agreement_is_printed(pack: Callable, tmp_path: Path) -> None:
    random_models(tmp_path)
    words = [tmp_path / n for n in ("base", "a", "b")]
    cosine = _numbers(pack, *words)["total"]["change_cosine"][0][1]
    lines = pack("diff", *words).out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("cosine of changes"))
    assert lines[at + 1].split()[-2:] == ["1.000", f"{cosine:.3f}"]


def test_another_type_is_noted(pack: Callable, tmp_path: Path) -> None:
    x = torch.randn(4, 4)
    write_model(tmp_path / "base", {"x": x})
    write_model(tmp_path / "half", {"x": x.half()})
    out = pack("diff", tmp_path / "base", tmp_path / "half").out
    assert "1 of 1 tensors are F32 in" in out
    assert "rounding counts as change" in out


class _Page(HTMLParser):
    """Collects what a page would load, and the numbers of its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.loaded.append(str(value))
            if name == "data-v":
                self.cells.append(str(value))


def test_the_page(pack: Callable, tmp_path: Path) -> None:
    """It loads nothing, escapes names, and has a cell for every layer, module and model."""
    hostile = "layers.0.<img src=//x onerror=alert(1)>\x1b[31m\u202e.weight"
    shapes = {hostile: (8, 8), "layers.0.up.weight": (8, 8), "layers.1.up.weight": (8, 8),
              "embed.weight": (9, 8)}  # fmt: skip
    random_models(tmp_path, shapes=shapes)
    page = tmp_path / "page.html"
    words = [tmp_path / n for n in ("base", "a", "b")]
    ran = pack("diff", *words, "--html", page)
    assert ran.code == 0, ran.err
    text = page.read_text()
    for hidden in ("\x1b", "\u202e"):
        assert hidden not in ran.out
        assert hidden not in text
    parsed = _Page()
    parsed.feed(text)
    assert parsed.loaded == []
    assert "url(" not in text
    assert "@import" not in text
    assert "img" not in parsed.tags
    # change, cosine and share of two models, one cosine between them, one share of conflicts
    assert len(parsed.cells) == 3 * (3 * 2 + 1 + 1)
    found = _numbers(pack, *words)["tensors"]["layers.1.up.weight"]
    for value in (*found["relative_change"], found["sign_conflict"], found["change_cosine"][0][1]):
        assert f"{value:.7g}" in parsed.cells


def test_the_page_replaces_only_pages(pack: Callable, tmp_path: Path) -> None:
    """What cannot be written is refused before weights are read, and nothing else is replaced."""
    random_models(tmp_path)
    words = [tmp_path / n for n in ("base", "a")]
    page = tmp_path / "page.html"
    assert pack("diff", *words, "--html", page).code == 0
    ran = pack("diff", *words, "--html", page)
    assert ran.code == 1
    assert "--force" in ran.err
    assert pack("diff", *words, "--html", page, "--force").code == 0
    weights = tmp_path / "a" / "model.safetensors"
    before = weights.read_bytes()
    ran = pack("diff", *words, "--html", weights, "--force")
    assert ran.code == 1
    assert "is not a page of pack diff" in ran.err
    assert weights.read_bytes() == before
    ran = pack("diff", *words, "--html", page / "below.html")
    assert ran.code == 1
    assert "no file can be written there" in ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base", "c", "page.html"]


def test_errors_cannot_move_the_cursor(pack: Callable, tmp_path: Path) -> None:
    write_model(tmp_path / "a", {"a\x1b[2J": torch.ones(2)})
    write_model(tmp_path / "b", {"b": torch.ones(2)})
    ran = pack("diff", tmp_path / "a", tmp_path / "b")
    assert ran.code == 1
    assert "no tensor in common" in ran.err
    assert "\x1b" not in ran.err
    assert pack("diff", tmp_path / "a\x1b[2J", tmp_path / "b").err.count("\x1b") == 0
