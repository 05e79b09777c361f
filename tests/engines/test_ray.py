"""A Ray cluster of three nodes on this machine: the bytes of one process, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, digests, random_models, write_recipe
from tests.engines.slow import attempts, fatal_do, hold, slow_write

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")

SHAPES = {f"layers.{i}.up.weight": (300, 401) for i in range(8)}
FILES = [f"model-{i:05}-of-00008.safetensors" for i in range(1, 9)]
CUT = ["--shard-size", "300kB"]


@dataclass
class Nodes:
    """The cluster."""

    cluster: Any
    address: str

    def add(self) -> Any:
        """One more node of one CPU."""
        return self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20,
                        "include_dashboard": False},
    )  # fmt: skip
    found = Nodes(cluster, cluster.address)
    found.add()
    found.add()
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, before)
    yield found
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_models(tmp_path_factory.mktemp("models"), shapes=SHAPES, dtype=torch.bfloat16)


def _recipe(models: Path, name: str = "ties", **parameters: object) -> Path:
    entries = {n: {"weight": 0.7, "density": 0.5} for n in "abc"}
    path = models / f"{name}-{len(parameters)}.yaml"
    more = {"parameters": parameters} if parameters else {}
    return write_recipe(
        path, name, entries, base_model="base", dtype="bfloat16", seed=7, **more
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What this process makes of the recipe with TIES."""
    out = tmp_path_factory.mktemp("expected") / "out"
    words = [sys.executable, "-m", "mergekit_lite", "merge", _recipe(models), "-o", out, *CUT, "-q"]
    subprocess.run(list(map(str, words)), check=True, cwd=ROOT)
    return digests(out)


def _ray(nodes: Nodes) -> list[str]:
    return ["--engine", "ray", "--address", nodes.address]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {}), ("ties", {"trim": "global", "rescale": True}), ("dare_ties", {})],
)
def test_same_bytes(
    pack: Callable[..., Any],
    nodes: Nodes,
    models: Path,
    tmp_path: Path,
    method: str,
    parameters: dict[str, object],
) -> None:
    recipe = _recipe(models, method, **parameters)
    assert pack("merge", recipe, "-o", tmp_path / "here", *CUT, "-q").code == 0
    ran = pack("merge", recipe, "-o", tmp_path / "there", *CUT, "--json", *_ray(nodes))
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["recomputed"] == 0
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert set(FILES) < digests(tmp_path / "there").keys()
    assert {p.name for p in tmp_path.iterdir()} == {"here", "there"}


def test_gguf(pack: Callable[..., Any], nodes: Nodes, example_models: Path, tmp_path: Path) -> None:
    words = ["quantize", "--to", "gguf", "q4_k_m", "--to", "gguf", "q8_0", example_models / "base",
             "--split-max-size", "1MB", "--no-verify", "-q"]  # fmt: skip
    ran = pack(*words, "-o", tmp_path / "here")
    assert ran.code == 0, ran.err
    ran = pack(*words, "-o", tmp_path / "there", *_ray(nodes))
    assert ran.code == 0, ran.err
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert len(list((tmp_path / "there" / "gguf-q8_0").glob("*.gguf"))) > 2


