"""A served explorer for tests, and requests to it that say exactly what is sent."""

import contextlib
import http.client
import json
import threading

from kdsr_jax.explorer.answers import Answers
from kdsr_jax.explorer.server import Server


@contextlib.contextmanager
def serve(runs):
    """Serve dict name -> Recommender on a free port; yields the Server."""
    with Server(0) as server:
        server.answers = Answers(runs)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def request(port, method, path, body=None, headers=(), host=None):
    """Send a request and return (status, headers, bytes); ``headers`` are (name, value), ``host`` one, several or ()."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.putrequest(method, path, skip_host=True)
        for value in (f"127.0.0.1:{port}",) if host is None else host:
            connection.putheader("Host", value)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def post(port, path, content):
    """Send JSON, or bytes as they are; return (status, JSON of the answer)."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    status, _, answer = request(port, "POST", path, body, headers)
    return status, json.loads(answer)
