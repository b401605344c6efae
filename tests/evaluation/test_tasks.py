"""Scores of labels, worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from stackwise.evaluation.tasks import class_scores, number_scores


def outputs(predicted, n_classes):
    """Logits whose largest is that of ``predicted``, by 0.1, 0.2, …"""
    found = np.zeros((len(predicted), n_classes))
    found[np.arange(len(predicted)), predicted] = 0.1 * np.arange(1, len(predicted) + 1)
    return found


def test_two_classes():
    truth, predicted = np.array([1, 1, 1, 1, 0, 0, 0]), np.array([1, 1, 1, 0, 0, 1, 0])  # tp 3, fn 1, fp 1, tn 2
    found = class_scores(truth, outputs(predicted, 2), ("no", "yes"))
    value = {name: score["value"] for name, score in found["metrics"].items()}
    assert value["accuracy"] == pytest.approx(5 / 7)
    assert value["f1 of yes"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert value["f1 macro"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert value["matthews"] == pytest.approx((3 * 2 - 1 * 1) / math.sqrt(4 * 4 * 3 * 3))
    assert found["confusion"] == [[2, 1], [1, 3]] and found["majority"] == pytest.approx(4 / 7)
    assert [(e["row"], e["label"], e["predicted"]) for e in found["wrong"]] == [(5, "no", "yes"), (3, "yes", "no")]
    assert found["wrong"][0]["probability"] == pytest.approx(1 / (1 + math.exp(-0.6)))


def test_three_classes_have_no_binary_f1():
    truth, predicted = np.array([0, 1, 2, 2, 1]), np.array([0, 2, 2, 2, 1])
    found = class_scores(truth, outputs(predicted, 3), ("a", "b", "c"))
    assert set(found["metrics"]) == {"accuracy", "f1 macro", "matthews"}
    assert found["metrics"]["f1 macro"]["value"] == pytest.approx((1 + 2 / 3 + 4 / 5) / 3)
    assert found["confusion"] == [[1, 0, 0], [0, 1, 1], [0, 0, 2]]


def test_the_interval_of_an_accuracy_is_that_of_a_proportion_and_always_the_same():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, 400)
    predicted = np.where(rng.random(400) < 0.8, truth, 1 - truth)
    one = class_scores(truth, outputs(predicted, 2), ("a", "b"))["metrics"]
    p = float((truth == predicted).mean())
    half = 1.96 * math.sqrt(p * (1 - p) / 400)
    assert one["accuracy"]["low"] == pytest.approx(p - half, abs=0.006)
    assert one["accuracy"]["high"] == pytest.approx(p + half, abs=0.006)


def test_numbers():
    truth, predicted = np.array([1.0, 2.0, 4.0, 8.0], dtype=np.float32), np.array([2.0, 1.0, 5.0, 6.0])
    found = number_scores(truth, predicted[:, None])
    value = {name: score["value"] for name, score in found["metrics"].items()}
    assert value["mean squared error"] == pytest.approx((1 + 1 + 1 + 4) / 4)
    a, b = truth - truth.mean(), predicted - predicted.mean()
    assert value["pearson"] == pytest.approx(float((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum())))
    assert value["spearman"] == pytest.approx(1 - 6 * (1 + 1 + 0 + 0) / (4 * 15))
    assert found["wrong"][0]["row"] == 3


def test_a_correlation_with_a_constant_is_not_defined():
    found = number_scores(np.array([1.0, 2.0, 3.0], dtype=np.float32), np.full((3, 1), 2.0))["metrics"]
    assert found["pearson"] == {"value": None, "low": None, "high": None}
    assert found["mean squared error"]["value"] == pytest.approx(2 / 3)


def test_scores_are_those_of_scikit_learn_and_scipy():
    rng = np.random.default_rng(11)
    for k in (2, 5):
        truth, predicted = rng.integers(0, k, 211), rng.integers(0, k, 211)
        found = class_scores(truth, outputs(predicted, k), tuple("abcde"[:k]))
        value = {name: score["value"] for name, score in found["metrics"].items()}
        assert value["f1 macro"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))
        assert value["matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, predicted))
        assert found["confusion"] == metrics.confusion_matrix(truth, predicted).tolist()
    truth, predicted = rng.integers(0, 9, 211).astype(np.float32), rng.integers(0, 30, 211) / 4
    found = number_scores(truth, predicted[:, None])["metrics"]
    assert found["pearson"]["value"] == pytest.approx(stats.pearsonr(truth, predicted).statistic)
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(truth, predicted).statistic)
    drawn = stats.bootstrap(
        (truth, predicted), lambda a, b: stats.pearsonr(a, b).statistic, paired=True, vectorized=False,
        n_resamples=1000, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert [found["pearson"]["low"], found["pearson"]["high"]] == pytest.approx([drawn.low, drawn.high], abs=0.03)
