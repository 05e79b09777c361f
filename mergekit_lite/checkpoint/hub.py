"""Models on the Hugging Face Hub: what a reference means, and a snapshot of it on disk.

Weights are fetched whole into the Hub's own cache; for a look at a model, headers alone do (see
`mergekit_lite.checkpoint.far`).
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

from mergekit_lite.checkpoint.pytorch import pytorch_files
from mergekit_lite.checkpoint.safetensors import INDEX_NAME, load_json
from mergekit_lite.errors import PackError

__all__ = [
    "HubReference",
    "Listing",
    "dataset_file",
    "explained",
    "fetch",
    "fits_here",
    "is_small",
    "listing",
    "parse_reference",
    "pinned",
    "pinned_at",
    "snapshot",
]

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>(?!.*\.\.)[\w./-]+))?")
_DATA = re.compile(
    r"hf://datasets/(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)"
    r"(@(?P<revision>(?!.*\.\.)[\w.-]+))?/(?P<path>(?!.*\.\.)[\w./ -]+)"
)
_SMALL = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
_ROOM = 1 << 30
"""Bytes of the disk that stay free beside a model in the cache."""
_SMALL_IN_FOLDERS = ("additional_chat_templates/*.jinja", "1_Pooling/config.json")


class HubReference:
    """``org/name`` or ``org/name@revision``."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo = repo
        self.revision = revision

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_reference(text: str) -> HubReference | None:
    """Read a Hub reference; None when the text cannot be one."""
    match = _ID.fullmatch(text.removeprefix("hf://"))
    return HubReference(match["repo"], match["revision"]) if match else None


_PINNED: ContextVar[Mapping[str, str]] = ContextVar("pinned", default=MappingProxyType({}))


@contextmanager
def pinned(commits: Mapping[str, str]) -> Iterator[None]:
    """Take models at these commits, whatever their main branch holds by now.

    Args:
        commits: By reference, as a user wrote it.
    """
    token = _PINNED.set(commits)
    try:
        yield
    finally:
        _PINNED.reset(token)


def snapshot(reference: HubReference) -> tuple[Path, str]:
    """Fetch a model into the Hub's cache, unless it is there.

    Only what a merge reads is fetched: config, tokenizer, licence, and the weights that
    `open_checkpoint` would take, PyTorch files only where there are no safetensors. A model in the
    cache is used as it is while the Hub cannot be asked.

    Returns:
        The folder, and the commit that it holds.

    Raises:
        PackError: There is no such model, no permission, or no network.
    """
    with explained(reference):
        wanted = pinned_at(reference)
        listed = listing(wanted)
        if not listed.offline:
            fetch(wanted, listed)
    return listed.folder, listed.commit


def pinned_at(reference: HubReference) -> HubReference:
    """The same model at the commit that it is pinned to, if it is."""
    commit = _PINNED.get().get(str(reference))
    return HubReference(reference.repo, commit) if commit else reference


def dataset_file(text: str) -> Path | None:
    """Fetch a file of a data set: ``hf://datasets/ORG/NAME[@REVISION]/PATH``.

    Returns:
        Where it lies in the Hub's cache; None where the text is of another form.

    Raises:
        PackError: There is no such data set or file, no permission, or no network.
    """
    match = _DATA.fullmatch(text)
    if match is None:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    reference = HubReference(f"datasets/{match['repo']}", match["revision"])
    with explained(reference, "data set"):
        try:
            found = hf_hub_download(
                match["repo"], match["path"], repo_type="dataset", revision=match["revision"]
            )
        except EntryNotFoundError:
            raise PackError(
                f"{text}: the data set has no such file", "See its files on its page on the Hub."
            ) from None
    return Path(found)


@contextmanager
def explained(reference: HubReference, what: str = "model") -> Iterator[None]:
    """Turn the Hub's errors into ones that say what to do.

    Args:
        reference: What is fetched.
        what: What that is.

    Raises:
        PackError: There is no such thing, no permission, or no network.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise PackError(
            f"{reference}: access to this {what} must be granted first",
            f"Ask for it on the {what}'s page, then run: hf auth login   ({reference.repo})",
        ) from None
    except RevisionNotFoundError:
        raise PackError(
            f"{reference}: the {what} has no such revision", "Check the text after '@'."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise PackError(
            f"{reference}: neither a folder here nor a {what} on the Hub",
            f"Check the spelling; for a private {what} run: hf auth login",
        ) from None
    except (OSError, HTTPError) as error:
        raise PackError(
            f"{reference}: the download failed ({_first_line(error)})",
            "Run the same command again.",
        ) from None


def fetch(reference: HubReference, listed: Listing) -> None:
    """Fetch a model's weights into the Hub's cache."""
    from huggingface_hub import snapshot_download

    snapshot_download(
        reference.repo, revision=listed.commit, allow_patterns=_exactly(listed.weights)
    )


@dataclass(frozen=True)
class Listing:
    """A model on the Hub: its small files, fetched, and what holds its weights, which is not.

    Attributes:
        folder: Of the small files.
        weights: Names of files.
        offline: Whether the Hub could not be asked; the weights are then in its cache.
        sizes: Bytes of the weights, where the Hub says so.
        digests: Their SHA-256, where the Hub says so.
    """

    folder: Path
    weights: Sequence[str]
    offline: bool
    sizes: Mapping[str, int]
    digests: Mapping[str, str]

    @property
    def commit(self) -> str:
        """That it is of."""
        return self.folder.name

    def cached(self, reference: HubReference) -> dict[str, Path]:
        """Those of the weights that are in the Hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        found = {
            n: try_to_load_from_cache(reference.repo, n, revision=self.commit) for n in self.weights
        }
        return {name: Path(path) for name, path in found.items() if isinstance(path, str)}


