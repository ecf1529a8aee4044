"""Options: strict, immutable models filled from a YAML file and dotted overrides, with errors that help.

Every module owns the options that it needs, as a subclass of `Options`; this one knows none of them.

    class MaskOptions(Options):
        shape: Literal["uniform", "cluster"] = "uniform"
        ratio: float = Field(0.75, gt=0, lt=1)

    load(MaskOptions, Path("mask.yaml"), ["ratio=0.8"])

A union of models is told apart by a field called `name`, a `Literal`: `Annotated[A | B, Field(discriminator="name")]`;
where the name may be left out, by a function: `Annotated[Annotated[A, Tag("a")] | ..., Discriminator(function)]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml  # type: ignore[import-untyped, unused-ignore]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigIndexError, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails


class UserError(Exception):
    """A mistake of the user's, told in one line."""


class Options(BaseModel):
    """Base of all options: unknown keys, loose types and changes are refused. Use tuples, not lists, for sequences."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()  # keys of which one is given: an override replaces another


T = TypeVar("T", bound=Options)
Location = tuple[str | int, ...]  # where pydantic found an error: keys, list indices, and `name`s of union members

_COMMAND_LINE = "command line"
_KEY = re.compile(r"\w[\w-]*(\.\w[\w-]*)*")  # no index below 0: OmegaConf would empty the item first
_RESOLVER = re.compile(r"\$\{(?![\w.]+\})[^}]*\}?")  # any interpolation but ${a.key}
_WANTED = {
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "string_type": "should be text",
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping",
}


def load(
    model: type[T], file: Path | None, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> T:
    """Fill `model` from `defaults`, then a YAML file, then overrides such as `phases.0.epochs=5`.

    The file merges with the defaults key by key; an override replaces what stands at its key, so
    `objective={name: ssast}` drops the options of the objective before it, and `phases.0.steps=5` the file's epochs.

    Raises:
        UserError: one line with the source (the file, or "command line"), the key, what is wrong and what would do.
    """
    alternatives = [(key, group) for _, key, below in _models(model) for group in below.alternatives]
    data = merge(file, overrides, defaults, alternatives)
    if problems := _problems(model, data):
        key, problem = next(iter(problems.items()))
        from_file = merge(file, (), defaults, resolve=False)
        is_files = file and (not overrides or _problems(model, from_file).get(key) == problem)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{file if is_files else _COMMAND_LINE}: {problem}{more}")
    return model.model_validate_json(_json(data))  # in JSON's strict mode a list does for a tuple, text for a path


def merge(
    file: Path | None, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None,
    alternatives: Sequence[tuple[str, tuple[str, ...]]] = (), *, resolve: bool = True,
) -> dict[str, Any]:
    """What `load` fills a model with: the sources put together, whatever the model makes of it.

    Raises:
        UserError: as `load`, but for what a model says.
    """
    config = OmegaConf.create(dict(defaults or {}))
    try:
        if file:
            config.merge_with(_read(file))
        for override in overrides:
            _assign(config, override)
            _drop_alternatives(config, override, overrides, alternatives)
        merged: Any = OmegaConf.to_container(config, resolve=resolve)
    except OmegaConfBaseException as error:  # a ${reference} that leads nowhere
        source = file if file and not any("${" in override for override in overrides) else _COMMAND_LINE
        raise UserError(f"{source}: {error.full_key}: {_brief(error)}") from None
    return dict(merged)


def dump(options: Options) -> str:
    """YAML text that loads back to an equal object (if no text in it holds `${` or one of Unicode's rare line breaks,
    U+0085, U+2028 and U+2029, which PyYAML reads as newlines)."""
    return OmegaConf.to_yaml(OmegaConf.create(options.model_dump(mode="json")))


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """The dotted keys at which two options (or what YAML holds of them) differ, with both values; "-" stands for a key
    that one does not have."""
    left, right = (dict(flatten(o.model_dump(mode="json") if isinstance(o, Options) else o)) for o in (a, b))
    pairs = ((key, left.get(key, "-"), right.get(key, "-")) for key in left | right)
    return [(key, old, new) for key, old, new in pairs if old != new]


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a list is one value unless it holds mappings."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = dict(enumerate(value)).items()
    else:
        yield key, value
        return
    for name, below in items:
        yield from flatten(below, f"{key}.{name}" if key else str(name))


def find_config(name: str, command: str) -> Path:
    """The config file called `name`: a path, or a shipped config, with or without `configs/`, `command/` and `.yaml`.

    Raises:
        UserError: there is none; names the nearest.
    """
    if Path(name).is_file():
        return Path(name)
    package = Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")  # in a wheel, in a checkout
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    shipped = {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}

    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    for candidate in (wanted, f"{command}/{wanted}"):
        if candidate in shipped:
            return shipped[candidate]
    full_names = {key.rpartition("/")[2]: key for key in shipped} | {key: key for key in shipped}
    near = [full_names[match] for match in get_close_matches(wanted, full_names, n=1)]
    raise UserError(f"{_COMMAND_LINE}: no config {name!r}{_hint(near, shipped)}")


def _read(file: Path) -> DictConfig:
    try:
        config = OmegaConf.load(file)  # reads 3e-4 as a number; PyYAML alone makes it text
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or 'should hold a mapping of keys to values'}") from None
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{file}: {_brief(error)}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{file}: should hold a mapping of keys to values")
    _refuse_resolvers(str(file), _json(OmegaConf.to_container(config)))
    return config


def _assign(config: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise UserError(f"{_COMMAND_LINE}: {override!r} should be KEY=VALUE, such as optim.lr=1e-3")
    _refuse_resolvers(_COMMAND_LINE, override)
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])._get_node("value")
        OmegaConf.update(config, key, value, merge=False)
    except (ConfigIndexError, TypeError, ValueError):
        raise UserError(f"{_COMMAND_LINE}: {key}: no such item in the list; the first is 0") from None
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        hint = f"text with signs needs quotes: {key}=\"'...'\""
        raise UserError(f"{_COMMAND_LINE}: {key}: {_brief(error)}; {hint}") from None


def _drop_alternatives(
    config: DictConfig, override: str, overrides: Sequence[str], groups: Iterable[tuple[str, tuple[str, ...]]]
) -> None:
    """An override takes the place of its alternatives, unless these are overrides too: then both stand, and collide."""
    parent, _, name = override.partition("=")[0].rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig) or node._get_node(name)._is_none():  # type: ignore[union-attr]
        return
    generic = re.sub(r"\.\d+(?=\.|$)", ".0", parent)
    for other in {other for place, group in groups if place == generic and name in group for other in group} - {name}:
        if not any(given.startswith(f"{parent}.{other}=".lstrip(".")) for given in overrides):
            node.pop(other, None)


def _refuse_resolvers(source: str, text: str) -> None:
    """Configs are passed around, and a resolver such as `oc.env` could copy secrets into what a run records."""
    if found := _RESOLVER.search(text):
        raise UserError(f"{source}: {found[0]} is refused; only plain references such as ${{data.root}} are allowed")


def _problems(model: type[Options], data: Any) -> dict[str, str]:
    """What is wrong with `data`: dotted key -> a sentence that starts with it. Empty if the data are valid."""
    try:
        model.model_validate_json(_json(data))
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
    else:
        return {}
    errors.sort(key=lambda error: error["type"] != "extra_forbidden")  # a misspelt key is why another one is missing
    known = [
        ((*place, name), f"{key}.{name}".lstrip("."))
        for place, key, below in _models(model) for name in below.model_fields
    ]
    problems: dict[str, str] = {}
    for error in errors:
        key, problem = _explain(error, data, known)
        if key in problems:  # pydantic reports every member of a union such as `float | Literal["auto"]`
            problem = f"{problems[key]} or {problem.rpartition(' should be ')[2]}"
        problems[key] = problem
    return problems


def _explain(error: ErrorDetails, data: Any, known: list[tuple[Location, str]]) -> tuple[str, str]:
    """The dotted key of an error of pydantic's, and the sentence for it."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    place = tuple(0 if isinstance(part, int) else part for part in error["loc"])
    key = _dotted(error["loc"], data, missing=kind == "missing")
    shown = "" if isinstance(value, dict) else f" is {_json(value)[:80]}"
    match kind:
        case "extra_forbidden":
            return key, f"{key}: unknown key{_similar_key(place, key, known)}"
        case "missing":
            return key, f"{key} must be given"
        case "union_tag_not_found":
            names = [str(where[-2]) for where, _ in known if where[:-2] == place and where[-1] == "name"]
            return f"{key}.name", f"{key}.name must be given{_hint([], names)}"
        case "union_tag_invalid":
            names = re.findall(r"'(.*?)'", context["expected_tags"])
            return f"{key}.name", f"{key}.name is {context['tag']!r}{_hint(_near(context['tag'], names), names)}"
        case "value_error":
            return key, f"{key}{shown}: {context['error']}".removeprefix(": ")
        case "literal_error":
            hint = _hint(_near(str(value), re.findall(r"'(.*?)'", context["expected"])), [])
        case _:
            hint = ""
    wanted = _WANTED.get(kind) or re.sub("^.*? (?=should )", "", error["msg"])
    return key, f"{key or 'the whole'}{shown and shown + ' but'} {wanted}{hint}"


