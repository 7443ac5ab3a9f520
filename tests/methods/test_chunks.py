"""Methods on chunks: a teacher of another tokenizer, by hand and in a trainer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill import MethodTrainer, methods
from llmdistill.composition.batch import Text
from llmdistill.composition.term import Groups
from llmdistill.errors import UserError
from llmdistill.objectives.alm import binary_divergence, chunk_credit, merged
from llmdistill.preflight import examine
from llmdistill.recipe.config import RolloutConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.teachers.chunks import ChunkTeacher
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, collate
from llmdistill.texts.rollout import Reading
from llmdistill.tokenization.align import align_chunks
from llmdistill.tokenization.token_bytes import table_of
from tests import tiny
from tests.methods import byte_model, rounds
from tests.tokenization import vocabularies

PAIRS = ["o k", "ok ok", "ad d", "a d", "1 2", "Ġ ok", "ok Ġok"]  # merges of the teacher's vocabulary


def teacher_tokenizer() -> Any:
    tok = vocabularies.byte_level(PAIRS, eos_token="<end>", pad_token="<p>")
    tok.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}: {% endif %}"
    )
    return tok


def other_teacher(seed: int = 2) -> LocalTeacher:
    tok = teacher_tokenizer()
    model = tiny.llama(seed, vocab=len(tok) + 3)  # columns past the vocabulary, as heads have them
    model.generation_config.eos_token_id = tok.eos_token_id
    return LocalTeacher(model, tok)


def make(
    folder: Path, method: str, *, student: Any = None, teacher: Any = None, rows: Any = None, **settings: Any
) -> Any:
    more = {k: settings.pop(k) for k in ("data", "min_aligned", "processing_class", "preflight") if k in settings}
    shared = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "rollouts": RolloutConfig(max_new_tokens=5),
    }
    args = methods.config_class(method)(output_dir=str(folder / "run"), **{**shared, **settings})
    return MethodTrainer(
        student or tiny.llama(1),
        args,
        teacher or other_teacher(),
        train_dataset=tiny.rows(8) if rows is None else rows,
        **{"processing_class": tiny.tokenizer(), **more},
    )


COMPLETIONS = ["ok ok 12", "add 1212 ok", "12", "é ok okok"]
NUMERALS = ["1 ok 21", "121 ok 11", "1", "é 1 1 ok12"]  # lone digits, behind which one tokenizer has no 2


def text(t: Any, completions: list[str] = COMPLETIONS, *, left: int = 0, right: int = 0) -> Text:
    tok = t.encode.tokenizer
    prompts = [t.encode(row, i) for i, row in enumerate(tiny.rows(len(completions), completion=False))]
    tails = [[*vocabularies.encode(tok, c), *([tok.eos_token_id] if i != 1 else [])] for i, c in enumerate(completions)]
    rollout = collate([p.ids for p in prompts], tails, pad_id=0)
    return Text(rounds.padded(rollout, left, right), prompts)


def by_hand(t: Any, given: Text, student: Any, *, word_ends: bool, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """log S and log T of every chunk, sequence after sequence, from unpadded forwards and the contract's alignment."""
    judge: ChunkTeacher = t.judges["teacher"]
    model, tok, own_tok = judge.teacher.model, judge.retokenizer.judge, t.encode.tokenizer  # type: ignore[attr-defined]
    student_C, teacher_C, ends_C, student_ends_C, last_C, open_C = [], [], [], [], [], []
    for b, prompt in enumerate(given.prompts):
        ids = given.rollout.input_ids[b][given.rollout.attention_mask[b]].tolist()
        tail = ids[len(prompt.ids) :]
        content = [i for i in tail if i != own_tok.eos_token_id]
        written = bytes(u for i in content for u in table_of(own_tok).units[i]).decode()
        head = vocabularies.encode(tok, tok.apply_chat_template(t_row(b), tokenize=False, add_generation_prompt=True))
        judged = [*vocabularies.encode(tok, written), *([tok.eos_token_id] if tail != content else [])]

        def logps(
            model: Any, head: list[int], tail: list[int], table: Any
        ) -> tuple[list[Tensor], list[Tensor], Tensor]:
            logp = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].double().log_softmax(-1)
            words = [
                i for i, u in enumerate(table.units) if u and (u[0] in (32, 9, 10, 11, 12, 13) or u[0] >= 0x110000)
            ]
            return [row[i] for row, i in zip(logp, tail, strict=True)], list(logp[:, words].logsumexp(-1)), logp

        own, own_ends, own_logp = logps(student, list(prompt.ids), tail, table_of(own_tok))
        with torch.no_grad():
            other, other_ends, other_logp = logps(model, head, judged, table_of(tok))
        for a, c in align_chunks(tail, judged, own_tok, tok):
            student_C.append(torch.stack(own[a]).sum())
            teacher_C.append(torch.stack(other[c]).sum())
            closed = a.stop < len(own)
            student_ends_C.append(own_ends[a.stop] if closed else torch.zeros((), dtype=torch.float64))
            ends_C.append(other_ends[c.stop] if closed else torch.zeros((), dtype=torch.float64))
            last_C.append(not closed)
            sides = ((own_tok, own_logp, a.stop, tok), (tok, other_logp, c.stop, own_tok))
            rest = [
                digits_open(*side, tail[: a.stop], own_tok, written) if closed else torch.zeros(()) for side in sides
            ]
            open_C.append(torch.stack([x.double() for x in rest]))
    s, o, e, se = (torch.stack(x) for x in (student_C, teacher_C, ends_C, student_ends_C))
    opened = torch.stack(open_C).unbind(-1)  # with the chunk that ends there, and not with the next
    if not word_ends:
        s, o = (x + y - torch.cat([y.new_zeros(1), y[:-1]]) for x, y in zip((s, o), opened, strict=True))
        return s, o
    into = merged(e.exp(), torch.tensor(last_C), threshold)
    count = int(into[-1]) + 1
    closes = torch.cat([into[1:] != into[:-1], torch.tensor([True])])
    opens = [torch.cat([y.new_zeros(1), torch.where(closes, y, 0.0)[:-1]]) for y in opened]
    sums = [
        torch.zeros(count, dtype=torch.float64).index_add(0, into, x - y) for x, y in zip((s, o), opens, strict=True)
    ]
    return sums[0] + se[closes], sums[1] + e[closes]


