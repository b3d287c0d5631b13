"""Loading: merging, overrides, places of mistakes, nearest keys, round trips."""

from pathlib import Path

import pytest

from gtpo_megatron.config import AlgorithmConfig, RunConfig
from gtpo_megatron.config.loading import known_keys, load_config, nearest_key, read_recorded, save_config
from gtpo_megatron.errors import UserError

RECIPE = """\
name: trial
model:
  path: some/model
data: {path: rows.jsonl}
training:
  steps: 3
rewards:
  terms:
  - kind: format
    weight: 0.5
  - kind: math_verify
optimizer:
  lr: 1e-6
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def error_of(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    return str(caught.value)


def test_yaml_1_2_floats_are_numbers(recipe: Path) -> None:
    assert load_config(recipe).optimizer.lr == 1e-6


def test_words_that_yaml_takes_for_truth_values_stay_words_where_text_is_due(recipe: Path) -> None:
    with recipe.open("a") as file:
        file.write("algorithm:\n  gate: {mode: off}\n  importance:\n    level: Off\n")
    with pytest.raises(UserError, match="'Off'"):  # what was written, not `False`
        load_config(recipe)
    overrides = ["algorithm.importance={level: off}", "training.deterministic=off", "name=no"]
    config = load_config(recipe, [*overrides, "rollout.sglang.args=[--flag, on]"])
    assert config.algorithm.gate.mode == config.algorithm.importance.level == "off"
    assert config.training.deterministic is False
    assert (config.name, config.rollout.sglang.args) == ("no", ("--flag", "on"))
    assert load_config(recipe, [*overrides, "algorithm.gate.mode=off"]).algorithm.gate.mode == "off"
    assert "algorithm.gate.mode: False" in error_of(recipe, *overrides, "algorithm.gate.mode=false")


def test_overrides_are_typed_as_yaml(recipe: Path) -> None:
    config = load_config(
        recipe,
        [
            "optimizer.lr=2e-5",
            "training.deterministic=false",
            "rollout.sglang.urls=[http://a:1, http://b:2]",
            "data.system_prompt=''",
            "evaluation.data={path: test.jsonl}",
            "model.tokenizer=null",
            "rewards.terms[1].weight=2",
        ],
    )
    assert config.optimizer.lr == 2e-5
    assert config.training.deterministic is False
    assert config.rollout.sglang.urls == ("http://a:1", "http://b:2")
    assert config.data.system_prompt == ""
    assert config.evaluation.data is not None and config.evaluation.data.path == "test.jsonl"
    assert config.model.tokenizer is None
    assert [term.weight for term in config.rewards.terms] == [0.5, 2.0]


def test_the_name_of_an_fp8_format_stands_for_the_section(recipe: Path, tmp_path: Path) -> None:
    short = load_config(recipe, ["model.fp8=hybrid"])
    assert short == load_config(recipe, ["model.fp8.format=hybrid"])
    assert (short.model.fp8.format, short.model.fp8.recipe) == ("hybrid", "tensorwise")
    overlay = tmp_path / "fp8.yaml"
    overlay.write_text("model: {fp8: {format: e4m3, recipe: blockwise, param: true}}\n")
    assert load_config([recipe, overlay]).model.fp8.recipe == "blockwise"
    assert load_config([recipe, overlay], ["model.fp8=none"]).model.fp8 == load_config(recipe).model.fp8
    assert "model.fp8.format: 'e5m2'" in error_of(recipe, "model.fp8=e5m2")


def test_the_last_override_wins(recipe: Path) -> None:
    assert load_config(recipe, ["training.seed=1", "training.seed=2"]).training.seed == 2


def test_overlays_merge_mappings_and_replace_lists(recipe: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "site.yaml", tmp_path / "more.yaml"
    first.write_text("training: {seed: 7}\nrewards: {terms: [{kind: paper_format}]}\n")
    second.write_text("training: {seed: 8}\n")
    config = load_config([recipe, first, second], ["optimizer.lr=1e-3"])
    assert (config.training.steps, config.training.seed) == (3, 8)
    assert [term.kind for term in config.rewards.terms] == ["paper_format"]
    assert config.rewards.workers == RunConfig.model_fields["rewards"].default.workers


def test_a_mistake_in_an_overlay_names_the_overlay(recipe: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "site.yaml"
    overlay.write_text("training:\n  seed: 1\n  stepss: 5\n")
    with pytest.raises(
        UserError, match=r"site\.yaml:3: training\.stepss: unknown key \(value 5\).*training\.steps\?"
    ):
        load_config([recipe, overlay])


def test_unknown_key_in_a_file_names_line_value_and_nearest_key(recipe: Path) -> None:
    recipe.write_text(f"{RECIPE}rollout:\n  temperature: 1.0\n  grup_size: 4\n")
    message = error_of(recipe)
    assert (
        f"{recipe}:16: rollout.grup_size: unknown key (value 4); did you mean rollout.group_size?" in message
    )


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("trainig", "training"),
        ("training.step", "training.steps"),
        ("training.lr", "optimizer.lr"),
        ("rollout.tempreature", "rollout.temperature"),
        ("rewards.terms.0.wieght", "rewards.terms[].weight"),
        ("paralel.tensor", "parallel.tensor"),
        ("rollout.sglang.url", "rollout.sglang.urls"),
        ("qqqqqq", None),
    ],
)
def test_nearest_key(unknown: str, nearest: str | None) -> None:
    assert nearest_key(unknown) == nearest


def test_known_keys_reach_into_lists_and_optional_sections() -> None:
    keys = set(known_keys())
    assert {
        "rewards.terms[].kind",
        "evaluation.data.fields.answer",
        "rollout.dynamic_sampling.enabled",
    } <= keys


def test_unknown_key_without_a_near_one_lists_the_section(recipe: Path) -> None:
    assert "known here: steps, micro_batch_tokens" in error_of(recipe, "training.qqqqqq=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps=many", "training.steps: 'many': input should be a valid integer"),
        ("training.steps=0", "training.steps: 0: input should be greater than or equal to 1"),
        ("rollout.group_size=1", "rollout.group_size: 1: input should be greater than or equal to 2"),
        ("model.dtype=fp16", "model.dtype: 'fp16': input should be 'bf16' or 'fp32'"),
        ("training=5", "training: 5: input should be a valid dictionary"),
        ("rollout.sglang.urls=http://a", "rollout.sglang.urls: 'http://a': input should be a valid tuple"),
        ("name=a/b", "name: 'a/b': string should match pattern"),
        ("optimizer.lr=", "optimizer.lr: None: input should be a valid number"),
    ],
)
def test_wrong_value_names_key_value_and_rule(recipe: Path, override: str, expected: str) -> None:
    assert error_of(recipe, override).startswith(f"override '{override}': {expected}")


def test_wrong_type_in_a_file_names_its_line(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("weight: 0.5", "weight: heavy"))
    assert f"{recipe}:10: rewards.terms[0].weight: 'heavy': input should be a valid number" in error_of(
        recipe
    )


def test_all_mistakes_are_named_at_once(recipe: Path) -> None:
    message = error_of(recipe, "training.steps=x", "zzz=1", "rollout.group_size=1")
    assert message.startswith("3 mistakes in the configuration:")
    assert all(part in message for part in ("training.steps", "zzz", "rollout.group_size"))


def test_a_rule_over_two_keys_names_where_both_were_set(recipe: Path) -> None:
    recipe.write_text(f"{RECIPE}parallel:\n  sequence: true\n")
    message = error_of(recipe, "parallel.tensor=1")
    assert f"{recipe}:15" in message and "override 'parallel.tensor=1'" in message
    assert "parallel.sequence: true needs parallel.tensor > 1" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline needs parallel.pipeline > 1"),
        (["algorithm.kl_beta=0.1"], "algorithm.kl_beta is a term of GRPO"),
        (["algorithm.name=grpo", "algorithm.compat=reference"], "algorithm.compat: reference goes with"),
        (["rewards.terms=[{kind: python}]"], "rewards.terms[].function goes with kind: python"),
    ],
)
def test_impossible_combinations(recipe: Path, overrides: list[str], expected: str) -> None:
    assert expected in error_of(recipe, *overrides)


def test_missing_section(recipe: Path) -> None:
    recipe.write_text("name: trial\ntraining: {steps: 1}\n")
    message = error_of(recipe)
    assert f"{recipe}: model is missing; it has no default" in message
    assert f"{recipe}: data is missing" in message


@pytest.mark.parametrize(
    ("text", "line", "rule"),
    [
        ("name: a\n\tmodel: b\n", 2, "not valid YAML"),
        ("name: a\nmodel: [\n", 3, "not valid YAML"),
        ("- a\n- b\n", 1, "a recipe is a mapping"),
        ("name: a\ntraining:\n  seed: 1\n  steps: 2\n  seed: 3\n", 5, "training.seed is given twice"),
        ("name: ${nowhere}\n", 1, "Interpolation key 'nowhere' not found"),
    ],
)
def test_broken_files_name_the_line(tmp_path: Path, text: str, line: int, rule: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert error_of(path).startswith(f"{path}:{line}: ") and rule in error_of(path)


def test_empty_missing_and_binary_files(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.yaml", tmp_path / "binary.yaml"
    empty.write_text("# nothing\n")
    binary.write_bytes(b"\xff\xfe\x00")
    assert "the file is empty" in error_of(empty)
    assert "not UTF-8" in error_of(binary)
    assert "No such file" in error_of(tmp_path / "absent.yaml")
    assert "Is a directory" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("training.steps", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("training={steps", "not valid YAML"),
        ("rewards.terms[5].weight=1", "there is no such list entry"),
        ("rewards.terms[x].weight=1", "there is no such list entry"),
    ],
)
def test_malformed_overrides(recipe: Path, override: str, rule: str) -> None:
    message = error_of(recipe, override)
    assert message.startswith(f"override '{override}'") and rule in message


def test_saved_configuration_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load_config(
        recipe,
        [
            "rewards.terms=[{kind: python, function: 'a.b:c', options: {x: [1, 2.5, null], y: {z: é}}}]",
            "rollout.sglang.urls=[http://a:1]",
            "optimizer.lr=3e-7",
            "data.system_prompt='line one\n  line: two'",
        ],
    )
    saved = tmp_path / "new" / "config.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    assert [path.name for path in saved.parent.iterdir()] == ["config.yaml"]


def test_a_failed_save_leaves_the_old_file(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, saved = load_config(recipe), tmp_path / "run" / "config.yaml"
    save_config(config, saved)
    before = saved.read_text()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_config(load_config(recipe, ["training.seed=9"]), saved)
    assert saved.read_text() == before
    assert [path.name for path in saved.parent.iterdir()] == ["config.yaml"]


def test_the_configuration_is_frozen(recipe: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(recipe).training.steps = 5


@pytest.mark.parametrize(
    "override",
    [
        "rewards.terms[0].weight=.inf",
        "rewards.terms[0].weight=.nan",
        "rollout.temperature=1e-300",
        "rollout.temperature=.inf",
        "optimizer.eps=.inf",
        "optimizer.lr=.inf",
        "algorithm.gamma=.inf",
        "training.seed=18446744073709551616",
        "rewards.timeout_s=.inf",
        "training.steps=1000000000000",
        "rewards.workers=1000000",
        "rewards.terms[0].options.tolerance=.nan",
        "rewards.terms[0].options.list=[1,[.inf]]",
        "rollout.sglang.request_timeout_s=.inf",
    ],
)
def test_nonsense_is_refused_by_name(recipe: Path, override: str) -> None:
    key = override.partition("=")[0]
    assert key.partition(".options.")[0] in error_of(recipe, override)


@pytest.mark.parametrize(
    ("algorithm", "advantages"),
    [
        ({}, "mean"),
        ({"name": "grpo"}, "std"),
        ({"name": "grpo", "normalize": "mean"}, "mean"),
        ({"normalize": "std"}, "std"),
    ],
)
def test_advantages_are_the_objectives_own_unless_told(algorithm: dict[str, str], advantages: str) -> None:
    assert AlgorithmConfig(**algorithm).advantages == advantages


def test_what_a_run_left_is_read_as_it_stands_or_refused_by_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: old\nof_another_version: 1\ntraining: {steps: 3}\n")
    assert read_recorded(path, ["name", "training.steps"])["of_another_version"] == 1
    for content, message in (
        ("", "it has no name"),
        ("17\n", "it has no name"),
        ("name: [\n", "not valid YAML"),
        ("[" * 20_000, "nested too deeply"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=f"config.yaml.*: .*{message}"):
            read_recorded(path, ["name"])
    path.write_bytes(b"\xff\xfename: x\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_recorded(path, ["name"])


def test_a_recipe_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("[" * 20_000)
    with pytest.raises(UserError, match=r"recipe\.yaml: nested too deeply"):
        load_config(path)
