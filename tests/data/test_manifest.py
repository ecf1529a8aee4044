from __future__ import annotations

import json
import random
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ESC10, needs_esc10

from ssl_c2f.core.options import UserError
from ssl_c2f.data.manifest import Clip, Manifest, fingerprint, read_manifest, scan, write_manifest


def sound(file: Path, samples: int = 160, rate: int = 16000, channels: int = 1) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.full((samples, channels), 0.1, np.float32), rate)
    return file


names = st.text(string.ascii_letters + "é中,\"'\n|-", min_size=1, max_size=8)  # all that upsets a CSV file
clips = st.builds(
    Clip,
    path=names.map(lambda name: name + ".wav"),
    labels=st.lists(names.map(str.strip).filter(bool), max_size=3).map(tuple),
    fold=st.none() | st.integers(0, 9),
    num_samples=st.integers(1, 10**6),
    sample_rate=st.integers(1000, 768_000),
    channels=st.integers(1, 8),
)


def manifest_of(root: Path, clips: list[Clip]) -> Manifest:
    classes = sorted({label for clip in clips for label in clip.labels})
    return Manifest(root, tuple(sorted(clips, key=lambda clip: clip.path)), tuple(classes))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(listed=st.lists(clips, min_size=1, max_size=5, unique_by=lambda clip: clip.path))
def test_what_is_written_is_read_back(tmp_path: Path, ending: str, listed: list[Clip]) -> None:
    for clip in listed:
        (tmp_path / clip.path).write_bytes(bytes(200))
    manifest = manifest_of(tmp_path, listed)
    write_manifest(manifest, tmp_path / f"set.{ending}")
    assert read_manifest(tmp_path / f"set.{ending}") == manifest


@given(st.lists(clips, min_size=1, max_size=6, unique_by=lambda clip: clip.path), st.randoms())
def test_the_fingerprint_sees_content_not_order(listed: list[Clip], rng: random.Random) -> None:
    first = fingerprint(manifest_of(Path("a"), listed))
    shuffled = rng.sample(listed, len(listed))
    assert fingerprint(Manifest(Path("b"), tuple(shuffled), ())) == first
    for change in ({"path": "new"}, {"labels": ("new",)}, {"fold": 77}, {"num_samples": 0}, {"sample_rate": 0}):
        changed = [replace(shuffled[0], **change), *shuffled[1:]]
        assert fingerprint(manifest_of(Path("a"), changed)) != first


def test_a_folder_gives_labels_formats_and_nothing_hidden(tmp_path: Path) -> None:
    sound(tmp_path / "loose.WAV")
    sound(tmp_path / "dog/a.flac", 100, 8000, 2)
    sound(tmp_path / "dog/big/b.ogg", 44100, 44100)
    sound(tmp_path / "cat/c.mp3", 44100, 44100)
    sound(tmp_path / "cat/._c.wav")
    sound(tmp_path / ".cache/d.wav")
    (tmp_path / "cat/notes.txt").write_text("no audio")
    found = scan(tmp_path)
    assert [(clip.path, clip.labels) for clip in found.clips] == [
        ("cat/c.mp3", ("cat",)),
        ("dog/a.flac", ("dog",)),
        ("dog/big/b.ogg", ("dog/big",)),
        ("loose.WAV", ()),
    ]
    assert found.classes == ("cat", "dog", "dog/big")
    assert found.clips[1] == Clip("dog/a.flac", ("dog",), None, 100, 8000, 2)
    assert found.bad == ()


def test_bad_files_are_set_apart_with_their_reason(tmp_path: Path) -> None:
    sound(tmp_path / "good.wav")
    sound(tmp_path / "none.wav", samples=0)
    (tmp_path / "text.wav").write_text("not audio")
    found = scan(tmp_path)
    assert [clip.path for clip in found.clips] == ["good.wav"]
    assert found.bad == (("none.wav", "no samples"), ("text.wav", "damaged, or not audio"))


