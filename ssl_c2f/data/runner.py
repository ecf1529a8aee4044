"""Running a model over the windows that cover recordings: the one loop of validation, probes, embedding and prediction.

Legend: B batch, W windows, n recordings, D values that a model gives for a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.core.options import UserError
from ssl_c2f.core.signals import Stop
from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.dataset import Windows, in_batches, make_loader
from ssl_c2f.data.front_end import Batch, FrontEnd, Items


@dataclass(frozen=True)
class Rows:
    """Values of windows, in the order of recordings and then of time."""

    values: Tensor  # (W, D) float32
    clip: Tensor  # (W,) index into the corpus
    start: Tensor  # (W,) seconds into the file
    frames: Tensor  # (W,) real frames

    def by_clip(self) -> tuple[Tensor, Tensor]:
        """(n, D) means over the windows of each recording, and (n,) which recordings, ascending."""
        return mean_by_clip(self.values, self.clip, self.frames)


@dataclass(frozen=True)
class Runner:
    """Reads windows of a corpus, in the geometry and on the device of a front end."""

    corpus: Corpus
    front_end: FrontEnd
    batch_size: int
    stop: Stop | None = None  # asked before each batch

    @torch.no_grad()
    def run(
        self, read: Callable[[Batch], Tensor], clips: Sequence[int], *, per_clip: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Rows:
        """The values (B, D) that `read` gives for each batch of the windows of `clips` (of each `per_clip` at most).

        A recording of which any window cannot be read is left out whole; `corpus.bad` names it.

        Raises:
            UserError: none can be read, or more cannot be than data.max_bad_files. Abandoned: `stop` was set.
        """
        g = self.front_end.geometry
        windows = self.corpus.windows(g, clips, per_clip)
        nothing = torch.zeros(0, dtype=torch.int64)
        parts, done = [(nothing.float(), nothing, nothing)], 0
        for batch in self._batches(windows):
            values = read(batch).float().cpu()
            if not values.isfinite().all():
                odd = int(batch.index.cpu()[~values.flatten(1).isfinite().all(1)][0])
                raise UserError(f"the network gives NaN or infinite values, first for "
                                f"{self.corpus.manifest.clips[odd].path}: its weights have diverged, or are damaged")
            parts.append((values, batch.index.cpu(), batch.num_frames.cpu()))
            done += len(batch.index)
            if progress:
                progress(done, len(windows))
        planned, starts = torch.tensor(windows.windows, dtype=torch.int64).view(-1, 2).unbind(1)
        values, clip, frames = (torch.cat(column) for column in zip(*parts, strict=True))
        total = len(self.corpus.manifest.clips)
        whole = clip.bincount(minlength=total) == planned.bincount(minlength=total)  # all of its windows were read
        kept = whole[clip]
        if not kept.any():
            path, reason = next(iter(self.corpus.bad.seen.items()))
            raise UserError(f"none of {len(self.corpus.bad.seen)} recordings can be read; {path}: {reason}")
        begin = torch.tensor([self.corpus.manifest.clips[i].start for i in clip[kept].tolist()])
        return Rows(values[kept], clip[kept], starts[whole[planned]] / g.sample_rate + begin, frames[kept])

    def batches(
        self, clips: Sequence[int], *, per_clip: int | None = None, masking: Masking | None = None, draw: int = 0
    ) -> Iterator[Batch]:
        """The windows of `clips` that can be read. Masks depend on the window and the draw alone.

        Raises:
            UserError: more cannot be read than data.max_bad_files. Abandoned: `stop` was set.
        """
        return self._batches(self.corpus.windows(self.front_end.geometry, clips, per_clip), masking, draw)

    def _batches(self, windows: Windows, masking: Masking | None = None, draw: int = 0) -> Iterator[Batch]:
        workers = self.corpus.workers(self.front_end.geometry)
        for items in make_loader(windows, in_batches(len(windows), self.batch_size), workers):
            if isinstance(items, UserError):
                raise UserError(str(items))
            if not isinstance(items, Items):  # nothing of the batch could be read
                self.corpus.bad.add(items)
                continue
            self.corpus.bad.add(items.bad)
            if self.stop:
                self.stop.check()
            yield self.front_end(replace(items, keys=draws.key(items.keys, "validation", draw)), masking)


def mean_by_clip(rows: Tensor, index: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Average the (W, D) rows of each recording -> (n, D), and (n,) which recordings, ascending.

    A window counts as much as its (W,) real frames: the short rest at a recording's end has less weight.
    """
    found, place = torch.unique(index, return_inverse=True)
    weights = frames.to(rows.dtype)[:, None]
    total = torch.zeros(len(found), rows.shape[1], dtype=rows.dtype).index_add_(0, place, rows * weights)
    return total / torch.zeros(len(found), 1, dtype=rows.dtype).index_add_(0, place, weights), found
