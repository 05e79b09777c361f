"""One file on a server, of which any range of bytes can be asked for.

A transport knows nothing of weights. It tells one state of a file from another by what the server
says of it (its ETag, or when it was changed) and asks for that state alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from mergekit_lite.errors import FileFormatError, PackError

__all__ = [
    "Broken", "Changed", "Denied", "FileTransport", "FsspecTransport", "HttpTransport",
    "S3Transport", "Transport", "client", "netrc_header",
]  # fmt: skip

_TIMEOUT = 60.0
_OK, _PARTIAL, _CHANGED, _OUTSIDE = 200, 206, 412, 416
_MAKING = Lock()
_LATER = {408, 425, 429, 500, 502, 503, 504}


class Broken(Exception):
    """A request failed in a way that may not happen again.

    Attributes:
        got: Bytes that came before it broke off.
    """

    def __init__(self, why: str, got: bytes = b"") -> None:
        super().__init__(why)
        self.got = got


class Changed(Exception):
    """The server has another state of the file by now."""


class Denied(PackError):
    """The server does not say why it refuses, or it does: no permission."""


class Transport(ABC):
    """One file on a server.

    Attributes:
        name: Relative to the model.
        url: For messages; without credentials.
        host: What is shared by files that come over one line.
        size: In bytes.
        identity: Tells one state of the file from another; empty where the server does not.
        sha256: Of the file where the server knows it.
    """

    name: str
    url: str
    host: str
    size: int
    identity: str
    sha256: str | None = None

    @abstractmethod
    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes from ``start`` up to ``stop``.

        Raises:
            Broken: It may work if it is tried again.
            Changed: The file is another one by now.
            PackError: It will not work.
        """

    @abstractmethod
    def check(self) -> None:
        """Look whether it is still the same file; raises as `fetch` does."""


def client() -> Any:
    """What speaks HTTP: the library that the Hub's client brings; one for all threads."""
    with _MAKING:  # `cache` alone lets threads that come together make one each
        return _client()


@cache
def _client() -> Any:
    import httpx2

    limits = httpx2.Limits(max_connections=64, max_keepalive_connections=32)
    return httpx2.Client(follow_redirects=True, timeout=_TIMEOUT, limits=limits)