def _models(annotation: Any, place: Location = (), key: str = "") -> Iterator[tuple[Location, str, type[Options]]]:
    """Every model in a type: where pydantic locates it (with 0 for any index), and its key as a user writes it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _models(arguments[0], place, key)
    elif origin in (list, tuple) and arguments:
        yield from _models(arguments[0], (*place, 0), f"{key}.0")
    elif origin in (Union, UnionType):
        members = [get_args(member)[0] if get_origin(member) is Annotated else member for member in arguments]
        models = [member for member in members if _is_options(member)]
        for member in members:
            names = get_args(member.model_fields["name"].annotation) if len(models) > 1 and member in models else ()
            for tag in names or (None,):
                yield from _models(member, place if tag is None else (*place, tag), key)
    elif _is_options(annotation):
        yield place, key, annotation
        for name, field in annotation.model_fields.items():
            yield from _models(field.annotation, (*place, name), f"{key}.{name}".lstrip("."))


def _is_options(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Options)


def _similar_key(place: Location, key: str, known: list[tuple[Location, str]]) -> str:
    """A hint for an unknown key: a similar one beside it, else one of that name elsewhere, else all beside it."""
    siblings = [str(where[-1]) for where, _ in known if where[:-1] == place[:-1]]
    elsewhere = {dotted: where for where, dotted in known if where[-1] == place[-1]}
    generic = re.sub(r"\.\d+(?=\.)", ".0", key)
    if generic in elsewhere:  # the key of another member of a union
        parent = key.rpartition(".")[0]
        return f" for {parent}.name={place[-2]}; it belongs to {parent}.name={elsewhere[generic][-2]}"
    return _hint(_near(str(place[-1]), siblings) or list(elsewhere)[:2], siblings)


def _near(word: str, choices: Iterable[str]) -> list[str]:
    return get_close_matches(word, list(choices), n=1)


def _hint(near: Sequence[str], choices: Iterable[str]) -> str:
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    allowed = ", ".join(choices)
    return f"; allowed: {allowed}" if allowed else ""


def _dotted(location: Location, data: Any, *, missing: bool) -> str:
    """The key as the user wrote it: pydantic's location without the names that it adds for members of unions."""
    parts = []
    for part in location[:-1] if missing else location:
        if isinstance(part, int) or (isinstance(data, dict) and part in data):
            parts.append(part)
            data = data[part]
    return ".".join(map(str, [*parts, location[-1]] if missing else parts))


def _brief(error: Exception) -> str:
    """One line for an error of YAML's or OmegaConf's, with the line number where there is one."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).partition("\n")[0]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
