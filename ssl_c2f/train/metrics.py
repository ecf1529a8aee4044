"""Scores of predictions. n: clips, C: classes."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_c2f.core import draws


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Fraction of clips whose highest score is their label: (n, C), (n, C) of 0 and 1."""
    return float((scores.argmax(1) == labels.argmax(1)).float().mean())


def wilson_interval(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson, 1927); unlike the normal one it stays within 0 and 1."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, spread = right / n, z * z / n
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def confusion_matrix(scores: Tensor, labels: Tensor) -> Tensor:
    """(C, C) counts; the rows are the labels, the columns what was predicted."""
    classes = labels.shape[1]
    pairs = labels.argmax(1) * classes + scores.argmax(1)
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def multi_label(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean average precision, mean AUC and d', over the classes with both positive and negative clips.

    d' = sqrt(2) times the normal quantile of the AUC, as in the AudioSet papers (Gemmeke et al., ICASSP 2017).
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # takes 2 s

    y, s = labels.numpy(), scores.double().numpy()
    usable = (y.sum(0) > 0) & (y.sum(0) < len(y))
    if not usable.any():
        return {"map": math.nan, "auc": math.nan, "d_prime": math.nan}
    auc = float(np.mean(roc_auc_score(y[:, usable], s[:, usable], average=None)))
    return {
        "map": float(np.mean(average_precision_score(y[:, usable], s[:, usable], average=None))),
        "auc": auc,
        "d_prime": math.sqrt(2) * NormalDist().inv_cdf(min(max(auc, 1e-6), 1 - 1e-6)),
    }


def map_interval(
    value: float, scores: Tensor, labels: Tensor, resamples: int = 200, confidence: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of a mean average precision: normal, with the std over resamples of the clips (bootstrap).

    Quantiles of the resamples would be too high: a positive that is drawn twice ranks next to itself, so resamples
    score higher than the clips they are drawn from. The draws are the same each time.
    """
    n = len(scores)
    drawn = draws.integers(draws.key("bootstrap", torch.arange(resamples)[:, None], torch.arange(n)), n)
    counts = torch.stack([torch.bincount(row, minlength=n) for row in drawn], dim=1).to(torch.uint8).numpy()
    columns = zip(scores.T.double().numpy(), labels.T.numpy() > 0, strict=True)
    found = np.stack([counted_precision(*column, counts) for column in columns])  # (C, resamples)
    there = np.isfinite(found)
    means = np.nansum(found, 0)[there.any(0)] / there.sum(0)[there.any(0)]
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * float(means.std())
    return max(value - half, 0.0), min(value + half, 1.0)


def counted_precision(
    score: npt.NDArray[np.float64], label: npt.NDArray[np.bool_], counts: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    """(R,) average precision of a class where clip i occurs counts[i, r] times: (n,), (n,), (n, R).

    NaN where there are no positives or no negatives.
    """
    if not label.any():
        return np.full(counts.shape[1], np.nan)
    levels = np.unique(score[label])[::-1]  # precision is averaged over the positives' scores
    order = np.argsort(-score, kind="stable")
    starts = np.searchsorted(-score[order], -levels, side="right")  # behind the last clip of at least each level
    there = np.add.reduceat(counts[order], np.append(0, starts[starts < len(score)]), axis=0, dtype=np.int64).cumsum(0)
    order = order[label[order]]
    gain = np.add.reduceat(counts[order], np.searchsorted(-score[order], -levels), axis=0, dtype=np.int64)
    positives = gain.sum(0)
    precision = gain.cumsum(0) / np.maximum(there[: len(levels)], 1)
    found = (gain * precision).sum(0) / np.maximum(positives, 1)
    return np.where((positives > 0) & (positives < there[-1]), found, np.nan)


def effective_rank(features: Tensor) -> float:
    """How many directions (n, D) features use: exp of the entropy of their singular values (RankMe, Garrido et al.,
    ICML 2023), of centred features, so that a mean that all share is no direction. 1 is collapse to a line."""
    values = torch.linalg.svdvals(features.double() - features.double().mean(0))
    share = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(share).sum().exp())


def uniformity(features: Tensor) -> float:
    """Log mean of exp(-2 distance^2) between (n, D) features of length 1 (Wang & Isola, ICML 2020): 0 where all are one
    point, and the lower the more evenly they spread."""
    x = F.normalize(features.float(), dim=1)
    apart = torch.pdist(x).square()
    return float((-2 * apart).exp().mean().log()) if len(apart) else math.nan


def score(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy where every clip has exactly one label, else the multi-label scores."""
    if bool((labels.sum(1) == 1).all()):
        return {"accuracy": accuracy(scores, labels)}
    return multi_label(scores, labels)


def knn_scores(queries: Tensor, bank: Tensor, labels: Tensor, k: int = 10, temperature: float = 0.1) -> Tensor:
    """(n, C) votes of the k nearest features by cosine similarity, weighted by exp(similarity / temperature).

    The weighting of Wu et al., CVPR 2018, for any number of labels per clip. queries: (n, D); bank: (m, D); labels:
    (m, C).
    """
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T
    nearest, index = similarity.topk(min(k, len(bank)), dim=1)
    weights = ((nearest - 1) / temperature).exp()
    return torch.einsum("nk,nkc->nc", weights, labels[index].float()) / weights.sum(1, keepdim=True)
