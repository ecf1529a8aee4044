"""`ssl_c2f data manifest|check|stats|build|shard`: look at recordings before training on them, list them, pack them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from ssl_c2f.core.options import Options, UserError
from ssl_c2f.core.progress import Count, table
from ssl_c2f.core.threads import in_threads
from ssl_c2f.curriculum.geometry import AudioOptions, Compression, make_geometries
from ssl_c2f.data import public
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.dataset import amount
from ssl_c2f.data.decode import AudioError
from ssl_c2f.data.manifest import Clip, Manifest, write_manifest
from ssl_c2f.data.quality import Sound, examine, remarks
from ssl_c2f.data.recordings import DataOptions, open_manifest
from ssl_c2f.data.shards import write_shards
from ssl_c2f.data.statistics import InputStatistics

_LISTED = 20  # recordings that are named of each kind


class DataCommandOptions(Options):
    """Options of the data commands."""

    data: DataOptions = DataOptions()
    audio: AudioOptions = AudioOptions()
    compression: Compression = "frame_shift"
    time_factors: tuple[int, ...] = (1, 2, 4)


def manifest(options: DataCommandOptions, out: Path) -> None:
    """Write the list of recordings, with what their headers say, so that later runs need not read those."""
    found = open_manifest(options.data)
    write_manifest(found, out)
    _say(found)
    print(out)


def build_public(options: DataCommandOptions, name: str, out: Path | None, download: bool) -> None:
    """Write the manifest of a public set into its folder, or to `out`."""
    if not options.data.root:
        raise UserError(f"data build {name}: give data.root=FOLDER, where the set is")
    root = Path(options.data.root)
    if download and name != "speech_commands":
        raise UserError(f"data build {name} --download: only speech_commands can be fetched by itself; get {name} "
                        f"from {public.SETS[name].source if name in public.SETS else 'its site'}")
    if download:
        public.download_speech_commands(root)
    with Count("reading recordings") as count:
        found, missing = public.build(name, root, progress=count.update)
    out = out or root / "manifest.csv"
    write_manifest(found, out)
    _say(found)
    print(f"{missing} listed recordings are not there" if missing else "no listed recording is missing")
    print(f"{out}\nuse it: data.manifest={out}" + ("" if out.parent == root else f" data.root={root}"))


def shard(options: DataCommandOptions, out: Path, gigabytes: float) -> None:
    """Pack the recordings into few large files."""
    found = open_manifest(options.data)
    with Count("packing") as count:
        packed = write_shards(found, out, gigabytes, count.update)
    _say(packed)
    for path, reason in found.bad:
        print(f"left out {path}: {reason}")
    print(f"{len({clip.shard for clip in packed.clips})} shards in {out}\nuse them: data.manifest={out}/manifest.jsonl")


def check(options: DataCommandOptions) -> int:
    """Decode every recording whole, name the bad ones, and list those that may not be what was meant to be recorded.

    The exit status is 1 if there are bad ones.
    """
    with Count("reading headers") as count:
        found = open_manifest(options.data, count.update)
    print("".join(f"{note}\n" for note in found.notes), end="")
    files = {clip.path: clip for clip in found.clips}

    def look(clip: Clip) -> Sound | str:
        try:
            return examine(clip.place(found.root))
        except AudioError as error:
            return error.reason

    sounds, bad = dict[str, Sound](), dict(found.bad)
    looked = in_threads(look, list(files.values()), os.cpu_count() or 1)
    with Count("decoding") as count:
        for done, (path, sound) in enumerate(zip(files, looked, strict=True), 1):
            if isinstance(sound, str):
                bad[path] = sound
            else:
                sounds[path] = sound
            count.update(done, len(files))
    for title, paths in remarks(sounds, {path: clip.sample_rate for path, clip in files.items()}).items():
        more = f", and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
        print(f"{len(paths)} {title}: {', '.join(paths[:_LISTED])}{more}")
    for path, reason in bad.items():
        print(f"{path}: {reason}")
    print(f"{len(sounds)} good, {len(bad)} bad")
    return int(bool(bad))


def stats(options: DataCommandOptions) -> None:
    """Durations, rates, labels and folds; mean and deviation of the log-mel values at each time factor."""
    with Count("reading headers") as count:
        found = open_manifest(options.data, count.update)
    _say(found)
    factors = [(factor, None) for factor in options.time_factors]
    geometries = make_geometries(options.audio, options.compression, (options.audio.num_mels, 1), factors)
    print(amount(found, range(len(found.clips)), geometries[0]))
    if found.classes:
        counts = Counter(label for clip in found.clips for label in clip.labels)
        table("labels", ("label", "clips"), counts.most_common())
    corpus = Corpus.whole(found, options.data.model_copy(update={"cache_gb": 0.0}))  # only what is measured is read
    statistics = InputStatistics(corpus)
    rows = []
    for geometry in geometries:
        measured = statistics.of(geometry)
        hop = f"{geometry.hop_ms * geometry.pool:g} ms"
        rows.append((geometry.time_factor, hop, f"{measured.mean:.4f}", f"{measured.std:.4f}"))
    table(f"log-mel values ({options.compression})", ("C", "hop", "mean", "deviation"), rows)


def _say(found: Manifest) -> None:
    print("".join(f"{note}\n" for note in found.notes), end="")
    files = {clip.path: clip for clip in found.clips}.values()
    seconds = sorted(clip.num_samples / clip.sample_rate for clip in files)
    rates = Counter(clip.sample_rate for clip in files)
    folds = sorted({clip.fold for clip in found.clips if clip.fold is not None})
    print(
        f"{len(files)} recordings, {sum(seconds) / 3600:.2f} h in all, {seconds[0]:.2f} to {seconds[-1]:.2f} s, "
        f"median {seconds[len(seconds) // 2]:.2f} s; "
        f"{', '.join(f'{n} at {rate} Hz' for rate, n in rates.most_common())}; "
        f"{len(found.classes)} labels; folds {folds or 'none'}; {len(found.bad)} unreadable"
    )
