"""Suites: the shipped files, local folders in the place of hub names, and what is refused."""

import json
from pathlib import Path

import pytest

from gtpo_megatron.config import RunConfig, SuiteConfig
from gtpo_megatron.config.loading import load_file
from gtpo_megatron.data.prompts import load_questions
from gtpo_megatron.data.suites import SHIPPED, metrics_of, resolve_suites, suites_in_training
from gtpo_megatron.errors import UserError

# the columns of each suite's local copy; the hub's have the first that the suite names
COLUMNS = {
    "gsm8k": {"question": "1+1?", "answer": "one and one\n#### 2"},
    "math500": {"problem": "1+1?", "answer": "2", "unique_id": "a/7"},
    "aime24": {"problem": "1+1?", "answer": 2},
    "aime25": {"problem": "1+1?", "expected_answer": "2"},
    "amc23": {"problem": "1+1?", "answer": 2.0},
    "minerva": {"question": "1+1?", "answer": "2"},
    "olympiadbench": {"question": "1+1?", "final_answer": ["2"]},
}


def run_config(**evaluation: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "model": {"path": "model"},
            "data": {"path": "rows.jsonl", "system_prompt": "be brief", "max_prompt_tokens": 99},
            "training": {"steps": 1},
            "evaluation": evaluation,
        }
    )


def put(folder: Path, name: str, *rows: dict) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_shipped_suite_reads_its_local_copy(tmp_path: Path) -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == set(COLUMNS)
    for name, row in COLUMNS.items():
        assert load_file(SHIPPED / f"{name}.yaml", SuiteConfig).name == name
        put(tmp_path, name, row)
    suites = resolve_suites(run_config(folder=str(tmp_path), samples=4), list(COLUMNS))
    assert [suite.name for suite in suites] == list(COLUMNS)
    for suite in suites:
        (question,) = load_questions(suite.data)
        assert (question.question, question.answer.removesuffix(".0")) == ("1+1?", "2")
        assert question.turns[0] == {"role": "system", "content": "be brief"}  # as the policy was trained
        assert suite.data.max_prompt_tokens == 99 and suite.config.evaluation.samples == 4
    assert load_questions(suites[1].data)[0].id == "a/7"


def test_several_answers_of_olympiadbench_are_left_out_and_a_list_is_no_question(tmp_path: Path) -> None:
    row = COLUMNS["olympiadbench"]
    put(tmp_path, "olympiadbench", row, row | {"final_answer": ["1", "2"]}, row | {"question": ["q"]})
    (suite,) = resolve_suites(run_config(folder=str(tmp_path)), ["olympiadbench"])
    assert len(load_questions(suite.data)) == 1


def test_what_a_suite_says_wins(tmp_path: Path) -> None:
    put(tmp_path, "own", {"q": "1+1?", "a": "2"}, {"q": "2+2?", "a": "4"})
    own = tmp_path / "own.yaml"
    own.write_text(
        f"name: own\npath: {tmp_path / 'own'}\nquestion: [q]\nanswer: [a]\nsamples: 8\ntemperature: 0.6\n"
        "top_p: 0.95\nfew_shot: 1\nsystem_prompt: ''\nseed: 3\n"
    )
    (suite,) = resolve_suites(run_config(samples=2, max_new_tokens=7), [str(own)])
    evaluation = suite.config.evaluation
    assert (evaluation.samples, evaluation.temperature, evaluation.top_p, evaluation.seed) == (
        8,
        0.6,
        0.95,
        3,
    )
    assert evaluation.max_new_tokens == 7
    (question,) = load_questions(suite.data)
    assert [turn["role"] for turn in question.turns] == ["user", "assistant", "user"]
    assert question.text.startswith("1+1?\n<reasoning>") and question.text.endswith("2+2?\n")


@pytest.mark.parametrize(
    ("yaml", "rows", "message"),
    [
        ("answer: [b]", [{"question": "q", "a": "2"}], "none of the columns b for the answer is in its set"),
        ("", [], "has no rows"),
        ("temprature: 1", [{"question": "q", "answer": "2"}], "did you mean temperature?"),
        ("temperature: 0", [{"question": "q", "answer": "2"}], "suite own: .* are all the same"),
    ],
)
def test_mistakes_of_a_suite(tmp_path: Path, yaml: str, rows: list[dict], message: str) -> None:
    put(tmp_path, "own", *rows)
    own = tmp_path / "own.yaml"
    own.write_text(f"name: own\npath: {tmp_path / 'own'}\n{yaml}\n")
    with pytest.raises(UserError, match=message):
        resolve_suites(run_config(samples=2), [str(own)])


def test_the_hubs_refusal_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no such set")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError, match=r"^evaluation\.data\.path: nobody/set .* no such set"):
        resolve_suites(run_config(data={"path": "nobody/set"}))
    with pytest.raises(UserError, match=r"^suite math500: path: HuggingFaceH4/MATH-500 .* no such set"):
        suites_in_training(run_config(suites=["math500"]))


def test_mistakes_of_a_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--suite\): gsm9k: no such suite; known: aime24, .*olympiadbench"):
        resolve_suites(run_config(), ["gsm9k"])
    with pytest.raises(UserError, match="has no folder gsm8k for that suite"):
        resolve_suites(run_config(folder=str(tmp_path)), ["gsm8k"])
    put(tmp_path, "gsm8k", COLUMNS["gsm8k"])
    with pytest.raises(UserError, match="two suites are named gsm8k"):
        resolve_suites(run_config(folder=str(tmp_path)), ["gsm8k", "gsm8k"])
    with pytest.raises(UserError, match=r"evaluation\.data is missing"):
        resolve_suites(run_config())


def test_a_run_is_evaluated_on_its_data_and_its_suites(tmp_path: Path) -> None:
    put(tmp_path, "gsm8k", COLUMNS["gsm8k"])
    put(tmp_path, "aime25", COLUMNS["aime25"])
    data = {"path": "rows.jsonl", "max_prompt_tokens": 64}
    config = run_config(data=data, suites=["aime25", "gsm8k"], folder=str(tmp_path))
    both = suites_in_training(config)
    assert [metrics_of(suite.name) for suite in both] == ["eval/", "eval/aime25/", "eval/gsm8k/"]
    assert [suite.title for suite in both] == ["evaluation.data", "suite aime25", "suite gsm8k"]
    assert both[0].config == config
    assert both[1].data.fields.answer == "expected_answer"  # of the set; without a look the suite's first
    assert suites_in_training(config, look=False)[1].data.fields.answer == "answer"
    assert suites_in_training(run_config()) == []
