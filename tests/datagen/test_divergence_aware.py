"""What a student makes of traces, against its own logits; and the selection by it, with tokens of two vocabularies."""

import math

import pytest
import torch

from llmdistill.datagen import rules_over_rows
from llmdistill.datagen.divergence_aware import trace_statistics
from llmdistill.datagen.sentences import Statistics, sentence_logprobs
from llmdistill.datagen.student import Student
from tests import tiny

TEXTS = ["One. Two is more.\nThree – größer als zwei!", "4 + 4 = 8. So 8.", "x", "日本。次の文。", "Straße. Ω ≠ ω."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tiny.llama(1).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def rows():
    return [{"prompt": "ask " * (1 + i), "completion": text} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_the_student_s_log_probs_are_its_logits(folder, batch_tokens):
    student, tokenizer, model = Student(folder, "float32", batch_tokens=batch_tokens), tiny.tokenizer(), tiny.llama(1)
    found = list(student.read(rows()))
    assert len(found) == len(TEXTS)
    for row, read in zip(rows(), found, strict=True):
        prompt = tokenizer(f"<user>{row['prompt']}<assistant>", add_special_tokens=False)["input_ids"]
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + ids])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(read.logprobs), expected, rtol=0, atol=1e-4)
        assert {a for a, _ in read.offsets} == set(range(len(row["completion"])))


def written(logprob, **columns):
    """Traces of a teacher with the tiny vocabulary; ``logprob(text)`` of every one of its tokens."""
    tokenizer = tiny.tokenizer()
    made = []
    for i, row in enumerate(rows()):
        ids = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        about = {"token_ids": ids, "logprobs": [logprob(i, k) for k in range(len(ids))], "logprobs_of": "model"}
        made.append((i, {**row, **about, **columns}))
    return made


def test_statistics_are_those_of_both_sides_sentence_by_sentence(folder):
    student = Student(folder, "float32")
    traces = written(lambda i, k: -0.01 * (k % 7))
    found = dict(trace_statistics(traces, student, tiny.tokenizer(), scale="log", margin=0.5))
    assert set(found) == set(range(len(TEXTS)))
    for (number, row), read in zip(traces, student.read(row for _, row in traces), strict=True):
        ends = [len(row["completion"][: i + 1].encode()) for i in range(len(row["completion"]))]
        character = [next(i for i, end in enumerate(ends) if k < end) for k in range(ends[-1])]
        offsets = [(c, c + 1) for c in character] + [(len(ends), len(ends))]
        theirs = sentence_logprobs(row["completion"], offsets, row["logprobs"])
        ours = sentence_logprobs(row["completion"], read.offsets, read.logprobs)
        assert found[number].difference == pytest.approx(
            sum(t - o for t, o in zip(theirs, ours, strict=True)) / len(ours), abs=1e-5
        )
        assert found[number].teacher == len(ours)  # a random student gives all of it less


def test_the_student_as_its_own_teacher_says_nothing_of_its_own(folder):
    student = Student(folder, "float32")
    reads = [read.logprobs for read in student.read(rows())]
    traces = written(lambda i, k: reads[i][k] if k < len(reads[i]) else 0.0)
    for _, row in traces:
        row["token_ids"], row["logprobs"] = row["token_ids"][:-1], row["logprobs"][:-1]
    for _, found in trace_statistics(traces, student, tiny.tokenizer(), scale="log", margin=1e-3):
        assert isinstance(found, Statistics) and found.shared == found.shared + found.teacher + found.student
        assert found.difference == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"token_ids": None}, "no log-probs of its tokens"),
        (
            {"logprobs_of": "sampling", "sampling": {"temperature": 0.6, "top_p": 1.0, "top_k": 0}},
            "of another distribution",
        ),
        ({"token_ids": [9999], "logprobs": [-1.0]}, "tokens of another vocabulary"),
        ({"token_ids": [70], "logprobs": [-1.0]}, "its tokens do not spell its text"),
    ],
)
def test_traces_that_cannot_be_measured_say_why(folder, columns, reason):
    for _, found in trace_statistics(
        written(lambda i, k: -1.0, **columns), Student(folder, "float32"), tiny.tokenizer()
    ):
        assert reason in found


def test_log_probs_at_temperature_1_are_the_model_s(folder):
    plain = {"logprobs_of": "sampling", "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0}}
    found = dict(trace_statistics(written(lambda i, k: -1.0, **plain), Student(folder, "float32"), tiny.tokenizer()))
    assert all(isinstance(value, Statistics) for value in found.values())


def test_the_rule_keeps_what_the_teacher_is_surest_of(folder):
    traces = [
        {**row, "prompt": "same", "token_ids": row["token_ids"]} for _, row in written(lambda i, k: -0.1 * (1 + i))
    ]
    numbered = lambda: iter(enumerate(traces))  # noqa: E731
    settings = dict(student=folder, tokenizer=folder, dtype="float32", scale="log", score="mean")
    dropped = dict(rules_over_rows.sentences(numbered, each=2, **settings))
    measured = dict(trace_statistics(numbered(), Student(folder, "float32"), tiny.tokenizer(), scale="log"))
    best = sorted(measured, key=lambda n: -measured[n].difference)[:2]
    assert set(dropped) == set(range(len(TEXTS))) - set(best)
    assert set(dropped.values()) == {"poor in the teacher's own sentences"}
    with pytest.raises(ValueError, match="one of each and total"):
        list(rules_over_rows.sentences(numbered, **settings))
    assert math.isfinite(measured[0].difference)
