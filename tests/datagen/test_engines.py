"""Models in this process and behind the service: what they sampled comes with the ids and log-probs of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill.datagen.generation import generate
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.tables import read_rows
from llmdistill.datagen.writing import trace
from llmdistill.errors import UserError
from llmdistill.teachers.local import LocalTeacher
from tests import tiny
from tests.service.faulty import Faulty

ROWS = [{"prompt": f"{n} + {n}?", "answer": str(2 * n)} for n in range(6)]
SAMPLING = {"max_new_tokens": 12, "temperature": 1.0}


def write(out: Path, role: Any, writer: Any = "plain", **options: Any) -> list[Trace]:
    generate(ROWS, writer, {"teacher": role, "student": role}, out, **{"sampling": SAMPLING, "n": 2, **options})
    return [Trace.of(row) for row in read_rows(out)]


def rescored(found: Trace) -> list[float]:
    """Log-probs of a trace's ids by one forward of its model."""
    assert found.prompt_ids is not None and found.token_ids is not None
    ids = torch.tensor([[*found.prompt_ids, *found.token_ids]])
    with torch.no_grad():
        logprobs = tiny.llama(2)(ids).logits[0, len(found.prompt_ids) - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(found.token_ids)[:, None]).squeeze(1).tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def by_transformers(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    return write(tmp_path_factory.mktemp("hf") / "t.jsonl", hf(tiny_run))


def hf(run: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(run / "teacher"), "engine": "hf", "dtype": "float32", "batch_size": 4, **more}


def test_transformers_log_probs_are_the_models(by_transformers: list[Trace]) -> None:
    for found in by_transformers:
        assert found.logprobs_of == "model" and found.tokens == len(found.token_ids or ())
        assert found.logprobs == pytest.approx(rescored(found), abs=2e-5)
        assert (found.finish == "stop") == ((found.token_ids or [])[-1:] == [1])
    assert len({found.completion for found in by_transformers}) > 8  # samples differ


def test_a_batch_of_one_writes_the_same(by_transformers: list[Trace], tiny_run: Path, tmp_path: Path) -> None:
    """Every call has a random stream of its own, so company changes rounding only."""
    alone = write(tmp_path / "t.jsonl", hf(tiny_run, batch_size=1))
    assert [t.completion for t in alone] == [t.completion for t in by_transformers]


def test_the_service_is_the_same_model(by_transformers: list[Trace], tiny_run: Path, tmp_path: Path) -> None:
    with Faulty(LocalTeacher(tiny.llama(2), tiny.tokenizer())) as service:
        role = {"engine": "remote", "url": service.url, "tokenizer": str(tiny_run / "teacher"), "concurrency": 4}
        found = write(tmp_path / "t.jsonl", role)
    for one, here in zip(found, by_transformers, strict=True):
        assert (one.fingerprint, one.tokenizer, one.prompt_ids) == (here.fingerprint, here.tokenizer, here.prompt_ids)
        assert one.logprobs == pytest.approx(rescored(one), abs=1e-4)


@pytest.mark.slow
def test_vllm_takes_calls_as_they_come(tiny_run: Path, tmp_path: Path) -> None:
    """A writer of two calls in turn: the second ones arrive while the first of others are under way."""
    pytest.importorskip("vllm")
    role = {"model": str(tiny_run / "teacher"), "engine": "vllm", "dtype": "float32", "kv_cache_gib": 0.05}
    found = write(tmp_path / "t.jsonl", role, in_two)
    assert len(found) == 12
    for one in found:
        assert one.logprobs == pytest.approx(rescored(one), abs=1e-3)
        assert one.prompt_ids is not None and len(one.parts) == 2


async def in_two(row: Any, ask: Any) -> list[Trace]:
    """The student begins, the teacher goes on."""
    begun = await ask("student", row["prompt"], max_new_tokens=4)
    return [trace(row, ask, "in_two", begun, await ask("teacher", row["prompt"], prefix=begun.text))]


def test_a_prefix_stands_before_what_is_sampled(tiny_run: Path, tmp_path: Path) -> None:
    found = write(tmp_path / "t.jsonl", hf(tiny_run), "first_thought", options={"prefix": "Well, "}, n=1)
    tokenizer = tiny.tokenizer()
    for one in found:
        assert one.completion.startswith("Well, ") and one.parts[0].role == "given"
        assert tokenizer.decode(one.prompt_ids).endswith("<assistant>Well, ")
        said = one.completion[len("Well, ") :]
        assert tokenizer.decode(one.token_ids, skip_special_tokens=True) == said


def test_the_student_is_cut_in_its_second_half_and_the_teacher_goes_on(tiny_run: Path, tmp_path: Path) -> None:
    roles = {"student": {**hf(tiny_run), "model": str(tiny_run / "student")}, "teacher": hf(tiny_run)}
    made = generate(ROWS, "capped", roles, tmp_path / "t.jsonl", sampling=SAMPLING, n=2, options={"budget": 8})
    found = [Trace.of(row) for row in read_rows(tmp_path / "t.jsonl")]
    assert found and len(found) + made.lost.get("nothing was written", 0) == 12
    for one in found:
        student, teacher = one.parts
        assert (student.role, teacher.role, one.fingerprint) == ("student", "teacher", teacher.fingerprint)
        assert student.chars + teacher.chars == len(one.completion)
        assert tiny.tokenizer().decode(one.prompt_ids).endswith(one.completion[: student.chars])
    assert {a["role"] for a in made.details["authors"].values()} == {"student", "teacher"}


def test_a_prompt_without_room_is_rejected_and_says_so(tiny_run: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "a" * 250}]
    generate(rows, "plain", {"teacher": hf(tiny_run)}, tmp_path / "t.jsonl", sampling=SAMPLING, max_rejected=0.5)
    assert len(list(read_rows(tmp_path / "t.jsonl"))) == 6
    assert "more than the context of 256" in (tmp_path / "t.jsonl.rejects.jsonl").read_text()


