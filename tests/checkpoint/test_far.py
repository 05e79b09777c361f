"""Models that are read where they lie: the same bytes, and none too many, on any network."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_lite.checkpoint.far.cache import BlockCache
from mergekit_lite.checkpoint.far.checkpoint import _EARLY, FarFile, _Digest
from mergekit_lite.checkpoint.far.fetcher import FETCHER, Block, Fetcher, at_once, cache_folder
from mergekit_lite.checkpoint.far.locate import _fetched, _kept, fetch_adapter
from mergekit_lite.checkpoint.far.traffic import known_rate
from mergekit_lite.checkpoint.far.transport import (
    Broken,
    FsspecTransport,
    HttpTransport,
    Transport,
    client,
)
from mergekit_lite.checkpoint.known import KNOWN
from mergekit_lite.errors import Interrupted, PackError
from mergekit_lite.merge.model import _name_of
from tests.adapters.models import save_base, save_lora
from tests.conftest import Ran, digests, pack_process, random_models, write_recipe
from tests.far_server import FarServer, far_server
from tests.hub_server import HubServer

Pack = Callable[..., Ran]
NAMES = ("base", "a", "b")
SHAPES = {
    "embed.weight": (257, 64), "layers.0.up.weight": (160, 64), "layers.0.norm.weight": (64,),
    "layers.1.up.weight": (160, 64), "layers.1.norm.weight": (64,), "head.weight": (257, 64),
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return random_models(tmp_path / "models", "ab", torch.bfloat16, SHAPES)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some kilobytes, and nothing known of earlier runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mergekit_lite.checkpoint.far.checkpoint.BLOCK", 5000)
    monkeypatch.setattr("mergekit_lite.checkpoint.far.fetcher._PAUSE", 0.001)
    monkeypatch.setattr(FETCHER, "cache_bytes", 0)
    monkeypatch.setattr(FETCHER, "paused", False)


@pytest.fixture
def server(models: Path) -> Iterator[FarServer]:
    with far_server(models) as far:
        yield far


def ties(path: Path, where: str, method: str = "ties", **keys: object) -> Path:
    """A recipe of the three models below an address."""
    parameters = {"weight": 0.5} | ({"density": 0.5} if method == "ties" else {})
    tuned: dict[str, dict[str, object]] = {f"{where}/{n}": dict(parameters) for n in NAMES[1:]}
    if method == "linear":
        return write_recipe(path, method, {**tuned, f"{where}/base": dict(parameters)}, **keys)
    return write_recipe(path, method, tuned, base_model=f"{where}/base", **keys)


def weights(folder: Path) -> dict[str, str]:
    """Digests of a result, all but the lock, which says where the models lay."""
    return {name: digest for name, digest in digests(folder).items() if name != "pack.lock"}


def expected(pack: Pack, models: Path, tmp_path: Path, method: str = "ties") -> dict[str, str]:
    ran = pack("merge", ties(tmp_path / "same.yaml", str(models), method), "-o", tmp_path / "local")
    assert ran.code == 0, ran.err
    return weights(tmp_path / "local")


def inputs(folder: Path) -> list[list[dict[str, Any]]]:
    lock = json.loads((folder / "pack.lock").read_text())
    return [entry["files"] for entry in lock["inputs"]]


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_same_bytes(
    method: str, pack: Pack, server: FarServer, models: Path, tmp_path: Path
) -> None:
    """Every byte of the files is sent once, and none stays on this disk."""
    wanted = expected(pack, models, tmp_path, method)
    server.asked.clear()
    recipe = ties(tmp_path / "same.yaml", server.url, method)
    ran = pack("merge", recipe, "-o", tmp_path / "far")
    assert ran.code == 0, ran.err
    assert weights(tmp_path / "far") == wanted
    assert inputs(tmp_path / "far") == inputs(tmp_path / "local")
    for name in NAMES:
        size = (models / name / "model.safetensors").stat().st_size
        spans = sorted(server.asked[f"{name}/model.safetensors"])
        assert spans.pop(0) == (0, 1)  # whether it is still the same
        assert [start for start, _ in spans[1:]] == [stop for _, stop in spans[:-1]]
        assert (spans[0][0], spans[-1][1]) == (0, size)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 1000


def test_what_is_read_several_times(
    pack: Pack, server: FarServer, models: Path, tmp_path: Path
) -> None:
    """A trim of the whole model looks at all of it first."""
    for where, name in ((server.url, "far"), (str(models), "local")):
        recipe = ties(tmp_path / "same.yaml", where, parameters={"trim": "global"})
        ran = pack("merge", recipe, "-o", tmp_path / name)
        assert ran.code == 0, ran.err
    assert weights(tmp_path / "far") == weights(tmp_path / "local")
    assert inputs(tmp_path / "far") == inputs(tmp_path / "local")


def test_parts_of_a_model(pack: Pack, server: FarServer, tmp_path: Path) -> None:
    """Of layers that are left out nothing is sent; the lock's digest is known from before."""
    assert pack("merge", ties(tmp_path / "r.yaml", server.url), "-o", tmp_path / "out").code == 0
    server.asked.clear()
    part = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": f"{server.url}/base", "layer_range": [0, 1]}]}],
    }
    (tmp_path / "part.yaml").write_text(json.dumps(part))
    ran = pack("merge", tmp_path / "part.yaml", "-o", tmp_path / "part")
    assert ran.code == 0, ran.err
    sent = sum(stop - start for start, stop in server.asked["base/model.safetensors"])
    layer = 2 * (160 * 64 + 64)
    assert sent < server.folder.joinpath("base/model.safetensors").stat().st_size - layer + 2


