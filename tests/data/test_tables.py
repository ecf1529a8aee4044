"""Tables of recordings as people have them, splits, held-out recordings, and how often rare classes are drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_c2f.core.options import UserError
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.manifest import Clip, Manifest, look_like_labels, read_manifest, scan, write_manifest
from ssl_c2f.data.recordings import DataOptions, balanced_weights, hold_out, open_manifest, split
from ssl_c2f.data.sampler import clip_at
from ssl_c2f.data.tables import NAMES, TEST, TRAIN, VALIDATION, Row, read_table


def rows_of(tmp_path: Path, text: str, name: str = "set.csv", **options: object) -> list[Row]:
    (tmp_path / name).write_bytes(text.encode())
    return list(read_table(tmp_path / name, **options).rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", NAMES["path"])
@pytest.mark.parametrize("labels", NAMES["labels"])
def test_usual_names_are_recognised(path: str, labels: str, tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, f"recorder,{labels.title()},{path.upper()},humidity\nA,rain,x.wav,30\n")
    assert (row.path, row.labels) == ("x.wav", ("rain",))


def test_foreign_columns_are_left_aside_and_named(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("id,file,species,lat,lon\n1,x.wav,wren,5,6\n")
    table = read_table(tmp_path / "set.csv")
    assert table.ignored == ("id", "lat", "lon") and not table.is_split
    assert read_table(tmp_path / "set.csv", {"labels": "id"}).rows[0].labels == ("1",)
    with pytest.raises(UserError, match=r"data\.columns: .* has no column 'kind' for label"):
        read_table(tmp_path / "set.csv", {"label": "kind"})
    with pytest.raises(UserError, match=r"data\.columns: no 'lable' in a table; there are path, labels"):
        read_table(tmp_path / "set.csv", {"lable": "id"})


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_spreadsheets_of_any_country(name: str, mark: str, tmp_path: Path) -> None:
    text = "\ufeff" + "file,label,Begin Time (s),End Time (s)\r\nsub\\x.wav,rain,1.5,2\r\n".replace(",", mark)
    (row,) = rows_of(tmp_path, text, name)
    assert (row.path, row.labels, row.start, row.end) == ("sub/x.wav", ("rain",), 1.5, 2.0)


def test_annotations_of_long_recordings(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "file,onset,offset,label\nx.wav,0,2,a\nx.wav,1,3,b\nx.wav,1,3,c\n./x.wav,4,,a\n")
    assert [(row.start, row.end, row.labels) for row in rows] == [
        (0, 2, ("a",)), (1, 3, ("b", "c")), (4, None, ("a",))
    ]
    with pytest.raises(UserError, match=r"line 2: end 1 is not after start 2"):
        rows_of(tmp_path, "file,onset,offset\nx.wav,2,1\n")
    with pytest.raises(UserError, match=r"line 2: onset '1:30' is not a number of seconds"):
        rows_of(tmp_path, "file,onset\nx.wav,1:30\n")


def test_splits_have_names(tmp_path: Path) -> None:
    names = {"train": TRAIN, "Valid": VALIDATION, "dev": VALIDATION, "TEST": TEST, "eval": TEST, "": None}
    text = "file,split\n" + "".join(f"{i}.wav,{name}\n" for i, name in enumerate(names))
    assert [row.fold for row in rows_of(tmp_path, text)] == list(names.values())
    with pytest.raises(UserError, match="line 2: split 'monday' is none of train, val"):
        rows_of(tmp_path, "file,split\nx.wav,monday\n")


@pytest.mark.parametrize("text", ["a,rain", "a|rain", "a, dog"])
def test_a_label_that_may_be_several_is_asked_about(text: str, tmp_path: Path) -> None:
    table = "path\tlabels\nx.wav\t" + text + "\ny.wav\tdog\n"
    with pytest.raises(UserError, match=r"one label, or several\? data\.separator='[,|]' splits it"):
        rows_of(tmp_path, table, "a.tsv")
    assert rows_of(tmp_path, table, "a.tsv", separator=";")[0].labels == (text,)
    mark = "|" if "|" in text else ","
    assert rows_of(tmp_path, table, "a.tsv", separator=mark)[0].labels == tuple(p.strip() for p in text.split(mark))
    assert rows_of(tmp_path, 'path,label\nx.wav,"Speech, male"\n')[0].labels == ("Speech, male",)


def recording(file: Path, seconds: float = 0.1) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.full(round(8000 * seconds), 0.1), 8000)
    return file


def test_one_recording_under_two_spellings(tmp_path: Path) -> None:
    file = recording(tmp_path / "audio" / "x.wav")
    lines = [{"path": str(file.resolve())}, {"path": "./x.wav", "label": "a"}, {"path": "sub/../x.wav", "label": "b"}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines[1:])))
    (clip,) = read_manifest(tmp_path / "set.jsonl", tmp_path / "audio").clips
    assert (clip.path, clip.labels) == ("x.wav", ("a", "b"))
    (tmp_path / "set.jsonl").write_text(json.dumps(lines[0]))
    assert read_manifest(tmp_path / "set.jsonl", tmp_path / "audio").clips[0].path == "x.wav"


def test_a_split_is_trained_on_validated_with_and_written_back(tmp_path: Path) -> None:
    for i in range(4):
        recording(tmp_path / f"{i}.wav")
    (tmp_path / "set.csv").write_text("file,split,label\n0.wav,train,a\n1.wav,val,b\n2.wav,test,a\n3.wav,train,b\n")
    found = read_manifest(tmp_path / "set.csv")
    assert split(found, DataOptions()) == ([0, 3], [1])
    assert found.notes[-1].endswith("split 2 train, 1 val, 1 test; test clips are never trained on or validated with")
    for name in ("out.csv", "out.jsonl"):
        write_manifest(found, tmp_path / name)
        again = read_manifest(tmp_path / name)
        assert again.clips == found.clips and again.is_split


def test_folder_names_are_labels_where_they_look_like_it(tmp_path: Path) -> None:
    for site in "AB":
        for day in ("2024-05-01", "2024-05-02"):
            for i in range(2):
                recording(tmp_path / f"field/site_{site}/{day}/{i}.wav")
    for name in ("dog", "cat"):
        for i in range(3):
            recording(tmp_path / f"pets/{name}/{i}.wav")
    assert not look_like_labels(scan(tmp_path / "field")) and look_like_labels(scan(tmp_path / "pets"))
    for root, classes in (("field", ()), ("pets", ("cat", "dog"))):
        corpus = Corpus.open(DataOptions(root=str(tmp_path / root)), 0, labels_needed=False)
        assert corpus.manifest.classes == classes and "folder names" in corpus.manifest.notes[0]
    options = DataOptions(root=str(tmp_path / "field"), labels="top")
    assert Corpus.open(options, 0, labels_needed=False).manifest.classes == ("site_A", "site_B")
    days = open_manifest(options.model_copy(update={"labels": "folder"})).classes
    assert days == ("2024-05-01", "2024-05-02")
    assert open_manifest(options.model_copy(update={"labels": "none"})).classes == ()


def manifest_of(labels: list[tuple[str, ...]], per_recording: int = 1) -> Manifest:
    clips = tuple(
        Clip(f"{i:05}.wav", names, None, 100, 100, 1, start=float(j)) for i, names in enumerate(labels)
        for j in range(per_recording)
    )
    return Manifest(Path("x"), clips, tuple(sorted({name for names in labels for name in names})))


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), fraction=st.floats(0.05, 0.5),
       seed=st.integers(0, 9), per_recording=st.integers(1, 3))
def test_a_fraction_of_each_class_is_held_out_by_recording(
    counts: list[int], fraction: float, seed: int, per_recording: int
) -> None:
    labels = [(f"class {i}",) for i, count in enumerate(counts) for _ in range(count)]
    manifest = manifest_of(labels, per_recording)
    chosen = set(hold_out(manifest, fraction, seed))
    paths = {manifest.clips[i].path for i in chosen}
    assert chosen == {i for i, clip in enumerate(manifest.clips) if clip.path in paths}  # recordings stay whole
    for i, count in enumerate(counts):
        held = len({manifest.clips[k].path for k in chosen if manifest.clips[k].labels == (f"class {i}",)})
        assert abs(held - fraction * count) < 1 + 1e-6
    assert len(counts) == 1 or hold_out(manifest, fraction, seed) == sorted(chosen)


@pytest.mark.parametrize(("kind", "expected"), [("full", (0.5, 0.5)), ("sqrt", (0.75, 0.25))])
def test_rare_classes_are_drawn_more_often(kind: str, expected: tuple[float, float]) -> None:
    manifest = manifest_of([("common",)] * 90 + [("rare",)] * 10)
    weights = balanced_weights(manifest, range(100), kind)  # type: ignore[arg-type]
    drawn = Counter(manifest.clips[clip_at(3, p, 100, weights)[1]].labels[0] for p in range(1000))
    assert abs(drawn["common"] / 1000 - expected[0]) < 0.011 and abs(drawn["rare"] / 1000 - expected[1]) < 0.011
    plain = [clip_at(3, p, 100)[1] for p in range(100)]
    assert sorted(plain) == list(range(100))
    torch.manual_seed(0)  # draws depend on nothing else
    assert [clip_at(3, p, 100, weights) for p in range(150)] == [clip_at(3, p, 100, weights) for p in range(150)]