def digits_open(tok: Any, logp: Tensor, row: int, by: Any, begun: list[int], own_tok: Any, written: str) -> Tensor:
    """log P, in the tokens of ``tok``, that none of the digits follows behind which ``by`` would cut otherwise."""
    raw = bytes(u for i in begun for u in table_of(own_tok).units[i])
    if not raw[-1:].isdigit():
        return torch.zeros(())
    so_far = raw.decode()
    behind, ids = written[len(so_far) :][:1], vocabularies.encode(by, so_far)
    ruled_out = {ord(d) for d in "0123456789" if vocabularies.encode(by, so_far + d)[: len(ids)] != ids}
    if behind and ord(behind) in ruled_out:
        return torch.zeros(())
    taken = [i for i, u in enumerate(table_of(tok).units) if u and u[0] in ruled_out]
    return torch.log1p(-logp[row, taken].exp().sum())


def t_row(b: int) -> Any:
    return tiny.rows(b + 1, completion=False)[b]["prompt"]


def nats(student_C: Tensor, teacher_C: Tensor) -> Tensor:
    """The loss at the defaults: a hundred times the divergence at temperature 100."""
    return 100.0 * binary_divergence(student_C, teacher_C, temperature=100.0)


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "plain": ("alm", {"debias": False}, nats),
    "debiased": ("alm", {"merge_threshold": 0.0}, nats),
    "merged": ("alm", {"merge_threshold": 0.017}, nats),
    "tau 1, reverse": (
        "alm",
        {"debias": False, "chunk_temperature": 1.0, "divergence": "reverse_binary_kl"},
        partial(binary_divergence, temperature=1.0, divergence="reverse_binary_kl"),
    ),
    "credit": ("chunk_opd", {}, chunk_credit),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padding", [{}, {"left": 3, "right": 2}], ids=["", "padded"])
