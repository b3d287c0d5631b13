"""A model that is not to be had: what is said of a folder that is missing, and of the hub's answers, from one played here."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.hub import read_config

ASK = """
import json, sys
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import read_shape
said = []
for name in sys.argv[1:]:
    try:
        read_shape(name)
    except UserError as error:
        said.append(str(error))
print(json.dumps(said))
"""


class Hub(BaseHTTPRequestHandler):
    """Says of every model what its owner's name says, as the hub does: by status and header."""

    def do_HEAD(self) -> None:
        status, code = (403, "GatedRepo") if self.path.startswith("/gated/") else (401, "RepoNotFound")
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_gated_and_a_missing_model_of_the_hub(hub: str, tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = kept | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", ASK, "gated/model", "nobody/model"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    gated, missing = json.loads(ended.stdout)
    assert gated.startswith("model.path: gated/model: a gated model of the hub: ask for access")
    assert "HF_TOKEN" in gated
    assert missing.startswith("model.path: nobody/model: no such folder here, and no such model on the hub")


@pytest.mark.parametrize("name", ["absent/of/three", "./absent", "../absent", "~/absent", "/absent"])
def test_a_folder_that_is_missing_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=f"^model.path: {name}: no such folder; give a Hugging Face checkpoint"
    ):
        read_config(name)


def test_a_name_that_the_hub_cannot_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests run with HF_HUB_OFFLINE. A folder of the owner's name does not make it a local path."""
    (tmp_path / "nobody").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"nobody/model: no such folder here, .* the hub cannot be reached"):
        read_config("nobody/model")
