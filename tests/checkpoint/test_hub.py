"""Models named by their place on the Hub: fetched once, locked to a commit, and clear when not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from mergekit_lite.checkpoint.hub import parse_reference
from tests.conftest import ROOT, Ran, pack_process, write_recipe
from tests.hub_server import Fault, HubServer

CONFIG = b'{"num_hidden_layers": 1}'
SHAPES = {"embed.weight": (12, 8), "layers.0.up.weight": (10, 8), "layers.0.norm.weight": (8,)}

Run = Callable[..., Ran]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Run:
    """Run pack in a process whose Hub is the test's server and whose caches are empty at first."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = kept | hub.environment(tmp_path / "hf")

    def call(*words: object, **variables: str) -> Ran:
        process = pack_process(*words, cwd=tmp_path, env=environment | variables)
        out, err = process.communicate(timeout=120)
        return Ran(process.returncode, out, err)

    return call


def tensors(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {n: random.standard_normal(s, np.float32) for n, s in SHAPES.items()}


def model(seed: int, **more: bytes) -> dict[str, bytes]:
    return {"config.json": CONFIG, "model.safetensors": save(tensors(seed)), **more}


def average(*seeds: int) -> dict[str, np.ndarray]:
    """The equal-weighted average, in float64."""
    each = [tensors(seed) for seed in seeds]
    return {n: np.mean([t[n].astype(np.float64) for t in each], axis=0) for n in SHAPES}


def check_merged(folder: Path, *seeds: int) -> dict[str, object]:
    """Compare a result with the average of the models of these seeds; returns its lock."""
    found = load_file(folder / "model.safetensors")
    expected = average(*seeds)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=1e-7)
    return json.loads((folder / "pack.lock").read_text())


def soup(folder: Path, *models: str) -> Path:
    return write_recipe(folder / "r.yaml", "linear", {name: {} for name in models})


def check_refused(ran: Ran, *said: str) -> None:
    """One error of a line and a hint, exit code 1, and nothing of the library's insides."""
    assert ran.code == 1, ran.err
    for text in said:
        assert text in ran.err
    assert "Traceback" not in ran.err
    assert "pack itself failed" not in ran.err
    lines = ran.err.strip().splitlines()
    assert len(lines) == 2, ran.err
    assert lines[0].startswith("error: ")


