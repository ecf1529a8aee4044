"""AAC and others through PyAV, MP3 without a length, channels, and what a folder holds that is not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ssl_c2f.data import containers
from ssl_c2f.data.decode import AudioError, Header, Member, read_audio, read_header

RATE = 16000
CODECS = {"m4a": ("aac", "ipod"), "mp4": ("aac", "mp4"), "aac": ("aac", "adts"), "webm": ("libopus", "webm")}


def sweep(seconds: float, rate: int) -> np.ndarray:
    """A tone that rises, so that no two places sound alike."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (200 + 100 * time) * time)).astype(np.float32)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Stereo files of five seconds."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'ssl_c2f[formats]'")
    folder, files, rate = tmp_path_factory.mktemp("foreign"), [], 48000
    frame = av.AudioFrame.from_ndarray(np.stack([sweep(5, rate)] * 2), format="fltp", layout="stereo")
    for ending, (codec, kind) in CODECS.items():
        files.append(folder / f"a.{ending}")
        with av.open(str(files[-1]), "w", format=kind) as container:
            stream = container.add_stream(codec, rate=rate, layout="stereo")
            frame.sample_rate, frame.pts = rate, 0
            resampler = av.AudioResampler(stream.codec_context.format, "stereo", rate)
            for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
                container.mux(stream.encode(piece))
    return files


def test_aac_and_others_are_read_whole_and_cut_by_seeking(foreign: list[Path]) -> None:
    expected = torch.from_numpy(sweep(5, RATE))
    for file in foreign:
        header = read_header(file)
        assert header[1:] == (48000, 2) and abs(header.num_samples - 5 * 48000) < 2100, file
        whole = read_audio(file, RATE)
        inner = slice(RATE, 4 * RATE)
        # plain .aac holds its encoder's delay, which need not be whole samples at this rate
        delay = min(range(700), key=lambda d: float((whole[d:][inner] - expected[inner]).abs().mean()))
        assert (whole[delay:][inner] - expected[inner]).abs().max() < 0.1, file
        assert delay == 0 or file.suffix == ".aac"
        for start in (0, 1, 5000, 3 * RATE, len(whole) - 800):
            cut = read_audio(file, RATE, start, 800)
            torch.testing.assert_close(cut, whole[start : start + 800], rtol=0, atol=0.01)
        with pytest.raises(AudioError, match="ends before sample"):
            read_audio(file, RATE, 6 * RATE, 10)


def test_they_are_read_from_shards(foreign: list[Path], tmp_path: Path) -> None:
    for file in foreign:
        content = file.read_bytes()
        (tmp_path / "shard.tar").write_bytes(b"x" * 100 + content + b"y" * 100)
        member = Member(tmp_path / "shard.tar", 100, len(content))
        assert read_header(member) == read_header(file)
        assert torch.equal(read_audio(member, RATE, 4000, 100), read_audio(file, RATE, 4000, 100))


def test_damage_is_named_and_a_healthy_file_never_called_damaged(
    foreign: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in foreign:
        (tmp_path / file.name).write_bytes(file.read_bytes()[:60])
        with pytest.raises(AudioError, match=r"damaged, or not audio|no samples"):
            read_header(tmp_path / file.name)
    monkeypatch.setattr("ssl_c2f.data.decode.has_av", lambda: False)
    for file in foreign:
        with pytest.raises(AudioError, match=r"of a format that needs pip install 'ssl_c2f\[formats\]'"):
            read_header(file)


def test_the_endings_of_soundfile_are_known() -> None:
    wanted = {"wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "au", "caf", "w64", "rf64", "voc", "snd"}
    assert {f".{name}" for name in wanted} <= containers.endings()
    assert (".m4a" in containers.endings()) == containers.has_av() and ".raw" not in containers.endings()


@pytest.mark.parametrize("ending", ["aif", "au", "caf", "flac", "opus", "rf64", "voc", "w64", "WAV"])
def test_every_one_of_them_is_read(tmp_path: Path, ending: str) -> None:
    formats = {"aif": "AIFF", "opus": "OGG", "WAV": "WAV"}
    subtype = {"opus": "OPUS"}.get(ending, "PCM_16")
    file = tmp_path / f"a.{ending}"
    soundfile.write(file, sweep(0.5, RATE), RATE, format=formats.get(ending, ending.upper()), subtype=subtype)
    assert read_header(file) == Header(8000, RATE, 1)
    torch.testing.assert_close(read_audio(file, RATE), torch.from_numpy(sweep(0.5, RATE)), rtol=0, atol=0.2)


def test_mp3_without_a_length_is_measured_by_decoding(tmp_path: Path) -> None:
    """Loud noise after a quiet tone: by the bit rate of its beginning it would last much longer or shorter."""
    wave = np.concatenate([sweep(10, 44100), np.random.default_rng(0).normal(0, 0.3, 10 * 44100).astype(np.float32)])
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.5}
    soundfile.write(tmp_path / "tagged.mp3", wave, 44100, format="MP3", subtype="MPEG_LAYER_III", **options)
    content = (tmp_path / "tagged.mp3").read_bytes()
    assert b"Xing" in content[:200]
    second = next(i for i in range(4, 2000) if content[i : i + 2] == content[:2])
    for head in (b"", b"ID3\x04\x00\x00\x00\x00\x02\x00" + bytes(256)):
        (tmp_path / "plain.mp3").write_bytes(head + content[second:])
        said = soundfile.info(tmp_path / "plain.mp3").duration
        assert abs(said - 20) > 3, said
        header = read_header(tmp_path / "plain.mp3")
        assert abs(header.num_samples / 44100 - 20) < 0.1
        whole = read_audio(tmp_path / "plain.mp3", 44100)
        assert len(whole) == header.num_samples
        for start in (0, 5 * 44100, 19 * 44100):
            cut = read_audio(tmp_path / "plain.mp3", 44100, start, 5000)
            torch.testing.assert_close(cut, whole[start : start + 5000], rtol=0, atol=1e-4)


def test_flac_of_unknown_length_is_measured_by_decoding(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", sweep(3, RATE), RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21:26] = bytes([content[21] & 0xF0]) + bytes(4)  # total_samples of STREAMINFO: 0 means unknown
    (tmp_path / "b.flac").write_bytes(content)
    assert read_header(tmp_path / "b.flac") == Header(3 * RATE, RATE, 1)
    cuts = [read_audio(tmp_path / f"{name}.flac", RATE, 40000, 500) for name in "ab"]
    assert torch.equal(*cuts)


def test_one_channel_may_be_taken(tmp_path: Path) -> None:
    left = sweep(1, RATE)
    soundfile.write(tmp_path / "cancels.wav", np.stack([left, -left], 1), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "quiet.wav", np.stack([left / 4, left], 1), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", left, RATE, subtype="FLOAT")
    wave = torch.from_numpy(left)

    def read(name: str, channel: str) -> torch.Tensor:
        return read_audio(tmp_path / f"{name}.wav", RATE, channel=channel)  # type: ignore[arg-type]

    assert not read("cancels", "mean").any()
    assert torch.equal(read("cancels", "left"), wave) and torch.equal(read("cancels", "right"), -wave)
    assert torch.equal(read("quiet", "loudest"), wave) and torch.equal(read("quiet", "left"), wave / 4)
    assert all(torch.equal(read("mono", channel), wave) for channel in ("mean", "left", "right", "loudest"))
