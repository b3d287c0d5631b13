"""An HTTP proxy before one server that hangs, cuts, delays, or answers 500 or garbage, as a test tells it to."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, Self

import httpx

Fault = Literal["hang", "cut", "error", "garbage", "slow"]


class FaultyProxy:
    """Forwards to `upstream`; `faults` maps a path's beginning to what befalls its requests from now on."""

    def __init__(self, upstream: str) -> None:
        self.faults: dict[str, Fault] = {}
        self.seen: list[str] = []  # paths of the requests that a fault befell
        self._upstream = httpx.Client(base_url=upstream, timeout=120)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                fault = proxy.fault_of(self.path)
                if fault == "hang":
                    while proxy.faults:
                        time.sleep(0.05)
                if fault in ("hang", "cut"):
                    self.close_connection = True
                    return
                if fault == "slow":
                    time.sleep(1.0)
                if fault == "error":
                    return self._reply(500, b'{"error": "injected"}')
                if fault == "garbage":
                    return self._reply(200, b'{"meta_info": {"output_token_logprobs": 7}}')
                try:
                    answer = proxy._upstream.request(
                        self.command, self.path, content=body, headers={"content-type": "application/json"}
                    )
                except httpx.HTTPError:
                    self.close_connection = True
                    return
                if proxy.fault_of(self.path) == "cut":  # since the request
                    self.close_connection = True
                    return
                self._reply(answer.status_code, answer.content)

            def _reply(self, status: int, content: bytes) -> None:
                try:
                    self.send_response(status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True

            do_GET = do_POST = _handle

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fault_of(self, path: str) -> Fault | None:
        """What befalls a request of this path now."""
        fault = next((fault for start, fault in self.faults.items() if path.startswith(start)), None)
        if fault is not None:
            self.seen.append(path)
        return fault

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.faults.clear()
        self._server.shutdown()
        self._server.server_close()
        self._upstream.close()
