"""SGLang's calls by one process on many ports, with completions that are made beforehand: what remains is the client's work.

    python benchmarks/common/scripted_servers.py PORTS TOKENS SECONDS

Prints the ports. Every /generate is answered after SECONDS with the same TOKENS tokens, as SGLang answers it.
"""

import asyncio
import json
import resource
import sys
from typing import Any

from aiohttp import web

SAMPLED = [7 + place % 300 for place in range(100_000)]


class Server:
    """One of them: it knows which weights it was given."""

    def __init__(self, tokens: int, seconds: float) -> None:
        self.version, self.tokens, self.seconds = "default", tokens, seconds
        self.completion = b""

    def render(self) -> None:
        ids = SAMPLED[: self.tokens]
        meta: dict[str, Any] = {"id": "0" * 32, "finish_reason": {"type": "length", "length": self.tokens}}
        meta |= {
            "prompt_tokens": 64,
            "completion_tokens": self.tokens,
            "cached_tokens": 0,
            "e2e_latency": 1.0,
        }
        meta |= {"weight_version": self.version}
        meta["output_token_logprobs"] = [
            [-1.2345678806304932 - place % 7, token, None] for place, token in enumerate(ids)
        ]
        answer = {"text": " word" * self.tokens, "output_ids": ids, "meta_info": meta}
        self.completion = json.dumps(answer).encode()

    async def generate(self, request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(self.seconds)
        return web.Response(body=self.completion, content_type="application/json")

    async def other(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        if request.path == "/update_weight_version":
            self.version = body["new_version"]
            self.render()
        if request.path == "/server_info":
            return web.json_response({"tp_size": 1})
        if request.path == "/model_info":
            return web.json_response({"weight_version": self.version})
        return web.json_response({"success": True, "message": "done"})


async def serve(ports: int, tokens: int, seconds: float) -> None:
    found = []
    for _ in range(ports):
        server = Server(tokens, seconds)
        server.render()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/generate", server.generate)
        app.router.add_route("*", "/{path}", server.other)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        found.append(runner.addresses[0][1])
    print(json.dumps(found), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
