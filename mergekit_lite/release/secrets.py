"""What must not leave: tokens, private keys and paths of a machine, in the texts of a release."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["find_secrets"]

_LIMIT = 32 << 20
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".onnx", ".pt", ".npz")
_PATTERNS = {
    "a token of the Hub": re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a key of AWS": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a token of GitHub": re.compile(rb"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})"),
    "a key of an API": re.compile(rb"\bsk-[A-Za-z0-9_-]{32,}"),
    "a token of Slack": re.compile(rb"\bxox[abprs]-[A-Za-z0-9-]{20,}"),
    "a token of GitLab": re.compile(rb"\bglpat-[A-Za-z0-9_-]{20,}"),
    "a key of Google": re.compile(rb"\bAIza[A-Za-z0-9_-]{35}"),
    "a path of somebody's home": re.compile(
        rb"(?<![\w.])/(home|Users)/[A-Za-z0-9._-]+/|(?<![\w.])/root/|[A-Z]:\\\\?Users\\"
    ),
    "a path of a temporary folder": re.compile(rb"(?<![\w.])/(tmp|var/folders)/[A-Za-z0-9._-]+/"),
}


def find_secrets(folder: Path) -> Iterator[str]:
    """Name files and what they hold, a line each; never the secret itself."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix in _WEIGHTS or path.stat().st_size > _LIMIT:
            continue
        content = path.read_bytes()
        for what, pattern in _PATTERNS.items():
            match = pattern.search(content)
            if match:
                line = content.count(b"\n", 0, match.start()) + 1
                yield f"{path.relative_to(folder).as_posix()}:{line}: holds {what}"
