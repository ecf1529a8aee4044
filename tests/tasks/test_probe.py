"""Probes are fitted without the fold that they are scored on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from trained_runs import CLASSES, of, write_sounds

from ssl_c2f.core.options import UserError
from ssl_c2f.data.front_end import Batch
from ssl_c2f.data.manifest import scan
from ssl_c2f.tasks import probe
from ssl_c2f.tasks.probe import ProbeOptions, deal, linear_scores, probe_fold, standardise
from ssl_c2f.train import metrics


@given(
    counts=st.lists(st.integers(1, 13), min_size=1, max_size=5), k=st.integers(2, 6), seed=st.integers(0, 99)
)
def test_dealt_folds_are_even_and_stratified(counts: list[int], k: int, seed: int) -> None:
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    shuffled = target[torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))]
    folds = deal(torch.eye(len(counts))[shuffled], k, seed)
    for clips in (folds, *(folds[shuffled == i] for i in range(len(counts)))):
        sizes = torch.bincount(clips, minlength=k + 1)[1:]
        assert int(sizes.max() - sizes.min()) <= 1
    assert torch.equal(folds, deal(torch.eye(len(counts))[shuffled], k, seed))


def blobs(n: int, num_classes: int, seed: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(n) % num_classes
    x = torch.randn(n, 12, generator=generator)
    return x + spread * torch.randn(num_classes, 12, generator=generator)[target], torch.eye(num_classes)[target], (
        torch.arange(n) // num_classes % 5 + 1
    )


def test_the_path_of_regressions_equals_separate_ones() -> None:
    x, labels, _ = blobs(60, 3, 0, 0.5)
    path = linear_scores(x, labels, x, [1e-3, 1.0], single=True)
    for strength, scores in zip((1e-3, 1.0), path, strict=True):
        model = LogisticRegression(C=strength, max_iter=2000, tol=1e-6).fit(x.numpy(), labels.argmax(1).numpy())
        assert np.abs(model.predict_proba(x.numpy()) - scores.numpy()).max() < 0.01
    several = torch.stack([labels[:, 0], 1 - labels[:, 1], torch.zeros(60)], dim=1)
    (scores,) = linear_scores(x, several, x, [1.0], single=False)
    model = LogisticRegression(C=1.0, max_iter=2000, tol=1e-6).fit(x.numpy(), several[:, 1].numpy())
    assert np.abs(model.predict_proba(x.numpy())[:, 1] - scores[:, 1].numpy()).max() < 0.01
    assert not scores[:, 2].any()
    without = labels[:, 1] == 0
    (scores,) = linear_scores(x[without], labels[without], x, [1.0], single=True)
    assert not scores[:, 1].any() and metrics.accuracy(scores[without], labels[without]) > 0.8
    assert torch.equal(linear_scores(x[:1], labels[:1], x, [1.0], single=True)[0], labels[:1].expand(60, 3))


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), fold=st.integers(1, 5))
def test_a_fold_has_no_say_in_how_it_is_judged(seed: int, fold: int) -> None:
    """Whatever the features and labels of the held-out fold, C and the classifier come from the others alone."""
    x, labels, folds = blobs(30, 3, seed, 0.7)
    few = ProbeOptions(strengths=(1e-3, 1e-1))
    result = probe_fold(x, labels, folds, fold, few)
    other_x, other_labels = x.clone(), labels.clone()
    other_x[folds == fold] = other_x[folds == fold] * 100 + 7
    other_labels[folds == fold] = other_labels[folds == fold].roll(1, dims=1)
    assert probe_fold(other_x, other_labels, folds, fold, few)["C"] == result["C"]
    flipped = probe_fold(x, other_labels, folds, fold, few)
    assert result["linear"] + flipped["linear"] <= 1 + 1e-6 and result["clips"] == int((folds == fold).sum())
    far, place = torch.full((1, 12), 1e6), torch.tensor([fold])  # a clip that has no say in the scale of the others
    more = torch.cat([x, far]), torch.cat([labels, labels[:1]]), torch.cat([folds, place])
    with_outlier = probe_fold(*more, fold, few)
    for kind in ("linear", "knn"):
        more_right = with_outlier[kind] * with_outlier["clips"] - result[kind] * result["clips"]
        assert round(more_right, 3) in (0, 1)


def test_features_without_information_are_at_chance() -> None:
    """The classic leak (scaling or choosing C with the held-out fold in it) shows as better than chance."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(3):
        x = torch.randn(100, 200, generator=generator)
        labels = torch.eye(2)[torch.randint(2, (100,), generator=generator)]
        folds = torch.arange(100) % 5 + 1
        weak = ProbeOptions(strengths=(1e-2,))
        values += [probe_fold(x, labels, folds, fold, weak)["linear"] for fold in range(1, 6)]
    assert abs(sum(values) / len(values) - 0.5) < 0.1
    x, labels, folds = blobs(60, 3, 1)
    assert probe_fold(x, labels, folds, 1, ProbeOptions(strengths=(1e-2, 1.0)))["linear"] == 1.0


