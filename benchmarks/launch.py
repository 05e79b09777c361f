"""Run one command and write down its time and memory; started by `measure.py`, not by hand.

Linux charges a new program with the memory that its parent held at the moment of the fork, so
the process that starts a measured command has to be small. This one imports only the standard
library and runs with `python -I -S`, at about 10 MB.

Arguments: the file for the result, the file for the command's output, the command.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

INTERVAL = 0.05  # seconds between two looks at the anonymous memory


def _anonymous(pid: int) -> int:
    """Return the bytes of memory of a process that no file backs, 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Run the command of the command line; return 0 whatever its own exit status."""
    result, log, *command = sys.argv[1:]
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    ended = threading.Event()
    peak = 0

    def watch(pid: int) -> None:
        nonlocal peak
        while not ended.is_set():
            peak = max(peak, _anonymous(pid))
            ended.wait(INTERVAL)

    start = time.perf_counter()
    pid = os.posix_spawnp(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)],
    )
    watcher = threading.Thread(target=watch, args=(pid,), daemon=True)
    watcher.start()
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - start
    ended.set()
    watcher.join()
    content = {
        "exit": os.waitstatus_to_exitcode(status),
        "wall_s": wall,
        "user_s": usage.ru_utime,
        "system_s": usage.ru_stime,
        "disk_read_bytes": usage.ru_inblock * 512,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "peak_anonymous_bytes": peak,
    }
    Path(result).write_text(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
