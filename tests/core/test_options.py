"""Options from files and overrides are read as written, and every mistake gives one helpful line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator, model_validator

from ssl_c2f.core import options
from ssl_c2f.core.options import Options, UserError, differences, dump, find_config, load

ENOUGH = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Mae(Options):
    name: Literal["mae"] = "mae"
    ratio: float = Field(0.75, gt=0, lt=1)


class Ssast(Options):
    name: Literal["ssast"] = "ssast"
    weight: float = 1.0


class Optim(Options):
    lr: float = 1e-3
    clip: float | None = None
    beta: float = 0.9
    rule: float | Literal["auto"] = "auto"

    @field_validator("beta")
    @classmethod
    def _large(cls, beta: float) -> float:
        if beta < 0.8:
            raise ValueError("too small")
        return beta


class Phase(Options):
    name: str
    epochs: int | None = Field(None, gt=0)
    steps: int | None = None
    size: tuple[int, int] = (3, 5)

    @model_validator(mode="after")
    def _one_length(self) -> Phase:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs, steps")
        return self


class Run(Options):
    run_dir: Path
    shape: Literal["uniform", "cluster"] = "uniform"
    flip: bool = False
    note: str = ""
    limit: Annotated[float, Field(allow_inf_nan=True)] = float("inf")
    optim: Optim = Optim()
    objective: Annotated[Mae | Ssast, Field(discriminator="name")] = Mae()
    phases: tuple[Phase, ...] = ()


MAE = "objective.name=mae"
QUOTES = "text with signs needs quotes: note=\"'...'\""
REFUSED = " is refused; only plain references such as ${data.root} are allowed"
YAML = """
run_dir: runs/a
optim: {lr: 3e-4}
objective: {name: ssast, weight: 2}
phases:
  - {name: coarse, epochs: 2}
  - {name: fine, steps: 10, size: [1, 2]}
