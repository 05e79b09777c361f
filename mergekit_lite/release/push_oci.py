"""A release in an OCI registry: blobs first, the manifest last, so that the tag appears at once.

Everything is checked before anything leaves. Blobs that are there are not sent again, so running
again finishes what was stopped; a tag of other content is an error.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_lite.errors import PackError
from mergekit_lite.merge.run import Progress
from mergekit_lite.release.oci import Blob, Image, describe_image
from mergekit_lite.release.push import Pushed, check_before_leaving

__all__ = ["pull_image", "push_image"]

_CHUNK = 32 << 20
"""Bytes that are held and sent at a time."""
_WAIT = 30.0
"""Seconds that a registry may take to answer at all."""
_PAUSES = (1.0, 4.0)
"""Seconds before a file is sent again."""
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_HOST = r"(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)(?::\d{1,5})?|[A-Za-z0-9-]+:\d{1,5}"
_NAME = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"


def push_image(
    folder: Path,
    target: str,
    threads: int,
    progress: Progress,
    dry_run: bool = False,
) -> Pushed:
    """Push a release.

    Args:
        folder: Where it lies.
        target: ``REGISTRY/NAME``; the version becomes the tag. A registry on this machine is spoken
            to over http, others over https; who may push is taken from docker's configuration.
        threads: For checking the release.
        progress: Told how far it is.
        dry_run: Whether to tell only what would happen.

    Raises:
        PackError: It does not hold, holds a secret, the version is there with other content, or the
            registry refused.
    """
    if not re.fullmatch(rf"(?:{_HOST})(?:/{_NAME})+", target):
        raise PackError(
            f"'{target}' is no repository of a registry",
            "Write REGISTRY/NAME, the name in small letters, for example ghcr.io/org/model; the "
            "version becomes the tag.",
        )
    image = describe_image(folder)
    progress.begin("Check", sum(blob.size for blob in image.blobs))
    check_before_leaving(folder, threads, progress.advance)
    names = tuple(blob.name for blob in image.blobs if blob.name)
    if dry_run:
        return Pushed(target, image.tag, None, "", names, (), "nothing was sent (--dry-run)")
    try:
        done, sent = _Registry(f"{target}:{image.tag}").push(image)
    except PackError:
        raise
    except Exception as error:  # whatever the client raises
        raise PackError(
            f"{target}: the registry cannot be reached ({type(error).__name__})",
            "Check its name and the network. Run the same command again; what is done is not done "
            "twice.",
        ) from None
    return Pushed(target, image.tag, image.digest, "", sent, (), f"{done} @{image.digest}")


def pull_image(target: str, into: Path) -> Path:
    """Fetch a release from a registry.

    Args:
        target: ``REGISTRY/NAME:TAG`` or ``REGISTRY/NAME@sha256:…``.
        into: Folder for its files.

    Raises:
        PackError: There is no such release, or the registry refused.
    """
    if not re.fullmatch(rf"(?:{_HOST})(?:/{_NAME})+(?::{_TAG}|@sha256:[0-9a-f]{{64}})", target):
        raise PackError(
            f"'{target}' names no release in a registry", "Write oci://REGISTRY/NAME:VERSION"
        )
    try:
        _Registry(target).client.pull(target=target, outdir=str(into))
    except PackError:
        raise
    except Exception as error:  # whatever the client raises
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise PackError(
            f"{target}: cannot be fetched ({said:.200})",
            "Check the name and the version; for a private repository: docker login",
        ) from None
    return into


class _Registry:
    """A registry, through the client of the ORAS project."""

    def __init__(self, target: str) -> None:
        try:
            import oras.client
        except ImportError:
            raise PackError("OCI registries need oras", "pip install 'pack-models[oci]'") from None
        logging.getLogger("oras").setLevel(logging.CRITICAL)
        host = target.partition("/")[0]
        near = re.fullmatch(r"(?:localhost|127\.\d+\.\d+\.\d+)(?::\d+)?", host) is not None
        basic = _asks_for_password(host, near)
        self.client: Any = oras.client.OrasClient(
            hostname=host, insecure=near, auth_backend="basic" if basic else "token"
        )
        # The client tries again for two minutes whatever went wrong, a wrong password too; what is
        # worth it is tried again here.
        self.client.do_request = partial(type(self.client).do_request.__wrapped__, self.client)
        self._place: Any = self.client.get_container(target)
        self._target = target
        self.client.auth.load_configs(self._place)
        if basic and not hasattr(self.client.auth, "_basic_auth"):
            raise self._refused(401)

    def push(self, image: Image) -> tuple[str, tuple[str, ...]]:
        """Send what is not there; returns what was done, and the files that were sent."""
        url = f"{self.client.prefix}://{self._place.manifest_url()}"
        there = self.client.do_request(url, "HEAD", headers={"Accept": _MANIFEST})
        if there.status_code == 200:
            if there.headers.get("Docker-Content-Digest") != image.digest:
                raise PackError(
                    f"{self._target} is there already, with other content; a version never changes",
                    "Release it under the next version.",
                )
            return "it was there already", ()
        if there.status_code != 404:
            self._check(there)
        sent = [blob.name for blob in image.blobs if self._send(blob)]
        headers = {"Content-Type": _MANIFEST}
        self._check(self.client.do_request(url, "PUT", data=image.manifest, headers=headers))
        return "released", tuple(name for name in sent if name)

    def _send(self, blob: Blob) -> bool:
        """Send a file if it is not there; what a network does is tried again."""
        layer = {"digest": blob.digest, "size": blob.size}
        if self.client.blob_exists(layer, self._place):
            return False
        with tempfile.NamedTemporaryFile() as content:
            content.write(blob.content)
            content.flush()
            path = str(blob.path or content.name)
            for pause in (*_PAUSES, None):
                try:
                    answer = self._upload(path, blob.size, layer)
                    if answer.status_code < 500 or pause is None:
                        break
                except OSError:  # what the client's connections raise is of this family
                    if pause is None:
                        raise
                time.sleep(pause)
        self._check(answer)
        return True

    def _upload(self, path: str, size: int, layer: Mapping[str, Any]) -> Any:
        if size <= _CHUNK:
            return self.client.put_upload(path, self._place, layer)
        return self.client.chunked_upload(path, self._place, layer, chunk_size=_CHUNK)

    def _check(self, answer: Any) -> None:
        """Raise what a registry's refusal means."""
        status = answer.status_code
        if status in (401, 403):
            raise self._refused(status)
        if status >= 300:
            raise PackError(
                f"{self._target}: the registry answers {status}",
                "Run the same command again; what is done is not done twice.",
            )

    def _refused(self, status: int) -> PackError:
        return PackError(
            f"{self._target}: the registry refuses you ({status})",
            f"Log in: docker login {self._target.partition('/')[0]}",
        )


def _asks_for_password(host: str, near: bool) -> bool:
    """Whether a registry wants a password with each request, rather than a token."""
    import requests

    answer = requests.get(f"{'http' if near else 'https'}://{host}/v2/", timeout=_WAIT)
    return str(answer.headers.get("Www-Authenticate", "")).lower().startswith("basic")
