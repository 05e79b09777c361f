"""pack release --push-hub, with the Hub's own client against a Hub of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_lite.release.secrets import find_secrets
from tests.conftest import ROOT, Ran, digests, pack_process
from tests.hub_server import Fault, HubServer
from tests.release.test_release import _models, _recipe

REPO = "org/mine"
Run = Callable[..., Ran]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where a merge was made."""
    home = _models(tmp_path / "home")
    process = pack_process("merge", str(_recipe(home, hub=REPO)), "-q", cwd=home)
    assert process.wait() == 0
    return home


@pytest.fixture
def run(hub: HubServer, home: Path, tmp_path: Path) -> Run:
    """Run the command in a process that knows this Hub alone, as somebody with a token."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {**kept, **hub.environment(tmp_path / "hf"), "HF_TOKEN": "hf_" + "x" * 34}

    def command(*words: object) -> Ran:
        process = pack_process(*words, cwd=home, env=environment)
        out, err = process.communicate()
        assert "hf_xxx" not in out + err
        return Ran(process.returncode, out, err)

    return command


def _there(hub: HubServer, ref: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[REPO]
    return repository.commits[repository.refs[ref]]


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.is_file()}  # fmt: skip


def test_as_spelled(hub: HubServer, run: Run, home: Path, tmp_path: Path) -> None:
    """One commit, one tag; what is downloaded is the release, and is verified."""
    ran = run("release", "--push-hub")
    assert ran.code == 0, ran.err
    assert "org/mine v1.2.0" in ran.out
    release = home / "dist" / "mine" / "release" / "1.2.0"
    assert {**_files(release), ".gitattributes": _there(hub)[".gitattributes"]} == _there(hub)
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2
    assert repository.refs["v1.2.0"] == repository.refs["main"]
    code = (
        "import sys; from huggingface_hub import snapshot_download\n"
        f"print(snapshot_download({REPO!r}, revision='v1.2.0', local_dir=sys.argv[1]))"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {**kept, **hub.environment(tmp_path / "other")}
    fetched = tmp_path / "fetched"
    subprocess.run([sys.executable, "-c", code, fetched], check=True, env=environment)
    for name in (".gitattributes",):
        (fetched / name).unlink()
    import shutil

    shutil.rmtree(fetched / ".cache", ignore_errors=True)
    assert digests(fetched) == digests(release)
    assert run("verify", fetched).code == 0
    for word in (REPO, f"{REPO}@v1.2.0"):
        ran = run("verify", word)
        assert ran.code == 0, ran.err
        assert "all as they were released" in ran.out
    ran = run("reproduce", f"{REPO}@v1.2.0")
    assert ran.code == 0, ran.err
    ran = run("verify", f"{REPO}@v9")
    assert ran.code == 1
    assert "cannot be fetched from the Hub" in ran.err


def test_again(hub: HubServer, run: Run) -> None:
    """What is there is not sent twice; another content under the same version is an error."""
    assert run("release", "--push-hub", REPO).code == 0
    before = dict(hub.repositories[REPO].refs)
    ran = run("release", "--push-hub", REPO)
    assert ran.code == 0, ran.err
    assert "it was there already" in ran.out
    assert hub.repositories[REPO].refs == before
    repository = hub.repositories[REPO]
    sha = hub.add(REPO, {"MANIFEST.json": b"{}"}, "v1.2.0")
    repository.tags.add("v1.2.0")
    assert sha != before["v1.2.0"]
    ran = run("release", "--push-hub", REPO)
    assert ran.code == 1
    assert "v1.2.0 is there already, with other content" in ran.err


def test_the_next_version(hub: HubServer, run: Run) -> None:
    """It takes the place of the last one whole; files that are gone are removed."""
    hub.add(REPO, {".gitattributes": b"x", "old.safetensors": b"old", "README.md": b"old"})
    ran = run("release", "--push-hub", REPO)
    assert ran.code == 0, ran.err
    assert "removed there: old.safetensors" in ran.out
    assert "old.safetensors" not in _there(hub)
    assert "model.safetensors" in _there(hub)
    ran = run("release", "--version", "1.3.0", "--push-hub", REPO, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["pushed"][0]["tag"] == "v1.3.0"
    assert {"v1.2.0", "v1.3.0"} <= set(hub.repositories[REPO].refs)


FAULTS = {
    "500 at the commit": Fault("POST .*/commit/", times=1, status=500),
    "the connection drops at the commit": Fault("POST .*/commit/", times=1, cut=3),
    "500 at a large file": Fault("PUT /lfs/", status=500),
    "401 at the commit": Fault("POST .*/commit/", times=1, status=401),
    "403 at the commit": Fault("POST .*/commit/", times=1, status=403),
    "409 at the commit": Fault("POST .*/commit/", times=1, status=409),
    "500 at the tag": Fault("POST .*/tag/", times=1, status=500),
    "500 at the refs": Fault("GET .*/refs", times=1, status=500),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_faults(hub: HubServer, run: Run, home: Path, case: str) -> None:
    """Either the old state or the whole new one; running again finishes."""
    old = {".gitattributes": b"x", "README.md": b"old"}
    hub.add(REPO, old)
    fault = FAULTS[case]
    hub.faults.append(Fault(fault.pattern, fault.times, fault.status, fault.cut))
    ran = run("release", "--push-hub")
    assert ran.code == 1
    assert REPO in ran.err
    assert "Traceback" not in ran.err
    release = _files(home / "dist" / "mine" / "release" / "1.2.0")
    now = _there(hub)
    assert now == old or {n: c for n, c in now.items() if n != ".gitattributes"} == release
    hub.faults.clear()
    ran = run("release", "--push-hub")
    assert ran.code == 0, ran.err
    assert {n: c for n, c in _there(hub, "v1.2.0").items() if n != ".gitattributes"} == release


def test_somebody_was_faster(hub: HubServer, run: Run) -> None:
    """The commit names its parent, and is refused if that is not the branch's head any more."""
    hub.add(REPO, {".gitattributes": b"x"})
    asked = hub.answer

    def answer(request: Any) -> Any:
        if request.method == "POST" and "/commit/" in request.path:
            hub.add(REPO, {".gitattributes": b"x", "theirs": b"1"})
        return asked(request)

    hub.answer = answer  # type: ignore[method-assign]
    ran = run("release", "--push-hub")
    assert ran.code == 1
    assert "somebody else changed it meanwhile" in ran.err
    assert _there(hub).keys() == {".gitattributes", "theirs"}


