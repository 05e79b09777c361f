"""A model on the Hub seen through its headers: names, shapes and dtypes, no weights.

A safetensors file begins with all that describes it, so a request for its first bytes does. What
lies in the Hub's cache already is read there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.header import Header, parse_header, read_length
from mergekit_lite.checkpoint.hub import HubReference, explained, listing
from mergekit_lite.checkpoint.protocol import Checkpoint, TensorReader, TensorSpec
from mergekit_lite.checkpoint.safetensors import load_json
from mergekit_lite.errors import FileFormatError, PackError

__all__ = ["HeadersOnly", "look_at_hub"]

_GUESS = 1 << 17
"""Bytes of the first request: most headers fit."""


class HeadersOnly(Checkpoint):
    """Tensors that can be listed and not read."""

    def __init__(self, label: str, folder: Path, headers: Mapping[str, Header]) -> None:
        self.label = label
        self.folder = folder
        config = folder / "config.json"
        self.config = load_json(config) if config.is_file() else {}
        self._headers = headers
        self._where: dict[str, str] = {}
        for file, header in headers.items():
            for name in header.entries:
                if name in self._where:
                    raise FileFormatError(
                        f"{label}: tensor '{name}' is in {self._where[name]} and in {file}"
                    )
                self._where[name] = file

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return sorted(self._where)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        entry = self._headers[self._where[name]].entries[name]
        return TensorSpec(entry.shape, entry.dtype)

    def file_of(self, name: str) -> str | None:
        """Name of the file that holds a tensor."""
        return self._where[name]

    def metadata(self) -> Mapping[str, str]:
        """The ``__metadata__`` of all files; the first that has a key holds."""
        found: dict[str, str] = {}
        for header in self._headers.values():
            found = {**header.metadata, **found}
        return found

    def open(self, name: str) -> TensorReader:
        """Refuse: weights were not fetched.

        Raises:
            PackError: Always.
        """
        raise PackError(f"{self.label}: only its headers were fetched, no weights")


def look_at_hub(reference: HubReference, label: str) -> tuple[Path, str, HeadersOnly]:
    """Fetch a model's small files, and the headers of its weights.

    Returns:
        The folder of the small files, the commit, and the tensors.

    Raises:
        PackError: There is no such model, no permission, no network, or the weights are in a
            format that tells nothing before it is fetched whole.
    """
    with explained(reference):
        folder, weights, _ = listing(reference)
        commit = folder.name
        headers = {name: _header(reference, commit, name) for name in weights}
    return folder, commit, HeadersOnly(label, folder, headers)


def _header(reference: HubReference, commit: str, name: str) -> Header:
    from huggingface_hub import try_to_load_from_cache

    source = f"{reference}: {name}"
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise FileFormatError(f"{source}: the index names a file outside the model")
    if not name.endswith(".safetensors"):
        raise PackError(
            f"{source} is a PyTorch file, which tells nothing before it is fetched whole",
            f"Fetch it first: hf download {reference.repo} --revision {commit}",
        )
    cached = try_to_load_from_cache(reference.repo, name, revision=commit)
    if isinstance(cached, str):
        with Path(cached).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            return parse_header(file.read(read_length(prefix, size, source)), size, source)
    first, size = _range(reference, commit, name, 0, _GUESS)
    length = read_length(first[:8], size, source)
    if 8 + length > len(first):
        first += _range(reference, commit, name, len(first), 8 + length)[0]
    return parse_header(first[8 : 8 + length], size, source)


def _range(
    reference: HubReference, commit: str, name: str, start: int, stop: int
) -> tuple[bytes, int]:
    """Fetch bytes from ``start`` up to ``stop``, or to the file's end; also the file's size."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(reference.repo, name, revision=commit)
    headers = {
        **build_hf_headers(),
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    session: Any = get_session()
    with session.stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        whole = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != 206 or not whole.isdigit():
            raise PackError(
                f"{reference}: the server does not send parts of files, so headers alone cannot "
                "be read",
                f"Fetch the model first: hf download {reference.repo} --revision {commit}",
            )
        got = b""
        for part in response.iter_bytes():
            got += part
            if len(got) > stop - start:
                break
    if len(got) != min(stop, int(whole)) - start:
        raise OSError(f"{name} came incomplete")
    return got, int(whole)
