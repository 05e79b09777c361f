"""The wheel, installed outside the checkout, is the whole tool."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, random_models, write_recipe


@pytest.mark.slow
def test_a_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", tmp_path, ROOT],
        check=True,
    )  # fmt: skip
    wheel = next(tmp_path.glob("pack_models-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("mergekit_lite/data/recipes/") for n in names)
    assert any(n.startswith("mergekit_lite/data/templates/") for n in names)
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "examples/"))]
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
        check=True,
    )
    random_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "ties", {"a": {}, "b": {}}, base_model="base")
    code = (
        f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        f"sys.argv = ['pack', 'merge', 'ties', {str(recipe)!r}]\n"
        "import mergekit_lite, mergekit_lite.cli\n"
        f"assert mergekit_lite.__file__.startswith({str(site)!r})\n"
        "mergekit_lite.cli.main()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "dist" / "r" / "merged" / "model.safetensors").is_file()
