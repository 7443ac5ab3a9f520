"""Bands of pass rates, and traces that are far apart: against exhaustive search."""

import itertools

import numpy as np
import pytest

from llmdistill.datagen import selection


def test_bands():
    assert selection.in_band(1, 4, least=0.1, most=0.5) and not selection.in_band(3, 4, least=0.1, most=0.5)
    assert not selection.in_band(0, 0) and selection.in_band(0, 4) and not selection.in_band(4, 4, most=0.99)
    with pytest.raises(ValueError, match="band is 0.5 to 0.1"):
        selection.in_band(1, 2, least=0.5, most=0.1)


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def test_the_edit_distance():
    pytest.importorskip("rapidfuzz", reason="the data extra is not installed")
    texts = ["kitten", "sitting", "", "kitten", "smitten", "日本語の文", "日本の文章"]
    found = selection.distances(texts)
    expected = [[levenshtein(a, b) / max(len(a), len(b), 1) for b in texts] for a in texts]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_distance_of_word_runs():
    texts = [
        "one two three four five six seven",
        "one two three four five six seven",
        "eight nine ten eleven twelve one",
    ]
    found = selection.distances(texts, "minhash")
    assert found[0, 1] == 0 and found[0, 2] > 0.95 and np.allclose(found, found.T)


def spread(distance, chosen):
    return min(distance[i, j] for i, j in itertools.combinations(chosen, 2))


def test_greedy_choice_is_within_half_of_the_best():
    rng = np.random.default_rng(0)
    for _ in range(30):
        points = rng.normal(size=(8, 2))
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
        best = max(spread(distance, c) for c in itertools.combinations(range(8), 3))
        taken = selection.far_apart(distance, 3)
        assert len(set(taken)) == 3 and spread(distance, taken) >= best / 2
        assert taken[0] == distance.sum(1).argmin()


def test_it_stops_where_the_rest_is_alike():
    distance = np.array([[0, 0, 0.9], [0, 0, 0.9], [0.9, 0.9, 0]])
    assert selection.far_apart(distance, 3, least=0.1) == [0, 2]
    assert selection.far_apart(distance, 5) == [0, 2, 1]
    assert selection.far_apart(np.zeros((0, 0)), 2) == [] and selection.far_apart(distance, 0) == []


def test_choices_by_prompt():
    kept = selection.per_prompt(["a", "b", "a", "a"], lambda rows: rows[-2:])
    assert kept == [1, 2, 3]
    assert selection.shortest([5, 3, 3, 9], 2) == [1, 2]