def netrc_header(url: str) -> dict[str, str]:
    """What `~/.netrc` says of a host, as a header."""
    import base64
    import netrc

    try:
        found = netrc.netrc().authenticators(urlsplit(url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return {}
    if found is None:
        return {}
    token = base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode("ascii")
    return {"Authorization": f"Basic {token}"}


class HttpTransport(Transport):
    """A file that a server of HTTP sends in parts.

    Args:
        url: Of the file.
        name: Relative to the model.
        headers: Gives headers of requests, as those that say who asks.
        label: For messages, in the place of the URL.
        fixed: Whether its content cannot change under this URL.
        sha256: Of the file, if known.
    """

    def __init__(
        self,
        url: str,
        name: str,
        headers: Callable[[], Mapping[str, str]] = dict,
        label: str | None = None,
        fixed: bool = False,
        sha256: str | None = None,
    ) -> None:
        self.name = name
        self.url = label or url
        self.host = urlsplit(url).netloc.rpartition("@")[2]
        self.sha256 = sha256
        self._target = url
        self._headers = headers
        self._fixed = fixed
        self._state: tuple[str, ...] | None = None
        self._tag = ""
        self._behind: str | None = None
        self.size = 0
        self.identity = ""

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes from ``start`` up to ``stop``."""
        target = self._behind
        headers = {} if target else dict(self._headers())
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if self._tag and not self._fixed:
            headers["If-Match"] = self._tag
        got = bytearray()
        try:
            with client().stream("GET", target or self._target, headers=headers) as response:
                if target and response.status_code in (400, 401, 403, 404, 410):
                    self._behind = None  # an address that was lent for a while only
                    raise Broken(f"the server answers {response.status_code}")
                self._understand(response, start)
                if self._fixed and response.history:
                    self._behind = str(response.url)
                stop = min(stop, self.size)
                for part in response.iter_raw():
                    got += part
                    if len(got) > stop - start:
                        break
        except (Broken, Changed, PackError):
            raise
        except Exception as error:  # the library has many, and none of them means more than that
            raise Broken(_line(error), bytes(got)) from None
        if len(got) < stop - start:
            raise Broken(f"{len(got)} of {stop - start} bytes came", bytes(got))
        return bytes(got[: stop - start])

    def _understand(self, response: Any, start: int) -> None:
        status = response.status_code
        if status == _CHANGED:
            raise Changed
        if self._state is None and start == 0 and _is_empty(status, response.headers):
            return
        if status != _PARTIAL:
            raise _refused(self.url, status)
        stated = response.headers.get("Content-Range", "")
        span, _, whole = stated.removeprefix("bytes ").partition("/")
        if not whole.isdigit() or span.partition("-")[0] != str(start):
            raise Broken(f"the server sent the range '{stated[:40]}'")
        tag = response.headers.get("ETag", "")
        strong = tag.startswith('"')
        state = (whole, tag, "" if strong else response.headers.get("Last-Modified", ""))
        if self._state is None:
            self._state = state
            self._tag = tag if strong else ""
            self.size = int(whole)
            told = self._fixed or strong or _settled(response.headers)
            self.identity = f"{self.url} {' '.join(state)}" if told else ""
        elif (whole if self._fixed else state) != (self._state[0] if self._fixed else self._state):
            raise Changed

    def check(self) -> None:
        """Ask for its first byte once more."""
        if not self._fixed:
            self.fetch(0, 1)


def _is_empty(status: int, headers: Mapping[str, str]) -> bool:
    """Whether a file is there and holds nothing, of which no part can be asked for."""
    if status == _OK:
        return headers.get("Content-Length") == "0"
    return status == _OUTSIDE and headers.get("Content-Range") == "bytes */0"


def _settled(headers: Mapping[str, str]) -> bool:
    """Whether a time of change tells states apart: its second was over when it was asked for."""
    from email.utils import parsedate_to_datetime

    try:
        changed, now = (parsedate_to_datetime(headers[key]) for key in ("Last-Modified", "Date"))
        return (now - changed).total_seconds() > 1
    except (KeyError, TypeError, ValueError):
        return False


def _refused(url: str, status: int) -> Exception:
    if status in _LATER:
        return Broken(f"the server answers {status}")
    if status == _OK:
        return PackError(
            f"{url}: the server does not send parts of files",
            "Download the model, and give its folder.",
        )
    if status in (401, 403):
        return Denied(
            f"{url}: access denied ({status})",
            "Check your credentials: ~/.netrc for HTTP, hf auth login for the Hub.",
        )
    if status in (404, 410, 416):
        return FileFormatError(f"{url}: is not there, or empty ({status})", "Check the address.")
    return PackError(f"{url}: the server answers {status}", "Check the address.")


class FileTransport(Transport):
    """A file that is on this disk already, in the Hub's cache.

    Args:
        path: Of the file.
        name: Relative to the model.
        url: Where it came from.
    """

    def __init__(self, path: Path, name: str, url: str) -> None:
        self.name = name
        self.url = url
        self.host = ""
        self.size = path.stat().st_size
        self.identity = ""
        self._path = path

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes from ``start`` up to ``stop``."""
        try:
            with self._path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise Broken(_line(error)) from None

    def check(self) -> None:
        """Nothing: files of the cache are named by what they hold."""


class S3Transport(Transport):
    """An object of S3.

    Args:
        system: s3fs' file system.
        path: ``bucket/key``.
        name: Relative to the model.
        info: What the listing says of it.
    """

    def __init__(self, system: Any, path: str, name: str, info: Mapping[str, Any]) -> None:
        self.name = name
        self.url = f"s3://{path}"
        self.host = "s3"
        self.size = int(info["size"])
        self._system = system
        self._bucket, _, self._key = path.partition("/")
        self._tag = str(info.get("ETag", ""))
        self.identity = f"{self.url} {self.size} {self._tag}" if self._tag else ""

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes from ``start`` up to ``stop``."""
        from fsspec.asyn import sync

        stop = min(stop, self.size)
        if stop <= start:
            return b""
        got = bytearray()
        try:
            sync(self._system.loop, self._get, start, stop, got, timeout=2 * _TIMEOUT)
        except (Broken, Changed, PackError):
            raise
        except Exception as error:
            raise self._meaning(error, bytes(got)) from None
        if len(got) < stop - start:
            raise Broken(f"{len(got)} of {stop - start} bytes came", bytes(got))
        return bytes(got)

    async def _get(self, start: int, stop: int, got: bytearray) -> None:
        more = {"IfMatch": self._tag} if self._tag else {}
        connection = await self._system.get_s3(self._bucket)
        answer = await connection.get_object(
            Bucket=self._bucket, Key=self._key, Range=f"bytes={start}-{stop - 1}",
            **more, **self._system.req_kw,
        )  # fmt: skip
        async with answer["Body"] as body:
            while part := await body.read(1 << 20):
                got += part

    def _meaning(self, error: Exception, got: bytes) -> Exception:
        stated: Mapping[str, Any] = getattr(error, "response", None) or {}
        status = stated.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == _CHANGED:
            return Changed()
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            return PackError(
                f"{self.url}: no credentials for S3 were found",
                "Set them up as for any program: aws configure, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY.",
            )
        if isinstance(status, int) and status not in (_OK, _PARTIAL):
            return _refused(self.url, status)
        return Broken(_line(error), got)

    def check(self) -> None:
        """Ask what the server says of it now."""
        try:
            self._system.invalidate_cache(f"{self._bucket}/{self._key}")
            now = self._system.info(f"{self._bucket}/{self._key}", refresh=True)
        except FileNotFoundError:
            raise Changed from None
        except Exception as error:
            raise self._meaning(error, b"") from None
        if (int(now["size"]), str(now.get("ETag", ""))) != (self.size, self._tag):
            raise Changed


class FsspecTransport(Transport):
    """A file of any file system that fsspec knows.

    Args:
        system: fsspec's file system.
        path: Of the file there.
        url: For messages.
        name: Relative to the model.
    """

    def __init__(self, system: Any, path: str, url: str, name: str) -> None:
        self.name = name
        self.url = url
        self.host = urlsplit(url).scheme
        self._system = system
        self._path = path
        self._state = self._look()
        self.size = int(self._state["size"])
        self.identity = f"{url} {sorted(self._state.items())}" if len(self._state) > 1 else ""

    def _look(self) -> dict[str, str]:
        self._system.invalidate_cache()
        found = self._system.info(self._path)
        wanted = ("size", "ETag", "etag", "generation", "md5Hash", "crc32c", "mtime", "updated")
        return {key: str(found[key]) for key in wanted if found.get(key) is not None}

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes from ``start`` up to ``stop``."""
        stop = min(stop, self.size)
        try:
            found: bytes = self._system.cat_file(self._path, start=start, end=stop)
        except FileNotFoundError:
            raise Changed from None
        except Exception as error:
            raise Broken(_line(error)) from None
        if len(found) != stop - start:
            raise Broken(f"{len(found)} of {stop - start} bytes came", found[: stop - start])
        return found

    def check(self) -> None:
        """Ask what the server says of it now."""
        try:
            now = self._look()
        except FileNotFoundError:
            raise Changed from None
        except Exception as error:
            raise Broken(_line(error)) from None
        if now != self._state:
            raise Changed


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