def test_progress_counts_every_file(tmp_path: Path) -> None:
    for index in range(3):
        sound(tmp_path / f"{index}.wav")
    seen: list[tuple[int, int]] = []
    scan(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_folds_come_from_file_names(tmp_path: Path) -> None:
    def folds(pattern: str | None = None) -> list[int | None]:
        return [clip.fold for clip in scan(tmp_path, fold_pattern=pattern).clips]

    sound(tmp_path / "1-100032-A-0.wav")
    sound(tmp_path / "5-187207-B.wav")
    assert folds() == [1, 5]
    assert folds(r"(\d)\d\d\d-") == [0, 7]
    sound(tmp_path / "extra.wav")
    assert folds() == [None, None, None]  # one other name: these are no ESC names
    assert folds(r"^(\d)-") == [1, 5, None]
    for pattern in (r"fold(\d)", r"^\d-", r"^(\d|e)", "("):
        with pytest.raises(UserError, match="fold pattern"):
            folds(pattern)


def test_folders_without_audio(tmp_path: Path) -> None:
    def message(root: Path) -> str:
        with pytest.raises(UserError) as caught:
            scan(root)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert message(tmp_path / "missing") == f"{tmp_path / 'missing'}: no such folder"
    assert message(tmp_path) .startswith(f"{tmp_path}: no audio found (looked for .")
    for name in ("a.txt", "b.TXT", "c.xyz"):
        (tmp_path / name).write_text("no audio")
    assert message(tmp_path).endswith("; not read: 2 .txt, 1 .xyz")
    (tmp_path / "a.wav").write_text("not audio")
    assert message(tmp_path / "a.wav").endswith("a.wav: not a folder")
    assert message(tmp_path).endswith("none of 1 recordings can be read; a.wav: damaged, or not audio")


def test_lists_written_by_hand(tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav", "c.wav"):
        sound(tmp_path / "audio" / name, 320)
    (tmp_path / "set.csv").write_text("\ufeffpath,labels,fold\na.wav,dog; cat,2\nb.wav,,\ngone.wav,cat,1\n")
    rows = [{"path": "c.wav", "label": "rain"}, {"path": "b.wav", "labels": ["a;b", "c"], "fold": 3}]
    (tmp_path / "set.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    table = read_manifest(tmp_path / "set.csv", tmp_path / "audio")
    assert table.clips == (
        Clip("a.wav", ("dog", "cat"), 2, 320, 16000, 1),
        Clip("b.wav", (), None, 320, 16000, 1),
    )
    assert table.bad == (("gone.wav", "no such file"),)
    lines = read_manifest(tmp_path / "set.jsonl", tmp_path / "audio")
    assert [(clip.labels, clip.fold) for clip in lines.clips] == [(("a;b", "c"), 3), (("rain",), None)]
    for label in ("a;b", " a"):
        with pytest.raises(UserError, match=f"'{label}' does not fit into CSV"):
            write_manifest(manifest_of(tmp_path, [Clip("a.wav", (label,))]), tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "pfad,label\nx.wav,dog\n", "no column of file names among pfad, label; say which: data.columns="),
        ("a.csv", "path,label\nx.wav,dog,5\n", "line 2: more cells than columns"),
        ("a.csv", "path,fold\nx.wav,1\ny.wav,one\n", "line 3: fold 'one' is not a whole number"),
        ("a.csv", "path,label\n,dog\n", "line 2: no path"),
        ("a.csv", "path,fold\nx.wav,1\n./x.wav,2\n", "line 3: x.wav is listed twice, with another fold"),
        ("a.csv", "path\nx.wav\n", "none of 1 recordings can be read; x.wav: no such file"),
        ("a.csv", "path\n", "lists no clips"),
        ("a.csv", "", "lists no clips"),
        ("a.jsonl", '{"path": "x.wav"}\n["y.wav"]\n', "line 2: not a JSON object"),
        ("a.jsonl", '{"path": "x.wav", "fold": 1.5}\n', "line 1: fold 1.5 is not a whole number"),
        ("a.jsonl", '{"path": "x.wav", "labels": [[1]]}\n', "line 1: labels [[1]] are not text"),
        ("a.jsonl", '{"path": "x.wav"}\n{"path": \n', "line 2: not JSON"),
        ("a.jsonl", '{"path": "x.wav", "fold": ' + "[" * 200_000 + "\n", "line 1: not JSON"),
        ("a.jsonl", '{"path": "x.wav", "shard": 5}\n', "line 1: shard 5 is not text"),
        ("a.jsonl", '{"path": "x\\ud800.wav"}\n', "line 1: path 'x\\ud800.wav' is no text"),
        ("a.jsonl", '{"path": "x.wav", "shard": "a.tar", "offset": 1%s}\n' % ("0" * 400), "is too large"),
        ("a.jsonl", '{"path": "x.wav", "label": "%s"}\n' % ("l" * 10**6), "has 1000000 characters, more than 4096"),
        ("a.csv", b"path\nx\xff.wav\n", "can't decode byte"),
        ("a.txt", "x.wav\n", "a table of recordings ends in .csv, .tsv, .jsonl"),
        ("a.csv", None, "no such file"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, name: str, text: str | bytes | None, expected: str) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path / name)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_lengths_that_cannot_be_are_looked_up(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 320)
    for lie in ({"num_samples": 10**18}, {"sample_rate": 7}, {"channels": 10**9}):
        row = {"path": "a.wav", "num_samples": 320, "sample_rate": 16000, "channels": 1} | lie
        (tmp_path / "set.jsonl").write_text(json.dumps(row))
        assert read_manifest(tmp_path / "set.jsonl").clips == (Clip("a.wav", (), None, 320, 16000, 1),)


@needs_esc10
def test_esc10_is_understood_as_it_is() -> None:
    found = scan(ESC10)
    assert (len(found.clips), len(found.classes), found.bad) == (400, 10, ())
    assert [sum(clip.fold == fold for clip in found.clips) for fold in range(1, 6)] == [80] * 5
