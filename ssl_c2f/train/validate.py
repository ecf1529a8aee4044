"""Validation at full resolution, whatever the geometry that training is in: one yardstick for all phases and runs.

A fine model tested on coarse input collapses, and a loss on coarse input is another quantity. So a copy of the weights
is transferred to the fine geometry and tested there, on held-out clips, with fine statistics, one mask ratio and fixed
masks, averaged over several draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssl_c2f.core import draws
from ssl_c2f.core.options import UserError
from ssl_c2f.core.signals import Stop
from ssl_c2f.curriculum.geometry import Geometry
from ssl_c2f.curriculum.transfer import transfer
from ssl_c2f.data.corpus import Corpus
from ssl_c2f.data.dataset import in_batches, make_loader, spread
from ssl_c2f.data.front_end import Batch, Items, Masking
from ssl_c2f.models.heads import Readout
from ssl_c2f.objectives import Objective
from ssl_c2f.objectives.mae import MAEOptions
from ssl_c2f.train import metrics
from ssl_c2f.train.recipe import RunOptions


def batches(
    corpus: Corpus, geometry: Geometry, clips: Sequence[int], device: torch.device, batch_size: int,
    *, per_clip: int | None = None, masking: Masking | None = None, draw: int = 0, stop: Stop | None = None,
) -> Iterator[Batch]:
    """Windows of clips in order. Masks depend on the clip and the draw alone. Raises Abandoned where `stop` says so."""
    windows = corpus.windows(geometry, clips, per_clip)
    front_end = corpus.front_end(geometry).to(device)
    for items in make_loader(windows, in_batches(len(windows), batch_size), corpus.workers(geometry)):
        if not isinstance(items, Items):
            corpus.bad.add(items)
            continue
        corpus.bad.add(items.bad)
        if stop:
            stop.check()
        yield front_end(replace(items, keys=draws.key(items.keys, "validation", draw)).to(device), masking)


def at_full_resolution(
    options: RunOptions, state: Mapping[str, Tensor], geometry: Geometry, num_classes: int, device: torch.device
) -> Objective:
    """A copy of an objective's weights in the fine geometry. The global generator is left alone."""
    with torch.random.fork_rng([]):
        objective = options.build(options.fine_geometry, num_classes)
    fitted, _ = transfer(state, geometry, objective.state_dict(), options.fine_geometry)
    objective.load_state_dict(fitted)
    return objective.to(device).eval()


@torch.no_grad()
def validate(
    objective: Objective, options: RunOptions, corpus: Corpus, device: torch.device, stop: Stop | None = None
) -> dict[str, float]:
    """Loss and metrics on held-out clips (where the loss is comparable at all) and, for masked objectives with labelled
    clips, the accuracy (or mAP) of a kNN probe.

    Raises:
        Abandoned: `stop` was set meanwhile.
    """
    result: dict[str, float] = {}
    o = options.evaluation
    if corpus.held_out:
        clips = spread(corpus.held_out, o.max_clips)
        if not options.objective.num_masks:
            result |= _labelled(objective, options, corpus, clips, device, stop)
        elif objective.comparable_loss:
            result |= _masked_loss(objective, options, corpus, clips, device, stop)
    if options.objective.num_masks and corpus.num_classes > 1:
        result |= _knn(objective, options, corpus, device, stop)
    return {f"val/{name}": value for name, value in result.items()}


def _masked_loss(
    objective: Objective, options: RunOptions, corpus: Corpus, clips: Sequence[int], device: torch.device,
    stop: Stop | None,
) -> dict[str, float]:
    o, total, count = options.evaluation, dict[str, float](), 0
    masking = Masking("uniform", o.mask_ratio, options.mask.size, options.objective.num_masks)
    for draw in range(o.mask_draws):
        for batch in batches(
            corpus, options.fine_geometry, clips, device, o.batch_size, per_clip=1, masking=masking, draw=draw,
            stop=stop,
        ):
            found = objective(batch)
            for name, value in {"loss": found.loss, **found.metrics}.items():
                total[name] = total.get(name, 0.0) + float(value) * len(batch.spec)
            count += len(batch.spec)
    if isinstance(options.objective, MAEOptions) and options.objective.norm_targets and total:
        total["loss_normalised_targets"] = total.pop("loss")
    return {name: value / count for name, value in total.items()}