def test_the_strength_that_generalises_is_chosen() -> None:
    """Two thirds are of one class. Useless features are best all but ignored, a useful one is best used."""
    generator = torch.Generator().manual_seed(0)
    labels, folds = torch.eye(2)[(torch.arange(60) % 3 == 0).long()], torch.arange(60) // 3 % 5 + 1
    for order in ((1e-6, 1.0), (1.0, 1e-6)):
        both = ProbeOptions(strengths=order)
        useless = torch.randn(60, 300, generator=generator)
        useful = 4 * labels[:, 1:] + 0.1 * torch.randn(60, 1, generator=generator)
        assert probe.choose_strength(useless, labels, folds, both, True)[0] == 1e-6
        assert probe.choose_strength(useful, labels, folds, both, True)[0] == 1.0
        equal = torch.eye(2)[torch.arange(60) % 2]  # where both are right, the stronger regularisation
        assert probe.choose_strength(equal * 9, equal, torch.arange(60) // 2 % 5 + 1, both, True)[0] == 1e-6


def test_standardise_survives_constant_features() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    a, b = standardise(x, torch.tensor([[2.0, 6.0]]))
    assert torch.equal(a, torch.tensor([[-1.0, 0.0], [1.0, 0.0]])) and torch.equal(b, torch.tensor([[0.0, 1.0]]))


@given(frames=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_log_mel_statistics_ignore_padding(frames: list[int]) -> None:
    spec = torch.randn(len(frames), 6, 3, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(1)
    batch = Batch(spec, torch.tensor(frames), none, none, none, geometry=None, short=True)  # type: ignore[arg-type]
    for row, clip, n in zip(probe.log_mel_statistics(batch)["mean+std"], spec, frames, strict=True):
        want = torch.cat([clip[:n].mean(0), clip[:n].std(0, correction=0)])
        torch.testing.assert_close(row, want, atol=1e-6, rtol=1e-5)


def test_probe_of_a_checkpoint(autoencoder: Path, tones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = probe.probe(autoencoder, of(ProbeOptions, tones, strengths=[0.01, 1.0]))
    assert json.loads((autoencoder / "probe" / "tones" / "probe.json").read_text()) == result
    names = [(row["features"], row["readout"]) for row in result["rows"]]
    plain = ("mean", "mean+std", probe.CHOSEN)
    kinds = ("mean", "mean+std", "bands", "bands+std", probe.CHOSEN)
    encoders = ("checkpoint", "random encoder")
    assert names == [*((n, r) for n in encoders for r in kinds), *(("log-mel", r) for r in plain)]
    for row in result["rows"]:
        if row["readout"] == probe.CHOSEN:  # on the training folds alone
            of_fold = {r["readout"]: r["folds"] for r in result["rows"] if r["features"] == row["features"]}
            for fold, values in row["folds"].items():
                chosen = of_fold[values["readout"]][fold]
                assert values["linear"] == chosen["linear"]
                assert chosen["inner"] == max(f[fold]["inner"] for r, f in of_fold.items() if r != probe.CHOSEN)
        folds = [row["folds"][str(i)]["linear"] for i in range(1, 6)]
        assert row["linear"]["mean"] == pytest.approx(sum(folds) / 5)
        assert row["linear"]["std"] == pytest.approx(np.std(folds, ddof=1))
    assert "own 5 folds (15 recordings)" in capsys.readouterr().out
    bare = of(ProbeOptions, tones, strengths=[1.0], baseline=False, random=False)
    again = probe.probe(autoencoder, bare)["rows"]
    assert [row["knn"] for row in again[:4]] == [row["knn"] for row in result["rows"][:4]]


def test_probe_makes_folds_where_there_are_none(autoencoder: Path, tmp_path: Path) -> None:
    root = write_sounds(tmp_path / "sounds", per_class=4)
    for file in root.rglob("*.wav"):
        file.rename(file.with_name(f"clip{file.name[0]}.wav"))
    values = dict(random=False, strengths=[1.0], splits=2, out=str(tmp_path))
    result = probe.probe(autoencoder, of(ProbeOptions, root, **values))
    assert result["split"] == "2 stratified folds, seed 0"
    assert [fold["clips"] for fold in result["rows"][0]["folds"].values()] == [6, 6]
    with pytest.raises(UserError, match="12 labelled recordings are too few for 13 folds"):
        probe.probe(autoencoder, of(ProbeOptions, root, splits=13))
    with pytest.raises(UserError, match="at least two classes"):
        probe.probe(autoencoder, of(ProbeOptions, write_sounds(tmp_path / "one", CLASSES[:1], 2)))


def test_probe_of_several_labels(autoencoder: Path, tones: Path, tmp_path: Path) -> None:
    lines = ["path,labels,fold"] + [
        f"{clip.path},{clip.labels[0]}{';early' if clip.fold in (1, 2, 4) and i % 2 else ''},{clip.fold}"
        for i, clip in enumerate(scan(tones).clips)
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    data = {"root": str(tones), "manifest": str(tmp_path / "list.csv")}
    values = dict(data=data, random=False, strengths=[1.0], out=str(tmp_path))
    result = probe.probe(autoencoder, of(ProbeOptions, tones, **values))
    assert all(row["metric"] == "map" and 0 < row["linear"]["mean"] <= 1 for row in result["rows"])
    assert result["classes"] == [*CLASSES, "early"]
