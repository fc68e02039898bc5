"""An OpenAI-compatible endpoint in a thread, which fails as it is told and counts what it sells."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable

import fake_batches

KINDS = ("429", "500", "slow", "cut", "garbage", "talk", "range", "shape")
# (prompt, number of this prompt's request, from 0) → one of the kinds, or ""
Fault = Callable[[str, int], str]


def share(prompt: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on a text only."""
    digest = hashlib.sha256(f"{salt}{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def score(prompt: str) -> int:
    """The score that the endpoint gives to a prompt."""
    return int(share(prompt, "score") * 4)


def some(part: float, kinds: tuple[str, ...] = KINDS) -> Fault:
    """Faults at a share of all requests, the same in every run."""
    def fault(prompt: str, number: int) -> str:
        drawn = share(prompt, f"fault{number}")
        return kinds[int(drawn / part * len(kinds))] if drawn < part else ""

    return fault


class Endpoint(http.server.ThreadingHTTPServer):
    """The server.

    Attributes:
      fault: what goes wrong with a request.
      slow: seconds that a request of kind "slow" takes.
      after: the value of Retry-After with status 429.
      price: USD per million tokens of prompts and answers, for `spent`.
      times: when each request came, of `time.monotonic`.
      asked: prompt → number of requests.
      sold: prompt → number of whole chat completions that were sent.
      spent: their cost.
      batches: the batch interface.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, fault: Fault = lambda *_: "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault, self.slow, self.after, self.price = fault, 1.0, "0.02", (1.0, 2.0)
        self.pause = 0.0
        self.times: list[float] = []
        self.asked: collections.Counter[str] = collections.Counter()
        self.sold: collections.Counter[str] = collections.Counter()
        self.spent, self.lock = 0.0, threading.Lock()
        self.keys: set[str] = set()
        self.batches = fake_batches.Batches()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def sell(self, prompt: str, factor: float = 1.0) -> None:
        """Count a chat completion; `factor` multiplies its price."""
        self.sold[prompt] += 1
        self.spent += (len(prompt) // 4 * self.price[0] + self.price[1]) / 1e6 * factor

    def handle_error(self, *_: object) -> None:
        """Say nothing about clients that went away."""


def completion(model: str, prompt: str, text: str) -> dict:
    """A chat completion; its answer has one token."""
    before = len(prompt) // 4
    return {"id": "x", "object": "chat.completion", "created": 0, "model": model,
            "choices": [{"index": 0, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": before, "completion_tokens": 1, "total_tokens": before + 1}}


@contextlib.contextmanager
def serving(fault: Fault = lambda *_: ""):
    """Serve until the block ends."""
    server = Endpoint(fault)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01},
                              daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_GET(self) -> None:
        self._batches(b"")

    def _batches(self, body: bytes) -> None:
        server = self.server
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with server.lock:
            server.keys.add(key)
            server.batches.key = key
            status, data = server.batches.answer(server, self.command, self.path, self.headers,
                                                 body)
        self._send(status, data, {})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if not self.path.endswith("/chat/completions"):
            self._batches(raw)
            return
        body = json.loads(raw)
        prompt = body["messages"][-1]["content"]
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        server = self.server
        with server.lock:
            server.times.append(time.monotonic())
            server.keys.add(key)
            kind = server.fault(prompt, server.asked[prompt])
            server.asked[prompt] += 1
        if server.pause:
            time.sleep(server.pause)
        if kind == "slow":
            time.sleep(server.slow)
            self.connection.close()
            return
        if kind.isdigit():
            # a careless endpoint repeats the key
            value = {"error": {"message": f"request of {key} failed", "code": "no"}}
            more = {"Retry-After": server.after} if kind == "429" else {}
            self._send(int(kind), json.dumps(value).encode(), more)
            return
        if kind == "garbage":
            self._send(200, b"<html>" + key.encode(), {"Content-Type": "text/html"})
            return
        text = {"talk": f"It is hard to say, {key}.", "range": "7"}.get(kind, str(score(prompt)))
        value = completion(body["model"], prompt, text)
        if kind == "shape":
            value["choices"] = []
        data = json.dumps(value).encode()
        if kind == "cut":
            self._send(200, data, {}, len(data) // 2)
            return
        with server.lock:
            if kind != "shape":
                server.sell(prompt)
        self._send(200, data, {})

    def _send(self, status: int, data: bytes, more: dict[str, str], most: int | None = None):
        with contextlib.suppress(OSError):  # the client went away
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **more}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:most])
            if most is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""
