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
from pathlib import Path, PurePosixPath

from ssl_c2f.core.files import new_folder
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
    for path in map(PurePosixPath, (clip.path for clip in manifest.clips)):
        if path.is_absolute() or ".." in path.parts:  # tar would put it elsewhere when it is unpacked
            raise UserError(f"{path} is not below {manifest.root}: give data.root, and paths relative to it")
    packed: list[Clip] = []
    with new_folder(folder) as new:
        for index, clips in enumerate(_groups(manifest, gigabytes * 1e9)):
            try:
                packed += _write_shard(new / f"shard-{index:05}.tar", manifest.root, clips)
            except OSError as error:
                raise UserError(f"{error.filename or folder}: {error.strerror}") from None
            if progress:
                progress(len(packed), len(manifest.clips))
        result = Manifest(folder, tuple(packed), manifest.classes, manifest.bad)
        write_manifest(result, new / "manifest.jsonl")
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
    paths = list(dict.fromkeys(clip.path for clip in clips))  # of which several clips may be stretches
    with file.open("wb") as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, dereference=True) as tar:
            for path in paths:
                tar.add(root / path, path, filter=_anonymous)
        stream.flush()
        os.fsync(stream.fileno())
    with tarfile.open(file) as tar:
        members = dict(zip(paths, tar, strict=True))
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