def fits_here(reference: HubReference, listed: Listing) -> bool:
    """Whether there is room in the Hub's cache for the weights that it does not have."""
    from huggingface_hub.constants import HF_HUB_CACHE

    held = listed.cached(reference)
    missing = sum(listed.sizes.get(name, 0) for name in listed.weights if name not in held)
    folder = Path(HF_HUB_CACHE)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return missing == 0 or missing + _ROOM <= shutil.disk_usage(folder).free


def listing(reference: HubReference) -> Listing:
    """Fetch a model's small files, and say which files hold its weights."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()
    repo, revision = reference.repo, reference.revision
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (OSError, HTTPError) as error:  # of the HTTP library's errors, some are no OSError
        folder = _cached(reference, _first_line(error))
        names = _weights(folder, [path.name for path in folder.iterdir()])
        return Listing(folder, names, True, {}, {})
    files = [sibling.rfilename for sibling in info.siblings or []]
    # Asked for by its name, so that the cache knows the name's commit when the Hub is away.
    folder = Path(
        snapshot_download(repo, revision=revision, allow_patterns=_exactly(_small(files)))
    )
    weights = _weights(folder, files)
    if not weights:
        raise PackError(
            f"{reference}: holds no weights (*.safetensors or pytorch_model*.bin)",
            "Give the model that it was made from.",
        )
    stated = {sibling.rfilename: sibling for sibling in info.siblings or []}
    held = {name: stated[name] for name in weights if name in stated}
    return Listing(
        folder, weights, False,
        {name: each.size for name, each in held.items() if each.size is not None},
        {name: each.lfs.sha256 for name, each in held.items() if each.lfs is not None},
    )  # fmt: skip


def _cached(reference: HubReference, why: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                reference.repo,
                revision=reference.revision,
                local_files_only=True,
                allow_patterns=["config.json"],
            )
        )
    except LocalEntryNotFoundError:
        raise PackError(
            f"{reference}: no such folder here, and the Hub cannot be asked ({why})",
            "Check the path, or the network and HF_ENDPOINT.",
        ) from None
    weights = _weights(folder, [path.name for path in folder.iterdir()])
    if not weights or not all((folder / name).is_file() for name in weights):
        raise PackError(
            f"{reference}: only a part of it is in the cache, and the Hub cannot be asked ({why})",
            "Run the same command again with the Hub in reach.",
        )
    return folder


def _small(files: Iterable[str]) -> list[str]:
    """Of a model's files, those beside the weights that a merge reads or copies; never code."""
    return [name for name in files if is_small(name)]


def is_small(name: str) -> bool:
    """Whether a model's file is one of those beside the weights."""
    return any(fnmatchcase(name, p) for p in (_SMALL_IN_FOLDERS if "/" in name else _SMALL))


def _weights(folder: Path, files: Sequence[str]) -> list[str]:
    """Of a model's files, the weights that `open_checkpoint` would take.

    Args:
        folder: Holds the index, if the model has one.
        files: Paths of all files of the model.
    """
    safetensors = [name for name in files if fnmatchcase(name, "*.safetensors") and "/" not in name]
    if (folder / INDEX_NAME).is_file():
        weight_map = load_json(folder / INDEX_NAME).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, dict) else ()
        return sorted({shard for shard in shards if isinstance(shard, str)})
    if "model.safetensors" in safetensors:
        return ["model.safetensors"]
    if safetensors:
        return safetensors
    named = [path.name for path in pytorch_files(folder)]
    return named or [
        n
        for n in files
        if (fnmatchcase(n, "pytorch_model*.bin") or n == "adapter_model.bin") and "/" not in n
    ]


def _exactly(names: Iterable[str]) -> list[str]:
    return [glob.escape(name) for name in names]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
