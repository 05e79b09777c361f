"""A slow line in front of a server: latency before every answer, a rate that all answers share."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_PIECE = 1 << 16


@dataclass
class Line:
    """What passes and how.

    Attributes:
        rate: Bytes a second towards the client; None for no limit.
        latency: Seconds before the first byte of an answer.
        port: Where clients connect on loopback.
        sent: Bytes that clients got, headers included.
        answers: How many.
    """

    rate: float | None
    latency: float
    port: int = 0
    sent: int = 0
    answers: int = 0
    _free: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pause(self, count: int) -> None:
        """Wait until the line has had time for so many bytes."""
        with self._lock:
            self.sent += count
            if self.rate is None:
                return
            self._free = max(self._free, time.monotonic()) + count / self.rate
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))

    def carry(self, client: socket.socket, port: int) -> None:
        """Pass a connection on to the server at a port, and answers back, until one side ends."""
        asked = threading.Event()
        with client, socket.create_connection(("127.0.0.1", port)) as server:

            def ask() -> None:
                with suppress(OSError):
                    while data := client.recv(_PIECE):
                        asked.set()
                        server.sendall(data)
                with suppress(OSError):
                    server.shutdown(socket.SHUT_WR)

            threading.Thread(target=ask, daemon=True).start()
            with suppress(OSError):
                while data := server.recv(_PIECE):
                    if asked.is_set():
                        asked.clear()
                        with self._lock:
                            self.answers += 1
                        time.sleep(self.latency)
                    self.pause(len(data))
                    client.sendall(data)


@contextmanager
def slow_line(port: int, rate: float | None, latency: float) -> Iterator[Line]:
    """Put a line in front of the server at a port of loopback."""
    line = Line(rate, latency)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line.port = listener.getsockname()[1]

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=line.carry, args=(client, port), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield line
