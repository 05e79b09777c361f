"""Tasks of lm-evaluation-harness; they run where it is installed (it is large, CI has it not)."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

Pack = Callable[..., Any]
MODEL = ROOT / "examples" / "models" / "base"


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_harness(pack: Pack) -> None:
    ran = pack("eval", MODEL, "--tasks", "hellaswag")
    assert ran.code == 1
    assert "pip install 'pack-models[tasks]'" in ran.err


def test_wrong_usage(pack: Pack) -> None:
    ran = pack("eval", MODEL, "--limit", 3)
    assert ran.code == 2
    assert "go with --tasks" in ran.err


def test_as_the_harness_has_it(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of its own model for transformers."""
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [
        {"q": f"def f{i}(self, value):\n    return self.", "c": ["value", "__name__ + str", "in"],
         "a": i % 3}
        for i in range(12)
    ]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {data}}}\ntest_split: train\n"
    (tmp_path / "choice.yaml").write_text(
        f'task: a_choice\n{common}output_type: multiple_choice\ndoc_to_text: "{{{{q}}}}"\n'
        'doc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\nmetric_list: [{metric: acc}]\n'
    )
    (tmp_path / "rolling.yaml").write_text(
        f"task: a_text\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        'doc_to_target: "{{q}} {{c[0]}} and more"\nmetric_list: [{metric: bits_per_byte}]\n'
    )
    ran = pack("eval", MODEL, "--tasks", "a_choice,a_text", "--task-path", tmp_path, "--json")
    assert ran.code == 0, ran.err
    found = {(one["task"], one["metric"]): one["value"] for one in json.loads(ran.out)}
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path))
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(MODEL), "dtype": "float32"}, device="cpu",
        tasks=["a_choice", "a_text"], task_manager=manager,
    )["results"]  # fmt: skip
    assert found["a_choice", "acc"] == theirs["a_choice"]["acc,none"]
    assert found["a_text", "bits_per_byte"] == pytest.approx(
        theirs["a_text"]["bits_per_byte,none"], rel=1e-5
    )
