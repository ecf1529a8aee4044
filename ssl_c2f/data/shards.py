"""Packing many small recordings into few large files, which shared file systems serve much faster.

A shard is a plain, uncompressed tar file of the recordings as they are: nothing is decoded, so training on shards is
bit for bit training on the files, and `tar -x` gives those back. The manifest beside the shards says at which byte each
recording begins; it is read by seeking, in any order.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ssl_c2f.core.options import UserError
from ssl_c2f.data.manifest import Clip, Manifest, write_manifest


def write_shards(
    manifest: Manifest, folder: Path, gigabytes: float, progress: Callable[[int, int], object] | None = None
) -> Manifest:
    """Write DIR/shard-00000.tar ... of at most so many gigabytes each (one recording at least), and DIR/manifest.jsonl.

    Returns:
        The manifest, which holds the same clips with the same labels and folds.

    Raises:
        UserError: the folder has shards already, cannot be written, or a recording went missing.
    """
    if gigabytes <= 0:
        raise UserError(f"--gigabytes {gigabytes:g}: must be above 0")
    if (folder / "manifest.jsonl").exists():
        raise UserError(f"{folder}: holds shards already; choose another --out")
    if inside := [clip for clip in manifest.clips if clip.shard]:
        raise UserError(f"{inside[0].shard}: these recordings are in shards already")
    packed: list[Clip] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, clips in enumerate(_groups(manifest, gigabytes * 1e9)):
            packed += _write_shard(folder / f"shard-{index:05}.tar", manifest.root, clips)
            if progress:
                progress(len(packed), len(manifest.clips))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None
    result = Manifest(folder, tuple(packed), manifest.classes, manifest.bad)
    write_manifest(result, folder / "manifest.jsonl")  # last: shards without it are no shards
    return result


def _groups(manifest: Manifest, most: float) -> Iterator[list[Clip]]:
    """Consecutive clips of at most `most` bytes, and one recording at least."""
    group: list[Clip] = []
    total = 0
    for clip in manifest.clips:
        more = group and group[-1].path == clip.path  # another stretch of the same recording
        size = 0 if more else (manifest.root / clip.path).stat().st_size
        if group and total + size > most and not more:
            yield group
            group, total = [], 0
        group.append(clip)
        total += size
    yield group


def _write_shard(file: Path, root: Path, clips: Sequence[Clip]) -> list[Clip]:
    """Written under a temporary name and renamed, so that a shard is whole or not there."""
    temporary = file.with_suffix(".tmp")
    try:
        with temporary.open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, dereference=True) as tar:
                for path in dict.fromkeys(clip.path for clip in clips):
                    tar.add(root / path, path, filter=_anonymous)
            stream.flush()
            os.fsync(stream.fileno())
        with tarfile.open(temporary) as tar:
            members = {member.name: member for member in tar}
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
    return [
        replace(clip, shard=file.name, offset=members[clip.path].offset_data, size=members[clip.path].size)
        for clip in clips
    ]


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner, rights and times: the same recordings make the same shards."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member
