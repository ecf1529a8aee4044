from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ssl_c2f import cli
from ssl_c2f.core.options import UserError
from ssl_c2f.data.decode import AudioError, Member, read_audio, read_header
from ssl_c2f.data.manifest import Clip, Manifest, checked, fingerprint, read_manifest, scan
from ssl_c2f.data.shards import write_shards

FORMATS = {"a.wav": "PCM_16", "b.flac": "PCM_16", "c.ogg": "VORBIS", "d.mp3": "MPEG_LAYER_III", "é/e.wav": "FLOAT"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Recordings of every container, some long enough that cuts have to seek, and one of them a link."""
    folder = tmp_path_factory.mktemp("recordings")
    for seed, (name, subtype) in enumerate(FORMATS.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        samples = np.random.default_rng(seed).uniform(-0.3, 0.3, (22050 * (4 + 6 * seed), 1 + seed % 2))
        soundfile.write(folder / name, samples.astype(np.float32), 22050, subtype=subtype)
    (folder / "linked.flac").symlink_to(folder / "b.flac")
    return scan(folder)


@pytest.fixture(scope="module")
def shards(files: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_shards(files, tmp_path_factory.mktemp("shards"), 0.001)


def test_a_recording_in_a_shard_reads_like_its_file(files: Manifest, shards: Manifest) -> None:
    assert len({clip.shard for clip in shards.clips}) > 1, "so small shards must be several"
    for file, packed in zip(files.clips, shards.clips, strict=True):
        assert file.path == packed.path
        here, there = file.place(files.root), packed.place(shards.root)
        assert isinstance(there, Member) and read_header(here) == read_header(there)
        assert torch.equal(read_audio(here, 16000), read_audio(there, 16000))
        for start, num in ((0, 500), (16001, 16000), (50000, None)):
            assert torch.equal(read_audio(here, 16000, start, num), read_audio(there, 16000, start, num)), file.path


def test_the_manifest_names_the_same_recordings(files: Manifest, shards: Manifest) -> None:
    read = read_manifest(shards.root / "manifest.jsonl")
    assert read.clips == shards.clips and read.classes == files.classes
    assert fingerprint(read) == fingerprint(files), "a run may go on from files to shards"


def test_tar_gives_the_files_back(files: Manifest, shards: Manifest, tmp_path: Path) -> None:
    for shard in shards.root.glob("*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(tmp_path, filter="data")
    for clip in files.clips:
        assert (tmp_path / clip.path).read_bytes() == (files.root / clip.path).read_bytes()


def test_the_same_recordings_make_the_same_shards(files: Manifest, shards: Manifest, tmp_path: Path) -> None:
    again = write_shards(files, tmp_path / "again", 0.001)
    for shard in sorted({str(clip.shard) for clip in again.clips}):
        assert (again.root / shard).read_bytes() == (shards.root / shard).read_bytes()


def test_a_damaged_shard_is_told_like_a_damaged_file(files: Manifest, tmp_path: Path) -> None:
    packed = write_shards(files, tmp_path / "s", 1.0)
    shard = packed.root / "shard-00000.tar"
    last = packed.clips[-1]
    shard.write_bytes(shard.read_bytes()[: last.offset + last.size // 2])
    assert len(read_audio(packed.clips[0].place(packed.root), 16000))
    ogg = next(clip for clip in packed.clips if clip.path == "c.ogg")
    cut = Member(shard, ogg.offset, ogg.size // 2)
    with pytest.raises(AudioError, match="truncated"):
        read_header(cut)
    shard.unlink()
    with pytest.raises(AudioError, match=r"shard-00000.tar at byte \d+: no such file"):
        read_header(last.place(packed.root))


def test_what_cannot_be_packed(files: Manifest, shards: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds shards already"):
        write_shards(files, shards.root, 1.0)
    with pytest.raises(UserError, match="in shards already"):
        write_shards(shards, tmp_path / "twice", 1.0)
    with pytest.raises(UserError, match="--gigabytes 0"):
        write_shards(files, tmp_path / "none", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_shards(files, tmp_path / "file", 1.0)


def test_the_command(files: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["data", "shard", f"data.root={files.root}", "--out", str(out), "--gigabytes", "0.002"]) == 0
    assert f"use them: data.manifest={out}/manifest.jsonl" in capsys.readouterr().out
    assert cli.main(["data", "check", f"data.manifest={out}/manifest.jsonl"]) == 0
    assert "6 good, 0 bad" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["{root}/a.wav", "../outside/a.wav", "sub/../a.wav"])
def test_a_shard_holds_nothing_that_unpacks_elsewhere(tmp_path: Path, path: str) -> None:
    for folder in ("root/sub", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("root/a.wav", "outside/a.wav"):
        soundfile.write(tmp_path / name, np.zeros(100), 8000)
    clip = Clip(path.format(root=tmp_path / "root"))
    with pytest.raises(UserError, match=r"is not below .*: give data\.root"):
        write_shards(checked(tmp_path / "root", [clip], None), tmp_path / "shards", 1.0)
    assert not (tmp_path / "shards").exists()
