"""A release on the Hub: all of it in one commit, then a tag of its version.

Everything is checked before anything leaves. The commit names the state that it was made for, so it
fails whole if somebody else was faster. Running again finishes what was stopped: a commit that is
there already is not made twice, a tag of the same content is fine, of another an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.errors import PackError
from mergekit_lite.merge.run import Progress
from mergekit_lite.release.hub import HubPlan, hub_error
from mergekit_lite.release.manifest import MANIFEST, SIGNATURE, read_manifest
from mergekit_lite.release.profiles import PROFILES
from mergekit_lite.release.secrets import find_secrets
from mergekit_lite.release.verify import Checked, require_whole

__all__ = [
    "Pushed",
    "Target",
    "check_before_leaving",
    "collect",
    "describe",
    "push_all",
    "push_release",
]

_KEPT = frozenset({".gitattributes"})


@dataclass(frozen=True)
class Target:
    """Where a release goes.

    Attributes:
        repo: ``org/name``.
        private: Whether a new repository is private.
        pull_request: Whether a pull request is opened instead of changing the main branch.
        dry_run: Whether to tell only what would happen.
    """

    repo: str
    private: bool = False
    pull_request: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Pushed:
    """What was done.

    Attributes:
        repo: Where it is.
        tag: Of the version.
        commit: Of the release; None after a dry run, or where nothing was to be done.
        url: Of the commit or pull request; empty without.
        added: Files that were sent.
        removed: Files of an earlier release that are not in this one.
        done: In words.
    """

    repo: str
    tag: str
    commit: str | None
    url: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    done: str


def push_release(
    folder: Path, target: Target, threads: int, progress: Callable[[int], None] = lambda _: None
) -> Pushed:
    """Push a release.

    Args:
        folder: Where it lies.
        target: Where it goes.
        threads: For checking it.
        progress: Told the bytes that were checked.

    Raises:
        PackError: It does not hold, holds a secret, the version is there with other content, or the
            Hub refused; then the repository is as it was.
    """
    found = check_before_leaving(folder, threads, progress)
    _, entries, digest = read_manifest(folder / MANIFEST)
    signed = (SIGNATURE,) if (folder / SIGNATURE).is_file() else ()
    paths = (*sorted(entries), MANIFEST, *signed)
    tag = f"v{found.version}"
    if target.dry_run:
        return Pushed(target.repo, tag, None, "", paths, (), "nothing was sent (--dry-run)")
    try:
        return _Hub(target).push(folder, paths, tag, digest, f"{found.name} {found.version}")
    except PackError:
        raise
    except Exception as error:  # whatever the client raises
        raise hub_error(error, target.repo) from None


def check_before_leaving(
    folder: Path, threads: int, progress: Callable[[int], None] = lambda _: None
) -> Checked:
    """Check a release before it goes anywhere.

    Raises:
        PackError: It does not hold, holds a secret, or is for production and not signed.
    """
    found = require_whole(folder, threads, progress)
    refuse_secrets(folder)
    if not (folder / SIGNATURE).is_file() and _wants_signature(folder):
        raise PackError(
            f"{folder}: is for production, and not signed", "Sign it: pack release --sign KEY"
        )
    return found


def refuse_secrets(folder: Path) -> None:
    """Refuse a release that holds what must not leave.

    Raises:
        PackError: It does.
    """
    secrets = list(find_secrets(folder))
    if secrets:
        listed = "".join(f"\n  {secret}" for secret in secrets)
        raise PackError(
            f"{folder}: holds what must not leave:{listed}",
            "Remove it from the recipe, the card or the models' files, and release again.",
        )


def push_all(
    folders: Sequence[Path],
    plan: HubPlan,
    name: str,
    threads: int,
    progress: Progress,
    pull_request: bool = False,
    dry_run: bool = False,
) -> list[Pushed]:
    """Push a release, and those of its formats into their own repositories.

    Args:
        folders: Of the releases, the model's first.
        plan: Where they go.
        name: Of the release of the model.
        threads: For checking them.
        progress: Told how far it is.
        pull_request: See `Target`.
        dry_run: See `Target`.

    Raises:
        PackError: One of them cannot be pushed; those before it are there.
    """
    documents = [read_manifest(folder / MANIFEST) for folder in folders]
    progress.begin("Check", sum(e.size for _, entries, _ in documents for e in entries.values()))
    done = []
    for folder, (document, _, _) in zip(folders, documents, strict=True):
        variant = str(document["name"]).removeprefix(name).removeprefix("-")
        target = Target(plan.repo_of(variant), plan.private, pull_request, dry_run)
        done.append(push_release(folder, target, threads, progress.advance))
    if plan.collection and not dry_run and not pull_request:
        collect(plan.collection, [one.repo for one in done], plan.private)
    return done


def collect(title: str, repos: Sequence[str], private: bool) -> str:
    """Put repositories into a collection of their owner, which is made if it is not there.

    Returns:
        Its address.

    Raises:
        PackError: The Hub refused; the repositories are as they were pushed.
    """
    from huggingface_hub import HfApi

    api: Any = HfApi()
    try:
        made = api.create_collection(
            title, namespace=repos[0].partition("/")[0], private=private, exists_ok=True
        )
        for repo in repos:
            made = api.add_collection_item(made.slug, repo, item_type="model", exists_ok=True)
    except Exception as error:  # whatever the client raises
        raise hub_error(error, f"collection '{title}'") from None
    return str(made.url)


def _wants_signature(folder: Path) -> bool:
    path = folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    return PROFILES[recipe.get("profile") or "community"].signed


class _Hub:
    """One repository, through the Hub's own client."""

    def __init__(self, target: Target) -> None:
        from huggingface_hub import HfApi

        self._api: Any = HfApi()
        self._target = target

    def push(
        self, folder: Path, paths: tuple[str, ...], tag: str, digest: str, title: str
    ) -> Pushed:
        """Make the commit and the tag, as far as they are not there."""
        repo = self._target.repo
        self._api.create_repo(repo, private=self._target.private, exist_ok=True)
        refs = self._api.list_repo_refs(repo)
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        if tag in tags:
            if self._digest(tags[tag]) != digest:
                raise PackError(
                    f"{repo}: {tag} is there already, with other content; a version never changes",
                    "Release it under the next version.",
                )
            return Pushed(repo, tag, tags[tag], "", (), (), "it was there already")
        head = next((r.target_commit for r in refs.branches if r.name == "main"), None)
        if head is not None and self._digest(head) == digest and not self._target.pull_request:
            self._api.create_tag(repo, tag=tag, revision=head, exist_ok=True)
            return Pushed(repo, tag, head, "", (), (), "the commit was there already; tagged")
        return self._commit(folder, paths, tag, title, head)

    def _commit(
        self, folder: Path, paths: tuple[str, ...], tag: str, title: str, head: str | None
    ) -> Pushed:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        repo = self._target.repo
        there = set(self._api.list_repo_files(repo, revision=head)) if head else set()
        removed = tuple(sorted(there - set(paths) - _KEPT))
        operations = [CommitOperationAdd(path, str(folder / path)) for path in paths]
        operations += [CommitOperationDelete(path) for path in removed]
        made = self._api.create_commit(
            repo, operations, commit_message=f"Release {title}", parent_commit=head,
            create_pr=self._target.pull_request,
        )  # fmt: skip
        if self._target.pull_request:
            return Pushed(repo, tag, made.oid, str(made.pr_url), paths, removed,
                          "a pull request was opened; tag it when it is merged")  # fmt: skip
        self._api.create_tag(repo, tag=tag, revision=made.oid, exist_ok=True)
        return Pushed(repo, tag, made.oid, str(made.commit_url), paths, removed, "released")

    def _digest(self, revision: str) -> str | None:
        """The digest of the release that a commit holds; None if it holds none."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = self._api.hf_hub_download(self._target.repo, MANIFEST, revision=revision)
        except EntryNotFoundError:
            return None
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def describe(pushed: Pushed) -> dict[str, Any]:
    """As data for JSON."""
    return {
        "repo": pushed.repo,
        "tag": pushed.tag,
        "commit": pushed.commit,
        "url": pushed.url,
        "added": list(pushed.added),
        "removed": list(pushed.removed),
        "done": pushed.done,
    }
