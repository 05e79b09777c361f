"""From an address to a model that is read where it lies: hf://, s3://, gs://, https://."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from mergekit_lite.checkpoint.far.checkpoint import FarCheckpoint
from mergekit_lite.checkpoint.far.fetcher import FETCHER, FIRST, at_once, cache_folder
from mergekit_lite.checkpoint.far.transport import (
    Denied,
    FileTransport,
    FsspecTransport,
    HttpTransport,
    S3Transport,
    Transport,
    netrc_header,
)
from mergekit_lite.checkpoint.hub import (
    HubReference,
    Listing,
    explained,
    listing,
    parse_reference,
    pinned_at,
)
from mergekit_lite.checkpoint.hub import is_small as is_small_file
from mergekit_lite.checkpoint.safetensors import INDEX_NAME, read_weight_map
from mergekit_lite.errors import FileFormatError, PackError

__all__ = ["fetch_adapter", "open_far", "open_far_hub"]

_EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "gcs": ("gcsfs", "gs")}
_ASKED = (
    "config.json", INDEX_NAME, "adapter_config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "README.md", "LICENSE", "LICENSE.txt",
    "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
)  # fmt: skip
"""A server of HTTP does not list a folder, so these are asked for."""
_SMALL = 256 << 20
"""Bytes of the largest file beside the weights; tokenizers have some 30 MB."""
_AT_FIRST = 48 << 20
"""Bytes that are asked for before it is known how many there are."""
_ADAPTER = "adapter_model.safetensors"


def open_far(reference: str) -> tuple[Path, str | None, FarCheckpoint]:
    """Open a model by its address; headers and small files are fetched.

    Args:
        reference: ``hf://ORG/NAME[@REVISION]``; ``s3://BUCKET/FOLDER``, ``gs://…``, ``https://…``,
            or one file of safetensors there.

    Returns:
        The folder of its small files, the commit if it has one, and its tensors.

    Raises:
        PackError: There is no such model, no permission, a library is missing, or the server does
            not send parts of files.
    """
    scheme = reference.partition("://")[0]
    if scheme == "hf":
        hub = parse_reference(reference)
        if hub is None:
            raise PackError(
                f"{reference}: is no address of a model on the Hub", "Write hf://ORG/NAME@REVISION."
            )
        return open_far_hub(hub, reference)
    try:
        parts = urlsplit(reference)
    except ValueError as error:
        raise PackError(f"{reference}: is no address ({error})", "Check its spelling.") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise PackError(
            f"{parts.scheme}://{parts.hostname or ''}{parts.path}: an address that holds a user, a "
            "password or a signature would be in every lock",
            "Leave it out; credentials come from ~/.netrc, or from where S3's tools have them.",
        )
    if scheme in ("http", "https"):
        return _open_http(reference.rstrip("/"))
    return _open_listed(scheme, reference.rstrip("/"))


def open_far_hub(
    hub: HubReference, label: str, listed: Listing | None = None
) -> tuple[Path, str, FarCheckpoint]:
    """Open a model of the Hub where it lies; what the Hub's cache has is read there.

    Raises:
        PackError: There is no such model, no permission, no network, or it is no safetensors.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    with explained(hub):
        listed = listed or listing(pinned_at(hub))
    held = listed.cached(hub)

    def transport(name: str) -> Transport:
        url = f"hf://{hub.repo}@{listed.commit[:12]}/{name}"
        if name in held:
            return FileTransport(held[name], name, url)
        return HttpTransport(
            hf_hub_url(hub.repo, name, revision=listed.commit), name, build_hf_headers, url,
            fixed=True, sha256=listed.digests.get(name),
        )  # fmt: skip

    transports = [transport(name) for name in _safetensors(listed.weights, label)]
    return listed.folder, listed.commit, FarCheckpoint(label, listed.folder, transports)


def fetch_adapter(reference: str) -> Path:
    """Fetch an adapter whole, which is small: a folder in the user's cache for each state of it.

    Args:
        reference: Its address, other than one of the Hub.

    Raises:
        PackError: It cannot be had.
    """
    found, _, checkpoint = open_far(reference)
    small = {path.name: path.read_bytes() for path in found.iterdir() if path.name[0] != "."}
    try:
        folder = _kept(f"{reference} {checkpoint.fingerprint()}", small)
        for file in checkpoint.far:
            file.save(folder / file.name)
    finally:
        checkpoint.close()
    return folder


def _safetensors(names: Sequence[str], label: str) -> list[str]:
    for name in names:
        if not name.endswith(".safetensors"):
            raise PackError(
                f"{label}: '{name}' is a PyTorch file, which cannot be read in parts",
                "Download the model, and give its folder.",
            )
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            raise FileFormatError(f"{label}: the index names a file outside the model ('{name}')")
    return sorted(names)


def _open_http(url: str) -> tuple[Path, None, FarCheckpoint]:
    headers = lambda: netrc_header(url)  # noqa: E731
    name = url.rpartition("/")[2]
    if name.endswith(".safetensors"):
        return _bare(url, [HttpTransport(url, name, headers)])
    small = _fetched({n: HttpTransport(f"{url}/{n}", n, headers) for n in _ASKED})
    folder = _kept(url, small)
    usual = _ADAPTER if "adapter_config.json" in small else "model.safetensors"
    names = _indexed(folder) or [usual]
    transports = [
        HttpTransport(f"{url}/{quote(str(PurePosixPath(n)))}", n, headers)
        for n in _safetensors(names, url)
    ]
    return folder, None, FarCheckpoint(url, folder, transports)


