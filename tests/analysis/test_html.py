"""The page: self-contained, hostile text stays text, and in a browser, where there is one, it works."""

import base64
import gzip
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gtpo_megatron.analysis import html
from gtpo_megatron.analysis.analyse import analyse
from gtpo_megatron.commands.cli import main
from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.analysis import dumps
from tests.tiny_models import tiny_tokenizer
from tests.trajectories.test_store import trajectory

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
CHROMIUM = shutil.which("chromium")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --virtual-time-budget=5000"


class Scripts(HTMLParser):
    """What the elements of a page are, and what stands in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [value for name in ("src", "href") if (value := values.get(name))]
        self._script = values.get("id") or "program" if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def part(self, number: int) -> dict[str, Any]:
        return json.loads(gzip.decompress(base64.b64decode(self.scripts[f"part-{number}"])))


def hostile_dump(folder: Path) -> tuple[Path, Path]:
    """A dump of verl whose prompts, completions and reward's name are hostile, and a tokenizer."""
    rows = [
        {"input": HOSTILE, "output": f"{HOSTILE} {answer}", "score": score, "step": 1, HOSTILE: score}
        for answer, score in (("yes", 1.0), ("no", 0.0))
    ]
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return dumps.write_jsonl(folder / "dump" / "1.jsonl", rows), folder / "tokenizer"


def page_of(folder: Path) -> Path:
    dump, tokenizer = hostile_dump(folder)
    analyse([dump], tokenizer=tokenizer, html=folder / "page.html")
    return folder / "page.html"


def test_page_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    page = Scripts(page_of(tmp_path).read_text(encoding="utf-8"))
    assert page.tags.count("script") == 3  # figures, one part, the program
    assert "img" not in page.tags
    assert page.links == []
    assert "http" not in re.sub(r'"http://www.w3.org/2000/svg"', "", page.scripts["program"])
    summary = json.loads(page.scripts["summary"])
    assert summary["figures"]["completions"] == 2
    group = page.part(0)["groups"][0]
    assert group["prompt"] == HOSTILE
    strings = page.part(0)["v"]
    assert "".join(strings[str(token)] for token in group["c"][0]["t"]) == f"{HOSTILE} yes"


def test_page_says_what_the_analysis_found(tmp_path: Path) -> None:
    analyse([dumps.ours(tmp_path / "run")], html=tmp_path / "page.html")
    part = Scripts((tmp_path / "page.html").read_text(encoding="utf-8")).part(0)
    assert part["v"] == {}  # no tokenizer: ids are shown
    first = part["groups"][0]["c"]
    assert [(c["p"], c["s"], c["n"], c["t"]) for c in first[:2]] == [
        (2, 1, 4, [11, 12, 13, 2]),
        (2, 1, 5, [11, 12, 14, 15, 2]),
    ]
    assert first[0]["lp"] == [-50] * 4


