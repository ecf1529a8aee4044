"""Public data sets, laid out in miniature as their documentation describes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssl_c2f import cli
from ssl_c2f.core.options import UserError
from ssl_c2f.data.manifest import read_manifest
from ssl_c2f.data.public import SETS, build

MINIATURES: dict[str, tuple[Mapping[str, str], list[str], list[tuple[str, tuple[str, ...], int | None]]]] = {
    # name: (tables, audio files, the clips that are expected of them)
    "esc50": (
        {"meta/esc50.csv": "filename,fold,target,category,esc10,src_file,take\n"
                           "1-1-A-0.wav,1,0,dog,True,1,A\n5-2-A-14.wav,5,14,chirping_birds,False,2,A\n"},
        ["audio/1-1-A-0.wav", "audio/5-2-A-14.wav"],
        [("audio/1-1-A-0.wav", ("dog",), 1), ("audio/5-2-A-14.wav", ("chirping_birds",), 5)],
    ),
    "esc10": (
        {"meta/esc50.csv": "filename,fold,target,category,esc10,src_file,take\n"
                           "1-1-A-0.wav,1,0,dog,True,1,A\n5-2-A-14.wav,5,14,chirping_birds,False,2,A\n"},
        ["audio/1-1-A-0.wav", "audio/5-2-A-14.wav"],
        [("audio/1-1-A-0.wav", ("dog",), 1)],
    ),
    "urbansound8k": (
        {"metadata/UrbanSound8K.csv": "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
                                      "100032-3-0-0.wav,100032,0.0,0.3,1,5,3,dog_bark\n"},
        ["audio/fold5/100032-3-0-0.wav"],
        [("audio/fold5/100032-3-0-0.wav", ("dog_bark",), 5)],
    ),
    "speech_commands": (
        {"validation_list.txt": "bed/b_nohash_0.wav\n", "testing_list.txt": "cat/c_nohash_1.wav\n"},
        ["bed/a_nohash_0.wav", "bed/b_nohash_0.wav", "cat/c_nohash_1.wav", "_background_noise_/pink_noise.wav"],
        [("bed/a_nohash_0.wav", ("bed",), 1), ("bed/b_nohash_0.wav", ("bed",), 2), ("cat/c_nohash_1.wav", ("cat",), 3)],
    ),
    "fsd50k": (
        {"FSD50K.ground_truth/dev.csv": 'fname,labels,mids,split\n10,"Bark,Dog","/m/1,/m/2",train\n11,Rain,/m/3,val\n',
         "FSD50K.ground_truth/eval.csv": "fname,labels,mids\n12,Rain,/m/3\n"},
        ["FSD50K.dev_audio/10.wav", "FSD50K.dev_audio/11.wav", "FSD50K.eval_audio/12.wav"],
        [("FSD50K.dev_audio/10.wav", ("Bark", "Dog"), 1), ("FSD50K.dev_audio/11.wav", ("Rain",), 2),
         ("FSD50K.eval_audio/12.wav", ("Rain",), 3)],
    ),
    "audioset": (
        {"class_labels_indices.csv": 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man"\n',
         "balanced_train_segments.csv": "# made on a day\n# num_ytids=1\n# YTID, start_seconds, end_seconds, labels\n"
                                        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n',
         "eval_segments.csv": "# made on a day\n# num_ytids=2\n# YTID, start_seconds, end_seconds, labels\n"
                              'Yabcdefghij, 30.000, 40.000, "/m/09x0r"\nZZZZZZZZZZZ, 0.000, 10.000, "/m/09x0r"\n'},
        ["train/Y--PJHxphWEs_30.000_40.000.wav", "eval/Yabcdefghij_30000.flac"],
        [("eval/Yabcdefghij_30000.flac", ("Speech",), 3),
         ("train/Y--PJHxphWEs_30.000_40.000.wav", ("Speech", "Male speech, man"), 1)],
    ),
    "vggsound": (
        {"vggsound.csv": '---g-f_I2yQ,1,people marching,test\n--0PQM4-hqg,30,"waterfall, burbling",train\n'},
        ["---g-f_I2yQ_000001.wav", "--0PQM4-hqg_000030.wav"],
        [("---g-f_I2yQ_000001.wav", ("people marching",), 3), ("--0PQM4-hqg_000030.wav", ("waterfall, burbling",), 1)],
    ),
    "voxceleb1": (
        {"iden_split.txt": "3 id10003/na8-QEFmj44/00003.wav\n1 id10004/xTV-jFAUKcw/00001.wav\n"},
        ["wav/id10003/na8-QEFmj44/00003.wav", "wav/id10004/xTV-jFAUKcw/00001.wav"],
        [("wav/id10003/na8-QEFmj44/00003.wav", ("id10003",), 3),
         ("wav/id10004/xTV-jFAUKcw/00001.wav", ("id10004",), 1)],
    ),
}


def lay_out(root: Path, name: str) -> None:
    tables, audio, _ = MINIATURES[name]
    for file, text in tables.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    for file in audio:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / file, np.full(800, 0.1, np.float32), 16000)


def test_every_set_has_a_miniature() -> None:
    assert MINIATURES.keys() == SETS.keys()


@pytest.mark.parametrize("name", MINIATURES)
def test_clips_labels_and_folds(name: str, tmp_path: Path) -> None:
    lay_out(tmp_path, name)
    manifest, missing = build(name, tmp_path)
    assert [(clip.path, clip.labels, clip.fold) for clip in manifest.clips] == MINIATURES[name][2]
    assert missing == (name == "audioset"), "one of AudioSet's videos is gone"


@pytest.mark.parametrize("name", MINIATURES)
def test_missing_and_odd_tables_are_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"get .* from"):
        build(name, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not there|none of the 0 recordings"):
        build(name, tmp_path)
    lay_out(tmp_path, name)
    if name == "speech_commands":
        return  # its tables are plain lists of files
    (tmp_path / next(iter(MINIATURES[name][0]))).write_text("some\nother\ntable\nthan\nthis\n")
    with pytest.raises(UserError, match="of another form"):
        build(name, tmp_path)


def test_recordings_that_are_gone_are_counted(tmp_path: Path) -> None:
    lay_out(tmp_path, "esc50")
    (tmp_path / "audio/1-1-A-0.wav").unlink()
    manifest, missing = build("esc50", tmp_path)
    assert len(manifest.clips) == 1 and missing == 1
    (tmp_path / "audio/5-2-A-14.wav").unlink()
    with pytest.raises(UserError, match="none of the 2 recordings"):
        build("esc50", tmp_path)


def test_as_torchaudio_unpacks_it(tmp_path: Path) -> None:
    lay_out(tmp_path / "SpeechCommands/speech_commands_v0.02", "speech_commands")
    manifest, _ = build("speech_commands", tmp_path)
    assert manifest.clips[0].path == "SpeechCommands/speech_commands_v0.02/bed/a_nohash_0.wav"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_out(tmp_path, "fsd50k")
    assert cli.main(["data", "build", "fsd50k", f"data.root={tmp_path}"]) == 0
    assert f"use it: data.manifest={tmp_path}/manifest.csv" in capsys.readouterr().out
    assert read_manifest(tmp_path / "manifest.csv").classes == ("Bark", "Dog", "Rain")
    for words in (["nothing", f"data.root={tmp_path}"], ["esc50"], ["fsd50k", f"data.root={tmp_path}", "--download"]):
        assert cli.main(["data", "build", *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.network
def test_download(tmp_path: Path) -> None:
    assert cli.main(["data", "build", "speech_commands", f"data.root={tmp_path}", "--download"]) == 0
    assert len(read_manifest(tmp_path / "manifest.csv").clips) == 105829
