"""Releases: what is in them, that they are the same anywhere, and what verify finds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
import zstandard

from mergekit_lite.errors import FileFormatError, PackError
from mergekit_lite.merge.model import last_result
from mergekit_lite.release.bundle import make_release
from mergekit_lite.release.card import front_matter, lint_front_matter, render_card
from mergekit_lite.release.draft import Asked
from mergekit_lite.release.gather import gather, last_name
from mergekit_lite.release.manifest import read_manifest
from mergekit_lite.release.verify import verify_release
from tests.conftest import digests, random_models

Pack = Callable[..., Any]
CARD = {
    "summary": "A model of **ours**.", "intended_use": "Tests.", "out_of_scope": "All else.",
    "evaluation": "None.", "limitations": "Random weights.", "authors": ["The authors"],
    "citation": "None.", "languages": ["en"], "tags": ["tiny"],
}  # fmt: skip


def _recipe(folder: Path, **keys: object) -> Path:
    document = {
        "merge_method": "ties", "base_model": "base", "name": "mine", "version": "1.2.0",
        "license": "apache-2.0", "card": CARD,
        "models": [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b"}], **keys,
    }  # fmt: skip
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _models(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random_models(folder, "ab")
    for name, licence in (("base", "apache-2.0"), ("a", "apache-2.0"), ("b", "mit")):
        (folder / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    (folder / "base" / "LICENSE").write_text("Apache License\nVersion 2.0 …")
    (folder / "base" / "NOTICE").write_text("Copyright of the base")
    return folder


@pytest.fixture
def release(pack: Pack, tmp_path: Path) -> Path:
    """A release of a merge."""
    home = _models(tmp_path / "home")
    assert pack("merge", _recipe(home), "-q", cwd=home).code == 0
    ran = pack("release", "mine", "-q", cwd=home)
    assert ran.code == 0, ran.err
    return home / "dist" / "mine" / "release" / "1.2.0"


def test_what_is_in_it(pack: Pack, release: Path) -> None:
    names = {p.relative_to(release).as_posix() for p in release.rglob("*") if p.is_file()}
    assert names >= {
        "model.safetensors", "config.json", "README.md", "LICENSE", "NOTICE", "recipe.yaml",
        "pack.lock", "MANIFEST.json", "sbom.cdx.json", "provenance.intoto.json",
        "licenses/base/LICENSE",
    }  # fmt: skip
    merged = release.parents[1] / "merged" / "model.safetensors"
    assert (release / "model.safetensors").stat().st_ino == merged.stat().st_ino
    notice = (release / "NOTICE").read_text()
    assert "Copyright of the base" in notice
    assert "- b (MIT License)" in notice
    card = (release / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "apache-2.0"
    assert head["tags"] == ["merge", "tiny"]
    assert "A model of **ours**." in card
    assert "density: 0.5" in card
    ran = pack("verify", release)
    assert ran.code == 0, ran.err
    assert "all as they were released" in ran.out


def test_the_bill_of_materials(release: Path) -> None:
    """Valid by CycloneDX's own schema, as the library has it."""
    pytest.importorskip("cyclonedx")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (release / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    ancestors = bill["metadata"]["component"]["pedigree"]["ancestors"]
    assert [ancestor["name"] for ancestor in ancestors] == ["a", "b", "base"]


def test_the_provenance(release: Path) -> None:
    statement = json.loads((release / "provenance.intoto.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    dependencies = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    found = {d["name"]: d["digest"]["sha256"] for d in dependencies}
    weights = release.parents[3] / "a" / "model.safetensors"
    assert found["a/model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_the_same_anywhere(
    pack: Pack, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, time zone, locale, umask, and with other threads."""
    other = _models(tmp_path / "elsewhere" / "deep")
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    monkeypatch.setenv("LC_ALL", "C")
    before = os.umask(0o077)
    try:
        assert pack("merge", _recipe(other), "-q", "--threads", 1, cwd=other).code == 0
        assert pack("release", "-q", cwd=other).code == 0
    finally:
        os.umask(before)
    assert digests(other / "dist" / "mine" / "release" / "1.2.0") == digests(release)


def _flip(path: Path, at: int = -5) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.unlink()  # it may be a link
    path.write_bytes(raw)


def _swap(first: Path, second: Path) -> None:
    one, two = first.read_bytes(), second.read_bytes()
    first.unlink()
    second.unlink()
    first.write_bytes(two)
    second.write_bytes(one)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.unlink()
    path.write_text(text.replace(old, new, 1))


def _sealed_again(folder: Path, path: str) -> None:
    """Whoever tampers may also mend the manifest."""
    content = (folder / path).read_bytes()
    manifest = folder / "MANIFEST.json"
    document = json.loads(manifest.read_text())
    for entry in document["files"]:
        if entry["path"] == path:
            entry["sha256"] = hashlib.sha256(content).hexdigest()
            entry["bytes"] = len(content)
    manifest.write_text(json.dumps(document))


def _mend(change: Callable[[Path], None], path: str) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        change(folder)
        _sealed_again(folder, path)

    return both


def _documents(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    manifest = folder / "MANIFEST.json"
    document = json.loads(manifest.read_text())
    change(document["files"])
    manifest.write_text(json.dumps(document))


def _without(folder: Path, path: str) -> None:
    (folder / path).unlink()
    _documents(folder, lambda files: files.remove(next(f for f in files if f["path"] == path)))


def _with(folder: Path, path: str) -> None:
    (folder / path).write_bytes(b"x")
    entry = {"path": path, "bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    _documents(folder, lambda files: files.append(entry))


def _drop(path: Path, key: str) -> None:
    document = json.loads(path.read_text())
    document[key] = []
    path.write_text(json.dumps(document))


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a byte of the weights": (
        lambda f: _flip(f / "model.safetensors"), "model.safetensors: its content was changed"),
    "weights cut off": (
        lambda f: (f / "model.safetensors").write_bytes(b"x"), "model.safetensors: has 1 bytes"),
    "two files swapped": (
        lambda f: _swap(f / "LICENSE", f / "NOTICE"), "LICENSE: has"),
    "two tensors' files swapped, of one size": (
        lambda f: ((f / "twin").write_bytes((f / "config.json").read_bytes()[::-1]),
                   _swap(f / "config.json", f / "twin"), (f / "twin").unlink()),
        "config.json: its content was changed"),
    "the card": (
        lambda f: _edit(f / "README.md", "Random weights", "Perfect weight"),
        "README.md: its content was changed"),
    "a licence text dropped": (
        lambda f: (f / "licenses/base/LICENSE").unlink(), "licenses/base/LICENSE: is missing"),
    "an extra file": (
        lambda f: (f / "model-2.safetensors").write_bytes(b"x"),
        "model-2.safetensors: is not in the manifest"),
    "the lock": (
        lambda f: _edit(f / "pack.lock", '"seed": 0', '"seed": 1'),
        "pack.lock: its content was changed"),
    "weights, and the manifest mended": (
        _mend(lambda f: _flip(f / "model.safetensors"), "model.safetensors"),
        "pack.lock: 'model.safetensors' of merged is no file of this release"),
    "the bill, and the manifest mended": (
        _mend(lambda f: _edit(f / "sbom.cdx.json", '"version": "1.2.0"', '"version": "9.9.9"'),
              "sbom.cdx.json"), "sbom.cdx.json: is of version '9.9.9'"),
    "the provenance, and the manifest mended": (
        _mend(lambda f: (f / "provenance.intoto.json").write_text("{}"), "provenance.intoto.json"),
        "provenance.intoto.json: is missing or broken"),
    "inputs of the lock, and the manifest mended": (
        _mend(lambda f: _edit(f / "pack.lock", json.loads((f / "pack.lock").read_text())["results"]
                              ["merged"]["inputs"][0]["files"][0]["sha256"], "0" * 64),
              "pack.lock"), "provenance.intoto.json: names other inputs"),
    "the recipe, and the manifest mended": (
        _mend(lambda f: _edit(f / "recipe.yaml", "merge_method: ties", "merge_method: linear"),
              "recipe.yaml"), "recipe.yaml: is another recipe than merged was made by"),
    "a licence, and its entry": (
        lambda f: _without(f, "LICENSE"), "LICENSE: is not in the manifest"),
    "the notice, and its entry": (
        lambda f: _without(f, "NOTICE"), "NOTICE: is not in the manifest"),
    "more weights, and an entry for them": (
        lambda f: _with(f, "pytorch_model.bin"), "pytorch_model.bin: is nothing that was made"),
    "the list of the bill emptied, and the manifest mended": (
        _mend(lambda f: _drop(f / "sbom.cdx.json", "components"), "sbom.cdx.json"),
        "sbom.cdx.json: does not list 'config.json'"),
    "the subjects of the provenance emptied, and the manifest mended": (
        _mend(lambda f: _drop(f / "provenance.intoto.json", "subject"), "provenance.intoto.json"),
        "provenance.intoto.json: does not speak of 'config.json'"),
    "a bill of nonsense, and the manifest mended": (
        _mend(lambda f: (f / "sbom.cdx.json").write_text('{"metadata": [1]}'), "sbom.cdx.json"),
        "sbom.cdx.json: is broken"),
    "a folder that is a link": (
        lambda f: (f / "more").symlink_to("/etc"), "more: is a link to a folder"),
    "a folder of the release moved behind a link": (
        lambda f: ((f / "licenses").rename(f.parent / "elsewhere"),
                   (f / "licenses").symlink_to(f.parent / "elsewhere")),
        "licenses/base/LICENSE: is missing"),
    "a link in the place of a file": (
        lambda f: ((f / "NOTICE").unlink(), (f / "NOTICE").symlink_to("/etc/hostname")),
        "NOTICE: is missing"),
    "the bill gone": (lambda f: (f / "sbom.cdx.json").unlink(), "sbom.cdx.json: is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering(pack: Pack, release: Path, case: str) -> None:
    """Each is caught, and named."""
    change, message = TAMPERED[case]
    change(release)
    ran = pack("verify", release, "-q")
    assert ran.code == 1
    assert message in ran.err
    assert any(message in problem for problem in verify_release(release, 2).problems)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{", '{"files": [{"path": "../x", "bytes": 1, "sha256": ""}]}',
        '{"name": "a\\nb", "version": "1.0.0", "files": []}',
        '{"name": "../../x", "version": "1.0.0", "files": []}',
        '{"name": "x", "version": "1.0.0", "files": [], "name": "y"}',
        '{"name": "x", "version": "1.0.0", "files": [{"path": "a", "bytes": Infinity}]}',
        '{"name": "x", "version": "1.0.0", "files": [{"path": "./a", "bytes": 1, "sha256": ""}]}',
        json.dumps({"name": "x", "version": "1.0.0",
                    "files": [{"path": "a", "bytes": n, "sha256": ""} for n in (1, 2)]}),
        '{"files": [{"path": "/etc/x", "bytes": 1, "sha256": ""}]}', '{"files": [{"path": "x"}]}',
    ],
)  # fmt: skip
def test_hostile_manifests(tmp_path: Path, content: str) -> None:
    (tmp_path / "MANIFEST.json").write_text(content)
    with pytest.raises(FileFormatError):
        read_manifest(tmp_path / "MANIFEST.json")


def test_versions(pack: Pack, release: Path) -> None:
    """A version never changes; a release wants one."""
    home = release.parents[3]
    ran = pack("release", "mine", cwd=home)
    assert ran.code == 1
    assert "version 1.2.0 was released already" in ran.err
    assert pack("release", "mine", "--version", "1.3.0", "-q", cwd=home).code == 0
    ran = pack("release", "mine", "--version", "latest", cwd=home)
    assert "no semantic version" in ran.err
    ran = pack("release", "mien", cwd=home)
    assert ran.code == 1
    assert "did you mean 'mine'" in ran.err


def test_what_a_stopped_run_left_is_no_result(pack: Pack, tmp_path: Path) -> None:
    """Neither below the name nor where results pass through on their way elsewhere."""
    home = _models(tmp_path / "home")
    assert pack("merge", _recipe(home), "-q", cwd=home).code == 0
    dist = home / "dist"
    for left in (".uploads/.s3-bucket-x.rounded", "mine/.merged.old"):
        shutil.copytree(dist / "mine" / "merged", dist / left)
    assert last_name(dist) == "mine"
    assert [made.folder.name for made in gather(dist, "mine").artifacts] == ["merged"]
    assert last_result(home) == Path("dist/mine/merged")
    with pytest.raises(PackError, match="nothing was made") as refused:
        gather(dist, ".uploads")
    assert refused.value.hint == "Made so far: mine"


def test_what_is_missing(pack: Pack, tmp_path: Path) -> None:
    """Warned of; an error under production, and nothing is written."""
    home = _models(tmp_path / "home")
    shutil.rmtree(home / "b")
    shutil.copytree(home / "a", home / "b")
    (home / "b" / "README.md").unlink()
    recipe = _recipe(home, card={"summary": "x"})
    assert pack("merge", recipe, "-q", cwd=home).code == 0
    ran = pack("release", "--profile", "production", cwd=home)
    assert ran.code == 1
    assert "the licence of b is not known" in ran.err
    assert "the card lacks 'intended_use'" in ran.err
    assert not (home / "dist" / "mine" / "release" / "1.2.0").exists()
    ran = pack("release", cwd=home)
    assert ran.code == 0, ran.err
    assert "warning: the licence of b is not known" in ran.err


def test_licences_that_conflict(pack: Pack, tmp_path: Path) -> None:
    home = _models(tmp_path / "home")
    (home / "a" / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    assert pack("merge", _recipe(home), "-q", cwd=home).code == 0
    ran = pack("release", cwd=home)
    assert ran.code == 1
    assert "cannot be released as apache-2.0, only as gpl-3.0" in ran.err
    assert list((home / "dist" / "mine").glob("release/*")) == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{{ name.__init__ }}",
        "{{ self._TemplateReference__context }}", "{% import 'os' as os %}", "{{ nothing }}",
        "{{ card.update({}) }}", "{{ cycler.__init__.__globals__ }}", "{% for %}",
        "{{ '%s' | format(name.__class__) }}", "{{ range(10**9) | list }}", "{{ 1 / 0 }}",
        "{{ '{a}'.format() }}", "{{ '\ud800' }}", "{{ 'x' * 3000000000 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)  # fmt: skip
def test_the_sandbox(template: str) -> None:
    """A template gets data: no file, no attribute of Python's own, no change of its data."""
    with pytest.raises(PackError, match="cannot be rendered"):
        render_card(template, {"name": "x", "card": {"a": 1}})


def test_a_template_of_ones_own(pack: Pack, release: Path) -> None:
    home = release.parents[3]
    (home / "card.jinja").write_text(
        "---\n{{ front_matter }}---\n{{ name }} of {{ card.authors[0] }}"
    )
    ran = pack("release", "--version", "2.0.0", "--template", "card.jinja", "-q", cwd=home)
    assert ran.code == 0, ran.err
    card = (release.parent / "2.0.0" / "README.md").read_text()
    assert card.endswith("mine of The authors")
    ran = pack("reproduce", release.parent / "2.0.0", cwd=home)
    assert ran.code == 0, ran.err
    _recipe(home, version="2.1.0", card={**CARD, "template": "card.jinja"})
    ran = pack("build", "r.yaml", "-q", cwd=home)
    assert ran.code == 0, ran.err
    assert (release.parent / "2.1.0" / "README.md").read_text().endswith("mine of The authors")
    _recipe(home, version="2.1.1", card={**CARD, "template": "cart.jinja"})
    ran = pack("build", "r.yaml", "-q", cwd=home)
    assert ran.code == 1
    assert "cart.jinja: the card's template cannot be read" in ran.err


def _keys(folder: Path, name: str = "key") -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    paths = folder / f"{name}.pem", folder / f"{name}.pub"
    paths[0].write_bytes(private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))  # fmt: skip
    paths[1].write_bytes(private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ))  # fmt: skip
    return paths


def test_signatures(pack: Pack, release: Path, tmp_path: Path) -> None:
    """The library's own command accepts ours; another key, changed files and old ones are found."""
    home = release.parents[3]
    private, public = _keys(tmp_path)
    ran = pack("release", "--sign", private, "-q", cwd=home)
    assert ran.code == 0, ran.err
    checked = subprocess.run(
        [sys.executable, "-m", "model_signing", "verify", "key", "--signature",
         str(release / "model.sig"), "--public_key", str(public), "--ignore-paths",
         str(release / "model.sig"), str(release)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    ran = pack("verify", release, "--public-key", public)
    assert ran.code == 0, ran.err
    assert "signed by the holder of this key" in ran.out
    _, other = _keys(tmp_path, "other")
    ran = pack("verify", release, "--public-key", other)
    assert ran.code == 1
    assert "model.sig: does not hold" in ran.err
    old = (release / "model.sig").read_bytes()
    assert pack("release", "--version", "1.3.0", "-q", cwd=home).code == 0
    later = release.parent / "1.3.0"
    ran = pack("verify", later, "--public-key", public)
    assert "model.sig: is missing" in ran.err
    (later / "model.sig").write_bytes(old)
    ran = pack("verify", later, "--public-key", public)
    assert ran.code == 1
    assert "model.sig: does not hold" in ran.err
    ran = pack("release", "--version", "1.4.0", "--sign", public, cwd=home)
    assert ran.code == 1
    assert "Give a private key" in ran.err
    assert public.read_text() not in ran.err


@pytest.mark.parametrize("kind", ["tar", "tar.zst"])
def test_an_archive(pack: Pack, release: Path, kind: str) -> None:
    """One file, the same bytes each time; verified as it is; hostile ones are refused."""
    home = release.parents[3]
    assert pack("release", "--archive", kind, "-q", cwd=home).code == 0
    path = release.parent / f"mine-1.2.0.{kind}"
    first = path.read_bytes()
    for file in release.rglob("*"):
        os.utime(file, (1, 1))
    ran = pack("release", "--archive", kind, cwd=home)
    assert ran.code == 0, ran.err
    assert str(path.name) in ran.out
    assert path.read_bytes() == first
    path.write_bytes(b"other")
    ran = pack("release", "--archive", kind, cwd=home)
    assert ran.code == 1
    assert "is there already, with other content" in ran.err
    path.unlink()
    assert pack("release", "--archive", kind, "-q", cwd=home).code == 0
    assert path.read_bytes() == first
    ran = pack("verify", path)
    assert ran.code == 0, ran.err
    assert "all as they were released" in ran.out
    raw = bytearray(
        first if kind == "tar" else zstandard.ZstdDecompressor().decompress(first, 1 << 24)
    )
    at = raw.index(b"Random weights")
    raw[at] ^= 1
    path.write_bytes(raw if kind == "tar" else zstandard.ZstdCompressor().compress(raw))
    ran = pack("verify", path)
    assert ran.code == 1
    assert "its content was changed" in ran.err
    for content in (b"", b"x" * 2000, first[:5000], first[: len(first) // 2], b"\x28\xb5\x2f\xfd"):
        path.write_bytes(content)
        assert pack("verify", path).code == 1
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("1.2.0/../../x")
        archive.addfile(info)
    assert pack("verify", path).code == 1
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("1.2.0/x")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    ran = pack("verify", path)
    assert "is no archive of a release" in ran.err


def test_what_leads_elsewhere(pack: Pack, tmp_path: Path) -> None:
    """Nothing comes into a release through links of a model, or a template's path."""
    home = _models(tmp_path / "home")
    (home / "secret.pem").write_text("a secret of mine")
    for name in ("NOTICE", "LICENSE-x"):
        (home / "a" / name).symlink_to(home / "secret.pem")
    assert pack("merge", _recipe(home), "-q", cwd=home).code == 0
    ran = pack("release", "-q", cwd=home)
    assert ran.code == 0, ran.err
    folder = home / "dist" / "mine" / "release" / "1.2.0"
    for path in folder.rglob("*"):
        assert path.is_dir() or b"a secret of mine" not in path.read_bytes()
    for name in ("../secret.pem", str(home / "secret.pem")):
        ran = pack("build", _recipe(home, version="1.3.0", card={**CARD, "template": name}),
                   cwd=home)  # fmt: skip
        assert ran.code == 1
        assert "is not below the recipe's folder" in ran.err


def test_what_comes_along_with_parents(pack: Pack, tmp_path: Path) -> None:
    """Notices and policies under any usual name."""
    home = _models(tmp_path / "home")
    (home / "a" / "NOTICE.txt").write_text("A notice in a text file")
    (home / "a" / "USE_POLICY.md").write_text("A policy")
    (home / "b" / "License.txt").write_text("Permission is hereby granted, free of charge")
    assert pack("merge", _recipe(home), "-q", cwd=home).code == 0
    assert pack("release", "-q", cwd=home).code == 0
    folder = home / "dist" / "mine" / "release" / "1.2.0"
    assert "A notice in a text file" in (folder / "NOTICE").read_text()
    assert (folder / "licenses" / "a" / "USE_POLICY.md").is_file()
    assert (folder / "licenses" / "b" / "License.txt").is_file()


def test_damaged_releases_go_nowhere(pack: Pack, release: Path, tmp_path: Path) -> None:
    """They are not signed, packed, reproduced or kept."""
    home = release.parents[3]
    private, _ = _keys(tmp_path)
    (release / "evil.py").write_text("x")
    for words in (("--sign", private), ("--archive",), ("--oci",)):
        ran = pack("release", "mine", *words, cwd=home)
        assert ran.code == 1
        assert "evil.py: is not in the manifest" in ran.err
    ran = pack("reproduce", release, cwd=home)
    assert ran.code == 1
    assert "evil.py" in ran.err
    (release / "evil.py").unlink()
    _flip(release / "model.safetensors")
    ran = pack("release", "mine", "--sign", private, cwd=home)
    assert ran.code == 1
    assert "model.safetensors: its content was changed" in ran.err
    assert not (release / "model.sig").exists()


def test_another_signature(pack: Pack, release: Path, tmp_path: Path) -> None:
    """The same key again is kept; another one is refused, and the first stays."""
    home = release.parents[3]
    private, public = _keys(tmp_path)
    assert pack("release", "mine", "--sign", private, "-q", cwd=home).code == 0
    ran = pack("release", "mine", "--sign", private, cwd=home)
    assert ran.code == 0, ran.err
    assert "signature, kept" in ran.out
    other, _ = _keys(tmp_path, "other")
    ran = pack("release", "mine", "--sign", other, cwd=home)
    assert ran.code == 1
    assert "is signed already, by another key" in ran.err
    assert pack("verify", release, "--public-key", public).code == 0


def test_a_card_that_leaves_out_what_must_be_shown(pack: Pack, tmp_path: Path) -> None:
    home = _models(tmp_path / "home")
    (home / "card.jinja").write_text("---\n{{ front_matter }}---\n# Mine")
    for name in ("base", "a", "b"):
        (home / name / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    keys = {"license": "llama3.1", "name": "Llama-mine"}
    assert pack("merge", _recipe(home, **keys), "-q", cwd=home).code == 0
    ran = pack("release", "--template", "card.jinja", cwd=home)
    assert ran.code == 1
    assert "leaves out what must be shown: Built with Llama" in ran.err
    (home / "card.jinja").write_text("# Mine\n{{ display | join }}")
    ran = pack("release", "--template", "card.jinja", cwd=home)
    assert ran.code == 1
    assert "it begins with no front matter" in ran.err


def test_weights_are_not_read_again(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release of a fresh merge takes its digests from the lock."""
    home = _models(tmp_path / "home")
    assert pack("merge", _recipe(home), "-q", cwd=home).code == 0

    def read(path: Path) -> str:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr("mergekit_lite.release.gather.known_sha256", read)
    monkeypatch.setattr("mergekit_lite.release.verify.sha256_of", read)
    made = gather(home / "dist", "mine")
    weights = [e for a in made.artifacts for e in a.files if e.path.endswith(".safetensors")]
    assert weights
    monkeypatch.chdir(home)
    [release] = make_release(made, Path("dist"), Path(), Asked())
    assert (release.folder / "model.safetensors").is_file()


HEADS = {
    "license: mit": None, "license: other\nlicense_name: x\nlicense_link: LICENSE": None,
    "license: apache2": "no license 'apache2'", "license: other": "needs license_name",
    "tags: merge": "'tags' is a str", "base_model_relation: child": "no base_model_relation",
    "a: [": "is no YAML", "- a": "is no mapping",
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_what_the_hub_reads(head: str) -> None:
    found = lint_front_matter(f"---\n{head}\n---\n# x")
    assert (found == []) if HEADS[head] is None else (str(HEADS[head]) in found[0])


@pytest.mark.parametrize("licence", ["apache-2.0", "exaone", "mpl-2.0", "mine", None])
def test_every_head_of_ours_is_read(licence: str | None) -> None:
    head = front_matter(licence, ["org/a"], "merge", ["en"], ["x"], "transformers")
    assert lint_front_matter(f"---\n{head}---\n") == []