def test_other_weights_under_one_output_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", hf(tiny_run))
    other = {**hf(tiny_run), "model": str(tiny_run / "student")}
    with pytest.raises(UserError, match="fingerprint|model"):
        write(tmp_path / "t.jsonl", other)


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ({"model": "m", "engine": "hf", "url": "http://h"}, "url is 'http://h'; it must be empty for engine hf"),
        ({"engine": "hf"}, "model is ''; it must be a folder or hub name"),
        ({"model": "m", "bach_size": 1}, "teacher has the unknown setting 'bach_size'"),
        ({"model": "./nowhere", "engine": "hf"}, "./nowhere.*there is no such folder"),
    ],
)
def test_what_names_no_model_is_said_at_once(tmp_path: Path, role: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate(ROWS, "plain", {"teacher": role}, tmp_path / "t.jsonl")


def test_a_template_that_opens_the_thoughts_has_its_tag_once(tiny_run: Path, tmp_path: Path) -> None:
    """In front of the completion where the template wrote it, and not twice where a prefix begins with it."""
    opening = tiny.TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")
    tiny.llama(2).save_pretrained(tmp_path / "thinker")
    tiny.tokenizer(opening).save_pretrained(tmp_path / "thinker")
    role = {**hf(tiny_run), "model": str(tmp_path / "thinker")}
    plain = write(tmp_path / "plain.jsonl", role, n=1)[0]
    assert plain.completion.startswith("<think>\n") and plain.parts[0].role == "given"
    prefixed = write(tmp_path / "prefixed.jsonl", role, "first_thought", options={"prefix": "<think>\nSo"}, n=1)[0]
    for one, end in ((plain, "<assistant><think>\n"), (prefixed, "<assistant><think>\nSo")):
        assert one.completion.count("<think>") == 1
        assert tiny.tokenizer().decode(one.prompt_ids).endswith(end)


def test_the_solution_is_shown_to_the_teacher_and_not_to_the_student(tiny_run: Path, tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "Two and two are four.\n#### 4"}]
    generate(rows, "privileged", {"teacher": hf(tiny_run)}, tmp_path / "t.jsonl", sampling=SAMPLING)
    found = Trace.of(next(read_rows(tmp_path / "t.jsonl")))
    assert found.prompt == [{"role": "user", "content": "How many?"}] and found.answer == "4"
    assert "Two and two are four." in tiny.tokenizer().decode(found.prompt_ids)