def test_nobody_there(hub: HubServer, run: Run) -> None:
    hub.close()
    ran = run("release", "--push-hub")
    assert ran.code == 1
    assert "cannot be reached" in ran.err


def test_dry_run(hub: HubServer, run: Run) -> None:
    ran = run("release", "--push-hub", "--dry-run")
    assert ran.code == 0, ran.err
    assert "nothing was sent" in ran.out
    assert hub.requests == []


def test_secrets(hub: HubServer, run: Run, home: Path, tmp_path: Path) -> None:
    """Found in any text of a release; named without being shown; nothing leaves."""
    (tmp_path / "x").mkdir()
    secrets = {
        "token": "hf_" + "a" * 34, "key": "-----BEGIN EC PRIVATE KEY-----",
        "path": "/home/me/models/", "aws": "AKIA" + "A" * 16, "github": "ghp_" + "b" * 36,
    }  # fmt: skip
    for name, secret in secrets.items():
        (tmp_path / "x" / f"{name}.md").write_text(f"first\nlook: {secret} x\n")
    found = list(find_secrets(tmp_path / "x"))
    assert len(found) == len(secrets)
    assert not any(secret in line for line in found for secret in secrets.values())
    assert all(":2: holds" in line for line in found)
    path = home / "dist" / "mine" / "merged"
    lock = json.loads((path / "pack.lock").read_text())
    lock["recipe"]["card"]["contact"] = "/home/somebody/x"
    (path / "pack.lock").write_text(json.dumps(lock))
    ran = run("release", "--push-hub")
    assert ran.code == 1
    assert "holds what must not leave" in ran.err
    assert hub.requests == []


@pytest.mark.parametrize("words", [("--push-hub", "nobody"), ("--dry-run",), ("--private",)])
def test_wrong_usage(run: Run, words: tuple[str, ...]) -> None:
    assert run("release", *words).code in (1, 2)


def test_made_again_of_models_that_changed(hub: HubServer, run: Run, home: Path) -> None:
    """Models on the Hub are taken at the commits that went in, whatever main holds by now."""
    for name in ("base", "a", "b"):
        hub.add(f"org/{name}", _files(home / name))
    recipe = home / "hub.yaml"
    models = [{"model": "org/a", "parameters": {"density": 0.5}}, {"model": "org/b"}]
    recipe.write_text(json.dumps({
        "merge_method": "ties", "base_model": "org/base", "models": models, "name": "again",
        "version": "1.0.0", "license": "apache-2.0",
    }))  # fmt: skip
    ran = run("build", recipe, "-q")
    assert ran.code == 0, ran.err
    changed = _files(home / "a") | {"model.safetensors": _files(home / "b")["model.safetensors"]}
    hub.add("org/a", changed)
    ran = run("reproduce", "dist/again/release/1.0.0")
    assert ran.code == 0, ran.err
    ran = run("build", recipe, "-q")
    assert ran.code == 1
    assert "was released with other content" in ran.err


