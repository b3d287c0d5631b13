"""From YAML files and `key.path=value` overrides to a RunConfig, and back; every mistake is named with its place."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError

M = TypeVar("M", bound=BaseModel)
YAML_SUFFIXES = (".yaml", ".yml")
WORDS = ("on", "off", "yes", "no")  # truth values to YAML 1.1, words to people
Origins = dict[str, str]  # dotted key -> where it was last set: "recipe.yaml:12" or "override 'a.b=1'"


@dataclass(frozen=True)
class _Layer:
    """One source of values: a file, or the command line."""

    values: DictConfig
    origins: Origins


def load_config(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Merge YAML files in order, then dotted overrides (`optimizer.lr=2e-6`, `rewards.terms[0].weight=2`), and validate.

    A mapping is merged key by key; a list or a scalar of a later source replaces the earlier one.

    Raises:
        UserError: naming all mistakes at once, each with file and line (or the override), key, value and rule.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    merged, origins = OmegaConf.create({}), Origins()
    for layer in map(_read_file, map(Path, paths)):
        merged = _merge(merged, layer.values, next(iter(layer.origins.values()), ""))
        origins |= layer.origins
    for override in overrides:
        key = _apply_override(merged, override, origins)
        origins = {k: v for k, v in origins.items() if not k.startswith(f"{key}.")}
        origins[key] = f"override '{override}'"
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        place = _place(str(getattr(error, "full_key", "") or "").replace("[", ".").replace("]", ""), origins)
        raise UserError(f"{place}{str(error).splitlines()[0]}") from error
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_report(error, origins, str(paths[0]))) from error


def load_recipe(recipe: str | Path, settings: Sequence[str] = ()) -> RunConfig:
    """`load_config` of a recipe with overlay files and overrides in any order, as a command line has them."""
    overlays = [s for s in settings if "=" not in s and s.endswith(YAML_SUFFIXES)]
    return load_config([recipe, *overlays], [s for s in settings if s not in overlays])


def load_file(path: str | Path, model: type[M]) -> M:
    """One YAML file that is no recipe, as `model`. Raises UserError as `load_config` does."""
    layer = _read_file(Path(path))
    try:
        return model.model_validate(OmegaConf.to_container(layer.values))
    except ValidationError as error:
        raise UserError(_report(error, layer.origins, str(path), model)) from error


def read_recorded(path: str | Path, needed: Sequence[str]) -> dict[str, Any]:
    """The configuration that a run left in its directory, as it stands: another version's keys are let stand.

    Args:
        needed: dotted keys that the caller uses.

    Raises:
        UserError: there is none, it is damaged, or it lacks one of these keys.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; is {path.parent} the directory of a run?")
    content = _parsed(path, _text(path), yaml.safe_load)
    for key in needed:
        value: Any = content
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            raise UserError(f"{path}: it has no {key}, so it is not the configuration of a run, or damaged")
    return content


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration (`to_yaml`); atomic."""
    path = Path(path)
    text = to_yaml(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a configuration; an element of a list is written `terms[]`."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for section, is_list in _sections(field.annotation):
            yield from known_keys(section, f"{prefix}{name}{'[]' if is_list else ''}.")


def nearest_key(key: str, model: type[BaseModel] = RunConfig) -> str | None:
    """The known dotted key most like an unknown one, or None if none is near. Siblings win over strangers."""
    parent, _, leaf = _generic(key).rpartition(".")

    def likeness(candidate: str) -> tuple[float, float]:
        candidate_parent, _, candidate_leaf = candidate.rpartition(".")
        leaf_ratio = SequenceMatcher(None, leaf, candidate_leaf).ratio()
        parent_ratio = SequenceMatcher(None, parent, candidate_parent).ratio()
        return leaf_ratio, leaf_ratio + 0.3 * parent_ratio

    ranked = sorted(((likeness(k), k) for k in known_keys(model)), key=lambda item: -item[0][1])
    return next((k for (leaf_ratio, _), k in ranked if leaf_ratio >= 0.6), None)


def _sections(annotation: Any) -> list[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, False)]
    is_tuple = getattr(annotation, "__origin__", None) is tuple
    return [
        (section, is_tuple or nested) for arg in get_args(annotation) for section, nested in _sections(arg)
    ]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot read the configuration: {reason}") from error


def _parsed(path: Path, text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be a configuration") from None


def _read_file(path: Path) -> _Layer:
    text = _text(path)
    node = _parsed(path, text, lambda text: yaml.compose(text, Loader=yaml.SafeLoader))
    if node is None:
        raise UserError(f"{path}: the file is empty; a recipe needs at least name, model, data and training")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: a recipe is a mapping of sections (key: value)")
    origins, duplicates = Origins(), []
    for key, line, duplicate in _walk(node, ""):
        if duplicate:
            duplicates.append(
                f"{path}:{line}: {_shown(key)} is given twice (first at {origins[key]}); keep one"
            )
        origins.setdefault(key, f"{path}:{line}")
    if duplicates:
        raise UserError("\n".join(duplicates))
    try:
        values = OmegaConf.create(text)  # its YAML reader takes 1e-6 for a number, as YAML 1.2 does
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    _keep_words(values, node)
    return _Layer(values, origins)


def _walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int, bool]]:
    """Yield (dotted key, line, given before in the same mapping) of everything below a node."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            yield key, key_node.start_mark.line + 1, key in seen
            seen.add(key)
            yield from _walk(value_node, f"{key}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{prefix}{index}", item.start_mark.line + 1, False
            yield from _walk(item, f"{prefix}{index}.")


def _keep_words(values: DictConfig, node: yaml.Node, prefix: str = "") -> None:
    """Give keys that hold text what was written, where YAML 1.1 reads `off`, `on`, `no` or `yes` as a truth value."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:bool" and node.value.lower() in WORDS and _holds_text(prefix):
            OmegaConf.update(values, prefix, node.value)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _keep_words(values, value, f"{prefix}.{key.value}".removeprefix("."))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _keep_words(values, item, f"{prefix}.{index}")


def _holds_text(key: str) -> bool:
    """Whether a recipe's dotted key takes text, and no truth value."""
    kind: Any = RunConfig
    for part in key.split("."):
        if part.isdigit():
            kind = next((get_args(a)[0] for a in _alternatives(kind) if get_args(a)), None)
        else:
            sections = [a for a in _alternatives(kind) if hasattr(a, "model_fields")]
            kind = next((s.model_fields[part].annotation for s in sections if part in s.model_fields), None)
    alternatives = _alternatives(kind)
    texts = [a for a in alternatives if a is str or any(isinstance(word, str) for word in get_args(a))]
    return bool(texts) and bool not in alternatives


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union; anything else is its own only one."""
    is_union = get_origin(annotation) in (Union, UnionType)
    return list(get_args(annotation)) if is_union else [annotation]


def _merge(base: DictConfig, layer: DictConfig, place: str) -> DictConfig:
    try:
        return OmegaConf.merge(base, layer)
    except OmegaConfBaseException as error:
        raise UserError(f"{place}: {str(error).splitlines()[0]}") from error


def _apply_override(merged: DictConfig, override: str, origins: Origins) -> str:
    """Set the override's value in place and return its dotted key (list indices as plain numbers)."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(
            f"override '{override}': expected key.path=value, e.g. optimizer.lr=2e-6, or a .yaml file"
        )
    dotted = key.replace("[", ".").replace("]", "")
    try:
        written = OmegaConf.create(f"value: {text}")
        given = yaml.compose(f"value: {text}", Loader=yaml.SafeLoader)
        value = OmegaConf.to_container(written)["value"]  # interpolations stay as they are
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override '{override}': the value is not valid YAML") from error
    try:
        OmegaConf.update(merged, dotted, value, merge=True, force_add=True)
        _keep_words(merged, given.value[0][1], dotted)
    except (OmegaConfBaseException, AssertionError, TypeError, ValueError, IndexError) as error:
        place = _place(dotted, origins).removesuffix(": ")
        where = f" (set at {place})" if place else ""
        rule = (
            "there is no such list entry"
            if OmegaConf.is_list(_innermost(merged, dotted))
            else "not below a section"
        )
        raise UserError(
            f"override '{override}': {rule}{where}; give the whole list, or change the file"
        ) from error
    return dotted