def test_layers_of_a_merge(
    pack: Callable[..., Any],
    nodes: Nodes,
    example_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights alone, of a recipe whose statistic spans the model: a lost worker costs its layer."""
    entries = {str(example_models / n): {"weight": 0.5, "density": 0.5} for n in ("code",)}
    recipe = write_recipe(
        tmp_path / "merged.yaml", "ties", entries, base_model=str(example_models / "base"),
        dtype="bfloat16", parameters={"trim": "global"},
    )  # fmt: skip
    words = ["quantize", "--to", "bnb", "nf4", recipe, "--json"]
    ran = pack(*words, "-o", tmp_path / "here")
    assert ran.code == 0, ran.err
    noted = tmp_path / "noted"
    noted.mkdir()
    monkeypatch.setattr("mergekit_lite.engines.tasks.do", fatal_do(noted, 1))
    ran = pack(*words, "-o", tmp_path / "there", *_ray(nodes))
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)[0]["recomputed"] == 1
    assert Counter(p.name.partition(".")[0] for p in noted.glob("*.*")) == Counter("011")
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert {p.name for p in tmp_path.iterdir()} == {"here", "there", "noted", "merged.yaml"}


def test_a_killed_worker_goes_on_at_its_layer(
    pack: Callable[..., Any],
    nodes: Nodes,
    example_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GPTQ, whose layers have an order: one task, which whoever takes it over continues."""
    import transformers

    model = tmp_path / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((example_models / "base" / name).read_bytes())
    words = ["quantize", "--to", "gptq", "w4g32", "--context", 64, "--windows", 8, model,
             "--threads", 1]  # fmt: skip
    ran = pack(*words, "-o", tmp_path / "here", "-q")
    assert ran.code == 0, ran.err
    noted = tmp_path / "noted"
    noted.mkdir()
    monkeypatch.setattr("mergekit_lite.engines.tasks.do", fatal_do(noted, 2))
    ran = pack(*words, "-o", tmp_path / "there", "--json", *_ray(nodes))
    assert ran.code == 0, ran.err
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert json.loads(ran.out)[0]["recomputed"] == 1
    assert Counter(p.name.partition(".")[0] for p in noted.glob("*.*")) == Counter("01223")


def test_build(
    pack: Callable[..., Any], nodes: Nodes, example_models: Path, tmp_path: Path
) -> None:
    """A recipe with formats of both kinds."""
    recipe = write_recipe(
        tmp_path / "small.yaml", "linear",
        {str(example_models / n): {"weight": 0.5} for n in ("base", "code")},
        name="small", dtype="bfloat16",
        quantize=[{"to": "int8", "scheme": "w8a16"},
                  {"to": "awq", "scheme": "w4g128", "calibration": {"context": 128, "windows": 8}}],
    )  # fmt: skip
    found = []
    for name, engine in (("here", []), ("there", _ray(nodes))):
        (tmp_path / name).mkdir()
        ran = pack("build", recipe, "--threads", 1, "-q", *engine, cwd=tmp_path / name)
        assert ran.code == 0, ran.err
        found.append(digests(tmp_path / name / "dist"))
    assert found[0] == found[1]
    assert {Path(p).parts[1] for p in found[0]} == {"merged", "int8-w8a16", "awq-w4g128"}


def test_ctrl_c_keeps_what_is_finished(
    pack: Callable[..., Any],
    nodes: Nodes,
    models: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = tmp_path / "noted"
    hold(noted, *FILES[2:])
    monkeypatch.setattr("mergekit_lite.engines.tasks.write", slow_write(noted))
    words = ["merge", _recipe(models), "-o", tmp_path / "out", *CUT, *_ray(nodes)]

    def interrupt() -> None:
        _until(lambda: len(_journal(tmp_path)) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=interrupt)
    stopper.start()
    ran = pack(*words)
    stopper.join()
    assert ran.code == 130, ran.err
    said = "stopped; 2 of 8 output files finished\nRun the same command to continue.\n"
    assert ran.err.endswith(said)
    hold(noted)
    assert pack(*words).code == 0
    assert digests(tmp_path / "out") == expected


def test_a_dead_driver_is_continued(
    pack: Callable[..., Any],
    nodes: Nodes,
    models: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted, out = tmp_path / "noted", tmp_path / "out"
    words = ["merge", _recipe(models), "-o", out, *CUT, *_ray(nodes)]
    hold(noted, *FILES[5:])
    command = [sys.executable, "-m", "tests.engines.slow", noted, *words]
    dead = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.DEVNULL)
    _until(lambda: len(_journal(tmp_path)) == 5)
    dead.kill()
    dead.wait()
    before = Counter(a["name"] for a in attempts(noted))
    hold(noted)
    monkeypatch.setattr("mergekit_lite.engines.tasks.write", slow_write(noted))
    ran = pack(*words)
    assert ran.code == 0, ran.err
    assert "continuing: 5 of 8 output files were finished" in ran.err
    after = Counter(a["name"] for a in attempts(noted))
    assert after - before == Counter(FILES[5:])
    assert digests(out) == expected
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def _until(there: Callable[[], bool]) -> None:
    """Wait for what other processes do, but not for ever."""
    last = time.monotonic() + 60
    while not there() and time.monotonic() < last:
        time.sleep(0.02)


def _journal(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / ".out.journal").read_text())["shards"]
    except OSError:
        return {}
    return found


def test_an_error_in_a_task_is_the_same_error(
    pack: Callable[..., Any], nodes: Nodes, example_models: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (example_models / "base").iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(example_models / "base" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    words = ["quantize", "--to", "gguf", "q8_0", broken, "-q", "-o", tmp_path / "out"]
    here, there = pack(*words), pack(*words, *_ray(nodes))
    assert "holds NaN or infinity" in here.err
    assert (here.code, here.err) == (there.code, there.err)


def test_a_folder_that_nodes_do_not_see(
    pack: Callable[..., Any],
    nodes: Nodes,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "mergekit_lite.merge.writer.ArtifactWriter.begin_attempts",
        lambda self, run: self.final.parent / "elsewhere" / run,
    )
    ran = pack("merge", _recipe(models), "-o", tmp_path / "out", *CUT, *_ray(nodes))
    assert ran.code == 1
    assert "is not that of the machine where pack was started" in ran.err
    assert "Choose a folder that all nodes share: -o DIR" in ran.err


def test_a_node_that_cannot_take_part_is_left_out(
    pack: Callable[..., Any],
    nodes: Nodes,
    models: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    noted = tmp_path / "noted"
    hold(noted)
    monkeypatch.setattr("mergekit_lite.engines.tasks.write", slow_write(noted))
    monkeypatch.setattr("mergekit_lite.engines.tasks.look", _blind(alive[0]))
    ran = pack("merge", _recipe(models), "-o", tmp_path / "out", *CUT, *_ray(nodes))
    assert ran.code == 0, ran.err
    assert "no task runs on the node" in ran.err
    assert ": it has no such folder\n" in ran.err
    assert alive[0] not in {a["node"] for a in attempts(noted)}
    assert digests(tmp_path / "out") == expected


def _blind(refused: str) -> Callable[..., Any]:
    """A look at a node that one node fails, and one that has the inputs at hand."""

    def look(asked: Any) -> Any:
        import ray

        from mergekit_lite.engines.tasks import Failed

        here = ray.get_runtime_context().get_node_id()
        return Failed("it has no such folder", "") if here == refused else True

    return look


def test_other_versions_are_refused(
    pack: Callable[..., Any],
    nodes: Nodes,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mergekit_lite.engines.tasks.versions", lambda: {"pack": "0.0.0"})
    ran = pack("merge", _recipe(models), "-o", tmp_path / "out", *CUT, *_ray(nodes))
    assert ran.code == 1
    assert "on a node, and 0.0.0 where pack was started" in ran.err


def test_a_task_that_no_node_can_take(
    pack: Callable[..., Any], nodes: Nodes, models: Path, tmp_path: Path
) -> None:
    ran = pack(
        "merge", _recipe(models), "-o", tmp_path / "out", *CUT, "--threads", 1000, *_ray(nodes)
    )
    assert ran.code == 1
    assert "a task needs 1000 CPUs" in ran.err


def test_without_ray(
    pack: Callable[..., Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_lite.engines.ray.find_spec", lambda name: None)
    ran = pack("merge", _recipe(models), "-o", tmp_path / "out", "--engine", "ray")
    assert ran.code == 1
    assert "Install it: pip install 'pack-models[ray]'" in ran.err


def test_only_what_asks_for_ray_imports_it(models: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from mergekit_lite.cli import cli; "
        f"cli(['merge', {str(_recipe(models))!r}, '-o', {str(tmp_path / 'out')!r}, '-q'], "
        "standalone_mode=False); "
        "assert not [m for m in sys.modules if m == 'ray' or m.startswith('mergekit_lite.engines')"
        " and m.rpartition('.')[2] in ('ray', 'tasks')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_an_address_where_nobody_answers(
    pack: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    words = ("-o", tmp_path / "out", "--engine", "ray", "--address", "127.0.0.1:1")
    ran = pack("merge", _recipe(models), *words)
    assert (ran.code, "127.0.0.1:1: no Ray cluster to be used" in ran.err) == (1, True), ran.err
    assert list(tmp_path.glob("*out*")) == []


def test_what_is_not_spread(pack: Callable[..., Any], models: Path) -> None:
    ran = pack("merge", _recipe(models), "--address", "auto")
    assert (ran.code, "--address goes with --engine ray" in ran.err) == (2, True)
    ran = pack("quantize", "--to", "onnx", "int4", models / "a", "--engine", "ray")
    assert (ran.code, "ONNX is made by one process" in ran.err) == (2, True)
    recipe = _recipe(models)
    asking = recipe.with_name("asking.yaml")
    document = {**json.loads(recipe.read_text()), "quantize": [{"to": "onnx", "scheme": "int4"}]}
    asking.write_text(json.dumps(document))
    ran = pack("build", asking, "--engine", "ray")
    assert (ran.code, "asks for onnx, which one process makes" in ran.err) == (1, True), ran.err


def test_killed_workers_and_a_killed_node(
    pack: Callable[..., Any],
    nodes: Nodes,
    models: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = tmp_path / "noted"
    hold(noted, *FILES)
    monkeypatch.setattr("mergekit_lite.engines.tasks.write", slow_write(noted))
    node = nodes.add()
    [victim] = [n["NodeID"] for n in ray.nodes() if n["NodeManagerPort"] == node.node_manager_port]
    lost: list[str] = []

    def begun(count: int) -> list[dict[str, Any]]:
        _until(lambda: len(attempts(noted)) >= count)
        return attempts(noted)

    def kill() -> None:
        first = begun(4)  # one on each node
        elsewhere = [a for a in first if a["node"] != victim][:2]
        for attempt in elsewhere:
            os.kill(attempt["pid"], signal.SIGKILL)
        begun(6)
        lost.extend(a["name"] for a in elsewhere)
        lost.extend(a["name"] for a in first if a["node"] == victim)
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        hold(noted)

    killer = threading.Thread(target=kill)
    killer.start()
    out = tmp_path / "out"
    ran = pack("merge", _recipe(models), "-o", out, *CUT, "--threads", 1, "--json", *_ray(nodes))
    killer.join()
    assert ran.code == 0, ran.err
    assert digests(out) == expected
    tried = Counter(a["name"] for a in attempts(noted))
    assert tried == Counter(FILES) + Counter(lost)
    assert json.loads(ran.out)["recomputed"] == len(lost) == 3