def test_loss_and_gradients_by_hand(tmp_path: Path, case: str, padding: dict[str, int]) -> None:
    method, settings, loss = CASES[case]
    student = tiny.llama(1)
    t = make(tmp_path, method, student=student, **settings)
    question = t.method.terms[0].group.question
    twin = copy.deepcopy(student).double()
    ends, threshold = question.word_ends, question.merge_threshold
    given = text(t)
    s, o = by_hand(t, given, twin, word_ends=ends, threshold=threshold)
    if case == "merged":
        assert len(s) < len(by_hand(t, given, twin, word_ends=True)[0])  # some are, and not all
        assert len(s) > len(COMPLETIONS)
    expected = loss(s, o).mean()
    value, found = rounds.gradients(t, text(t, **padding))
    assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    twin.zero_grad()
    expected.backward()
    rounds.assert_same(found, {n: p.grad.float() for n, p in twin.named_parameters() if p.grad is not None}, 1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", ["teacher", "student"])
def test_the_ends_of_numerals_by_hand(tmp_path: Path, case: str, groups: str) -> None:
    """Where one of the two writes 12 as one token, and so says with a lone 1 that no 2 follows."""
    method, settings, loss = CASES[case]
    own = {}
    if groups == "student":
        tok = teacher_tokenizer()
        tok.chat_template = tiny.TEMPLATE
        splits = LocalTeacher(tiny.llama(2, vocab=len(tiny.tokenizer())), tiny.tokenizer())
        student = tiny.llama(1, vocab=len(tok))
        student.generation_config.eos_token_id = tok.eos_token_id
        own = {"student": student, "processing_class": tok, "teacher": splits}
    t = make(tmp_path, method, **own, **settings)
    question, twin = t.method.terms[0].group.question, copy.deepcopy(t.model).double()
    given = text(t, NUMERALS)
    s, o = by_hand(t, given, twin, word_ends=question.word_ends, threshold=question.merge_threshold)
    told = t.judges["teacher"].chunks(given.rollout, given.prompts, question).tensors
    assert int(told[6].any(-1).sum() if groups == "teacher" else (told[5] < 0).sum()) > 1
    expected = loss(s, o).mean()
    for parts, padding in ((1, {}), (4, {"left": 2, "right": 3})):
        value, found = rounds.gradients(t, text(t, NUMERALS, **padding), parts)
        assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    twin.zero_grad()
    expected.backward()
    rounds.assert_same(found, {n: p.grad.float() for n, p in twin.named_parameters() if p.grad is not None}, 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_micro_batches_or_padding(tmp_path: Path, case: str) -> None:
    method, settings, _ = CASES[case]
    t = make(tmp_path, method, **settings)
    loss, whole = rounds.gradients(t, text(t))
    for parts, padding in ((2, {}), (4, {"left": 2}), (1, {"right": 4})):
        other, found = rounds.gradients(t, text(t, **padding), parts)
        assert other == pytest.approx(loss, rel=1e-5, abs=1e-8)
        rounds.assert_same(found, whole, 5e-5)


@pytest.mark.parametrize("case", ["plain", "debiased"])
@pytest.mark.parametrize("parts", [1, 4])
def test_chunks_weigh_what_their_rows_do(tmp_path: Path, case: str, parts: int) -> None:
    """Weights of domains, of rows, and of tokens: a chunk's is the mean of its rows'; over the sum of all weights."""
    method, settings, loss = CASES[case]
    student = tiny.llama(1)
    t = make(tmp_path, method, student=student, **settings)
    t.args.domain_weights = {"maths": 3.0}
    given, twin = text(t), copy.deepcopy(student).double()
    lengths = given.rollout.row_counts
    token_weights = tuple(0.5 + (k % 3) for k in range(lengths[1]))
    weights = [1.0, token_weights, 0.25, 0.0]
    domains = ["maths", None, "other", None]
    given.prompts = [replace(p, weight=w, domain=d) for p, w, d in zip(given.prompts, weights, domains, strict=True)]
    s, o = by_hand(t, given, twin, word_ends=bool(t.method.terms[0].group.question.word_ends))
    expected_weights = []
    for b, (weight, domain) in enumerate(zip(weights, domains, strict=True)):
        chunks = chunk_rows(t, given, b)
        of_rows = torch.tensor(weight if isinstance(weight, tuple) else [weight] * lengths[b])
        expected_weights += [float(of_rows[rows].mean()) * (3.0 if domain == "maths" else 1.0) for rows in chunks]
    w = torch.tensor(expected_weights, dtype=torch.float64)
    assert len(w) == len(s) and len(set(expected_weights)) > 4
    expected = (w * loss(s, o)).sum() / w.sum()
    value, found = rounds.gradients(t, given, parts)
    assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    twin.zero_grad()
    expected.backward()
    rounds.assert_same(found, {n: p.grad.float() for n, p in twin.named_parameters() if p.grad is not None}, 1e-4)


def chunk_rows(t: Any, given: Text, b: int) -> list[slice]:
    """The student's rows of every chunk of a sequence."""
    judge = t.judges["teacher"].retokenizer
    tail = given.rollout.input_ids[b][given.rollout.attention_mask[b]].tolist()[len(given.prompts[b].ids) :]
    content = [i for i in tail if i != t.encode.tokenizer.eos_token_id]
    written = bytes(u for i in content for u in table_of(t.encode.tokenizer).units[i]).decode()
    judged = [*vocabularies.encode(judge.judge, written), *([judge.judge.eos_token_id] if tail != content else [])]
    return [a for a, _ in align_chunks(tail, judged, t.encode.tokenizer, judge.judge)]


@pytest.mark.parametrize("case", ["plain", "credit", "debiased"])
def test_it_trains_and_logs_what_was_aligned(tmp_path: Path, case: str) -> None:
    method, settings, _ = CASES[case]
    student = tiny.llama(1)
    before = copy.deepcopy(student.state_dict())
    t = make(tmp_path, method, student=student, **settings)
    t.train()
    assert any(not torch.equal(p, before[n]) for n, p in student.state_dict().items())
    lines = [line for line in t.state.log_history if "loss" in line]
    assert len(lines) == 2
    assert lines[0]["teacher/aligned_bytes"] == lines[0]["teacher/aligned_rows"] == 1.0
    assert 0 < lines[0]["teacher/single_chunks"] <= 1 and lines[0]["distill/chunk_tokens"] >= 1


def test_a_teacher_of_the_students_own_weights_and_tokenizer_leaves_nothing(tmp_path: Path, caplog: Any) -> None:
    student = tiny.llama(1)
    teacher = LocalTeacher(copy.deepcopy(student), tiny.tokenizer())
    for k, settings in enumerate(({"debias": False}, {})):
        t = make(tmp_path / str(k), "alm", student=student, teacher=teacher, **settings)
        loss, found = rounds.gradients(t, text(t))
        assert abs(loss) < 1e-5 and all(float(g.abs().max()) < 1e-4 for g in found.values())  # nats, in float32
    assert "has the student's tokenizer: every token is a chunk" in caplog.text


def test_the_held_out_estimate_is_of_the_chunks(tmp_path: Path) -> None:
    t = make(tmp_path, "alm", debias=False)
    t.eval_dataset = t._encoded(tiny.rows(4), t.encode)
    found = t.evaluate()
    given = Text(*_completed(t))
    s, o = by_hand(t, given, copy.deepcopy(t.model).double(), word_ends=False)
    assert found["eval_dataset/forward_kl"] == pytest.approx(float((o - s).sum()) / given.rollout.num_rows, rel=1e-4)
    assert found["eval_loss"] == found["eval_dataset/forward_kl"]


def _completed(t: Any) -> Any:
    from llmdistill.texts.prompts import completed

    return completed(t.eval_dataset, 0), t.eval_dataset


def test_too_little_that_is_aligned_is_refused_with_what_breaks(tmp_path: Path) -> None:
    words = vocabularies.wordpiece(["ok", "add"])
    words.pad_token = "[UNK]"
    model = tiny.llama(3, vocab=len(words))
    rows = [{"prompt": "ok ", "completion": "ok 猫 add"}] * 4
    teacher = LocalTeacher(model, words)
    t = make(tmp_path, "alm", teacher=teacher, rows=rows, debias=False)
    with pytest.raises(UserError, match=r"teacher.min_aligned is 0.9, and 0.000 of the bytes .* no token for what"):
        t.train()
    t = make(tmp_path / "b", "alm", teacher=teacher, rows=[*rows[:2], *[{"prompt": "ok ", "completion": "ok add"}] * 2],
             debias=False, min_aligned=0.1)  # fmt: skip
    t.train()
    assert t.state.log_history[0]["teacher/aligned_rows"] == 0.5


def test_what_does_not_go_together_is_refused_at_once(tmp_path: Path) -> None:
    class Elsewhere:
        max_top_k = 5
        tokenizer = teacher_tokenizer()

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def info(self) -> Any:
            return self.inner.info()

        def score(self, *args: Any) -> Any:
            return self.inner.score(*args)

        def close(self) -> None: ...

    elsewhere = Elsewhere(other_teacher())
    t = make(tmp_path, "chunk_opd", teacher=elsewhere)  # which needs its tokens' log-probs alone
    t.train()
    with pytest.raises(UserError, match="asks how likely words end of teacher .* Fix: --debias false, or"):
        make(tmp_path / "b", "alm", teacher=elsewhere)
    del Elsewhere.tokenizer
    with pytest.raises(UserError, match="without its tokenizer.*Fix: --teacher.tokenizer"):
        make(tmp_path / "c", "alm", teacher=elsewhere)
    with pytest.raises(UserError, match="merge_threshold is 0.3 and objective.debias false"):
        make(tmp_path / "d", "alm", debias=False, merge_threshold=0.3)
    with pytest.raises(UserError, match="rollouts.temperature is 0.5"):
        make(tmp_path / "e", "chunk_opd", rollouts=RolloutConfig(temperature=0.5))
    with pytest.raises(UserError, match="teacher.context is 'hint'"):
        rows = [{**row, "hint": "h"} for row in tiny.rows(8)]
        method = methods.config_class("alm")(output_dir=str(tmp_path / "f"))
        MethodTrainer(tiny.llama(1), method, other_teacher(), train_dataset=rows, processing_class=tiny.tokenizer(),
                      data=DataConfig(contexts={"hint": "hint"}), contexts={"teacher": "hint"})  # fmt: skip
    no_template = other_teacher()
    no_template.tokenizer.chat_template = None
    with pytest.raises(UserError, match="row 0: teacher's tokenizer has no chat template"):
        make(tmp_path / "g", "alm", teacher=no_template)


@pytest.mark.parametrize("case", ["plain", "tau 1, reverse", "credit"])
@pytest.mark.parametrize("grouping", ["student splits numerals", "student groups them"])
def test_token_tables_of_one_byte_level_model_leave_nothing(case: str, grouping: str) -> None:
    """METHODS-2026 9.3.7: both sides say the same of every text, one digit by digit and one in groups.

    P(token | before) is the product over the token's bytes of a bigram model's conditionals.
    """
    splits = vocabularies.byte_level()
    groups = vocabularies.byte_level([f"{a} {b}" for a in range(10) for b in range(10)])
    own, other = (splits, groups) if grouping.startswith("student splits") else (groups, splits)
    bigram = torch.randn(10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    text = "31415926535897932384"

    def logps(tok: Any, ids: list[int]) -> list[Tensor]:
        """The table's row for each token: log P of every token of digits."""
        spelled, at, rows = table_of(tok).units, 0, []
        for i in ids:
            before = int(text[at - 1]) if at else 0
            row = torch.full((len(spelled),), -1e4, dtype=torch.float64)
            for j, units in enumerate(spelled):
                if units and all(48 <= u <= 57 for u in units):
                    digits = [before, *(u - 48 for u in units)]
                    row[j] = sum(bigram[a, b] for a, b in zip(digits, digits[1:], strict=False))
            rows.append(row)
            at += len(spelled[i])
        return rows

    ids, judged = vocabularies.encode(own, text), vocabularies.encode(other, text)
    table, taught = torch.stack(logps(own, ids)).requires_grad_(), logps(other, judged)
    picked = table.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    chunks = align_chunks(ids, judged, own, other)
    assert len(chunks) < max(len(ids), len(judged)) and len(chunks) > 3
    student_C = torch.stack([picked[a].sum() for a, _ in chunks])
    teacher_C = torch.stack(
        [torch.stack([taught[k][judged[k]] for k in range(b.start, b.stop)]).sum() for _, b in chunks]
    )
    loss = CASES[case][2](student_C, teacher_C).sum()
    (gradient,) = torch.autograd.grad(loss, table)
    assert abs(float(loss.detach())) < 1e-12 and float(gradient.abs().max()) < 1e-12
    off = CASES[case][2](student_C, teacher_C - 0.1).sum()
    assert abs(float(off.detach())) > 1e-8  # it does see a difference


def test_the_preflight_says_what_is_aligned_and_compares_no_ids(tmp_path: Path) -> None:
    t = make(tmp_path, "alm", rows=tiny.rows(8))
    found = {f.check: f for f in examine(t)}
    assert {f.level for f in found.values()} <= {"ok", "notice"}, [str(f) for f in found.values() if f.level == "fail"]
    assert found["alignment"].message.startswith("1.0000 of the bytes of 8 completions are in ")
    assert "tokenizers" not in found and "head" in found
    words = vocabularies.wordpiece(["ok", "add"])
    words.pad_token = "[UNK]"
    teacher = LocalTeacher(tiny.llama(3, vocab=len(words)), words)
    rows = [{"prompt": "ok ", "completion": "ok 猫 add"}] * 4
    broken = next(f for f in examine(make(tmp_path / "b", "alm", teacher=teacher, rows=rows)) if f.check == "alignment")
    assert broken.level == "fail" and "no token for what comes after" in broken.message


@pytest.mark.parametrize("groups", ["teacher", "student"])
def test_the_credits_expected_gradient_is_that_of_the_kl_of_every_chunk(tmp_path: Path, groups: str) -> None:
    """Over all texts, of two models of bytes that disagree, one of which writes two digits as one token.

    A chunk's probability behind others is the share of the texts that are cut so, which knows nothing of tokens.
    """
    names = list(byte_model.texts(even=False))
    judged_p = byte_model.texts(even=False)
    own, other = (byte_model.digits(k) for k in ((1, 2) if groups == "teacher" else (2, 1)))
    for tok in (own, other):
        tok.chat_template = tiny.TEMPLATE
    table = byte_model.Table(other, judged_p)
    student = tiny.llama(1, vocab=len(own))
    student.generation_config.eos_token_id = own.eos_token_id
    t = make(tmp_path, "chunk_opd", student=student, processing_class=own, teacher=byte_model.TableTeacher(table))
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(len(names), generator=generator, dtype=torch.float64).requires_grad_()
    written_p = theta.softmax(0)  # of whole texts
    tokenized = [[*vocabularies.encode(own, name), own.eos_token_id] for name in names]
    prompts = [Prompt([3], "1", readings={"teacher": Reading("1", (4,), False)}) for _ in names]
    rollout = collate([p.ids for p in prompts], tokenized, pad_id=0)

    # What the student's tokens say, from the texts that begin so.
    shares: dict[tuple[int, ...], Tensor] = {}
    for ids, p in zip(tokenized, written_p, strict=True):
        for n in range(len(ids) + 1):
            shares[tuple(ids[:n])] = shares.get(tuple(ids[:n]), p.new_zeros(())) + p
    rows = []
    for ids in tokenized:
        for n in range(len(ids)):
            next_V = torch.full((len(own),), byte_model.IMPOSSIBLE, dtype=torch.float64)
            known = [i for i in range(len(own)) if (*ids[:n], i) in shares]
            logs = torch.stack([(shares[(*ids[:n], i)] / shares[tuple(ids[:n])]).log() for i in known])
            rows.append(next_V.index_put((torch.tensor(known),), logs))
    evidence = t.judges["teacher"].chunks(rollout, prompts, t.method.terms[0].group.question).tensors
    group = t.method.terms[0].group
    values = group.values(torch.stack(rows), *evidence)
    credit_C = group.losses(values, Groups(tuple(map(len, tokenized)), (len(names),), evidence))
    judged_ids = [[*vocabularies.encode(other, name), other.eos_token_id] for name in names]
    cuts = [[a for a, _ in align_chunks(*both, own, other)] for both in zip(tokenized, judged_ids, strict=True)]
    counts = torch.tensor([len(c) for c in cuts])
    expected_credit = (written_p.detach().repeat_interleave(counts) * credit_C).sum()
    (found,) = torch.autograd.grad(expected_credit, theta, retain_graph=True)

    # The same tree of chunks, from the texts alone.
    of_own, of_judge = {}, {}
    for name, ids, cut, p in zip(names, tokenized, cuts, written_p, strict=True):
        chunks = tuple(tuple(ids[part]) for part in cut)
        for n in range(len(chunks) + 1):
            of_own[chunks[:n]] = of_own.get(chunks[:n], p.new_zeros(())) + p
            of_judge[chunks[:n]] = of_judge.get(chunks[:n], 0.0) + judged_p[name]
    kl = theta.new_zeros(())
    for chunks, p in of_own.items():
        if chunks:
            before = chunks[:-1]
            step, judged = p / of_own[before], of_judge[chunks] / of_judge[before]
            kl = kl + of_own[before].detach() * step * (step.log() - math.log(judged))
    (expected,) = torch.autograd.grad(kl, theta)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)