def _innermost(merged: DictConfig, dotted: str) -> Any:
    """The innermost existing container on the way to a key."""
    node: Any = merged
    for part in dotted.split("."):
        if OmegaConf.is_list(node):
            child = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        else:
            child = node.get(part)
        if not OmegaConf.is_config(child):
            break
        node = child
    return node


def _report(error: ValidationError, origins: Origins, recipe: str, model: type[BaseModel] = RunConfig) -> str:
    lines = [_line(detail, origins, recipe, model) for detail in error.errors(include_url=False)]
    return (
        "\n".join(lines)
        if len(lines) == 1
        else "\n  ".join([f"{len(lines)} mistakes in the configuration:", *lines])
    )


def _line(detail: dict[str, Any], origins: Origins, recipe: str, model: type[BaseModel]) -> str:
    key = ".".join(map(str, detail["loc"]))
    place = _place(key, origins) or f"{recipe}: "
    if detail["type"] == "missing":
        return f"{place}{_shown(key)} is missing; it has no default"
    value = _short(detail["input"])
    if detail["type"] == "extra_forbidden":
        near = nearest_key(key, model)
        hint = f"did you mean {near}?" if near else f"known here: {', '.join(_siblings(key, model))}"
        return f"{place}{_shown(key)}: unknown key (value {value}); {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":  # a rule over several keys: it names them itself
        named = {word.strip(":,;") for word in message.split()}
        places = {origins[k]: None for k in sorted(origins) if _shown(k) in named}
        return f"{', '.join(places)}: {message}" if places else f"{place}{message}"
    return f"{place}{_shown(key)}: {value}: {message[0].lower()}{message[1:]}"


def _siblings(key: str, model: type[BaseModel]) -> list[str]:
    parent = _generic(key).rpartition(".")[0]
    return [k.rpartition(".")[2] for k in known_keys(model) if k.rpartition(".")[0] == parent]


def _place(key: str, origins: Origins) -> str:
    """Where a key, something in it, or the nearest section around it was set, followed by ': '; empty if nowhere."""
    inside = next((origin for name, origin in origins.items() if name.startswith(f"{key}.")), None)
    if key not in origins and inside is not None:
        return f"{inside}: "
    while key:
        if key in origins:
            return f"{origins[key]}: "
        key = key.rpartition(".")[0]
    return ""


def _generic(key: str) -> str:
    """rewards.terms.0.weight -> rewards.terms[].weight"""
    return "".join("[]" if part.isdigit() else f".{part}" for part in key.split(".")).removeprefix(".")


def _shown(key: str) -> str:
    """rewards.terms.0.weight -> rewards.terms[0].weight"""
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in key.split(".")).removeprefix(".")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