def test_long_completions_are_shown_by_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "WHOLE_TOKENS", 0)
    monkeypatch.setattr(html, "END_TOKENS", 1)
    monkeypatch.setattr(html, "PART_COMPLETIONS", 3)
    analyse([dumps.ours(tmp_path / "run")], html=tmp_path / "page.html")
    page = Scripts((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [p["groups"] for p in json.loads(page.scripts["summary"])["parts"]] == [1, 1]
    assert [c["t"] for c in page.part(0)["groups"][0]["c"]] == [[11, 2], [11, 2], [11, 2]]
    assert page.part(1)["groups"][0]["c"][0]["t"] == [30, 31]


def test_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        analyse([dumps.ours(tmp_path / "run")], html=tmp_path / "nowhere" / "page.html")


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here (tools/setup_browser.sh): the page's program is only read"
)
@pytest.mark.parametrize("width", [360, 1280])
def test_page_in_a_browser(tmp_path: Path, width: int) -> None:
    page = page_of(tmp_path)
    # The body is narrowed, as a headless window is never narrower than 500 pixels.
    text = page.read_text(encoding="utf-8").replace("<body>", f'<body style="width:{width}px">')
    probe = (
        "<script>setTimeout(() => { const wide = Math.max(...[...document.querySelectorAll('header,main')].map("
        "node => node.scrollWidth)); document.body.dataset.wide = wide; }, 1500)</script></body>"
    )
    page.write_text(text.replace("</body>", probe), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shown = Scripts(done.stdout)
    assert "img" not in shown.tags
    assert "<title>Trajectories: 1.jsonl</title>" in done.stdout
    body = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert (
        body.count('class="protected"') == body.count('class="amplified"') > 10
    )  # the hostile text, in both completions
    assert "&lt;img src=x onerror=" in body  # the prompt, as text
    assert int(re.search(r'data-wide="(\d+)"', done.stdout)[1]) <= width


def run_with_a_spike(folder: Path, scale: float, spike: int = 9) -> Path:
    """Twelve steps of one group, whose gradient norm stands out once; the fourth completion is behind it."""
    store = TrajectoryStore(folder / "trajectories")
    for step in range(12):
        advantages = [0.1, -0.1, 0.1, 3.0 if step == spike else -0.1]
        batch = [
            trajectory(
                step=step,
                index=index,
                token_ids=np.array([5 + index, 6, 7], np.int32),
                logprobs=np.full(3, -scale, np.float32),
                advantage=advantage,
                reward=advantage,
            )
            for index, advantage in enumerate(advantages)
        ]
        store.write(step, batch)
    rows = [
        {"step": step + 1, "time": 0.0, "loss": 0.1, "grad_norm": 50.0 if step == spike else 1.0 + step % 3}
        for step in range(12)
    ]
    dumps.write_jsonl(folder / "metrics.jsonl", rows)
    return folder


def test_two_runs_on_one_page(tmp_path: Path) -> None:
    ours, other = run_with_a_spike(tmp_path / "ours", 0.5), run_with_a_spike(tmp_path / "other", 1.5)
    figures = analyse([ours], html=tmp_path / "page.html", against=other)
    assert figures["completions"] == 48  # of the first alone
    assert figures["by_step"][9]["metrics"]["grad_norm"] == 50.0
    page = Scripts((tmp_path / "page.html").read_text(encoding="utf-8"))
    summary = json.loads(page.scripts["summary"])
    assert summary["other"]["title"] == "other" and len(summary["other"]["by_step"]) == 12
    assert [p.get("side", 0) for p in summary["parts"]] == [0] * 12 + [1] * 12
    key = page.part(3)["groups"][0]["key"]
    assert key and [p["keys"] for p in summary["parts"][12:]] == [[key]] * 12
    assert page.part(3)["groups"][0]["c"][0]["lp"] == [-50] * 3
    assert page.part(15)["groups"][0]["c"][0]["lp"] == [-150] * 3


def test_against_needs_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = str(dumps.ours(tmp_path / "run"))
    with pytest.raises(SystemExit) as ended:
        main(["analyse", run_dir, "--against", run_dir])
    assert ended.value.code == 2 and "add --html FILE" in capsys.readouterr().err


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here (tools/setup_browser.sh): the page's program is only read"
)
def test_a_spike_leads_to_the_completion_behind_it(tmp_path: Path) -> None:
    ours, other = run_with_a_spike(tmp_path / "ours", 0.5), run_with_a_spike(tmp_path / "other", 1.5, spike=2)
    page = tmp_path / "page.html"
    analyse([ours], html=page, against=other)
    click = """<script>setTimeout(() => {
      const spike = [...document.querySelectorAll("#spikes button")].find(b => b.textContent.includes("gradient norm"));
      document.body.dataset.spike = spike.textContent; spike.click();
      const colour = document.getElementById("colour"); colour.value = "entropy";
      setTimeout(() => colour.dispatchEvent(new Event("change")), 1000);
    }, 1000)</script></body>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", click), encoding="utf-8")
    flags = [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    body = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert 'data-spike="step 9: gradient norm 50, 2.500 around it"' in body
    outlined = re.findall(r'class="completion behind"><div class="facts"><b>#(\d)</b>', body)
    assert outlined == ["3"]
    beside = body[body.index('id="beside"') :]
    assert "other: step 9, group 0, 4 completions" in beside and beside.count('class="facts"') == 4
    assert "entropy is not known of these completions" in body  # and not shown as if it were low