"""

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029")  # see dump
text = st.text(characters, max_size=12).filter(lambda word: "${" not in word)
odd_text = text | st.sampled_from(
    ["1e3", "yes", "null", "~", "012", "1:30", "0x1f", "???", "2020-01-01", ".inf", "a: b"]
)
phases = st.builds(Phase, name=odd_text, epochs=st.integers(1, 9), size=st.tuples(st.integers(), st.integers()))
runs = st.builds(
    Run,
    run_dir=st.builds(Path, st.sampled_from(["a", "/b/c d", "1e3"])),
    flip=st.booleans(),
    note=odd_text,
    limit=st.floats(allow_nan=False),
    optim=st.builds(Optim, lr=st.floats(allow_nan=False, allow_infinity=False), clip=st.none() | st.floats(0, 1)),
    objective=st.builds(Mae, ratio=st.floats(0.01, 0.99)) | st.builds(Ssast, weight=st.floats(0, 9)),
    phases=st.lists(phases, max_size=3).map(tuple),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def mistake(file: Path | None, *overrides: str) -> str:
    """The one line that loading ends with, without the folder of the file."""
    with pytest.raises(UserError) as caught:
        load(Run, file, overrides)
    line = str(caught.value)
    assert "\n" not in line and "pydantic" not in line and "Value error" not in line
    return line.replace(f"{file.parent}/", "") if file else line


@ENOUGH
@given(run=runs)
def test_what_is_dumped_loads_back_equal(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "dumped.yaml"
    path.write_text(dump(run), encoding="utf-8")
    assert load(Run, path) == run
    assert differences(run, load(Run, path)) == []


@ENOUGH
@given(
    content=st.binary(max_size=30)
    | text.map(str.encode)
    | st.text("[]{}:-*&!'\"#|> \n\ta1${}", max_size=20).map(str.encode)
)
def test_any_file_gives_options_or_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    try:
        load(Run, path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1


@ENOUGH
@given(
    override=st.text("phases.01[]-=x: {}'$,*", max_size=14)
    | st.from_regex(r"(optim|phases|objective)[.\w]{0,9}=.{0,9}")
)
def test_any_override_gives_options_or_one_line(override: str, file: Path) -> None:
    try:
        load(Run, file, [override])
    except UserError as error:
        assert str(error).startswith("command line: ") and len(str(error).splitlines()) == 1


@ENOUGH
@given(a=runs, b=runs)
def test_differences_are_none_only_between_equals_and_mirror_each_other(a: Run, b: Run) -> None:
    assert (differences(a, b) == []) == (a == b)
    assert {(key, new, old) for key, old, new in map(_hashable, differences(a, b))} == set(
        map(_hashable, differences(b, a))
    )


def _hashable(difference: tuple[str, Any, Any]) -> tuple[str, str, str]:
    key, old, new = difference
    return key, repr(old), repr(new)


def test_file_overrides_and_defaults_merge(file: Path) -> None:
    defaults = {"note": "from defaults", "optim": {"lr": 1.0, "clip": 5}}
    run = load(
        Run,
        file,
        ["phases.0.epochs=7", "optim.rule=3e-4", "flip=true", "phases.1.size=[4, 6]", "run_dir=a=b"],
        defaults,
    )
    assert run.optim == Optim(lr=3e-4, clip=5.0, rule=3e-4)
    assert (run.note, run.flip, run.run_dir) == ("from defaults", True, Path("a=b"))
    assert run.phases == (Phase(name="coarse", epochs=7), Phase(name="fine", steps=10, size=(4, 6)))
    assert load(Run, file, ["objective={name: mae}"]).objective == Mae()
    assert load(Run, file, ["note=${phases.0.name}"]).note == "coarse"
    assert load(Run, None, ["run_dir=x"]) == Run(run_dir=Path("x"))


class Either(Options):
    alternatives = (("epochs", "steps"),)
    epochs: int | None = None
    steps: int | None = None


class Eithers(Options):
    epochs: int = 1
    whole: Either = Either()
    parts: tuple[Either, ...] = ()


def test_an_override_takes_the_place_of_its_alternative(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("whole: {epochs: 1}\nparts: [{epochs: 2}, {steps: 3}]\n")

    def given(*overrides: str) -> Eithers:
        return load(Eithers, file, overrides)

    assert given("whole.steps=5").whole == Either(steps=5)
    assert given("parts.1.epochs=5") == given().model_copy(update={"parts": (Either(epochs=2), Either(epochs=5))})
    assert given("whole.steps=5", "whole.epochs=6").whole == Either(steps=5, epochs=6), "two overrides both stand"
    assert given("whole.steps=null").whole == Either(epochs=1), "null takes no place"
    assert given("epochs=4").whole == Either(epochs=1), "alternatives stand in one mapping"


def test_options_are_immutable_and_hashable(file: Path) -> None:
    run = load(Run, file)
    hash(run)
    with pytest.raises(ValidationError, match="frozen"):
        run.note = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("phases.1.epohs=1", "phases.1.epohs: unknown key; did you mean 'epochs'?"),
        ("lr=1", "lr: unknown key; did you mean 'optim.lr'?"),
        ("optim.weird=1", "optim.weird: unknown key; allowed: lr, clip, beta, rule"),
        ("phaess.0.epochs=1", "phaess: unknown key; did you mean 'phases'?"),
        ("objective.ratio=1", "objective.ratio: unknown key for objective.name=ssast; it belongs to " + MAE),
        ("note=${nowhere}", "note: Interpolation key 'nowhere' not found"),
        ("note=*.wav", "note: line 1: expected alphabetic or numeric character, but found '.'; " + QUOTES),
        ("objective.wieght=1", "objective.wieght: unknown key; did you mean 'weight'?"),
        ("objective.name=mea", "objective.name is 'mea'; did you mean 'mae'?"),
        ("objective={}", "objective.name must be given; allowed: mae, ssast"),
        ("objective=3", "objective is 3 but should be a mapping"),
        ("objective={name: mae, ratio: 1.0}", "objective.ratio is 1.0 but should be less than 1"),
        ("shape=clustre", "shape is \"clustre\" but should be 'uniform' or 'cluster'; did you mean 'cluster'?"),
        ("phases.0.epochs=true", "phases.0.epochs is true but should be a whole number"),
        ("phases.0.epochs=0", "phases.0.epochs is 0 but should be greater than 0"),
        ("phases.0.steps=5", "phases.0: give exactly one of epochs, steps"),
        ("phases.0.size=[1]", "phases.0.size.1 must be given"),
        ("phases.0.size=[1,2,3]", "phases.0.size is [1, 2, 3] but should have at most 2 items after validation, not 3"),
        ("phases.-1.epochs=1", "'phases.-1.epochs=1' should be KEY=VALUE, such as optim.lr=1e-3"),
        ("optim.beta=0.5", "optim.beta is 0.5: too small"),
        ("phases={a: 1}", "phases should be a list"),
        ("flip=1", "flip is 1 but should be true or false"),
        ("note=1", "note is 1 but should be text"),
        ("optim.lr=abc", 'optim.lr is "abc" but should be a number'),
        ("optim.lr=.inf", "optim.lr is Infinity but should be a finite number"),
        ("optim.rule=aut", "optim.rule is \"aut\" but should be a number or 'auto'; did you mean 'auto'?"),
        ("optim.lr", "'optim.lr' should be KEY=VALUE, such as optim.lr=1e-3"),
        ("optim..lr=1", "'optim..lr=1' should be KEY=VALUE, such as optim.lr=1e-3"),
        ("phases.5.epochs=1", "phases.5.epochs: no such item in the list; the first is 0"),
        ("phases.x=1", "phases.x: no such item in the list; the first is 0"),
        ("phases.2={name: x}", "phases.2: no such item in the list; the first is 0"),
        ("phases.x.epochs=1", "phases.x.epochs: no such item in the list; the first is 0"),
        ("note=${oc.env:HOME}", "${oc.env:HOME}" + REFUSED),
    ],
)  # fmt: skip
def test_a_wrong_override_names_the_command_line_and_what_would_do(file: Path, override: str, line: str) -> None:
    assert mistake(file, override) == f"command line: {line}"


def test_a_mistake_is_blamed_on_its_source(file: Path) -> None:
    file.write_text(YAML.replace("epochs: 2", "epochs: two"))
    assert mistake(file) == 'run.yaml: phases.0.epochs is "two" but should be a whole number'
    assert mistake(file, "note=x", "phases.1.size=[2, 3]").startswith("run.yaml: phases.0.epochs")
    assert mistake(file, "phases.0.epochs=three").startswith("command line: phases.0.epochs")
    assert mistake(file, "phases.0.epochs=-1", "flip=3", "lr=1") == (
        "command line: lr: unknown key; did you mean 'optim.lr'? (and 2 more)"
    )
    assert mistake(None) == "command line: run_dir must be given"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a: 1\nb: [2", "line 2: expected ',' or ']', but got '<stream end>'"),
        ("note: a\nnote: b", "line 2: found duplicate key note"),
        ("- 1", "should hold a mapping of keys to values"),
        ("3", "should hold a mapping of keys to values"),
        ("run_dir: ${nowhere}", "run_dir: Interpolation key 'nowhere' not found"),
        ("run_dir: a\nnote: '${ oc.env:HOME,x}'", "${ oc.env:HOME,x}" + REFUSED),
        ("run_dir: a\nnote: '${a.${oc.env:HOME}}'", "${a.${oc.env:HOME}" + REFUSED),
        ("{}", "run_dir must be given"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_the_place(file: Path, content: str, line: str) -> None:
    file.write_text(content)
    assert mistake(file) == f"run.yaml: {line}"


def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    assert mistake(tmp_path / "none.yaml") == "none.yaml: No such file or directory"
    (tmp_path / "folder").mkdir()
    assert mistake(tmp_path / "folder") == "folder: Is a directory"
    (tmp_path / "latin.yaml").write_bytes(b"note: \xff")
    assert mistake(tmp_path / "latin.yaml") == "latin.yaml: not UTF-8 text"


def test_no_resolver_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_SECRET", "hunter2")
    for value in ("${oc.env:PLANTED_SECRET}", "${ oc.env:PLANTED_SECRET}", "${oc.create:${oc.env:PLANTED_SECRET}}"):
        assert "hunter2" not in mistake(file, f"note={value}")


def test_differences_show_phases_by_key_and_missing_ones_as_a_dash(file: Path) -> None:
    old, new = load(Run, file), load(Run, file, ["phases.0.size=[1, 1]", "objective={name: mae}", "optim.clip=1"])
    assert differences(old, new) == [
        ("optim.clip", None, 1.0),
        ("objective.name", "ssast", "mae"),
        ("objective.weight", 2.0, "-"),
        ("phases.0.size", [3, 5], [1, 1]),
        ("objective.ratio", "-", 0.75),
    ]


@pytest.mark.parametrize("layout", ["checkout", "wheel"])
def test_configs_are_found_by_path_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    package = tmp_path / "ssl_c2f"
    configs = (package if layout == "wheel" else tmp_path) / "configs"
    for name in ("pretrain/esc10_mae_c2f", "finetune/esc10", "debug/mae"):
        (configs / name).parent.mkdir(parents=True)
        (configs / f"{name}.yaml").touch()
    package.mkdir(exist_ok=True)
    monkeypatch.setattr(options, "__file__", str(package / "core" / "options.py"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where the names are no paths by chance

    shipped = configs / "pretrain/esc10_mae_c2f.yaml"
    names = (
        "esc10_mae_c2f",
        "esc10_mae_c2f.yaml",
        "pretrain/esc10_mae_c2f.yaml",
        "configs/pretrain/esc10_mae_c2f.yaml",
    )
    assert [find_config(name, "pretrain") for name in (*names, str(shipped))] == [shipped] * 5
    assert find_config("debug/mae", "pretrain") == configs / "debug/mae.yaml"

    def refusal(name: str) -> str:
        with pytest.raises(UserError) as caught:
            find_config(name, "pretrain")
        return str(caught.value)

    assert refusal("esc10_mae_c2") == "command line: no config 'esc10_mae_c2'; did you mean 'pretrain/esc10_mae_c2f'?"
    assert refusal("esc10") == "command line: no config 'esc10'; did you mean 'finetune/esc10'?"
    assert refusal("zzz").endswith("; allowed: debug/mae, finetune/esc10, pretrain/esc10_mae_c2f")
