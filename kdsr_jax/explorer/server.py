"""The explorer's server: the page, its pictures, and answers in JSON, for this machine alone.

It listens on the loopback address and answers only requests that name it as their host, so that no page of another origin
reaches it by a name of its own; every answer carries a policy under which the page loads nothing from elsewhere.
"""

import errno
import functools
import http.server
import inspect
import json
import pathlib
import re
import sys
import threading
import traceback
import urllib.parse

from kdsr_jax.errors import UserError
from kdsr_jax.report.markup import STYLE

LOOPBACK = "127.0.0.1"
MOST_BYTES = 2**20  # of a request's body
SECONDS = 60  # a connection may be silent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
ASKED = ("about", "items", "users", "user", "similar")  # methods of Answers, by GET /api/NAME?ARGUMENT=TEXT
SENT = ("recommend", "explain")  # by POST /api/NAME of a JSON object of arguments
_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::\d{1,5})?", re.IGNORECASE)  # any port, for those who forward one
_HERE = pathlib.Path(__file__).parent


class Refused(Exception):
    """A request that gets no answer: HTTP status and a line that says why."""


class Server(http.server.ThreadingHTTPServer):
    """Listens from the start, and answers once ``answers`` are there and ``serve_forever`` runs.

    Attributes:
      answers: Answers.
      lock: held while one of them works; pictures need none.
    """

    daemon_threads = True
    answers = None

    def __init__(self, port: int):
        """Take a port, 0 for any free one.

        Raises:
          UserError: the port cannot be had.
        """
        self.lock = threading.Lock()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            used = getattr(error, "errno", None) == errno.EADDRINUSE
            reason = "is in use" if used else f"cannot be had ({getattr(error, 'strerror', error)})"
            raise UserError(f"--port={port}: {reason}; give another one, or --port=0 for any that is free") from error

    def handle_error(self, request, client_address):
        """Say nothing of a browser that went away before its answer was sent."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SECONDS

    def do_GET(self):
        self._answer(self._get)

    def do_POST(self):
        self._answer(self._post)

    def _answer(self, work):
        """Send what the work returns, (media type, bytes), or why it does not."""
        try:
            hosts = self.headers.get_all("Host", [])
            if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
                raise Refused(403, "this page is for this machine alone; open it as 127.0.0.1 or localhost")
            status, (kind, content) = 200, work()
        except Refused as error:
            status, (kind, content) = error.args[0], _json({"error": error.args[1]})
        except UserError as error:
            status, (kind, content) = 400, _json({"error": " ".join(str(error).split())})
        except Exception as error:  # noqa: BLE001 - a fault of our own ends one answer, not the server
            traceback.print_exc()
            status, (kind, content) = 500, _json({"error": f"{type(error).__name__}; the terminal says more"})
        self._send(status, kind, content)

    def _send(self, status, kind, content):
        self.close_connection |= status >= 400  # the body may be unread
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def _get(self):
        path, _, query = self.path.partition("?")
        if path in (files := _files()):
            return files[path]
        if picture := re.fullmatch(r"/picture/(\d{1,9})", path):
            found = self.server.answers.picture(int(picture[1]))
            if content := found.read() if found else b"":
                return f"image/{found.kind}", content
        name = path.removeprefix("/api/")
        if name in SENT and name != path:
            raise Refused(405, f"{path}: takes POST")
        if name not in ASKED or name == path:
            raise Refused(404, f"{path}: there is no such thing here")
        try:
            values = urllib.parse.parse_qs(query, True, True, errors="strict", max_num_fields=9) if query else {}
        except ValueError as error:
            raise Refused(400, "the query cannot be read; it is NAME=VALUE, in UTF-8") from error
        if twice := [key for key, value in values.items() if len(value) > 1]:
            raise UserError(f"{twice[0]}: is given twice")
        return self._ask(name, {key: value for key, (value,) in values.items()})

    def _post(self):
        name, length = self.path.removeprefix("/api/"), self.headers.get("Content-Length", "")
        if name not in SENT or name == self.path:
            raise Refused(404, f"{self.path}: there is no such thing here that takes POST")
        if self.headers.get_content_type() != "application/json":  # which other origins may not send unasked
            raise Refused(415, "the body must be application/json")
        if not re.fullmatch(r"\d{1,9}", length):
            raise Refused(411, "the length of the body is missing")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"the body may have {MOST_BYTES} bytes at most")
        try:
            values = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body cannot be read as JSON") from error
        if not isinstance(values, dict):
            raise Refused(400, "the body must be a JSON object")
        return self._ask(name, values)

    def _ask(self, name, values):
        method = getattr(self.server.answers, name)
        try:
            inspect.signature(method).bind(**values)
        except TypeError as error:  # a missing or an unknown argument
            raise UserError(f"/api/{name}: {error}") from error
        with self.server.lock:
            return _json(method(**values))

    def send_error(self, code, message=None, explain=None):
        """Answer what http.server itself refuses, in our form."""
        self.close_connection = True
        self._send(code, *_json({"error": message or http.server.BaseHTTPRequestHandler.responses[code][0]}))

    def version_string(self):
        return "kdsr_jax"

    def log_message(self, *_):
        """Be still: the terminal shows the address and faults."""


def _json(content):
    return "application/json", json.dumps(content).encode()  # in ASCII, so nothing in a text can break it


@functools.cache
def _files():
    """Return path -> (media type, content) of the page's own files."""
    page, style, script = ((_HERE / name).read_bytes() for name in ("explore.html", "explore.css", "explore.js"))
    return {
        "/": ("text/html; charset=utf-8", page),
        "/explore.css": ("text/css; charset=utf-8", STYLE.encode() + style),
        "/explore.js": ("text/javascript; charset=utf-8", script),
    }
