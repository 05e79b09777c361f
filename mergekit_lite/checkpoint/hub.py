"""Models on the Hugging Face Hub: what a reference means, and a snapshot of it on disk.

Weights are fetched whole into the Hub's own cache. Reading byte ranges of remote files belongs
here too, as another `Checkpoint`; nothing that consumes one would change.
"""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_lite.errors import PackError

__all__ = ["HubReference", "parse_reference", "snapshot"]

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SMALL = [
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
]


class HubReference:
    """``org/name`` or ``org/name@revision``."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo = repo
        self.revision = revision


def parse_reference(text: str) -> HubReference | None:
    """Read a Hub reference; None when the text cannot be one."""
    match = _ID.fullmatch(text.removeprefix("hf://"))
    return HubReference(match["repo"], match["revision"]) if match else None


def snapshot(reference: HubReference) -> tuple[Path, str]:
    """Fetch a model into the Hub's cache, unless it is there.

    Safetensors are preferred; PyTorch files are fetched only where there are none.

    Returns:
        The folder, and the commit that it holds.

    Raises:
        PackError: There is no such model, no permission, or no network.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = reference.repo, reference.revision
    shown = f"{repo}@{revision}" if revision else repo
    try:
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=False)
        except (OSError, HfHubHTTPError, OfflineModeIsEnabled) as error:
            if isinstance(error, GatedRepoError | RepositoryNotFoundError | RevisionNotFoundError):
                raise
            folder = snapshot_download(repo, revision=revision, local_files_only=True)
        else:
            files = [sibling.rfilename for sibling in info.siblings or []]
            weights = "*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin"
            folder = snapshot_download(repo, revision=info.sha, allow_patterns=[*_SMALL, weights])
    except GatedRepoError:
        raise PackError(
            f"{shown}: access to this model must be granted first",
            f"Ask for it on the model's page, then run: hf auth login   ({repo})",
        ) from None
    except RevisionNotFoundError:
        raise PackError(
            f"{shown}: the model has no such revision", "Check the text after '@'."
        ) from None
    except RepositoryNotFoundError:
        raise PackError(
            f"{shown}: neither a folder here nor a model on the Hub",
            "Check the spelling; for a private model run: hf auth login",
        ) from None
    except LocalEntryNotFoundError:
        raise PackError(
            f"{shown}: no such folder here, and the Hub cannot be reached",
            "Check the path, or the network and HF_ENDPOINT.",
        ) from None
    except (OSError, HfHubHTTPError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise PackError(
            f"{shown}: the download failed ({first})", "Run the same command again."
        ) from None
    return Path(folder), Path(folder).name
