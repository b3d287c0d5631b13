"""A server of SGLang's calls with a memory and no model: it ends when it is asked for what it has given up, or has already.

Completions follow from the prompt alone, so that two runs sample the same. Every call is a line on standard output.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

COMPLETION = 6
HELD = {"weights", "kv_cache"}
STATE: dict[str, Any] = {"version": "default", "paused": False, "memory": set(HELD)}
LOCK = Lock()


def needs(*parts: str) -> None:
    """What touches memory that is not there ends SGLang's scheduler, and with it the server."""
    if not STATE["memory"].issuperset(parts):
        print(f"misused: {parts} of {STATE['memory']}", flush=True)
        os._exit(1)


def answer(path: str, body: dict[str, Any]) -> Any:
    memory: set[str] = STATE["memory"]
    if path == "/health":
        needs(*HELD)
    elif path == "/generate":
        needs(*HELD)
        return generated(body)
    elif path == "/server_info":
        return {"tp_size": 1}
    elif path == "/model_info":
        return {"weight_version": STATE["version"]}
    elif path in ("/pause_generation", "/continue_generation"):
        STATE["paused"] = path == "/pause_generation"
    elif path == "/update_weights_from_tensor":
        needs("weights")
    elif path == "/update_weight_version":
        STATE["version"] = body["new_version"]
    elif path == "/release_memory_occupation":
        needs(*body["tags"], *([] if STATE["paused"] else ["idleness"]))
        memory -= set(body["tags"])
    elif path == "/resume_memory_occupation":
        needs(*(["room"] if memory & set(body["tags"]) else []))
        memory |= set(body["tags"])
    return {"success": True, "message": "done"}


def generated(body: dict[str, Any]) -> dict[str, Any]:
    ids, wanted = body["input_ids"], body["sampling_params"]["max_new_tokens"]
    meta: dict[str, Any] = {"weight_version": STATE["version"], "finish_reason": {"type": "length"}}
    if wanted == 0:  # to be scored
        return {
            "meta_info": meta
            | {"input_token_logprobs": [[-1.0, t] for t in ids[body["logprob_start_len"] :]]}
        }
    tokens = [3 + (sum(ids) * 7 + 31 * place) % 300 for place in range(min(wanted, COMPLETION))]
    return {"output_ids": tokens, "meta_info": meta | {"output_token_logprobs": [[-1.0, t] for t in tokens]}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else {}
        path = self.path.partition("?")[0]
        with LOCK:
            print(f"asked {path} {body.get('tags', '')}", flush=True)
            content = json.dumps(answer(path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
