"""Licences: worked cases with verdict and reason, and how a parent's licence is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.release.licences.combine import Parent, combine
from mergekit_lite.release.licences.expression import find_licences
from mergekit_lite.release.licences.find import find_parent
from mergekit_lite.release.licences.table import find_licence, licences

ANY: tuple[str, ...] = ()
# Parents (a kind before a colon), the licence of the release or None, its name or None; then the
# rules that are broken, and what it may be released under.
CASES: list[tuple[list[str], str | None, str | None, set[str], tuple[str, ...]]] = [
    # Permissive ones go together and under anything.
    (["apache-2.0"], "apache-2.0", None, set(), ANY),
    (["mit", "apache-2.0"], "mit", None, set(), ANY),
    (["bsd-3-clause", "mit", "isc"], "proprietary", None, set(), ANY),
    (["cc-by-4.0", "apache-2.0"], "apache-2.0", None, set(), ANY),
    (["cc0-1.0", "openmdw-1.0"], "mit", None, set(), ANY),
    (["bsd-2-clause", "unlicense"], "apache-2.0", None, set(), ANY),
    # A licence that binds what is made of it.
    (["llama3.1"], "llama3.1", "Llama-3.1-Mine", set(), ("llama3.1",)),
    (["llama3.1"], "apache-2.0", "Llama-Mine", {"released as"}, ("llama3.1",)),
    (["llama3"], "apache-2.0", "Llama-3-Mine", {"released as"}, ("llama3",)),
    (["llama3"], "llama3", "Mine", {"name"}, ("llama3",)),
    (["llama3"], "llama3", "Llama-Mine", {"name"}, ("llama3",)),
    (["llama3"], "llama3", "llama3-mine", set(), ("llama3",)),
    (["llama2"], "llama2", "mine", set(), ("llama2",)),
    (["llama3.2"], "mit", "mine", {"released as", "name"}, ("llama3.2",)),
    (["llama3.3"], "llama3.3", "Llama-3.3-x", set(), ("llama3.3",)),
    (["llama4"], "llama4", "Llama-4-x", set(), ("llama4",)),
    (["gemma"], "gemma", "anything", set(), ("gemma",)),
    (["gemma"], "mit", None, {"released as"}, ("gemma",)),
    (["qwen"], "qwen", "mine", set(), ("qwen",)),
    (["tongyi-qianwen"], "tongyi-qianwen", None, set(), ("tongyi-qianwen",)),
    (["qwen-research"], "qwen-research", "Qwen-mine", {"name"}, ("qwen-research",)),
    (["qwen-research"], "qwen-research", "mine-of-qwen", set(), ("qwen-research",)),
    (["mrl"], "apache-2.0", None, {"released as"}, ("mrl",)),
    (["mnpl"], "mnpl", None, set(), ("mnpl",)),
    (["deepseek"], "deepseek", None, set(), ("deepseek",)),
    (["bigscience-openrail-m"], "mit", None, {"released as"}, ("bigscience-openrail-m",)),
    (["openrail"], "openrail", None, set(), ("openrail",)),
    (["falcon-2"], "falcon-2", None, set(), ("falcon-2",)),
    (["exaone"], "exaone", "EXAONE-mine", set(), ("exaone",)),
    (["exaone"], "exaone", "mine", {"name"}, ("exaone",)),
    (["cc-by-nc-4.0"], "apache-2.0", None, {"released as"}, ("cc-by-nc-4.0",)),
    (["cc-by-sa-4.0"], "cc-by-sa-4.0", None, set(), ("cc-by-sa-4.0",)),
    (["cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0", None, set(), ("cc-by-nc-sa-4.0",)),
    (["gpl-3.0"], "mit", None, {"released as"}, ("gpl-3.0",)),
    (["agpl-3.0"], "agpl-3.0", None, set(), ("agpl-3.0",)),
    # Beside permissive ones they keep their terms.
    (["llama3.1", "apache-2.0"], "llama3.1", "Llama-x", set(), ("llama3.1",)),
    (["gemma", "mit"], "gemma", None, set(), ("gemma",)),
    (["gpl-3.0", "mit"], "gpl-3.0", None, set(), ("gpl-3.0",)),
    (["cc-by-sa-4.0", "apache-2.0"], "cc-by-sa-4.0", None, set(), ("cc-by-sa-4.0",)),
    (["llama3.1", "llama3.1"], "llama3.1", "Llama-x", set(), ("llama3.1",)),
    # Terms that add up.
    (["llama3.1", "gemma"], "gemma AND llama3.1", "Llama-x", set(), ("gemma AND llama3.1",)),
    (["llama3.1", "gemma"], "llama3.1", "Llama-x", {"released as"}, ("gemma AND llama3.1",)),
    (["llama3.1", "llama3.2"], None, "Llama-x", set(), ("llama3.1 AND llama3.2",)),
    (["cc-by-nc-4.0", "llama3.1"], None, "Llama-x", set(), ("cc-by-nc-4.0 AND llama3.1",)),
    (["gpl-3.0", "agpl-3.0"], "agpl-3.0", None, set(), ("agpl-3.0",)),
    # Two names that both come first.
    (["llama3.1", "exaone"], None, None, {"names"}, ("exaone AND llama3.1",)),
    (["llama3", "exaone"], None, None, {"names", "improving others"}, ("exaone AND llama3",)),
    # No other model may be improved.
    (["llama2", "apache-2.0"], None, None, {"improving others"}, ("llama2",)),
    (["llama3", "mit"], None, None, {"improving others"}, ("llama3",)),
    (["llama3", "gemma"], None, None, {"improving others"}, ("gemma AND llama3",)),
    (["tongyi-qianwen", "apache-2.0"], None, None, {"improving others"}, ("tongyi-qianwen",)),
    (["llama2", "llama3"], None, "Llama-3-x", set(), ("llama2 AND llama3",)),
    (["llama3", "adapter:apache-2.0"], "llama3", "Llama-3-x", set(), ("llama3",)),
    (["llama3", "data:cc-by-4.0"], "llama3", "Llama-3-x", set(), ("llama3",)),
    # Restrictions of use beside a licence that allows none.
    (["gemma", "gpl-3.0"], None, None, {"further restrictions"}, ("gemma AND gpl-3.0",)),
    (["openrail", "agpl-3.0"], None, None, {"further restrictions"}, ("agpl-3.0 AND openrail",)),
    (["deepseek", "gpl-3.0"], None, None, {"further restrictions"}, ("deepseek AND gpl-3.0",)),
    (["llama3.1", "gpl-3.0"], None, "Llama-x", {"further restrictions"},
     ("gpl-3.0 AND llama3.1",)),
    # Not commercial beside what must be commercial.
    (["cc-by-nc-4.0", "gpl-3.0"], None, None, {"commercial use"}, ("cc-by-nc-4.0 AND gpl-3.0",)),
    (["mrl", "cc-by-sa-4.0"], None, None, {"commercial use", "the same licence"},
     ("cc-by-sa-4.0 AND mrl",)),
    # Share alike beside anything that binds.
    (["cc-by-sa-4.0", "gpl-3.0"], None, None, {"the same licence"}, ("cc-by-sa-4.0 AND gpl-3.0",)),
    (["cc-by-sa-4.0", "gemma"], None, None, {"further restrictions"},
     ("cc-by-sa-4.0 AND gemma",)),
    (["cc-by-nc-sa-4.0", "cc-by-sa-4.0"], None, None, {"commercial use", "the same licence"},
     ("cc-by-nc-sa-4.0 AND cc-by-sa-4.0",)),
    # Three.
    (["apache-2.0", "mit", "llama3.1"], "llama3.1", "Llama-x", set(), ("llama3.1",)),
    (["llama3.1", "exaone", "gpl-3.0"], None, None,
     {"names", "further restrictions", "commercial use", "the same licence"},
     ("exaone AND gpl-3.0 AND llama3.1",)),
]  # fmt: skip


def _parents(words: list[str]) -> list[Parent]:
    found = []
    for number, word in enumerate(words):
        kind, _, name = word.rpartition(":")
        licence = find_licence(name)
        assert licence is not None, name
        found.append(Parent(f"model-{number}", licence, name, kind or "model"))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{' + '.join(case[0])} as {case[1]}")
def test_worked_cases(case: Any) -> None:
    words, released_as, name, rules, allowed = case
    verdict = combine(_parents(words), released_as, name)
    assert {conflict.rule for conflict in verdict.conflicts} == rules
    assert verdict.release_as == allowed
    for conflict in verdict.conflicts:
        assert len(conflict.sentence) > 30


def test_every_licence_is_in_a_case() -> None:
    used = {find_licence(w.rpartition(":")[2]).id for c in CASES for w in c[0]}  # type: ignore[union-attr]
    assert used == set(licences())
    assert len(CASES) >= 40


OBLIGATIONS = {
    "apache-2.0": {"copy", "notice", "changes"}, "mit": {"copy", "notice"},
    "llama2": {"copy", "notice", "policy", "users", "improve", "same"},
    "llama3": {"copy", "notice", "policy", "users", "improve", "same", "display", "prefix"},
    "llama3.1": {"copy", "notice", "policy", "users", "same", "display", "prefix"},
    "llama4": {"copy", "notice", "policy", "users", "same", "display", "prefix", "limit"},
    "gemma": {"copy", "notice", "changes", "restrictions", "policy", "same"},
    "qwen": {"copy", "notice", "changes", "display", "users", "same"},
    "tongyi-qianwen": {"copy", "notice", "changes", "users", "improve", "same"},
    "qwen-research": {"copy", "notice", "changes", "display", "not_first", "noncommercial", "same"},
    "mrl": {"copy", "notice", "changes", "noncommercial", "same", "limit"},
    "deepseek": {"copy", "notice", "changes", "restrictions", "same"},
    "bigscience-openrail-m": {"copy", "notice", "changes", "restrictions", "same"},
    "falcon-2": {"copy", "notice", "changes", "display", "policy", "same"},
    "exaone": {"copy", "prefix", "noncommercial", "same", "limit"},
    "cc-by-4.0": {"link", "notice", "changes"},
    "cc-by-nc-sa-4.0": {"link", "notice", "changes", "noncommercial", "same"},
    "gpl-3.0": {"copy", "notice", "changes", "same", "source"},
    "openmdw-1.0": {"copy", "notice"},
}  # fmt: skip


@pytest.mark.parametrize("name", OBLIGATIONS)
def test_obligations(name: str) -> None:
    verdict = combine(_parents([name]))
    assert {obligation.kind for obligation in verdict.obligations} == OBLIGATIONS[name]


def test_obligations_add_up() -> None:
    verdict = combine(_parents(["apache-2.0", "llama3.1", "mit"]))
    kept = [o for o in verdict.obligations if o.kind == "notice"]
    assert [o.because for o in kept] == [("apache-2.0", "mit"), ("llama3.1",)]
    assert "Copyright © Meta" in kept[1].what
    unknown = combine([Parent("a", None, "made-up"), *_parents(["mit"])])
    assert [parent.name for parent in unknown.unknown] == ["a"]


TEXTS = {
    "GNU AFFERO GENERAL PUBLIC LICENSE Version 3 … the GNU General Public License": "agpl-3.0",
    "GNU GENERAL PUBLIC LICENSE\nVersion 3": "gpl-3.0",
    "Apache License\n   Version 2.0, January 2004": "apache-2.0",
    "Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International": "cc-by-nc-sa-4.0",
    "Attribution 4.0 International": "cc-by-4.0",
    "Redistributions of source code must retain … Neither the name of X nor the names of its "
    "contributors": "bsd-3-clause",
    "Redistributions of source code must retain the above": "bsd-2-clause",
    "Permission is hereby granted, free of charge, to any person": "mit",
    "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT": "llama3.1",
    "Qwen RESEARCH LICENSE AGREEMENT": "qwen-research",
    "Qwen LICENSE AGREEMENT": "qwen",
    "Tongyi Qianwen LICENSE AGREEMENT": "tongyi-qianwen",
    "Gemma Terms of Use": "gemma",
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts(tmp_path: Path, text: str) -> None:
    """A licence file is told by its words."""
    (tmp_path / "LICENSE.txt").write_text(text)
    parent, _ = find_parent("m", tmp_path, {})
    assert parent.licence is not None
    assert parent.licence.id == TEXTS[text]


def test_where_a_licence_is_found(tmp_path: Path) -> None:
    """Recipe, card, config, file, in this order; where they disagree that is said."""
    (tmp_path / "LICENSE").write_text("META LLAMA 3  COMMUNITY\nLICENSE AGREEMENT ...")
    parent, notes = find_parent("m", tmp_path, {})
    assert parent.licence is not None
    assert (parent.licence.id, notes) == ("llama3", [])
    parent, notes = find_parent("m", tmp_path, {"license": "mit"})
    assert parent.licence is not None
    assert parent.licence.id == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    parent, notes = find_parent("m", tmp_path, {"license": "mit"})
    assert parent.licence is not None
    assert parent.licence.id == "apache-2.0"
    assert "apache-2.0 in its card, mit in its config, llama3 in its LICENSE" in notes[0]
    parent, _ = find_parent("m", tmp_path, {}, "llama3")
    assert parent.licence is not None
    assert parent.licence.id == "llama3"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n")
    (tmp_path / "LICENSE").unlink()
    parent, _ = find_parent("m", tmp_path, {})
    assert parent.licence is not None
    assert parent.licence.id == "qwen-research"
    (tmp_path / "README.md").write_text("---\nlicense: made-up\n---\n")
    parent, _ = find_parent("m", tmp_path, {})
    assert (parent.licence, parent.stated) == (None, "made-up")
    assert find_parent("m", None, {})[0].stated == ""


def _model(folder: Path, licence: str | None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')
    if licence is not None:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a.weight": np.ones((4, 4), np.float32)}, folder / "model.safetensors")
    return folder


def test_the_most_frequent_breach(pack: Callable[..., Any], tmp_path: Path) -> None:
    """A derivative of Llama 3 that is to be released as apache-2.0 is stopped."""
    _model(tmp_path / "base", "llama3")
    _model(tmp_path / "tune", "llama3")
    recipe = tmp_path / "r.yaml"
    document = {
        "merge_method": "linear", "license": "apache-2.0", "name": "Llama-3-mine",
        "models": [{"model": "base"}, {"model": "tune"}],
    }  # fmt: skip
    recipe.write_text(json.dumps(document))
    ran = pack("licenses", recipe, "--check")
    assert ran.code == 1
    assert "cannot be released as apache-2.0, only as llama3" in ran.err
    assert "Built with Meta Llama 3" in ran.out
    ran = pack("plan", recipe)
    assert "cannot be released as apache-2.0, only as llama3" in ran.out
    recipe.write_text(json.dumps({**document, "license": "llama3"}))
    ran = pack("licenses", recipe, "--check")
    assert ran.code == 0, ran.err
    assert "licence llama3" in pack("plan", recipe).out
    recipe.write_text(json.dumps({**document, "license": "llama3", "name": "mine"}))
    ran = pack("licenses", recipe, "--check")
    assert ran.code == 1
    assert "must begin with “Llama 3”" in ran.err


def test_unknown_licences(pack: Callable[..., Any], tmp_path: Path) -> None:
    """Told as a warning; an error under production, unless they were accepted with a reason."""
    _model(tmp_path / "a", None)
    _model(tmp_path / "b", "mit")
    ran = pack("licenses", tmp_path / "a", tmp_path / "b", "--check")
    assert ran.code == 0, ran.err
    assert "not known" in ran.out
    ran = pack("licenses", tmp_path / "a", tmp_path / "b", "--check", "--profile", "production")
    assert ran.code == 1
    ran = pack("licenses", tmp_path / "a", tmp_path / "b", "--json")
    found = json.loads(ran.out)
    assert [parent["licence"] for parent in found["parents"]] == [None, "mit"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({
        "merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}],
        "licenses": {"a": "apache-2.0"},
    }))  # fmt: skip
    ran = pack("licenses", recipe, "--check", "--profile", "production")
    assert ran.code == 0, ran.err


def test_accepted_licences(pack: Callable[..., Any], tmp_path: Path) -> None:
    """What somebody answers for is no hindrance, and is told in the release."""
    _model(tmp_path / "a", "my-own")
    _model(tmp_path / "b", "llama3")
    recipe = tmp_path / "r.yaml"
    document = {
        "merge_method": "linear", "license": "apache-2.0", "name": "mine", "version": "1.0.0",
        "models": [{"model": "a"}, {"model": "b"}],
    }  # fmt: skip
    recipe.write_text(json.dumps(document))
    assert pack("build", recipe, cwd=tmp_path).code == 1
    assert not (tmp_path / "dist").exists()
    leave = ("--accept-license", "llama3", "--reason", "agreement of 2026-03-01")
    ran = pack("licenses", recipe, "--check", *leave)
    assert ran.code == 0, ran.err
    assert "cannot be released as apache-2.0" in ran.out
    assert "accepted: agreement of 2026-03-01" in ran.out
    ran = pack("build", recipe, *leave, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "the licence of a is not known" in ran.err
    folder = tmp_path / "dist" / "mine" / "release" / "1.0.0"
    assert "agreement of 2026-03-01" in (folder / "README.md").read_text()
    assert "agreement of 2026-03-01" in (folder / "pack.lock").read_text()
    ran = pack("reproduce", folder, cwd=tmp_path)
    assert ran.code == 0, ran.err
    recipe.write_text(json.dumps({
        **document, "version": "1.0.1",
        "accept_licenses": {"llama3": "agreement", "my-own": "it is mine"},
    }))  # fmt: skip
    ran = pack("build", recipe, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "licence of a" not in ran.err
    ran = pack("licenses", recipe, "--accept-license", "lama3", "--reason", "typo")
    assert ran.code == 1
    assert "did you mean 'llama3'" in ran.err
    assert pack("licenses", recipe, "--accept-license", "llama3").code == 2


def test_texts_that_parents_lack(pack: Callable[..., Any], tmp_path: Path) -> None:
    """The standard text goes along; where nobody has it, that is said."""
    _model(tmp_path / "a", "apache-2.0")
    _model(tmp_path / "x", None)
    (tmp_path / "x").rename(tmp_path / "b")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({
        "merge_method": "linear", "license": "llama3.1", "name": "Llama-3.1-x", "version": "1.0.0",
        "models": [{"model": "a"}, {"model": "b"}], "licenses": {"b": "llama3.1"},
    }))  # fmt: skip
    ran = pack("build", recipe, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "the text of the licence of b must go along" in ran.err
    assert "the text of the licence of a" not in ran.err
    folder = tmp_path / "dist" / "Llama-3.1-x" / "release" / "1.0.0"
    assert "Version 2.0, January 2004" in (folder / "licenses" / "a" / "LICENSE").read_text()


EXPRESSIONS = {
    "mit": ["mit"], "MIT OR Apache-2.0": ["mit"], "Apache-2.0 AND MIT": ["apache-2.0", "mit"],
    "gpl-3.0 OR mit": ["mit"], "llama3.1 AND (gpl-3.0 OR cc-by-4.0)": ["llama3.1", "cc-by-4.0"],
    "GPL-3.0-only WITH Classpath-exception-2.0": ["gpl-3.0"], "mit OR made-up": ["mit"],
    "mit AND made-up": [], "mit OR": [], "(" * 1000: [], "mit, apache-2.0": [],
    "cc-by-nc-4.0 OR llama3.1": ["llama3.1"],
}  # fmt: skip


@pytest.mark.parametrize("stated", EXPRESSIONS)
def test_expressions(stated: str) -> None:
    assert [licence.id for licence in find_licences(stated)] == EXPRESSIONS[stated]


def test_several_licences_of_one_parent(tmp_path: Path) -> None:
    """All of them bind; of alternatives the freest is taken."""
    (tmp_path / "README.md").write_text("---\nlicense: [cc-by-sa-4.0, llama3.1]\n---\n")
    parent, notes = find_parent("m", tmp_path, {})
    assert [licence.id for licence in parent.terms] == ["cc-by-sa-4.0", "llama3.1"]
    assert notes == []
    verdict = combine([parent], "apache-2.0")
    assert {conflict.rule for conflict in verdict.conflicts} == {
        "released as", "further restrictions",
    }  # fmt: skip
    (tmp_path / "README.md").write_text("---\nlicense: Apache-2.0 OR gpl-3.0\n---\n")
    parent, _ = find_parent("m", tmp_path, {})
    assert combine([parent], "mit").conflicts == ()
    both = [Parent("a", find_licence("gemma")), Parent("b", find_licence("llama3.1"))]
    assert combine(both, "llama3.1 AND gemma", "Llama-x").conflicts == ()


def test_what_is_partly_known() -> None:
    """The part of a statement that is known binds; that it is not all is told."""
    for stated in ("llama3.1 AND acme-terms", "acme-terms AND llama3.1"):
        assert find_licences(stated) == ()
        parent, _ = find_parent("m", None, {}, stated)
        verdict = combine([parent], "apache-2.0", "Llama-x")
        assert {conflict.rule for conflict in verdict.conflicts} == {"released as"}
        assert verdict.unknown == (parent,)


def test_accepting_one_waives_no_other() -> None:
    """What is accepted of one parent leaves what the others ask."""

    def parents(*ids: str) -> list[Parent]:
        return [Parent(f"m{n}", find_licence(name), name) for n, name in enumerate(ids)]

    two = parents("cc-by-nc-4.0", "gemma")
    verdict = combine(two, "apache-2.0", None, {"m0": "leave of the author"})
    assert [c.parents for c in verdict.conflicts] == [("m1",)]
    three = parents("gpl-3.0", "gpl-3.0", "llama3.1")
    verdict = combine(three, None, None, {"m0": "leave of the author"})
    assert {c.rule for c in verdict.conflicts} == {"further restrictions"}
    verdict = combine(three, None, None, {"gpl-3.0": "leave of the authors"})
    assert verdict.conflicts == ()
    assert len(verdict.accepted) == 1


def test_less_than_a_licence(tmp_path: Path) -> None:
    """A free licence under the Commons Clause is not that licence."""
    (tmp_path / "LICENSE").write_text(
        "Commons Clause License Condition\nPermission is hereby granted, free of charge"
    )
    assert find_parent("m", tmp_path, {})[0].licence is None


def test_data_sets(pack: Callable[..., Any], tmp_path: Path) -> None:
    """They count where the recipe states their licence; what nobody states is told."""
    for name in ("a", "b"):
        _model(tmp_path / name, "apache-2.0")
    (tmp_path / "a" / "README.md").write_text(
        "---\nlicense: apache-2.0\ndatasets: [org/texts, org/more]\n---\n"
    )
    recipe = tmp_path / "r.yaml"
    document = {
        "merge_method": "linear", "license": "apache-2.0", "name": "mine", "version": "1.0.0",
        "models": [{"model": "a"}, {"model": "b"}],
        "licenses": {"org/texts": "cc-by-4.0", "org/mor": "mit"},
    }  # fmt: skip
    recipe.write_text(json.dumps(document))
    ran = pack("build", recipe, cwd=tmp_path)
    assert ran.code == 0, ran.err
    ran = pack("licenses", recipe)
    assert (
        "'org/mor' is neither a model nor a data set of these; did you mean 'org/more'" in ran.out
    )
    assert "licences of data sets are not known: org/more" in ran.out
    card = (tmp_path / "dist" / "mine" / "release" / "1.0.0" / "README.md").read_text()
    assert "- a: org/texts, org/more" in card
    recipe.write_text(json.dumps({**document, "licenses": {"org/texts": "cc-by-nc-4.0"}}))
    ran = pack("licenses", recipe, "--check")
    assert ran.code == 1
    assert "org/texts" in ran.err
