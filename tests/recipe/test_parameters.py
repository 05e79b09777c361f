"""What parameters resolve to: precedence, gradients, filters, as mergekit documents them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.methods import ALIASES, METHODS
from mergekit_lite.recipe import Between, Parameter, parse_recipe
from mergekit_lite.recipe.parameters import parse_setting
from tests.conftest import random_models

WEIGHT = Parameter("weight", "weight", "float", 1.0, each=True)
DENSITY = Parameter("density", "density", "float", 1.0, each=True, bounds=Between(0.0, 1.0))


def _at(raw: Any, name: str = "layers.1.mlp.w", position: float = 0.5) -> Any:
    setting, mistakes = parse_setting(raw, WEIGHT)
    assert not mistakes
    assert setting is not None
    return setting.at(name, position)


@pytest.mark.parametrize(
    ("raw", "position", "value"),
    [
        (0.3, 0.7, 0.3),
        ([0, 1], 0.25, 0.25),
        ([0, 1, 0], 0.5, 1.0),
        ([0, 0.5, 0.3, 0.7, 1], 0.0, 0.0),
        ([0, 0.5, 0.3, 0.7, 1], 1.0, 1.0),
        ([0, 0.5, 0.3, 0.7, 1], 0.375, 0.4),
        ([2], 0.9, 2.0),
    ],
)
def test_gradients(raw: Any, position: float, value: float) -> None:
    assert _at(raw, position=position) == pytest.approx(value)


def test_the_first_filter_that_fits_holds() -> None:
    raw = [{"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 5}, {"value": 6}]
    assert _at(raw) == 0.5
    assert _at(raw, name="layers.1.attn.w") == 5
    assert _at([{"filter": "attn", "value": 1}]) is None


@pytest.mark.parametrize(
    "raw", ["0.5", True, None, [], [1, "x"], [[1]], {"value": 1}, [{"value": 1}, 2],
            [{"filter": 3, "value": 1}], [{"filter": "a"}], float("nan"), float("inf"), 1.5, -0.1]
)  # fmt: skip
def test_values_that_do_not_fit(raw: Any) -> None:
    setting, mistakes = parse_setting(raw, DENSITY)
    assert setting is None
    assert mistakes


def test_precedence(pack: Callable, tmp_path: Path) -> None:
    """A source of a slice, then the slice, then the whole recipe."""
    random_models(tmp_path)
    (tmp_path / "r.yaml").write_text(
        """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 1]}
      - {model: a, layer_range: [0, 1], parameters: {weight: 1}}
      - {model: b, layer_range: [0, 1]}
    parameters: {weight: 2}
  - sources:
      - {model: base, layer_range: [1, 2]}
      - {model: a, layer_range: [1, 2], parameters: {weight: [{filter: norm, value: 3}]}}
      - {model: b, layer_range: [1, 2]}
parameters: {weight: 4, lambda: 0.5}
"""
    )
    plan = json.loads(pack("plan", "r.yaml", "--json", cwd=tmp_path).out)
    weights = {t["name"]: t["parameters"]["weight"] for t in plan["tensors"]}
    assert weights["layers.0.up.weight"] == [1, 2]
    assert weights["layers.1.norm.weight"] == [3, 4]
    assert weights["layers.1.up.weight"] == [4, 4]
    assert weights["embed.weight"] == [1, 2]
    assert weights["head.weight"] == [4, 4]
    assert all(t["parameters"]["lambda"] == 0.5 for t in plan["tensors"])


def test_numbers_that_yaml_takes_for_words() -> None:
    recipe = parse_recipe(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1e-3, int8_mask: true}}]",
        "r.yaml",
        "r",
        METHODS,
        ALIASES,
    )
    assert recipe.models is not None
    assert recipe.models[0].settings()["weight"].at("x", 0.0) == 0.001


def test_names_come_from_the_file_when_they_are_not_given(tmp_path: Path) -> None:
    from mergekit_lite.recipe import read_recipe

    path = tmp_path / "my merge (2).yaml"
    path.write_text("merge_method: linear\nmodels: [{model: a}]")
    assert read_recipe(path, METHODS, ALIASES).name == "my-merge-2"
