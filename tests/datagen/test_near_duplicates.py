"""MinHash against exact Jaccard similarities, and what is left of a set of texts."""

import random

import numpy as np
import pytest

from llmdistill.datagen.near_duplicates import near_duplicates, signatures
from llmdistill.evals.ngrams import words

WORDS = [f"word{i}" for i in range(5000)]


def text(rng, size=120):
    return [rng.choice(WORDS) for _ in range(size)]


def edited(rng, original, share):
    return [rng.choice(WORDS) if rng.random() < share else word for word in original]


def jaccard(a, b, n=5):
    runs = [{tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (words(a), words(b))]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_signatures_estimate_the_similarity_of_the_sets():
    rng = random.Random(1)
    errors, scale = [], []
    for _ in range(200):
        original = text(rng)
        a, b = " ".join(original), " ".join(edited(rng, original, rng.choice([0.01, 0.03, 0.1])))
        found = signatures([a, b], 5)
        exact = jaccard(a, b)
        errors.append((found[0] == found[1]).mean() - exact)
        scale.append(np.sqrt(max(exact * (1 - exact), 1e-4) / 112))
    z = np.array(errors) / np.array(scale)
    assert abs(z.mean()) < 4 / np.sqrt(len(z)) and 0.8 < z.std() < 1.25


def test_unlike_texts_agree_nowhere():
    rng = random.Random(2)
    found = signatures([" ".join(text(rng)) for _ in range(200)], 5)
    assert max((found[i] == found[j]).sum() for i in range(200) for j in range(i)) <= 2


def test_what_is_near_goes_and_what_is_not_stays():
    rng = random.Random(3)
    texts, copies, unlike = [], {}, set()
    for _ in range(300):
        original = text(rng)
        texts.append(" ".join(original))
        if rng.random() < 0.5:
            copies[len(texts)] = len(texts) - 1
            texts.append("  ".join(edited(rng, original, 0.004)).upper() + "!")
        else:
            unlike.add(len(texts))
            texts.append(" ".join(edited(rng, original, 0.3)))
    near = {i for i, of in copies.items() if jaccard(texts[i], texts[of]) > 0.93}
    assert len(near) > 100
    found = {d.row: d for d in near_duplicates(texts)}
    assert near <= set(found) and not unlike & set(found)
    assert all(found[i].of == copies[i] for i in near)


def test_every_copy_of_many_goes():
    rng = random.Random(4)
    kinds = [" ".join(text(rng)) for _ in range(50)]
    texts = [kinds[i % 50] for i in range(5000)]
    found = near_duplicates(texts)
    assert [d.row for d in found] == list(range(50, 5000))
    assert all(d.of == d.row % 50 and d.similarity == 1.0 for d in found)


def test_a_bucket_of_many_unlike_rows_ends():
    """A common beginning may put all rows into one bucket: none of them goes for that."""
    rng = random.Random(5)
    head = text(rng, 100)
    texts = [" ".join(head + text(rng, 100)) for _ in range(400)]
    assert jaccard(texts[0], texts[1]) < 0.4
    assert near_duplicates(texts) == []


@pytest.mark.parametrize("short", ["", "one", "one two", "$x$ = 4", "!!!", "🙂"])
def test_short_texts_are_compared_whole(short):
    other = short + " more"
    found = near_duplicates([short, other, "something else entirely", short])
    assert [(d.row, d.of) for d in found] == [(3, 0)]


def test_signs_count():
    """Exercises that differ in a sign only are others, long or short."""
    asked = "Work out the following sum and give the result as a number: 57 {} 87 {} 70 {} 12 {} 5"
    texts = [asked.format(*signs) for signs in ("++++", "----", "+-+-", "××÷+")] + [
        "57 + 87",
        "57 - 87",
        "🙂",
        "🙃",
        "!!!",
    ]
    assert near_duplicates(texts) == []


def test_order_of_words_counts_in_short_texts():
    assert near_duplicates(["a b c", "c b a", "b a c"]) == []


@pytest.mark.parametrize("texts", [[], ["alone"]])
def test_nothing_to_compare(texts):
    assert near_duplicates(texts) == []


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"threshold": 1.5}, {"n": 0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        near_duplicates(["a", "b"], **wrong)