def test_a_build_that_pushes(hub: HubServer, run: Run, home: Path) -> None:
    """Signed where asked, pushed where the recipe says, and kept the next time."""
    ran = run("build", _recipe(home, hub=REPO), "--push-hub", "--json")
    assert ran.code == 0, ran.err
    steps = [(step["name"], step["done"]) for step in json.loads(ran.out)["steps"]]
    assert steps[-1] == ("push", True)
    assert "v1.2.0" in hub.repositories[REPO].refs
    ran = run("build", home / "r.yaml", "--push-hub")
    assert "nothing was to be done" in ran.out
    ran = run("build", _recipe(home, version=None), "--push-hub", REPO)
    assert ran.code == 1
    assert "makes no release" in ran.err


def test_a_repository_for_each_format(
    hub: HubServer, run: Run, home: Path, tmp_path: Path, example_models: Path
) -> None:
    """Each is a release of its own that names the other; a collection holds both."""
    plan = {"repo": REPO, "per_format": True, "collection": "Mine"}
    (home / "examples").mkdir()
    (home / "examples" / "models").symlink_to(example_models)
    document = yaml.safe_load((ROOT / "recipes" / "ties-release.yaml").read_text())
    recipe = home / "formats.yaml"
    recipe.write_text(yaml.safe_dump({**document, "hub": plan, "quantize": [{"scheme": "q8_0"}]}))
    ran = run("build", recipe, "--push-hub", "--json")
    assert ran.code == 0, ran.err
    main, quantized = (
        hub.repositories[repo].commits[hub.repositories[repo].refs["v1.0.0"]]
        for repo in (REPO, f"{REPO}-GGUF")
    )
    assert not [name for name in main if name.endswith(".gguf")]
    assert [name for name in quantized if name.endswith(".gguf")] == ["ties-release-Q8_0.gguf"]
    assert "model.safetensors" not in quantized
    assert f"https://huggingface.co/{REPO}-GGUF" in main["README.md"].decode()
    card = quantized["README.md"].decode()
    assert "# ties-release-GGUF 1.0.0" in card
    assert f"[the model itself](https://huggingface.co/{REPO})" in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == [REPO]
    assert head["base_model_relation"] == "quantized"
    assert head["library_name"] == "gguf"
    assert list(hub.collections.values()) == [[REPO, f"{REPO}-GGUF"]]
    for name in ("release", "release-gguf"):
        folder = home / "dist" / "ties-release" / name / "1.0.0"
        assert run("verify", folder).code == 0
        ran = run("reproduce", folder)
        assert ran.code == 0, ran.err
    ran = run("verify", f"{REPO}-GGUF@v1.0.0")
    assert ran.code == 0, ran.err
    _loads_in_transformers(hub, tmp_path, home / "dist" / "ties-release" / "merged")
    ran = run("build", recipe, "--push-hub")
    assert "nothing was to be done" in ran.out
    ran = run("release", "ties-release", "--push-hub")
    assert ran.code == 0, ran.err
    assert ran.out.count("it was there already") == 2
    assert list(hub.collections.values()) == [[REPO, f"{REPO}-GGUF"]]


def _loads_in_transformers(hub: HubServer, tmp_path: Path, merged: Path) -> None:
    """What snapshot_download fetches is loaded by the card's own lines, and computes the same."""
    pytest.importorskip("transformers")
    code = (
        "import sys, torch\n"
        "from huggingface_hub import snapshot_download\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"fetched = snapshot_download({REPO!r}, revision='v1.0.0')\n"
        "ids = AutoTokenizer.from_pretrained(fetched)('def f(x):', return_tensors='pt').input_ids\n"
        "logits = [AutoModelForCausalLM.from_pretrained(f)(ids).logits\n"
        "          for f in (fetched, sys.argv[1])]\n"
        "assert torch.equal(*logits)\n"
        "print('loaded', tuple(logits[0].shape))\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {**kept, **hub.environment(tmp_path / "reader")}
    ran = subprocess.run([sys.executable, "-c", code, merged], env=environment, check=False,
                         capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("loaded (1, ")