def test_a_bad_line(pack: Pack, server: FarServer, models: Path, tmp_path: Path) -> None:
    """Requests that fail, and answers that are cut, change nothing."""
    wanted = expected(pack, models, tmp_path)
    server.failing = 0.2
    before = FETCHER.traffic.retried
    ran = pack("merge", ties(tmp_path / "same.yaml", server.url), "-o", tmp_path / "far")
    assert ran.code == 0, ran.err
    assert weights(tmp_path / "far") == wanted
    assert FETCHER.traffic.retried > before


def test_a_small_window(
    pack: Pack, server: FarServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that nobody has read yet may be more than fit."""
    wanted = expected(pack, models, tmp_path)
    monkeypatch.setattr(FETCHER, "window", 12_000)
    ran = pack("merge", ties(tmp_path / "same.yaml", server.url), "-o", tmp_path / "far")
    assert ran.code == 0, ran.err
    assert weights(tmp_path / "far") == wanted


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_that_changes(
    etags: bool, pack: Pack, server: FarServer, models: Path, tmp_path: Path
) -> None:
    """Noticed by its ETag, or by the time of its last change; nothing is left under the name."""
    server.etags, server.latency = etags, 0.05
    file = models / "a" / "model.safetensors"

    def change() -> None:
        while len(server.asked.get("a/model.safetensors", ())) < 4:
            time.sleep(0.002)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        beside = file.with_name("new")
        beside.write_bytes(data)
        os.utime(beside, (1, 1))
        beside.rename(file)

    changing = threading.Thread(target=change, daemon=True)
    changing.start()
    ran = pack("merge", ties(tmp_path / "r.yaml", server.url), "-o", tmp_path / "far")
    changing.join(10)
    assert ran.code == 1
    assert "changed while it was being read" in ran.err
    assert not (tmp_path / "far").exists()


def test_adapter_on_a_base(
    pack: Pack, example_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_lite.checkpoint.far.checkpoint.BLOCK", 1 << 20)
    with far_server(example_models) as server:
        for where, name in ((server.url, "far"), (str(example_models), "local")):
            word = f"{where}/base+!{where}/lora-code"
            ran = pack("merge", "adapter", word, "-o", tmp_path / name)
            assert ran.code == 0, ran.err
        size = (example_models / "base" / "model.safetensors").stat().st_size
        sent = sum(b - a for a, b in server.asked["base/model.safetensors"])
        assert sent == size + 1
    assert weights(tmp_path / "far") == weights(tmp_path / "local")


@pytest.mark.parametrize("method", ["adapter", "linear", "ties"])
def test_an_adapter_that_looks_at_the_base_first(
    method: str, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DoRA on embeddings needs lengths of columns; the base is fetched once all the same."""
    folder = tmp_path / "models"
    base = save_base(folder / "base", "llama", torch.bfloat16, vocab_size=3000, hidden_size=256)
    save_base(folder / "other", "llama", torch.bfloat16, vocab_size=3000, hidden_size=256)
    save_lora(folder / "dora", base, target_modules=["embed_tokens", "lm_head"], use_dora=True)
    monkeypatch.setattr("mergekit_lite.checkpoint.far.checkpoint.BLOCK", 100_000)
    with far_server(folder) as server:
        for where, name in ((server.url, "far"), (str(folder), "local")):
            word = f"{where}/base+!{folder}/dora"
            keys: dict[str, Any] = {"weight": 0.5} | ({"density": 0.5} if method == "ties" else {})
            beside = {"base_model": f"{where}/other"} if method == "ties" else {}
            models = {word: keys} | ({} if method == "ties" else {f"{where}/other": keys})
            recipe = write_recipe(tmp_path / "same.yaml", method, models, **beside)
            words = (method, word) if method == "adapter" else (method, recipe)
            ran = pack("merge", *words, "-o", tmp_path / name)
            assert ran.code == 0, ran.err
        size = (base / "model.safetensors").stat().st_size
        sent = sum(b - a for a, b in server.asked["base/model.safetensors"])
        assert sent == size + 1
    assert weights(tmp_path / "far") == weights(tmp_path / "local")


@pytest.mark.parametrize("told", [True, False])
def test_an_adapter_that_is_replaced(
    told: bool, server: FarServer, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of the same size: the new one is used, and a state is fetched once."""
    if not told:  # the server says nothing of its state
        server.etags = False
        monkeypatch.setattr("tests.far_server.formatdate", lambda *_, **__: "")
    (models / "a" / "config.json").rename(models / "a" / "adapter_config.json")
    weights = models / "a" / "model.safetensors"
    weights = weights.rename(weights.with_name("adapter_model.safetensors"))
    times = []
    for state in (0, 1):
        data = bytearray(weights.read_bytes())
        data[-1] = state
        weights.write_bytes(data)
        os.utime(weights, (state, state))
        for _ in range(2):
            fetched = fetch_adapter(f"{server.url}/a") / weights.name
            assert fetched.read_bytes() == data
            times.append(fetched.stat().st_mtime_ns)
    if told:
        assert times[0] == times[1] != times[2] == times[3]


def test_small_files_that_several_processes_keep(tmp_path: Path) -> None:
    files = {f"{n}": bytes(10_000) for n in range(20)}
    barrier = threading.Barrier(4)

    def keep(_: int) -> None:
        for n in range(10):
            barrier.wait(20)
            _kept(f"x://{n}", files)

    at_once(keep, range(4))
    assert not list(tmp_path.rglob(".*"))


def test_gguf_of_a_model_elsewhere(
    pack: Pack, example_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_lite.checkpoint.far.checkpoint.BLOCK", 1 << 20)
    with far_server(example_models) as server:
        for where, name in ((server.url, "far"), (str(example_models), "local")):
            words = ("--to", "gguf", "q8_0", f"{where}/base", "--name", "x", "-o", tmp_path / name)
            ran = pack("quantize", *words)
            assert ran.code == 0, ran.err
    files = [next((tmp_path / name).glob("*.gguf")).read_bytes() for name in ("far", "local")]
    assert files[0] == files[1]


def test_local_cache(pack: Pack, server: FarServer, models: Path, tmp_path: Path) -> None:
    """What was fetched is there the second time; never more than was allowed."""
    recipe = ties(tmp_path / "r.yaml", server.url)
    assert pack("merge", recipe, "-o", tmp_path / "1", "--cache", "10MB").code == 0
    server.asked.clear()
    assert pack("merge", recipe, "-o", tmp_path / "2", "--cache", "10MB").code == 0
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    for name in NAMES:  # the head, and whether it is still the same
        assert sum(b - a for a, b in server.asked[f"{name}/model.safetensors"]) < 2000
    blocks = tmp_path / "cache" / "pack" / "blocks"
    for path in blocks.glob("*/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    server.asked.clear()
    assert pack("merge", recipe, "-o", tmp_path / "3", "--cache", "10MB").code == 0
    assert digests(tmp_path / "1") == digests(tmp_path / "3")
    for name in NAMES:  # what was damaged on the disk is fetched again
        size = (models / name / "model.safetensors").stat().st_size
        assert sum(b - a for a, b in server.asked[f"{name}/model.safetensors"]) == size + 1
    assert pack("merge", recipe, "-o", tmp_path / "4", "--cache", "20KB").code == 0
    assert sum(path.stat().st_size for path in blocks.rglob("*") if path.is_file()) <= 20_000


def test_a_cached_block_of_another_place(tmp_path: Path) -> None:
    """A block is used for the state and the range of a file that it was kept for alone."""
    cache = BlockCache(tmp_path, 10_000)
    for state in ("a", "b"):
        cache.keep(state, 0, 4, state.encode() * 4)
    cache.keep("a", 4, 8, b"next")
    assert [cache.find(*at) for at in (("a", 0, 4), ("a", 4, 8))] == [b"aaaa", b"next"]
    first, second = sorted(tmp_path.glob("*/0-4"))
    first.write_bytes(second.read_bytes())
    (first.parent / "8-12").write_bytes(b"")
    held = [cache.find(state, 0, 4) for state in "ab"]
    assert sorted(map(str, held)) in (["None", "b'aaaa'"], ["None", "b'bbbb'"])
    assert not first.exists()
    assert [cache.find(state, 8, 12) for state in "ab"] == [None, None]


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        (r"s3://b/ba\+se", "ba-se"), (r"s3://b/x\+y/base@v1", "base"), ("a/b+lora", "lora"),
        ("base+0.7*lora", "lora"), ("base+!lora", "lora"), (r"base+s3://b/lo\+ra", "lo-ra"),
    ],
)  # fmt: skip
def test_names_of_what_is_made(reference: str, name: str, tmp_path: Path) -> None:
    """A `+` that belongs to an address does not begin an adapter."""
    assert _name_of(reference, tmp_path) == name


def test_a_cache_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are used, though the time of their use cannot be noted."""
    BlockCache(tmp_path, 10_000).keep("a", 0, 4, b"aaaa")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("os.utime", refuse)
    cache = BlockCache(tmp_path, 10_000)
    assert cache.find("a", 0, 4) == b"aaaa"


@pytest.mark.parametrize("damaged", ["", "-99999999", "1e3", "many"])
def test_a_damaged_count_of_cached_bytes(tmp_path: Path, damaged: str) -> None:
    """The folder is looked through again, and the limit holds."""
    cache = BlockCache(tmp_path, 10_000)
    cache.keep("a", 0, 8000, bytes(8000))
    (tmp_path / ".bytes").write_text(damaged)
    cache.keep("a", 8000, 16000, bytes(8000))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 10_000


def test_processes_that_share_a_cache(tmp_path: Path) -> None:
    """Together they keep to the limit, whatever goes meanwhile, and what they keep can be found."""
    program = (
        "import sys; from pathlib import Path\n"
        "from mergekit_lite.checkpoint.far.cache import BlockCache\n"
        "cache = BlockCache(Path(sys.argv[1]), 50_000); sys.stdin.read()\n"
        "for at in range(40):\n"
        "    cache.keep(sys.argv[2], at, at + 2000, bytes(2000))\n"
        "    cache.find(sys.argv[2], at, at + 2000)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    several = [subprocess.Popen([*command, name], stdin=subprocess.PIPE) for name in "xyz"]
    for process in several:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(120) for process in several] == [0, 0, 0]
    files = [path for path in tmp_path.glob("*/*") if path.is_file()]
    assert 40_000 <= sum(path.stat().st_size for path in files) <= 50_000
    cache = BlockCache(tmp_path, 50_000)
    found = [cache.find(name, at, at + 2000) for name in "xyz" for at in range(40)]
    assert sum(data is not None for data in found) == len(files)


def test_a_plan_fetches_no_weights(pack: Pack, server: FarServer, tmp_path: Path) -> None:
    ran = pack("plan", ties(tmp_path / "r.yaml", server.url))
    assert ran.code == 0, ran.err
    assert f"{server.url}/base is read where it lies" in ran.out
    for name in NAMES:
        assert sum(b - a for a, b in server.asked[f"{name}/model.safetensors"]) < 2000


def test_mistakes(
    pack: Pack, server: FarServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(where: str, *said: str) -> None:
        ran = pack("merge", ties(tmp_path / "r.yaml", where), "-o", tmp_path / "out")
        assert ran.code == 1
        for text in said:
            assert text in ran.err, ran.err
        assert "Traceback" not in ran.err
        assert not (tmp_path / "out").exists()

    told(f"{server.url}/gone", "is not there")
    told(server.url.replace("//", "//user:secret@"), "would be in every lock")
    assert "secret" not in pack("inspect", "https://user:secret@host/x").err
    told("http://127.0.0.1:1", "could not be read")
    told("http://[::1", "is no address")
    told("hf://org/name", "no address of a model on the Hub")
    server.ranges = False
    told(server.url, "does not send parts of files")
    monkeypatch.setattr(
        "mergekit_lite.checkpoint.far.locate.find_spec",
        lambda name: None if name in ("s3fs", "gcsfs") else find_spec(name),
    )
    told("s3://bucket/x", "pip install 'pack-models[s3]'")
    told("gs://bucket/x", "pip install 'pack-models[gs]'")


def test_the_hub(pack: Pack, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf:// reads where it lies, at the commit of its revision; damage is noticed."""
    wanted = expected(pack, models, tmp_path)
    with HubServer() as hub:
        commits = [hub.add_folder(f"org/{name}", models / name) for name in NAMES]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment = kept | hub.environment(tmp_path / "hf")
        environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")

        def run(*words: object) -> Ran:
            process = pack_process(*words, cwd=tmp_path, env=environment)
            out, err = process.communicate(timeout=120)
            return Ran(process.returncode, out, err)

        ran = run("merge", ties(tmp_path / "same.yaml", "hf://org"), "-o", tmp_path / "far")
        assert ran.code == 0, ran.err
        assert weights(tmp_path / "far") == wanted
        assert not list((tmp_path / "hf").rglob("*.safetensors"))
        lock = json.loads((tmp_path / "far" / "pack.lock").read_text())
        assert {entry["revision"] for entry in lock["inputs"]} == set(commits)
        plan = run("plan", ties(tmp_path / "plain.yaml", "org"))
        assert "is fetched whole" in plan.out, plan.out + plan.err
        assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_damage_on_the_way(server: FarServer) -> None:
    """What came is compared with the digest that the server states."""
    url = f"{server.url}/a/model.safetensors"
    file = FarFile(HttpTransport(url, "model.safetensors", sha256="0" * 64))
    file.read(0, np.empty(file.size, np.uint8))
    with pytest.raises(PackError, match="not what the server says"):
        file.finish()


def test_a_digest_that_was_remembered_and_is_wrong(server: FarServer, models: Path) -> None:
    """The server stated none, so what came is what the file is."""
    url = f"{server.url}/a/model.safetensors"
    transport = HttpTransport(url, "model.safetensors")
    transport.fetch(0, 1)
    KNOWN.note_text(transport.identity, "0" * 64)
    for _ in range(2):
        file = FarFile(HttpTransport(url, "model.safetensors"))
        file.read(0, np.empty(file.size, np.uint8))
        assert file.finish().sha256 == digests(models / "a")["model.safetensors"]


@pytest.mark.parametrize(("age", "told"), [(-3600, False), (3600, True)])
def test_times_of_change_that_tell_states_apart(
    age: int, told: bool, server: FarServer, models: Path
) -> None:
    """Not those that are not over, at which the file may change once more."""
    server.etags = False
    path = models / "a" / "model.safetensors"
    os.utime(path, (time.time() - age,) * 2)
    transport = HttpTransport(f"{server.url}/a/model.safetensors", "model.safetensors")
    transport.fetch(0, 1)
    assert bool(transport.identity) == told


def put_shard(model: Path, shard: str) -> None:
    """Give the only shard of a model another name, which an index states."""
    path = model / shard
    path.parent.mkdir(parents=True, exist_ok=True)
    (model / "model.safetensors").rename(path)
    index = {"weight_map": dict.fromkeys(SHAPES, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard", ["a b#c%41+?.safetensors", "sub/deep er/x.safetensors", "./x.safetensors"]
)
def test_names_of_shards_that_are_no_urls(
    shard: str, pack: Pack, server: FarServer, models: Path
) -> None:
    put_shard(models / "a", shard)
    ran = pack("inspect", f"{server.url}/a")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("shard", ["../b/model", "/b/model", "..\\b", "sub/../../b/model"])
def test_names_of_shards_that_lie_elsewhere(
    shard: str, pack: Pack, server: FarServer, models: Path
) -> None:
    index = {"weight_map": dict.fromkeys(SHAPES, f"{shard}.safetensors")}
    (models / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    ran = pack("inspect", f"{server.url}/a")
    assert ran.code == 1
    assert "names a file outside the model's folder" in ran.err


def test_an_address_that_holds_a_plus(
    pack: Pack, server: FarServer, models: Path, tmp_path: Path
) -> None:
    """It is written so that it is told from the one before an adapter."""
    (models / "base").rename(models / "base+1")
    for written in (r"base\+1", "base%2B1"):
        assert pack("inspect", f"{server.url}/{written}").code == 0
        models_of = {f"{server.url}/{name}": {"weight": 0.5} for name in (written, "a")}
        recipe = write_recipe(tmp_path / "r.yaml", "linear", models_of)
        ran = pack("merge", recipe, "-o", tmp_path / written)
        assert ran.code == 0, ran.err
    assert weights(tmp_path / r"base\+1") == weights(tmp_path / "base%2B1")
    ran = pack("inspect", f"{server.url}/base+1")
    assert ran.code == 1
    assert f"{server.url}/base/" in ran.err


@pytest.mark.parametrize("ranges", [True, False])
def test_small_files_that_are_empty(ranges: bool, server: FarServer, models: Path) -> None:
    """They are there, whichever way a server says that they hold nothing."""
    server.ranges = ranges
    (models / "a" / "merges.txt").touch()
    url = f"{server.url}/a/merges.txt"
    assert _fetched({"merges.txt": HttpTransport(url, "merges.txt")}) == {"merges.txt": b""}


def test_small_files_that_are_large(
    server: FarServer, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come whole, or the model is refused; no file is cut."""
    content = bytes(range(250)) * 8
    (models / "a" / "merges.txt").write_bytes(content)
    url = f"{server.url}/a/merges.txt"
    monkeypatch.setattr("mergekit_lite.checkpoint.far.locate._AT_FIRST", 300)
    for most in (2000, 1999):
        monkeypatch.setattr("mergekit_lite.checkpoint.far.locate._SMALL", most)
        several = {"merges.txt": HttpTransport(url, "merges.txt")}
        if most == len(content):
            assert _fetched(several) == {"merges.txt": content}
            continue
        for _ in range(2):  # once its size is known, none of it is fetched
            with pytest.raises(PackError, match=r"merges\.txt: has 0 MB, and files beside"):
                _fetched(several)
    assert server.asked["a/merges.txt"] == [(0, 300), (300, 2000), (0, 300)]


def test_what_waits_to_be_hashed_is_let_go() -> None:
    """All files together hold no more than one may."""
    before = _Digest.waiting
    several = [_Digest() for _ in range(4)]
    part = np.empty(40 << 20, np.uint8)
    for one in several:
        one.feed(1, part)
    assert before < _Digest.waiting <= _EARLY
    for one in several:
        one.close()
    assert _Digest.waiting == before


def test_any_file_system(models: Path, tmp_path: Path) -> None:
    """Stores that have no transport of their own are read through fsspec."""
    fsspec = pytest.importorskip("fsspec")
    path = models / "a" / "model.safetensors"
    system = fsspec.filesystem("file")
    transport = FsspecTransport(system, str(path), f"file://{path}", "model.safetensors")
    file = FarFile(transport)
    out = np.empty(file.size, np.uint8)
    file.read(0, out)
    assert out.tobytes() == path.read_bytes()
    assert file.finish().sha256 == digests(models / "a")["model.safetensors"]
    os.utime(path, (5, 5))
    with pytest.raises(PackError, match="changed while"):
        file.finish()


def test_threads_that_read_the_same_blocks(server: FarServer, models: Path) -> None:
    """Random reads by many threads give what the file holds, with a window that is too small."""
    url = f"{server.url}/base/model.safetensors"
    data = np.fromfile(models / "base" / "model.safetensors", np.uint8)
    file = FarFile(HttpTransport(url, "model.safetensors"))
    wrong: list[int] = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(60):
            start = int(random.integers(0, len(data) - 1))
            out = np.empty(int(random.integers(1, min(20_000, len(data) - start) + 1)), np.uint8)
            file.read(start, out)
            if not np.array_equal(out, data[start : start + len(out)]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    file.close()


def test_what_stays_in_memory(server: FarServer) -> None:
    """All that was read once is let go."""
    held = FETCHER._held
    file = FarFile(HttpTransport(f"{server.url}/b/model.safetensors", "model.safetensors"))
    file.read(0, np.empty(file.size, np.uint8))
    assert FETCHER._held == held


class _Held(Transport):
    """Zeros that come when they may, the first time as an answer that breaks off at its end."""

    name, url, host, size, identity = "x", "x", "x", 1000, ""

    def __init__(self, *, breaking: bool = False) -> None:
        self.may = threading.Event()
        self.breaking = breaking

    def fetch(self, start: int, stop: int) -> bytes:
        self.may.wait(60)
        if self.breaking:
            self.breaking = False
            raise Broken("broken", bytes(min(stop, self.size) - start))
        assert start < min(stop, self.size)
        return bytes(stop - start)

    def check(self) -> None:
        pass


def _nothing(*_: object) -> None:
    pass


@pytest.mark.parametrize("stop", [1000, 1 << 28])
def test_an_answer_that_breaks_at_its_end(stop: int) -> None:
    """All of it came, so nothing is asked for again."""
    held = _Held(breaking=True)
    held.may.set()
    assert FETCHER.fetch_now(held, 0, stop) == bytes(1000)


def test_a_block_that_was_forgotten_is_fetched_when_it_is_wanted() -> None:
    fetcher, held = Fetcher(), _Held()
    fetcher.window = 0
    block = Block(0, 10)
    fetcher.ask(block, held, _nothing, (0, 0))
    fetcher.forget(iter([block]))
    held.may.set()
    out = np.ones(10, np.uint8)
    thread = threading.Thread(
        target=fetcher.take, args=(block, held, _nothing, 0, out), daemon=True
    )
    thread.start()
    thread.join(20)
    assert not out.any()


def test_a_server_that_does_not_answer_holds_nothing_up() -> None:
    """Neither a run that is stopped, nor the error of another file."""
    fetcher, held = Fetcher(), _Held()
    caught: list[BaseException] = []

    def take() -> None:
        try:
            fetcher.take(Block(0, 10), held, _nothing, 0, np.empty(10, np.uint8))
        except Interrupted as error:
            caught.append(error)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    fetcher.stop()
    thread.join(20)
    assert len(caught) == 1

    def opened(number: int) -> int:
        if number == 1:
            raise PackError("gone")
        return len(held.fetch(0, number))

    with pytest.raises(PackError, match="gone"):
        at_once(opened, [0, 1, 2])
    held.may.set()
    assert at_once(opened, [3, 2, 4]) == [3, 2, 4]


def test_threads_share_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections of another would never be closed."""
    several = threading.Barrier(2)

    @cache
    def make() -> object:
        with contextlib.suppress(threading.BrokenBarrierError):
            several.wait(0.05)  # a second thread that came here would be let in
        return object()

    monkeypatch.setattr("mergekit_lite.checkpoint.far.transport._client", make)
    assert len(set(map(id, at_once(lambda _: client(), range(4))))) == 1
    assert several.broken


def test_no_rate_of_another_host() -> None:
    cache_folder().mkdir(parents=True)
    (cache_folder() / "network.json").write_text('{"a": 5}')
    assert (known_rate("a"), known_rate("b")) == (5, None)


@pytest.mark.xdist_group("s3")
def test_s3(pack: Pack, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from an S3 server, with and without an object that changes."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    moto = pytest.importorskip("moto.server")
    import boto3

    wanted = expected(pack, models, tmp_path)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}"), ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "hidden"), ("AWS_DEFAULT_REGION", "us-east-1"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        store = boto3.client("s3")
        store.create_bucket(Bucket="models")
        for name in NAMES:
            for path in (models / name).iterdir():
                store.upload_file(str(path), "models", f"deep/{name}/{path.name}")
        recipe = ties(tmp_path / "same.yaml", "s3://models/deep")
        ran = pack("merge", recipe, "-o", tmp_path / "far")
        assert ran.code == 0, ran.err
        assert weights(tmp_path / "far") == wanted
        lock = (tmp_path / "far" / "pack.lock").read_text()
        assert inputs(tmp_path / "far") == inputs(tmp_path / "local")
        assert "hidden" not in lock
        file = FarFile(_s3_transport("models/deep/a/model.safetensors"))
        store.upload_file(
            str(models / "b" / "model.safetensors"), "models", "deep/a/model.safetensors"
        )
        with pytest.raises(PackError, match="changed while"):
            file.read(0, np.empty(file.size, np.uint8))
        with pytest.raises(PackError, match="changed while"):
            file.finish()
        put_shard(models / "b", "sub/deep/x.safetensors")
        names = ("config.json", "model.safetensors.index.json", "sub/deep/x.safetensors")
        for name in names:
            store.upload_file(str(models / "b" / name), "models", f"deep/sharded/{name}")
        ran = pack("inspect", "s3://models/deep/sharded")
        assert ran.code == 0, ran.err
        store.delete_object(Bucket="models", Key=f"deep/sharded/{names[-1]}")
        ran = pack("inspect", "s3://models/deep/sharded")
        assert "names the shard 'sub/deep/x.safetensors', which is not there" in ran.err
        ran = pack("inspect", "s3://models/deep/none")
        assert (ran.code, "Traceback" in ran.err) == (1, False)
        ran = pack("inspect", "s3://no-such-bucket/x")
        assert (ran.code, "Traceback" in ran.err) == (1, False)
    finally:
        server.stop()


def _s3_transport(path: str) -> Any:
    import fsspec

    from mergekit_lite.checkpoint.far.transport import S3Transport

    system = fsspec.filesystem("s3")
    return S3Transport(system, path, "model.safetensors", system.info(path, refresh=True))
