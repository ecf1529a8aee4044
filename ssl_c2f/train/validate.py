"""Validation at full resolution, whatever the geometry of the phase, so that phases and runs can be compared.

A fine model tested on coarse input collapses, and a loss on coarse input is another quantity. So a copy of the weights
is transferred to the fine geometry and tested there, on held-out clips, with fine statistics, one mask ratio and fixed
masks, averaged over several draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssl_c2f.curriculum.phases import Masking
from ssl_c2f.data.dataset import spread
from ssl_c2f.data.runner import Runner
from ssl_c2f.objectives import Objective
from ssl_c2f.objectives.mae import MAEOptions
from ssl_c2f.objectives.supervised import Supervised
from ssl_c2f.train import metrics
from ssl_c2f.train.recipe import RunOptions


@torch.no_grad()
def validate(objective: Objective, options: RunOptions, runner: Runner) -> dict[str, float]:
    """Loss and metrics on held-out clips (where the loss is comparable at all) and, for masked objectives with labelled
    clips, the accuracy (or mAP) of a kNN probe.

    Raises:
        Abandoned: the runner's `stop` was set meanwhile.
    """
    result: dict[str, float] = {}
    if held_out := spread(runner.corpus.held_out, options.evaluation.max_clips):
        if isinstance(objective, Supervised):
            scores, found = runner.run(objective.scores, held_out).by_clip()
            result |= metrics.score(scores, runner.corpus.manifest.labels(found))
        elif objective.comparable_loss:
            result |= _masked_loss(objective, options, runner, held_out)
        if options.objective.num_masks:
            features = runner.run(lambda batch: objective.embed(batch, options.evaluation.readout), held_out).values
            result |= {"rank": metrics.effective_rank(features), "uniformity": metrics.uniformity(features)}
    if options.objective.num_masks and runner.corpus.num_classes > 1:
        result |= _knn(objective, options, runner)
    return {f"val/{name}": value for name, value in result.items()}


def _masked_loss(
    objective: Objective, options: RunOptions, runner: Runner, clips: Sequence[int]
) -> dict[str, float]:
    o, total, count = options.evaluation, dict[str, float](), 0
    masking = Masking("uniform", o.mask_ratio, options.mask.size, options.objective.num_masks)
    for draw in range(o.mask_draws):
        for batch in runner.batches(clips, per_clip=max(o.max_clips // len(clips), 1), masking=masking, draw=draw):
            found = objective(batch)
            for name, value in {"loss": found.loss, **found.metrics}.items():
                total[name] = total.get(name, 0.0) + float(value) * len(batch.spec)
            count += len(batch.spec)
    if isinstance(options.objective, MAEOptions) and options.objective.norm_targets and total:
        total["loss_normalised_targets"] = total.pop("loss")
    return {name: value / count for name, value in total.items()}


def _knn(objective: Objective, options: RunOptions, runner: Runner) -> dict[str, float]:
    """Nearest neighbours among training clips; without held-out clips, each fold against the other folds."""
    o, corpus, clips = options.evaluation, runner.corpus, runner.corpus.manifest.clips
    labelled = spread([i for i in corpus.training if clips[i].labels], o.max_clips)
    held_out = spread([i for i in corpus.held_out if clips[i].labels], o.max_clips)
    folds = {clips[i].fold for i in labelled}
    if not labelled or not (held_out or (len(folds) > 1 and None not in folds)):
        return {}
    wanted = [*labelled, *held_out]
    rows, index = runner.run(lambda batch: objective.embed(batch, o.readout), wanted, per_clip=1).by_clip()
    labels = runner.corpus.manifest.labels(index)
    if held_out:
        groups = [torch.isin(index, torch.tensor(held_out))]
    else:
        groups = [torch.tensor([clips[i].fold == fold for i in index.tolist()]) for fold in sorted(folds)]  # type: ignore[type-var]
    scores = [metrics.knn_scores(rows[group], rows[~group], labels[~group], o.knn) for group in groups]
    found = metrics.score(torch.cat(scores), torch.cat([labels[group] for group in groups]))
    return {f"knn_{name}": value for name, value in found.items()}
