"""The main job from end to end: three fine-tunes of one base, merged, and measured.

    python examples/demo.py

Trains the example models unless they are there, merges the three full fine-tunes with TIES as
`recipes/ties-three-finetunes.yaml` says, and shows the held-out perplexity of every model in every
domain. A fine-tune is good in its own domain; the merge must be better than the base in all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
RECIPE = Path("recipes/ties-three-finetunes.yaml")
RESULT = Path("dist/ties-three-finetunes/merged")
SHOWN = ("base", "code", "docstrings", "reference")


def run(*words: str | Path) -> None:
    """Show a command and run it; a failure ends the demo with its exit code."""
    shown = " ".join("pack" if str(w) == "mergekit_lite" else str(w) for w in words if w != "-m")
    print(f"\n$ {shown}", flush=True)
    code = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Train, merge, measure."""
    run("examples/make_models.py")
    run("-m", "mergekit_lite", "plan", RECIPE)
    run("-m", "mergekit_lite", "merge", "ties", RECIPE, "--force")

    print("\nMeasuring the merge on held-out text (lower is better) ...", flush=True)
    from perplexity import held_out_perplexity, table

    known = json.loads((HERE / "models" / "perplexity.json").read_text())["perplexity"]
    rows = {name: known[name] for name in SHOWN}
    rows["TIES merge"] = held_out_perplexity(ROOT / RESULT)
    print(table(rows))
    worse = [d for d, value in rows["TIES merge"].items() if value >= rows["base"][d]]
    if worse:
        sys.exit(f"the merge does not beat the base on: {', '.join(worse)}")
    print("The merge beats the base on every domain.")
    print(f"\nThe merged model lies in {RESULT}; what made it is written in {RESULT}/pack.lock")


if __name__ == "__main__":
    main()