def test_a_merge_of_models_on_the_hub(hub: HubServer, run: Run, tmp_path: Path) -> None:
    """By name and by revision; the lock holds commits; the cache suffices when the Hub is gone."""
    first = hub.add("org/model-a", model(1))
    tagged = hub.add("org/model-b", model(2), ref="v1.0")
    hub.add("org/model-b", model(3))
    recipe = soup(tmp_path, "org/model-a", "org/model-b@v1.0")
    ran = run("merge", "linear", recipe, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    lock = check_merged(tmp_path / "out", 1, 2)
    revisions = {entry["model"]: entry["revision"] for entry in lock["inputs"]}
    assert revisions == {"org/model-a": first, "org/model-b@v1.0": tagged}

    weights = [path for method, path in hub.requests if method == "GET" and "safetensors" in path]
    assert len(weights) == 2
    assert run("merge", "linear", recipe, "-o", tmp_path / "again").code == 0
    assert weights == [p for m, p in hub.requests if m == "GET" and "safetensors" in p]

    hub.close()
    ran = run("merge", "linear", recipe, "-o", tmp_path / "third")
    assert ran.code == 0, ran.err
    locks = [(tmp_path / name / "pack.lock").read_bytes() for name in ("out", "again", "third")]
    assert locks[0] == locks[1] == locks[2]
    ran = run("merge", recipe, "-o", tmp_path / "fourth", HF_HUB_OFFLINE="1")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("kind", ["commit", "short", "branch"])
def test_revisions(hub: HubServer, run: Run, tmp_path: Path, kind: str) -> None:
    old = hub.add("org/model-a", model(1))
    hub.add("org/model-a", model(2))
    work = hub.add("org/model-a", model(3), ref="refs/pr/7")
    revision, commit, seed = {
        "commit": (old, old, 1),
        "short": (old[:9], old, 1),
        "branch": ("refs/pr/7", work, 3),
    }[kind]
    recipe = soup(tmp_path, f"org/model-a@{revision}")
    ran = run("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert check_merged(tmp_path / "out", seed)["inputs"][0]["revision"] == commit
    hub.close()
    assert run("merge", recipe, "-o", tmp_path / "again").code == 0


def test_only_what_a_merge_reads_is_fetched(hub: HubServer, run: Run, tmp_path: Path) -> None:
    """No code, no second copy of the weights, no training state; chat templates are."""
    wanted = {
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b"{}",
        "LICENSE": b"Apache-2.0",
        "README.md": b"# a",
    }
    junk = (
        ".gitattributes",
        "consolidated.safetensors",
        "modeling_x.py",
        "onnx/config.json",
        "onnx/model.onnx",
        "optimizer.bin",
        "original/consolidated.00.pth",
        "original/extra.safetensors",
        "pytorch_model.bin",
        "setup.sh",
        "training_args.bin",
        "x.gguf",
    )
    hub.add("org/model-a", model(1, **wanted, **dict.fromkeys(junk, b"import os")))
    ran = run("merge", soup(tmp_path, "org/model-a"), "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    expected = sorted([*wanted, "config.json", "model.safetensors"])
    assert hub.fetched("org/model-a") == expected
    cache = next((tmp_path / "hf").rglob("snapshots/*"))
    assert sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()) == expected
    check_merged(tmp_path / "out", 1)


def test_shards_are_those_of_the_index(hub: HubServer, run: Run, tmp_path: Path) -> None:
    held = tensors(1)
    names = sorted(held)
    shards = {names[0]: "model-00001-of-00002.safetensors", names[1]: "outer.safetensors"}
    shards[names[2]] = "outer.safetensors"
    files = {
        shard: save({n: held[n] for n in names if shards[n] == shard})
        for shard in set(shards.values())
    }
    index = json.dumps({"metadata": {}, "weight_map": shards}).encode()
    files |= {"config.json": CONFIG, "model.safetensors.index.json": index}
    hub.add("org/model-a", {**files, "consolidated.safetensors": save(held)})
    recipe = soup(tmp_path, "org/model-a")
    ran = run("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert hub.fetched("org/model-a") == sorted(files)
    check_merged(tmp_path / "out", 1)
    hub.close()
    next((tmp_path / "hf").rglob("snapshots/*/outer.safetensors")).unlink()
    ran = run("merge", recipe, "-o", tmp_path / "again")
    check_refused(ran, "org/model-a: only a part of it is in the cache")


def test_pytorch_files_where_there_is_nothing_else(
    hub: HubServer, run: Run, tmp_path: Path
) -> None:
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors(2).items()}
    torch.save(state, tmp_path / "state.bin")
    files = {"config.json": CONFIG, "pytorch_model.bin": (tmp_path / "state.bin").read_bytes()}
    hub.add("org/old", {**files, "training_args.bin": b"junk", "tf_model.h5": b"junk"})
    hub.add("org/model-a", model(1))
    recipe = soup(tmp_path, "org/old", "org/model-a")
    ran = run("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    check_merged(tmp_path / "out", 1, 2)
    assert hub.fetched("org/old") == sorted(files)
    hub.close()
    assert run("merge", recipe, "-o", tmp_path / "again").code == 0


def test_a_download_that_is_cut_goes_on(hub: HubServer, run: Run, tmp_path: Path) -> None:
    hub.add("org/model-a", model(1))
    hub.faults.append(Fault(r"^GET .*/model\.safetensors$", times=1, cut=300))
    ran = run("merge", soup(tmp_path, "org/model-a"), "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert len([p for m, p in hub.requests if m == "GET" and p.endswith("l.safetensors")]) == 2
    check_merged(tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/missing", "neither a folder here nor a model on the Hub"),
        ("org/model-a@v9", "the model has no such revision"),
        ("org/gated", "access to this model must be granted first"),
        ("org/codes", "holds no weights"),
        ("org/a--b", "neither a folder here nor a model on the Hub"),
    ],
)
def test_models_that_cannot_be_had(
    hub: HubServer, run: Run, tmp_path: Path, name: str, said: str
) -> None:
    hub.add("org/model-a", model(1))
    hub.add("org/gated", model(1), gated=True)
    hub.add("org/codes", {"config.json": CONFIG, "x.Q4_K_M.gguf": b"GGUF"})
    ran = run("merge", soup(tmp_path, "org/model-a", name), "-o", tmp_path / "out")
    check_refused(ran, f"{name}: {said}")
    assert not (tmp_path / "out").exists()


def test_a_token_opens_a_gated_model(hub: HubServer, run: Run, tmp_path: Path) -> None:
    hub.add("org/gated", model(1), gated=True)
    recipe = soup(tmp_path, "org/gated")
    ran = run("merge", recipe, "-o", tmp_path / "out", HF_TOKEN="hf_" + "x" * 34)
    assert ran.code == 0, ran.err
    assert "hf_" not in (tmp_path / "out" / "pack.lock").read_text()


@pytest.mark.parametrize("trouble", ["gone", "500", "offline", "unreadable"])
def test_a_hub_that_does_not_answer(hub: HubServer, run: Run, tmp_path: Path, trouble: str) -> None:
    """An error where nothing is in the cache; the name may have been meant as a path."""
    hub.add("org/model-a", model(1))
    if trouble == "gone":
        hub.close()
    if trouble == "500":
        hub.faults.append(Fault("", status=500))
    if trouble == "unreadable":
        hub.faults.append(Fault("", cut=10))
    variables = {"HF_HUB_OFFLINE": "1"} if trouble == "offline" else {}
    ran = run("merge", soup(tmp_path, "org/model-a"), "-o", tmp_path / "out", **variables)
    check_refused(ran, "org/model-a: no such folder here, and the Hub cannot be asked (")


def test_a_hub_that_fails_after_the_first_answer(hub: HubServer, run: Run, tmp_path: Path) -> None:
    hub.add("org/model-a", model(1))
    hub.faults.append(Fault(r"^GET .*/model\.safetensors$", status=500))
    recipe = soup(tmp_path, "org/model-a")
    ran = run("merge", recipe, "-o", tmp_path / "out")
    check_refused(ran, "org/model-a: the download failed (", "Run the same command again.")
    hub.faults.clear()
    ran = run("merge", recipe, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    check_merged(tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("hf://org/name", "org/name", None),
        ("org/na.me-1_b@v1.0", "org/na.me-1_b", "v1.0"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
    ],
)
def test_references(text: str, repo: str, revision: str | None) -> None:
    found = parse_reference(text)
    assert found is not None
    assert (found.repo, found.revision) == (repo, revision)
    assert str(found) == (f"{repo}@{revision}" if revision else repo)


@pytest.mark.parametrize(
    "text", ["name", "a/b/c", "../a", "/a/b", "org/name@", "org/name@../x", "org/name@a b", ""]
)
def test_texts_that_are_no_reference(text: str) -> None:
    assert parse_reference(text) is None


def test_a_look_fetches_no_weights(hub: HubServer, run: Run, tmp_path: Path) -> None:
    """Of a model and of a recipe's models, ranges of bytes are asked for; nothing is kept."""
    random = np.random.default_rng(0)
    large = {f"layers.0.{i}.w": random.standard_normal((64, 512), np.float32) for i in range(5)}
    many = {f"layers.0.name-{i:05}.w": np.zeros(1, np.float32) for i in range(4000)}
    commit = hub.add("org/large", {"config.json": CONFIG, "model.safetensors": save(large)})
    hub.add("org/many", {"config.json": CONFIG, "model.safetensors": save(many)})
    ran = run("inspect", "org/large", "--json", "--tensors")
    assert ran.code == 0, ran.err
    seen = json.loads(ran.out)
    assert seen["revision"] == commit
    assert seen["size"] == sum(tensor.nbytes for tensor in large.values())
    assert {t["name"]: tuple(t["shape"]) for t in seen["tensor_list"]} == {
        name: tensor.shape for name, tensor in large.items()
    }
    assert json.loads(run("inspect", "org/many", "--json").out)["tensors"] == len(many)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"org/large": {}, "org/many": {}})
    ran = run("inspect", recipe, "--json")
    assert [each["problem"] for each in json.loads(ran.out)["inputs"]] == [None, None]
    cached = sum(path.stat().st_size for path in (tmp_path / "hf").rglob("*") if path.is_file())
    assert cached < 10_000
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_look_at_what_is_cached_needs_no_hub(hub: HubServer, run: Run, tmp_path: Path) -> None:
    hub.add("org/model-a", model(1))
    recipe = write_recipe(tmp_path / "r.yaml", "linear", {"org/model-a": {}})
    assert run("merge", recipe, "-o", tmp_path / "out").code == 0
    before = len(hub.requests)
    assert json.loads(run("inspect", "org/model-a", "--json").out)["tensors"] == len(SHAPES)
    asked = [path for _, path in hub.requests[before:] if "safetensors" in path]
    assert asked == []
    hub.close()
    assert json.loads(run("inspect", "org/model-a", "--json").out)["tensors"] == len(SHAPES)


def test_a_look_that_cannot_be_had(hub: HubServer, run: Run) -> None:
    hub.add("org/old", {"config.json": CONFIG, "pytorch_model.bin": b"junk"})
    hub.add("org/cut", model(1))
    hub.add("org/broken", {"config.json": CONFIG, "model.safetensors": b"\xff" * 64})
    hub.faults.append(Fault(r"GET /org/cut/resolve/.*safetensors", cut=20))
    for name, said in (
        ("org/old", "is a PyTorch file"),
        ("org/cut", "could not be read"),
        ("org/broken", "not a safetensors file"),
        ("org/gone", "neither a folder here nor a model on the Hub"),
    ):
        ran = run("inspect", name)
        assert ran.code == 1
        assert said in ran.err, ran.err


def test_an_adapter_on_the_hub_is_seen(hub: HubServer, run: Run, example_models: Path) -> None:
    hub.add_folder("org/base", example_models / "base")
    hub.add_folder("org/lora", example_models / "lora-code")
    seen = json.loads(run("inspect", "org/lora", "--json").out)
    assert (seen["kind"], seen["adapter_type"]) == ("adapter", "LORA")
    assert {group["rank"] for group in seen["modules"]} == {8}
    ran = run("inspect", "org/base+!org/lora", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["tensors"] == 21


def test_calibration_text_of_a_data_set(run: Run, hub: HubServer, tmp_path: Path) -> None:
    """A file of a data set on the Hub; what is not there is named."""
    lines = "\n".join(json.dumps({"text": f"Line {i} of a data set. " * 9}) for i in range(90))
    hub.add("org/texts", {"data/train.jsonl": lines.encode()})
    model = ROOT / "examples" / "models" / "base"
    name = "hf://datasets/org/texts/data/train.jsonl"
    more = ("--calibration", name, "--context", "64", "--windows", "8", "-q")
    ran = run("quantize", "--to", "gptq", "w4g128", model, "-o", "out", *more)
    assert ran.code == 0, ran.err
    stated = json.loads((tmp_path / "out" / "pack.lock").read_text())["details"]["calibration"]
    assert stated["text"] == "train.jsonl"
    assert stated["windows"] == 8
    for wrong, told in (("org/none/a.jsonl", "on the Hub"), ("org/texts/b.jsonl", "no such file")):
        ran = run("eval", model, "--text", f"hf://datasets/{wrong}")
        assert ran.code == 1
        assert told in ran.err
        assert "Traceback" not in ran.err
