"""A server on loopback that speaks OpenAI's chat completions, with faults on demand.

What it is asked is checked as a strict server would: path, headers, the fields of the request. Each request takes the
next fault of `ChatServer.faults`, `None` for none; when they are used up, every request is answered.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


COMPLETION_FIELDS = {"model", "messages", "temperature", "max_tokens", "max_completion_tokens", "seed", "stop"}


class ChatServer(ThreadingHTTPServer):
    """
    The server; `url` is what a client takes for its base URL.

    Args:
        reply (`Callable[[str], str]`): From the content of the user's message to that of the assistant's.
        faults (`list`): `503` or another status, or a function that is given the request's handler.
        key (`str`): The key that clients must have, if any.
        port (`int`): 0 for any.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, reply: Callable[[str], str] = lambda content: content, faults=(), key=None, port=0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.reply, self.faults, self.key = reply, list(faults), key
        self.asked: Counter[str] = Counter()  # queries, as they came in
        self.answered: Counter[str] = Counter()  # queries to which a good answer went out
        self.bodies: list[dict] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(*args, **kwargs):
    server = ChatServer(*args, **kwargs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            fault = self.server.faults.pop(0) if self.server.faults else None
        try:
            self.answer(body, fault)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def answer(self, body: bytes, fault):
        if self.path != "/v1/chat/completions":
            return self.send(404, {"error": {"message": f"no such path: {self.path}"}})
        if self.server.key is not None and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self.send(401, {"error": {"message": "Incorrect API key provided"}})
        request = json.loads(body)
        unknown = request.keys() - COMPLETION_FIELDS
        if unknown or not isinstance(request.get("model"), str):
            return self.send(400, {"error": {"message": f"Unrecognized request argument: {sorted(unknown)}"}})
        (message,) = request["messages"]
        assert message.keys() == {"role", "content"} and message["role"] == "user"
        query = message["content"]
        with self.server.lock:
            self.server.asked[query] += 1
            self.server.bodies.append(request)
        if isinstance(fault, int):
            return self.send(fault, {"error": {"message": "a fault on demand"}})
        if fault is not None:
            return fault(self)
        self.send(200, self.completion(self.server.reply(query)))
        with self.server.lock:
            self.server.answered[query] += 1
        return None

    def completion(self, content: str | None, finish_reason: str = "stop") -> dict:
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "oracle",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
            ],
            "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
        }

    def send(self, status: int, content: dict | bytes, **headers: str):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


# --- Faults


def hangs(seconds: float):
    """Answers only after a time-out has passed."""

    def fault(handler):
        time.sleep(seconds)
        handler.close_connection = True

    return fault


def hangs_up(handler):
    """Closes the connection without a word."""
    handler.close_connection = True


def cuts_short(handler):
    """Announces more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def sends(content):
    """Sends this as if it were a completion."""
    return lambda handler: handler.send(200, content)


def out_of_room(handler):
    """Thinks until its tokens are used up, and has said nothing."""
    handler.send(200, handler.completion(None, "length"))


def busy(handler):
    """Says when to come back."""
    handler.send(429, {"error": {"message": "Rate limit reached"}}, Retry_After="0.2")