def _labelled(
    objective: Objective, options: RunOptions, corpus: Corpus, clips: Sequence[int], device: torch.device,
    stop: Stop | None,
) -> dict[str, float]:
    scores, found = clip_scores(
        objective, corpus, options.fine_geometry, clips, device, options.evaluation.batch_size, stop
    )
    return metrics.score(scores, corpus.source(options.fine_geometry).labels(found))


@torch.no_grad()
def clip_scores(
    objective: Objective, corpus: Corpus, geometry: Geometry, clips: Sequence[int], device: torch.device,
    batch_size: int, stop: Stop | None = None,
) -> tuple[Tensor, Tensor]:
    """(n, C) scores of a supervised objective, averaged over each readable clip's windows, and (n,) which clips."""
    scores, index, frames = [], [], []
    for batch in batches(corpus, geometry, clips, device, batch_size, stop=stop):
        scores.append(objective.scores(batch).cpu())  # type: ignore[union-attr, operator]
        index.append(batch.index.cpu())
        frames.append(batch.num_frames.cpu())
    _some(index, corpus)
    return mean_by_clip(torch.cat(scores), torch.cat(index), torch.cat(frames))


def mean_by_clip(rows: Tensor, index: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Average the (n, D) rows of each clip -> (clips, D), and (clips,) which clips, ascending.

    A row counts as much as its (n,) real frames: what is left over at a recording's end has no equal say.
    """
    found, place = torch.unique(index, return_inverse=True)
    weights = frames.to(rows.dtype)[:, None]
    total = torch.zeros(len(found), rows.shape[1], dtype=rows.dtype).index_add_(0, place, rows * weights)
    return total / torch.zeros(len(found), 1, dtype=rows.dtype).index_add_(0, place, weights), found


@torch.no_grad()
def features(
    objective: Objective, corpus: Corpus, geometry: Geometry, clips: Sequence[int], device: torch.device,
    batch_size: int, kind: Readout = "mean", per_clip: int | None = None, stop: Stop | None = None,
) -> tuple[Tensor, Tensor]:
    """(n, D) features, averaged over the windows of each readable clip, and (n,) which clips."""
    rows, index, frames = [], [], []
    for batch in batches(corpus, geometry, clips, device, batch_size, per_clip=per_clip, stop=stop):
        rows.append(objective.embed(batch, kind).float().cpu())
        index.append(batch.index.cpu())
        frames.append(batch.num_frames.cpu())
    _some(index, corpus)
    return mean_by_clip(torch.cat(rows), torch.cat(index), torch.cat(frames))


def _some(index: Sequence[Tensor], corpus: Corpus) -> None:
    if not index:
        raise UserError(f"none of these recordings in {corpus.manifest.root} can be read")


def _knn(
    objective: Objective, options: RunOptions, corpus: Corpus, device: torch.device, stop: Stop | None
) -> dict[str, float]:
    """Nearest neighbours among training clips; without held-out clips, each fold against the other folds."""
    o, clips = options.evaluation, corpus.manifest.clips
    labelled = spread([i for i in corpus.training if clips[i].labels], o.max_clips)
    held_out = spread([i for i in corpus.held_out if clips[i].labels], o.max_clips)
    folds = {clips[i].fold for i in labelled}
    if not labelled or not (held_out or (len(folds) > 1 and None not in folds)):
        return {}
    rows, index = features(
        objective, corpus, options.fine_geometry, [*labelled, *held_out], device, o.batch_size, per_clip=1,
        stop=stop,
    )
    labels = corpus.source(options.fine_geometry).labels(index)
    if held_out:
        groups = [torch.isin(index, torch.tensor(held_out))]
    else:
        groups = [torch.tensor([clips[i].fold == fold for i in index.tolist()]) for fold in sorted(folds)]  # type: ignore[type-var]
    scores = [metrics.knn_scores(rows[group], rows[~group], labels[~group], o.knn) for group in groups]
    wanted = torch.cat([labels[group] for group in groups])
    return {f"knn_{name}": value for name, value in metrics.score(torch.cat(scores), wanted).items()}
