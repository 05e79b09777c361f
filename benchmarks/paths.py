"""Where the benchmarks keep what they make: everything lies under the git-ignored `work/`."""

from pathlib import Path

WORK = Path(__file__).resolve().parent / "work"
REPOSITORY = WORK.parent.parent
