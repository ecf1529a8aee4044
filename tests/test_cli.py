"""The command line: its commands and options, its one-line errors, and all main commands one after another."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_runs
from launcher import launch_module
from paths import ROOT

from ssl_c2f import cli
from ssl_c2f.core import options
from ssl_c2f.tasks import config

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FLAGS = {
    "demo": {"folder"}, "pretrain": {"words"}, "train": {"words"}, "finetune": {"--ckpt", "--config", "words"},
    "evaluate": {"--ckpt", "words"}, "probe": {"--ckpt", "words"}, "embed": {"--ckpt", "words"},
    "predict": {"--ckpt", "words"}, "plan": {"--measure", "--clips", "words"}, "report": {"runs", "--out", "--wandb"},
    "convert": {"file", "--out", "words"}, "export": {"ckpt", "--format", "--out"},
    "config show": {"words"}, "config validate": {"words"}, "config diff": {"words"},
    "data manifest": {"words", "--out"}, "data check": {"words"}, "data stats": {"words"},
    "data build": {"words", "name", "--out", "--download"}, "data shard": {"words", "--out", "--gigabytes"},
}


def flags(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, set[str]]:
    """Command -> its arguments."""
    subs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not subs:
        names = {(action.option_strings or [action.dest])[-1] for action in parser._actions}
        return {prefix.strip(): names - {"--help", "--version"}}
    return {k: v for name, sub in subs[0].choices.items() for k, v in flags(sub, f"{prefix} {name}").items()}


def test_commands_and_options_are_unchanged() -> None:
    assert flags(cli.parser()) == FLAGS


def test_every_command_has_help_and_help_needs_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ssl_c2f", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and all(name.split()[0] in done.stdout for name in FLAGS), done.stderr
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    for name in FLAGS:
        with pytest.raises(SystemExit) as exit_:
            cli.main([*name.split(), "--help"])
        assert exit_.value.code == 0


def commands(table: cli.Table) -> list[cli.Command]:
    """Every command of a table."""
    below = [commands(entry.commands) if isinstance(entry, cli.Group) else [entry] for entry in table.values()]
    return [command for found in below for command in found]


def test_every_command_has_a_function_that_takes_its_arguments() -> None:
    for command in commands(cli.COMMANDS) + commands(launch_module().COMMANDS):
        module, _, name = command.does.rpartition(".")
        takes = inspect.signature(getattr(import_module(f"ssl_c2f.{module}"), name)).parameters
        if set(takes) == {"arguments"}:
            continue
        given = {each.how.get("dest") or each.name.removeprefix("--").replace("-", "_") for each in command.arguments}
        given = {"options" if name == "words" and "options" in takes else name for name in given}
        needed = {name for name, parameter in takes.items() if parameter.default is parameter.empty}
        assert needed <= given <= set(takes), command.does


def test_a_config_is_validated_whatever_its_comments_say_and_where_overrides_stand(
    tmp_path: Path, tiny_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# unlike name: supervised, this needs no labels\n" + Path(tiny_config).read_text())
    assert cli.main(["config", "validate", str(file)]) == 0
    assert cli.main(["config", "validate", "seed=3", "pretrain/mae_c2f"]) == 0
    assert cli.main(["config", "show", "seed=3", str(file), "objective={name: supervised}", "ema=0"]) == 0
    assert "seed: 3\n" in capsys.readouterr().out


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_config_loads_and_has_a_header(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "validate", str(file)]) == 0
    loaded = config.read_any([str(file)])
    again = options.load(type(loaded), None, (), loaded.model_dump(mode="json"))
    assert again == loaded
    changed = [str(file), "optim.lr=2e-3", "phases.0.epochs=5", "phases.0.warmup_epochs=1"]
    assert cli.main(["config", "validate", *changed]) == 0, "whatever the file gives as length and warm-up"
    capsys.readouterr()
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any("ssl_c2f " in line for line in head), "the command"
    assert any("Source" in line for line in head) and any("xpected figure" in line for line in head)


def error(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ssl_c2f: ") and "Traceback" not in lines[0], lines
    return lines[0]


@pytest.fixture
def tiny_config(tmp_path: Path) -> str:
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(tiny_runs.DEFAULTS | {"evaluation": {"every": 0}}))  # JSON is YAML
    return str(file)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "optim.lr"), ("lr=1e-3", "optim.lr"), ("phases.0.epochs=two", "phases.0.epochs"),
        ("compression=frameshift", "frame_shift"), ("mask.ratio=1.0", "mask.ratio"),
        ("phases.0.mask_ratio=1.0", "mask_ratio"),
        ("model.patch_f=20", "patch_f 20"), ("audio.f_max=9000", "f_max"), ("phases.7.steps=3", "phases.7"),
        ("objective={name: supervised}", "ssl_c2f train"), ("audio.clip_seconds=0.01", "window"),
        ("phases.0.steps=null", "exactly one"), ("optim.lr", "CONFIG"), ("model.width=30", "multiple"),
        ("objective.decoder_heads=3", "multiple of decoder_heads 3"), ("optim.betas=[1.0,0.95]", "optim.betas.0"),
    ],
)
def test_wrong_options_are_one_line(
    override: str, said: str, tiny_config: str, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", tiny_config, f"data.root={sounds}", f"run_dir={tmp_path / 'run'}", override]
    if override == "optim.lr":
        words.insert(1, "another")
        said = "give one config"
    assert said in error(words, capsys)
    assert not (tmp_path / "run").exists()


def test_wrong_folders_are_one_line(
    tiny_config: str, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no audio")
    for root, said in (("missing", "missing"), ("empty", "empty"), ("file.txt", "file.txt")):
        line = error(["pretrain", tiny_config, f"data.root={tmp_path / root}", f"run_dir={tmp_path / 'run'}"], capsys)
        assert said in line
    assert "data.root" in error(["pretrain", tiny_config, f"run_dir={tmp_path / 'run'}"], capsys)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.yaml").write_text("colour: blue")
    words = ["pretrain", tiny_config, f"data.root={sounds}", f"run_dir={tmp_path / 'theirs'}"]
    assert "theirs/config.yaml is not the config of a run" in error(words, capsys)


def bad_recordings(folder: Path) -> set[str]:
    """Write every kind of bad file, and unusual good ones; returns the names of the bad ones."""
    folder.mkdir()
    noise = np.random.default_rng(0).normal(0, 0.1, 96_000).astype(np.float32)
    for i in range(4):
        soundfile.write(folder / f"good-{i}.wav", noise[: 16_000], 16_000)
    soundfile.write(folder / "eight.wav", np.stack([noise] * 8, 1), 96_000)
    soundfile.write(folder / "short.wav", noise[:480], 16_000)
    soundfile.write(folder / "long.wav", np.zeros(7200 * 8000, np.int16), 8_000)  # two hours
    soundfile.write(folder / "accent.wav", noise[:16_000], 16_000)
    os.rename(folder / "accent.wav", os.fsencode(folder) + b"/caf\xe9.wav")  # Latin-1, as in old zip files
    (folder / "text.wav").write_text("not audio at all")
    soundfile.write(folder / "empty.wav", noise[:0], 16_000)
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    soundfile.write(folder / "whole.ogg", noise, 16_000, format="OGG", subtype="VORBIS")
    data = (folder / "whole.ogg").read_bytes()
    (folder / "whole.ogg").unlink()
    (folder / "cut.ogg").write_bytes(data[: len(data) // 2])
    return {"text.wav", "empty.wav", "nan.wav", "cut.ogg"}


def test_bad_recordings_are_reported(tiny_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = bad_recordings(tmp_path / "mixed")
    words = [tiny_config, f"data.root={tmp_path / 'mixed'}", "augment.mixup_prob=0"]
    assert cli.main(["pretrain", *words, f"run_dir={tmp_path / 'run'}", "data.cache_gb=0"]) == 0
    named = {json.loads(line)["path"] for line in (tmp_path / "run/bad_files.jsonl").read_text().splitlines()}
    assert named == bad
    assert "4 unreadable files" in capsys.readouterr().out
    line = error(["pretrain", *words, f"run_dir={tmp_path / 'strict'}", "data.max_bad_files=1"], capsys)
    assert "data.max_bad_files=1" in line
    assert cli.main(["data", "check", f"data.root={tmp_path / 'mixed'}"]) == 1
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in bad) and "8 good, 4 bad" in out


def test_all_main_commands(tiny_config: str, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plan, pretrain, resume, probe, finetune, evaluate, embed, predict and report, as typed by a user."""
    run, data = tmp_path / "run", f"data.root={sounds}"
    assert cli.main(["plan", tiny_config, data]) == 0
    assert "of single-phase" in capsys.readouterr().out
    assert cli.main(["pretrain", tiny_config, data, "data.val_folds=[5]", f"run_dir={run}"]) == 0
    assert cli.main(["pretrain", tiny_config, data, "data.val_folds=[5]", f"run_dir={run}"]) == 0
    assert tiny_runs.training_steps(run) == [1, 2, 3, 4, 5, 6]
    short = ["phases=[{name: tune, steps: 2, batch_size: 8}]", "folds=[1,2]", "tracking.wandb=off", data]
    assert cli.main(["finetune", "--ckpt", str(run), *short]) == 0
    scores = json.loads((run / "finetune/default/scores.json").read_text())
    assert set(scores["folds"]) == {"1", "2"} and sum(map(sum, scores["confusion"])) == 24
    tuned = str(run / "finetune/default/fold-1")
    assert cli.main(["evaluate", "--ckpt", tuned, data, "folds=[1]", f"out={tmp_path / 'scores'}"]) == 0
    assert cli.main(["probe", "--ckpt", str(run), data, "strengths=[0.01]"]) == 0
    assert cli.main(["embed", "--ckpt", str(run), data, f"out={tmp_path / 'features.npz'}"]) == 0
    file = next(sounds.rglob("*.wav"))
    capsys.readouterr()
    assert cli.main(["predict", "--ckpt", tuned, str(file)]) == 0
    assert file.name in capsys.readouterr().out
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000
    line = error(["finetune", "--ckpt", str(run), *short, "model.width=32", "name=wide"], capsys)
    assert "does not fit the checkpoint" in line and "encoder." in line
    assert "no such file" in error(["finetune", "--ckpt", str(tmp_path / "nothing"), *short], capsys)


def test_training_needs_labels(
    tiny_config: str, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlabelled = tmp_path / "flat"
    unlabelled.mkdir()
    for file in list(sounds.rglob("*.wav"))[:3]:
        (unlabelled / file.name).write_bytes(file.read_bytes())
    words = ["train", tiny_config, "objective={name: supervised}", f"data.root={unlabelled}"]
    assert "no recording has a label" in error([*words, f"run_dir={tmp_path / 'run'}"], capsys)
