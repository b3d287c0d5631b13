"""An OpenAI-compatible server in small, which counts sums and can be told to die."""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """What was asked, and how the next answers go."""

    url: str = ""
    asked: list[tuple[str, dict[str, Any], str | None]] = field(
        default_factory=list
    )  # path, body, authorization
    dies_after: int | None = None  # good answers; then every connection is cut
    faults: list[int] = field(default_factory=list)  # statuses of the next answers
    held: tuple[int, Path] | None = (
        None  # after so many good answers the others wait until there is such a file
    )
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def fake_server() -> Iterator[Server]:
    """A server that answers `a+b?` rightly where the seed is even, and one too much where it is odd."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            while state.held and len(state.asked) >= state.held[0] and not state.held[1].exists():
                time.sleep(0.01)
            with state.lock:
                if state.dies_after is not None and len(state.asked) >= state.dies_after:
                    self.connection.close()
                    return
                status = state.faults.pop(0) if state.faults else 200
                if status == 200:
                    state.asked.append((self.path, body, self.headers["Authorization"]))
            content = json.dumps(_answer(self.path, body) if status == 200 else {"error": "so"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    asked = body["messages"][-1]["content"] if path.endswith("/chat/completions") else body["prompt"]
    a, b = map(int, re.findall(r"(\d+)\+(\d+)\?", asked)[-1])
    text = f"it is {a + b + body['seed'] % 2}"
    choice: dict[str, Any] = {"finish_reason": "length" if a == 9 else "stop"}
    choice |= {"message": {"content": text}} if "messages" in body else {"text": text}
    return {"choices": [choice], "usage": {"completion_tokens": len(text)}}
