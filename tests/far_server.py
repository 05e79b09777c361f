"""A server of HTTP on loopback that sends parts of files, and can be slow, broken or changing."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

__all__ = ["FarServer", "far_server"]

_PIECE = 1 << 16


@dataclass
class FarServer:
    """What is served and how.

    Attributes:
        folder: Of the files.
        url: Address of the folder.
        latency: Seconds before an answer.
        rate: Bytes a second of all answers together; None for no limit.
        failing: Share of requests that fail or are cut in the middle.
        asked: Ranges that were sent, by path: start and stop.
        etags: Whether files have one, and not just a time of change.
        ranges: Whether parts of files are sent.
    """

    folder: Path
    url: str = ""
    latency: float = 0.0
    rate: float | None = None
    failing: float = 0.0
    etags: bool = True
    ranges: bool = True
    asked: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    free: float = 0.0
    chance: random.Random = field(default_factory=lambda: random.Random(5))

    def sent(self) -> int:
        """Bytes of all ranges."""
        return sum(stop - start for spans in self.asked.values() for start, stop in spans)

    def pause(self, count: int) -> None:
        """Wait until the line has had time for so many bytes."""
        if self.rate is None:
            return
        with self.lock:
            self.free = max(self.free, time.monotonic()) + count / self.rate
            until = self.free
        time.sleep(max(0.0, until - time.monotonic()))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def far(self) -> FarServer:
        return self.server.far  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def _refuse(self, status: int, size: int | None = None) -> None:
        self.send_response(status)
        if size is not None:
            self.send_header("Content-Range", f"bytes */{size}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        """Send a file, or a part of it."""
        far = self.far
        path = far.folder / unquote(self.path).lstrip("/")
        with far.lock:
            far.requests += 1
            lot = far.chance.random() < far.failing
            cut = lot and far.chance.random() < 0.5
        time.sleep(far.latency)
        if lot and not cut:
            self._refuse(503)
            return
        if not path.is_file():
            self._refuse(404)
            return
        stat = path.stat()
        tag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"'
        match = self.headers.get("If-Match")
        if far.etags and match is not None and match != tag:
            self._refuse(412)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = 0, stat.st_size
        if wanted and far.ranges:
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, stat.st_size)
            if start >= stat.st_size:
                self._refuse(416, stat.st_size)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{stat.st_size}")
        else:
            self.send_response(200)
        self.send_header("Last-Modified", formatdate(stat.st_mtime, usegmt=True))
        if far.etags:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if cut:
            stop = start + (stop - start) // 2
        with far.lock:
            far.asked.setdefault(self.path.lstrip("/"), []).append((start, stop))
        with path.open("rb") as file:
            file.seek(start)
            while start < stop and (data := file.read(min(_PIECE, stop - start))):
                far.pause(len(data))
                self.wfile.write(data)
                start += len(data)
        if cut:
            self.close_connection = True


@contextmanager
def far_server(folder: Path) -> Iterator[FarServer]:
    """Serve a folder on loopback."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            """Connections that the client drops are no news."""

    server = Server(("127.0.0.1", 0), _Handler)
    far = FarServer(folder)
    server.far = far  # type: ignore[attr-defined]
    far.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield far
    finally:
        server.shutdown()
        server.server_close()