def _open_listed(scheme: str, url: str) -> tuple[Path, None, FarCheckpoint]:
    """A model of a store that lists what it has."""
    system, transport = _system(scheme, url)
    path = url.partition("://")[2]
    if path.endswith(".safetensors"):
        return _bare(url, [transport(path, path.rpartition("/")[2])])
    found = {
        n: p for p in _listed(system, path, url)
        if "/" not in (n := p.removeprefix(path).lstrip("/"))
    }  # fmt: skip
    small = {n: transport(p, n) for n, p in found.items() if is_small_file(n)}
    folder = _kept(url, _fetched(small))
    weights = sorted(n for n in found if fnmatchcase(n, "*.safetensors"))
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    names = _safetensors(_indexed(folder) or weights, url)
    if not names:
        raise PackError(
            f"{url}: holds no weights (*.safetensors)", "Check the address; it names a folder."
        )
    for name in names:
        if "/" not in name and name not in found:
            raise _no_shard(url, name)

    def shard(name: str) -> Transport:
        """One by its name in the index; those in folders below were not listed."""
        try:
            return transport(found.get(name) or f"{path}/{PurePosixPath(name)}", name)
        except (FileNotFoundError, FileFormatError):
            raise _no_shard(url, name) from None
        except PermissionError as error:
            raise _unlisted(f"{url}/{name}", error) from None

    transports = at_once(shard, names)
    return folder, None, FarCheckpoint(url, folder, transports)


def _no_shard(url: str, name: str) -> PackError:
    return FileFormatError(
        f"{url}/{INDEX_NAME}: names the shard '{name}', which is not there",
        "Finish the upload of the model.",
    )


def _listed(system: Any, path: str, url: str) -> list[str]:
    try:
        return [str(p) for p in system.ls(path, detail=False)]
    except FileNotFoundError:
        raise PackError(
            f"{url}: there is no such folder",
            "Check the address; a + that belongs to it is written \\+",
        ) from None
    except PackError:
        raise
    except Exception as error:
        raise _unlisted(url, error) from None


def _unlisted(url: str, error: Exception) -> PackError:
    kind = type(error).__name__
    if "Credentials" in kind or isinstance(error, PermissionError):
        return PackError(
            f"{url}: access denied ({kind})",
            "Set up credentials as for any program of that store (for S3: aws configure).",
        )
    line = (str(error).strip() or kind).splitlines()[0][:200]
    return PackError(f"{url}: cannot be listed ({line})", "Check the address and the network.")


def _system(scheme: str, url: str) -> tuple[Any, Callable[[str, str], Transport]]:
    """A file system of fsspec, and what makes transports of its paths."""
    module, extra = _EXTRAS[scheme]
    if find_spec(module) is None:
        raise PackError(
            f"{url}: reading {scheme}:// needs '{module}', which is not installed",
            f"pip install 'pack-models[{extra}]'",
        )
    import fsspec

    system = fsspec.filesystem(scheme)
    if scheme != "s3":
        return system, lambda path, name: FsspecTransport(system, path, f"{scheme}://{path}", name)

    def of_s3(path: str, name: str) -> Transport:
        try:
            return S3Transport(system, path, name, system.info(path))
        except FileNotFoundError:
            raise FileFormatError(f"s3://{path}: is not there", "Check the address.") from None
        except Exception as error:
            raise _unlisted(f"s3://{path}", error) from None

    return system, of_s3


def _bare(url: str, transports: Sequence[Transport]) -> tuple[Path, None, FarCheckpoint]:
    folder = _kept(url, {})
    return folder, None, FarCheckpoint(url, None, transports)


def _indexed(folder: Path) -> list[str]:
    """Names of the shards, of a model with an index."""
    if not (folder / INDEX_NAME).is_file():
        return []
    return sorted(set(read_weight_map(folder / INDEX_NAME).values()))


def _fetched(transports: Mapping[str, Transport]) -> dict[str, bytes]:
    """Small files, those that are there.

    Raises:
        PackError: One cannot be had, or is larger than any small file.
    """

    def fetch(item: tuple[str, Transport]) -> tuple[str, bytes | None]:
        name, transport = item
        try:
            known = transport.size > _SMALL
            content = b"" if known else FETCHER.fetch_now(transport, 0, _AT_FIRST, FIRST)
        except (FileFormatError, Denied):  # some stores say the latter of what is not there
            return name, None
        if transport.size > _SMALL:
            raise PackError(
                f"{transport.url}: has {transport.size / 1e6:.0f} MB, and files beside the weights "
                f"are read up to {_SMALL / 1e6:.0f} MB",
                "Take it out of the model's folder if it is no part of the model; else download "
                "the model, and give its folder.",
            )
        if len(content) < transport.size:
            content += FETCHER.fetch_now(transport, len(content), transport.size, FIRST)
        return name, content

    found = at_once(fetch, transports.items())
    return {name: content for name, content in found if content is not None}


def _kept(url: str, files: Mapping[str, bytes]) -> Path:
    """A folder of small files, of that content, in the user's cache."""
    digest = hashlib.sha256(url.encode())
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)} {hashlib.sha256(content).hexdigest()}".encode())
    folder = cache_folder() / "far" / digest.hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != len(content):
                beside = folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
                beside.write_bytes(content)
                beside.rename(path)
    except OSError as error:
        raise PackError(
            f"{folder}: cannot be written ({error.strerror})",
            "Set XDG_CACHE_HOME to a folder that can be.",
        ) from None
    return folder
