"""Shows a run while it goes on, as a page on this machine: llm-local watch RUN [OTHER ...] [--port 8270]

It is the page that llm-local report makes, with what each stage does now, and renews itself. RUN is the output folder
of a launch, of all jobs of a run, or of one job. From another machine: ssh -L 8270:localhost:8270 HOST.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from llm_local.files import ends_with_a_line
from llm_local.program import command_parser, program
from llm_local.report.library import NoCharts
from llm_local.report.page import content, render
from llm_local.report.read import RunData, RunReader, short_names

NAME = program(__file__)
PORT = 8270
SECONDS = 2.0
LOCAL = ("localhost", "127.0.0.1", "[::1]")


class Watch:
    """The runs as they are; read at most once in SECONDS, by whichever request comes."""

    def __init__(self, folders: list[Path]):
        """Raises ValueError for a folder that holds no run."""
        self._readers = [RunReader(each, name) for each, name in zip(folders, short_names(folders), strict=True)]
        self._lock = threading.Lock()
        self._at = -SECONDS
        self._runs: list[RunData] = []
        self._read()

    def _read(self) -> list[RunData]:
        if time.monotonic() - self._at >= SECONDS / 2:
            self._runs = [reader.read() for reader in self._readers]
            self._at = time.monotonic()
        return self._runs

    def page(self) -> str:
        with self._lock:
            return render(self._read(), SECONDS)

    def news(self) -> str:
        with self._lock:
            return json.dumps(content(self._read(), is_live=True))


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, watch: Watch, port: int):
        self.watch = watch
        super().__init__(("127.0.0.1", port), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers this machine alone: a page from elsewhere that calls itself by another name gets nothing."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in LOCAL and host not in LOCAL:
            self.send_error(403)
            return
        try:
            if self.path == "/":
                self._send("text/html", self.server.watch.page())
            elif self.path == "/news":
                self._send("application/json", self.server.watch.news())
            else:
                self.send_error(404)
        except (ValueError, OSError) as error:  # the run is being replaced
            self.send_error(503, " ".join(str(error).split()))

    def _send(self, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(200)
        for name, value in (("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody wants a line each two seconds."""


@ends_with_a_line(NoCharts)
def main(arguments: list[str]) -> int:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--port", type=int, default=PORT, help=f"of the page; 0: any that is free ({PORT})")
    given = parser.parse_args(arguments)
    try:
        watch = Watch(given.runs)
        watch.page()
    except (ValueError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    try:
        server = Server(watch, given.port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"{NAME}: cannot listen on port {given.port} ({reason}); name another one, or 0", file=sys.stderr)
        return 2
    print(f"watch: http://localhost:{server.server_port}", flush=True)
    with server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
