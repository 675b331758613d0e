"""A server that speaks the wire of `lechat serve` and answers what a test has written for it."""

import base64
import hashlib
import json
import queue
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lechat_jax

PAGE = Path(lechat_jax.__file__).parent / "serve" / "page.html"
HOLD = object()  # in an answer: only pings come, until `FakeServer.go_on` is set


def hash_of(html: str, element: str) -> str:
    """The source of a policy that allows the one `<element>` of a page, and nothing changed."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def policy_of(html: str) -> str:
    """The Content-Security-Policy that a page is served with."""
    return (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        f"script-src {hash_of(html, 'script')}; style-src {hash_of(html, 'style')}"
    )


def event(**fields: Any) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(fields)}\n\n".encode()


@dataclass(frozen=True)
class Answer:
    """What a request gets: texts become events, bytes go out as they are, `HOLD` waits."""

    steps: tuple[Any, ...]
    finish: str
    pause: float
    ends: bool


@dataclass(frozen=True)
class Failure:
    """An answer of HTTP that is no stream."""

    status: int
    body: str


class FakeServer:
    """Serves the page and answers each request for a completion with the next that was written.

    Attributes:
        bodies: what was asked for, in order.
        key: what a request must bear, if anything.
        model: the name of its model.
        sees: whether it has a vision tower.
        left: set once somebody has gone away while an answer was held.
        go_on: ends the `HOLD` of an answer.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.key: str | None = None
        self.model = "mistral-tiny"
        self.sees = False
        self.left = threading.Event()
        self.go_on = threading.Event()
        self.answers: queue.SimpleQueue[Answer | Failure] = queue.SimpleQueue()
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listens, at the same address each time."""
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        """Is gone: whoever connects is refused."""
        self.go_on.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def will_answer(
        self, *steps: Any, finish: str = "stop", pause: float = 0, ends: bool = True
    ) -> None:
        """Writes the next answer: a text is a token, and each takes `pause` seconds."""
        self.go_on.clear()
        self.answers.put(Answer(steps, finish, pause, ends))

    def will_fail(self, status: int, message: str) -> None:
        """Writes the next answer: an error in the form of OpenAI's."""
        self.answers.put(Failure(status, error_body(message)))

    def will_fail_with_html(self, status: int) -> None:
        """Writes the next answer: an error of some proxy on the way."""
        self.answers.put(Failure(status, "<h1>Bad Gateway</h1>"))


def error_body(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "error", "param": None, "code": None}})


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            html = PAGE.read_text(encoding="utf-8")
            self.send(200, "text/html; charset=utf-8", html, policy_of(html))
        elif self.path == "/v1/models" and self.may_come_in():
            can = {"completion_chat": True, "vision": self.fake.sees}
            model = {"id": self.fake.model, "object": "model", "capabilities": can}
            models = {"object": "list", "data": [model]}
            self.send(200, "application/json", json.dumps(models))
        elif self.path != "/v1/models":
            self.send(404, "application/json", error_body("not found"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions" or not self.may_come_in():
            return
        self.fake.bodies.append(body)
        answer = self.fake.answers.get(timeout=5)
        if isinstance(answer, Failure):
            self.send(answer.status, "application/json", answer.body)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.fake.left.set()

    def may_come_in(self) -> bool:
        if self.fake.key is None or self.headers["Authorization"] == f"Bearer {self.fake.key}":
            return True
        self.send(401, "application/json", error_body("This server needs its key."))
        return False

    def stream(self, answer: Answer) -> None:
        self.write_delta({"role": "assistant", "content": ""})
        for step in answer.steps:
            if step is HOLD:
                while not self.fake.go_on.wait(0.02):
                    self.wfile.write(b": ping\n\n")
            elif isinstance(step, bytes):
                self.wfile.write(step)
            else:
                self.write_delta({"content": step})
            time.sleep(answer.pause)
        if answer.ends:
            tokens = sum(isinstance(step, str) for step in answer.steps)
            self.write_delta({}, answer.finish)
            self.wfile.write(event(choices=[], usage={"completion_tokens": tokens}))
            self.wfile.write(b"data: [DONE]\n\n")

    def write_delta(self, delta: dict[str, str], finish: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        self.wfile.write(event(choices=[choice], usage=None))

    def send(self, status: int, kind: str, body: str, policy: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode())))
        if policy is not None:
            self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(body.encode())
