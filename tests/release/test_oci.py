"""OCI: the image layout, and pushing to a real registry on loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.cli.progress import make_progress
from mergekit_lite.errors import PackError
from mergekit_lite.release.push_oci import push_image
from tests.conftest import digests
from tests.oci_registry import OciRegistry
from tests.release.test_release import _models, _recipe

Pack = Callable[..., Any]
SILENT = make_progress(True)


@pytest.fixture
def home(pack: Pack, tmp_path: Path) -> Path:
    """Where a release was made."""
    home = _models(tmp_path / "home")
    assert pack("merge", _recipe(home), "-q", cwd=home).code == 0
    assert pack("release", "-q", cwd=home).code == 0
    return home


def _release(home: Path) -> Path:
    return home / "dist" / "mine" / "release" / "1.2.0"


def test_the_layout(pack: Pack, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the specifications: every blob has its digest; the same bytes each time."""
    ran = pack("release", "--oci", "-q", cwd=home)
    assert ran.code == 0, ran.err
    layout = home / "dist" / "mine" / "release" / "mine-1.2.0.oci"
    for blob in (layout / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "1.2.0"
    manifest = json.loads(_blob(layout, entry).read_text())
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["annotations"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    layers = {
        layer["annotations"]["org.cncf.model.filepath"]: layer for layer in manifest["layers"]
    }
    kinds = {name: layer["mediaType"].split(".model.")[1] for name, layer in layers.items()}
    assert kinds["model.safetensors"] == "weight.v1.raw"
    assert kinds["config.json"] == "weight.config.v1.raw"
    assert kinds["README.md"] == "doc.v1.raw"
    config = json.loads(_blob(layout, manifest["config"]).read_text())
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    assert config["descriptor"] == {"name": "mine", "version": "1.2.0", "licenses": ["Apache-2.0"]}
    weights = _release(home) / "model.safetensors"
    assert _blob(layout, layers["model.safetensors"]).stat().st_ino == weights.stat().st_ino
    ran = pack("verify", layout)
    assert ran.code == 0, ran.err
    assert pack("release", "--oci", cwd=home).code == 0
    first = digests(layout)
    shutil.rmtree(layout)
    assert pack("release", "--oci", "-q", cwd=home).code == 0
    assert digests(layout) == first
    shutil.rmtree(layout)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert pack("release", "--oci", "-q", cwd=home).code == 0
    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = json.loads(_blob(layout, entry).read_text())
    created = manifest["annotations"]["org.opencontainers.image.created"]
    assert created == "2023-11-14T22:13:20Z"


def _blob(layout: Path, descriptor: dict[str, Any]) -> Path:
    path = layout / "blobs" / "sha256" / descriptor["digest"].removeprefix("sha256:")
    assert path.stat().st_size == descriptor["size"]
    return path


@pytest.mark.parametrize("name", ["../x", "/etc/x", ""])
def test_hostile_layouts(pack: Pack, home: Path, name: str) -> None:
    assert pack("release", "--oci", "-q", cwd=home).code == 0
    layout = home / "dist" / "mine" / "release" / "mine-1.2.0.oci"
    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(_blob(layout, index["manifests"][0]).read_text())
    manifest["layers"][0]["annotations"]["org.cncf.model.filepath"] = name
    raw = json.dumps(manifest).encode()
    digest = hashlib.sha256(raw).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(raw)
    index["manifests"][0] |= {"digest": f"sha256:{digest}", "size": len(raw)}
    (layout / "index.json").write_text(json.dumps(index))
    ran = pack("verify", layout)
    assert ran.code == 1
    assert "names a file outside" in ran.err
    index["manifests"][0]["digest"] = "sha256:../../../../etc/passwd"
    (layout / "index.json").write_text(json.dumps(index))
    assert pack("verify", layout).code == 1


def test_a_name_twice_in_a_layout(pack: Pack, home: Path) -> None:
    """It is refused, and nothing that blobs are linked to is written."""
    assert pack("release", "--oci", "-q", cwd=home).code == 0
    layout = home / "dist" / "mine" / "release" / "mine-1.2.0.oci"
    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(_blob(layout, index["manifests"][0]).read_text())
    layers = {la["annotations"]["org.cncf.model.filepath"]: la for la in manifest["layers"]}
    again = {**layers["README.md"], "annotations": layers["config.json"]["annotations"]}
    manifest["layers"].append(again)
    raw = json.dumps(manifest).encode()
    digest = hashlib.sha256(raw).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(raw)
    index["manifests"][0] |= {"digest": f"sha256:{digest}", "size": len(raw)}
    (layout / "index.json").write_text(json.dumps(index))
    before = digests(home / "dist" / "mine" / "merged")
    ran = pack("verify", layout)
    assert ran.code == 1
    assert "names a file twice" in ran.err
    assert digests(home / "dist" / "mine" / "merged") == before


def test_a_blob_with_other_content(pack: Pack, home: Path) -> None:
    assert pack("release", "--oci", "-q", cwd=home).code == 0
    layout = home / "dist" / "mine" / "release" / "mine-1.2.0.oci"
    readme = (_release(home) / "README.md").read_bytes()
    path = layout / "blobs" / "sha256" / hashlib.sha256(readme).hexdigest()
    path.unlink()
    path.write_bytes(readme.replace(b"Random", b"Rundom"))
    ran = pack("verify", layout)
    assert ran.code == 1
    assert "has other content" in ran.err


def test_pushed_and_pulled(pack: Pack, home: Path, tmp_path: Path) -> None:
    """What the ORAS client pulls has the bytes of the release; running again sends nothing."""
    from oras.client import OrasClient

    with OciRegistry(tmp_path / "registry") as registry:
        target = f"{registry.host}/org/mine"
        ran = pack("release", "--push-oci", target, "--dry-run", cwd=home)
        assert ran.code == 0, ran.err
        assert "nothing was sent" in ran.out
        ran = pack("release", "--push-oci", target, cwd=home)
        assert ran.code == 0, ran.err
        assert "released @sha256:" in ran.out
        pulled = tmp_path / "pulled"
        OrasClient(hostname=registry.host, insecure=True).pull(
            f"{target}:1.2.0", outdir=str(pulled)
        )
        assert digests(pulled) == digests(_release(home))
        ran = pack("verify", f"oci://{target}:1.2.0")
        assert ran.code == 0, ran.err
        assert "all as they were released" in ran.out
        ran = pack("reproduce", f"oci://{target}:1.2.0", cwd=home)
        assert ran.code == 0, ran.err
        ran = pack("release", "--push-oci", target, cwd=home)
        assert "it was there already" in ran.out
        readme = _release(home) / "README.md"
        before = readme.read_bytes()
        readme.write_bytes(before + b"x")
        ran = pack("release", "--push-oci", target, cwd=home)
        assert ran.code == 1
        assert "is not as it was released" in ran.err
        readme.write_bytes(before)
        shutil.rmtree(_release(home))
        _recipe(home, card={"summary": "Another."})
        assert pack("merge", home / "r.yaml", "-q", "--force", cwd=home).code == 0
        ran = pack("release", "--push-oci", target, cwd=home)
        assert ran.code == 1
        assert "is there already, with other content" in ran.err
        ran = pack("verify", f"oci://{target}:9.9.9")
        assert ran.code == 1
        assert "cannot be fetched" in ran.err
    ran = pack("release", "--push-oci", target, cwd=home)
    assert ran.code == 1
    assert "cannot be reached" in ran.err
    for wrong in ("org/mine", "HOST", f"{registry.host}/Org", f"{registry.host}/a b"):
        ran = pack("release", "--push-oci", wrong, cwd=home)
        assert ran.code == 1
        assert "is no repository of a registry" in ran.err


def test_large_files_in_pieces(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is larger than what is held at a time arrives whole."""
    monkeypatch.setattr("mergekit_lite.release.push_oci._CHUNK", 1000)
    with OciRegistry(tmp_path / "registry") as registry:
        done = push_image(_release(home), f"{registry.host}/org/mine", 2, SILENT)
        assert "model.safetensors" in done.added
        stored = tmp_path / "registry" / "content"
        weights = (_release(home) / "model.safetensors").read_bytes()
        name = hashlib.sha256(weights).hexdigest()
        [path] = stored.glob(f"docker/registry/v2/blobs/sha256/*/{name}/data")
        assert path.read_bytes() == weights


def test_who_may_push(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what docker login wrote; otherwise an error that says so, and no secret shown."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / ".docker"))
    with OciRegistry(tmp_path / "registry", password=True) as registry:
        target = f"{registry.host}/org/mine"
        with pytest.raises(PackError, match="the registry refuses you"):
            push_image(_release(home), target, 2, SILENT)
        (tmp_path / ".docker").mkdir()
        (tmp_path / ".docker" / "config.json").write_text(json.dumps(registry.docker_config()))
        assert push_image(_release(home), target, 2, SILENT).done.startswith("released")
