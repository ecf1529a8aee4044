"""Scores of predictions. n: clips, C: classes."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of clips whose highest score is their label: (n, C), (n, C) of 0 and 1."""
    return float((scores.argmax(1) == labels.argmax(1)).float().mean())


def wilson_interval(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share (Wilson, 1927); unlike the normal one it stays within 0 and 1."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
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
    from sklearn.metrics import average_precision_score, roc_auc_score  # 2 s, which each job would pay

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
