"""P-KL, H-KL and SimCT in a trainer: classes of tokens where a chunk begins, and the chunk among them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, TAIDConfig, TAIDTrainer
from llmdistill.composition.chunks import asked_of_chunks
from llmdistill.composition.term import Groups
from llmdistill.errors import UserError
from llmdistill.objectives.alm import binary_divergence
from llmdistill.objectives.classes import Classes
from llmdistill.objectives.divergences import jsd, reverse_kl
from llmdistill.objectives.taid import taid
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, collate
from llmdistill.texts.rollout import Reading
from llmdistill.tokenization.align import align_chunks
from llmdistill.tokenization.token_bytes import table_of
from tests import tiny
from tests.methods import byte_model, rounds
from tests.methods.test_chunks import by_hand as chunks_by_hand
from tests.methods.test_chunks import make, other_teacher, t_row, text
from tests.methods.test_invariances import masked
from tests.tokenization import vocabularies

# Without chunks beside: those are ALM's, and proved there.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "p_kl": ("p_kl", {"chunk_weight": 0.0}),
    "p_kl reverse": ("p_kl", {"chunk_weight": 0.0, "direction": "reverse"}),
    "h_kl": ("h_kl", {"chunk_weight": 0.0}),
    "simct": ("simct", {"sequences": "dataset"}),
}


def classes_by_hand(own: Any, other: Any) -> tuple[list[str | None], list[str | None], list[str]]:
    """Of every id of both tokenizers the longest spelling of both that it begins with, and all of these."""
    tables = []
    for tok in (own, other):
        end = table_of(tok).marked({tok.eos_token_id: 0x110000})
        tables.append([tuple(u) for u in end.units])
    shared = {u for u in tables[0] if u} & {u for u in tables[1] if u}
    special = set(own.all_special_ids), set(other.all_special_ids)

    def named(units: tuple[int, ...], i: int, side: int) -> Any:
        found = next((units[:n] for n in range(len(units), 0, -1) if units[:n] in shared), None)
        return None if found is None or (i in special[side] and found != units) else found

    sides = [[named(u, i, side) for i, u in enumerate(table)] for side, table in enumerate(tables)]
    return sides[0], sides[1], sorted(shared)  # type: ignore[return-value,type-var]


def by_hand(t: Any, given: Any, student: Any, name: str) -> Tensor:
    """The mean loss from unpadded forwards, a loop over the contract's chunks and dense sums of probabilities."""
    judge = t.judges["teacher"]
    model, tok, own_tok = judge.teacher.model, judge.retokenizer.judge, t.encode.tokenizer
    of_own, of_other, shared = classes_by_hand(own_tok, tok)
    places = {c: k for k, c in enumerate([*shared, None])}

    def summed(p: Tensor, names: list[Any]) -> Tensor:
        """[K + 1] of [V]; columns past the vocabulary are in none."""
        into = torch.tensor([places[c] for c in [*names, *[None] * (len(p) - len(names))]])
        found = p.new_zeros(len(places)).index_add(0, into, p)
        return torch.cat([found[:-1], found[-1:].clamp_min(1e-8)])

    alike = torch.tensor([of_own.count(c) == of_other.count(c) == 1 for c in shared] + [False])
    losses = []
    for b, prompt in enumerate(given.prompts):
        tail = given.rollout.input_ids[b][given.rollout.attention_mask[b]].tolist()[len(prompt.ids) :]
        content = [i for i in tail if i != own_tok.eos_token_id]
        written = bytes(u for i in content for u in table_of(own_tok).units[i]).decode()
        head = vocabularies.encode(tok, tok.apply_chat_template(t_row(b), tokenize=False, add_generation_prompt=True))
        judged = [*vocabularies.encode(tok, written), *([tok.eos_token_id] if tail != content else [])]
        own_p = student(torch.tensor([[*prompt.ids, *tail]])).logits[0, len(prompt.ids) - 1 : -1].double().softmax(-1)
        with torch.no_grad():
            other_p = model(torch.tensor([head + judged])).logits[0, len(head) - 1 : -1].double().softmax(-1)
        for a, c in align_chunks(tail, judged, own_tok, tok):
            s, q = summed(own_p[a.start], of_own), summed(other_p[c.start], of_other)
            if name == "simct":
                p = torch.stack([own_p[i, tail[i]] for i in range(a.start, a.stop)]).prod()
                q_chunk = torch.stack([other_p[i, judged[i]] for i in range(c.start, c.stop)]).prod()
                begun = torch.zeros(len(places), dtype=torch.bool)
                begun[[places[of_own[tail[a.start]]], places[of_other[judged[c.start]]]]] = True
                rest, left = (s[begun].sum() - p).clamp_min(1e-8), (q[begun].sum() - q_chunk).clamp_min(1e-8)
                others = (s * (s / q).log())[~begun].sum()
                losses.append(others + p * (p / q_chunk).log() + rest * (rest / left).log())
            elif name == "h_kl":
                tails = 1 - s[alike].sum(), 1 - q[alike].sum()
                kl = (q * (q / s).log())[alike].sum() + tails[1] * (tails[1] / tails[0]).log()
                losses.append(kl + (q - s).abs()[~alike].sum())
            else:
                x, y = (s, q) if name.endswith("reverse") else (q, s)
                losses.append((x * (x / y).log()).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_by_hand(tmp_path: Path, case: str) -> None:
    method, settings = CASES[case]
    student = tiny.llama(1)
    t = make(tmp_path, method, student=student, **settings)
    twin = copy.deepcopy(student).double()
    expected = by_hand(t, text(t), twin, case)
    value, found = rounds.gradients(t, text(t, left=3, right=2))
    assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    twin.zero_grad()
    expected.backward()
    rounds.assert_same(found, {n: p.grad.float() for n, p in twin.named_parameters() if p.grad is not None}, 1e-4)


@pytest.mark.parametrize("case", ["p_kl", "h_kl", "simct"])
def test_gradients_do_not_depend_on_micro_batches_or_padding(tmp_path: Path, case: str) -> None:
    """With all that stands beside at the defaults, and rows of several weights."""
    t = make(tmp_path, case, ce_weight=0.3, **({"sequences": "dataset"} if case == "simct" else {}))
    for domains in ({}, {"maths": 3.0}):
        t.args.domain_weights = domains

        def given(**padding: int) -> Any:
            made = text(t, **padding)
            made.prompts = [replace(p, domain="maths" if i % 2 else "other") for i, p in enumerate(made.prompts)]
            return made

        loss, whole = rounds.gradients(t, given())
        for parts, padding in ((2, {}), (4, {"left": 2}), (1, {"right": 4})):
            other, found = rounds.gradients(t, given(**padding), parts)
            assert other == pytest.approx(loss, rel=1e-5, abs=1e-8)
            rounds.assert_same(found, whole, 5e-5)


@pytest.mark.parametrize("case", ["p_kl", "h_kl", "simct"])
def test_a_teacher_of_the_students_own_weights_and_tokenizer_leaves_nothing(tmp_path: Path, case: str) -> None:
    student = tiny.llama(1)
    teacher = LocalTeacher(copy.deepcopy(student), tiny.tokenizer())
    t = make(tmp_path, case, student=student, teacher=teacher)
    loss, found = rounds.gradients(t, text(t))
    smooth = case != "h_kl"  # L1 has a corner where two models agree, and float32 lies on either side of it
    assert abs(loss) < 1e-5 and (not smooth or all(float(g.abs().max()) < 2e-5 for g in found.values()))


@pytest.mark.parametrize("case", ["p_kl", "h_kl", "simct"])
def test_it_trains(tmp_path: Path, case: str) -> None:
    """Two steps with held-out rows; the losses of its terms are logged."""
    student = tiny.llama(1)
    before = copy.deepcopy(student.state_dict())
    t = make(tmp_path, case, student=student)
    t.eval_dataset = t._encoded(tiny.rows(4), t.encode)
    t.train()
    assert any(not torch.equal(p, before[n]) for n, p in student.state_dict().items())
    lines = [line for line in t.state.log_history if "loss" in line]
    assert len(lines) == 2 and lines[0]["teacher/aligned_bytes"] == 1.0
    if case != "simct":
        assert lines[0]["distill/classes/loss"] > 0 and lines[0]["distill/chunks/loss"] > 0
    text = "dataset" if case != "simct" else "student"
    assert t.evaluate()[f"eval_{text}/{'forward' if text == 'dataset' else 'reverse'}_kl"] != 0


def test_a_teacher_elsewhere_is_refused_with_what_would_do(tmp_path: Path) -> None:
    class Elsewhere:
        tokenizer = other_teacher().tokenizer
        max_top_k = 5

        def info(self) -> Any:
            return other_teacher().info()

        def close(self) -> None: ...

    settings = {
        "p_kl": {},
        "h_kl": {},
        "simct": {},
        "chunk_opd": {"shared_weight": 0.5},
        "alm": {"debias": False, "shared_weight": 0.5},
    }
    for method, more in settings.items():  # as the run is put together, before a model has run
        with pytest.raises(UserError, match="compares what comes next of teacher .* Fix: --method chunk_opd, or"):
            make(tmp_path, method, teacher=Elsewhere(), **more)


# ---------------------------------------------------------------- acceptance: one model of bytes on both sides


@pytest.mark.parametrize("even", [True, False], ids=["full groups", "all numerals"])
@pytest.mark.parametrize("grouping", ["student splits numerals", "student groups them"])
@pytest.mark.parametrize("case", [*CASES, "p_kl with chunks", "alm", "alm debiased", "simct debiased", "chunk_opd"])
def test_tables_of_one_byte_level_model_leave_nothing(tmp_path: Path, case: str, grouping: str, even: bool) -> None:
    """METHODS-2026 9.3.7, at every chunk of every text. What X-Token publishes has a loss of its own making."""
    probabilities = byte_model.texts(even)
    own, other = (byte_model.Table(byte_model.digits(k), probabilities) for k in (1, 2))
    if grouping == "student groups them":
        own, other = other, own
    more = {"alm": {"debias": False}, "simct debiased": {"debias": True, "sequences": "dataset"}}
    method, settings = CASES.get(case) or (case.split()[0], more.get(case, {}))
    for table in (own, other):
        table.tok.chat_template = tiny.TEMPLATE
    models = {"student": tiny.llama(1, vocab=own.columns), "teacher": byte_model.TableTeacher(other)}
    t = make(tmp_path, method, processing_class=own.tok, **models, **settings)
    judge = t.judges["teacher"]
    prompts = [Prompt([3], "1", readings={"teacher": Reading("1", (4,), False)}) for _ in probabilities]
    ids = [[*vocabularies.encode(own.tok, text), own.tok.eos_token_id] for text in probabilities]
    rollout = collate([p.ids for p in prompts], ids, pad_id=0)
    student_NV = torch.cat([own.logits(tokens) for tokens in ids])
    for term in (term for term in t.method.terms if term.asks):
        parts = [judge.answer(rollout, prompts, asked_of_chunks(term, ask)) for ask in term.asks]
        evidence = [x for part in parts for x in part.chunk(slice(0, len(part)), None)]
        if term.group is None:
            floor = 1e-9 if even else 1e-6  # of classes without a token, 1e-8, which is not what is divided by
            assert float(term.loss(student_NV, *evidence).abs().max()) < floor
            assert int(evidence[-1].sum()) > 20  # of so many chunks
        else:
            values = term.group.values(student_NV, *evidence)
            groups = Groups(tuple(map(len, ids)), (len(ids),), tuple(evidence[:7]))
            assert float(term.group.losses(values, groups).abs().max()) < 1e-6
            assert term.group.count(groups) > 20
    assert judge.shares.aligned_bytes == judge.shares.bytes and judge.shares.single < judge.shares.chunks


# ---------------------------------------------------------------- the other front doors, across families

DOORS: dict[str, tuple[type[Any], type[Any], dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "opd": (OPDTrainer, OPDConfig, {}, reverse_kl),
    "gkd": (OPDTrainer, OPDConfig, {"divergence": "jsd", "beta": 0.3, "sequences": "mixed"}, partial(jsd, beta=0.3)),
    "taid": (TAIDTrainer, TAIDConfig, {"sequences": "dataset"}, partial(taid, t=0.4)),
}


def behind(door: str, folder: Path, student: Any = None, teacher: Any = None, **settings: Any) -> Any:
    trainer, config, own, _ = DOORS[door]
    args = config(
        output_dir=str(folder / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        rollouts=RolloutConfig(max_new_tokens=5),
        **{**own, **settings},
    )
    return trainer(
        student or tiny.llama(1),
        args,
        teacher or other_teacher(),
        train_dataset=tiny.rows(8),
        processing_class=tiny.tokenizer(),
        view="classes",
        preflight=True,
    )


@pytest.mark.parametrize("door", DOORS)
def test_another_front_door_compares_classes(tmp_path: Path, door: str) -> None:
    """Its own divergence of the classes' log-probabilities where chunks begin, and the chunks' own; and it trains."""
    student = tiny.llama(1)
    t = behind(door, tmp_path, student=student)
    given, twin = text(t), copy.deepcopy(student)
    of_chunks = binary_divergence(*chunks_by_hand(t, given, twin, word_ends=False), temperature=1.0).mean()
    expected = dense_by_hand(t, given, twin, DOORS[door][3]) + of_chunks
    value, found = rounds.gradients(t, text(t, left=2))
    assert value == pytest.approx(float(expected.detach()), rel=1e-4) and value > 0.01
    twin.zero_grad()
    expected.backward()
    rounds.assert_same(found, {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}, 1e-4)
    before = copy.deepcopy(student.state_dict())
    t.train()
    assert any(not torch.equal(p, before[n]) for n, p in student.state_dict().items())


def dense_by_hand(t: Any, given: Any, student: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    judge = t.judges["teacher"]
    model, tok, own_tok = judge.teacher.model, judge.retokenizer.judge, t.encode.tokenizer
    own_V, other_V, same = judge.retokenizer.classes  # proved by hand above
    maps, losses = [Classes(x, len(same)) for x in (own_V, other_V)], []
    for b, prompt in enumerate(given.prompts):
        tail = given.rollout.input_ids[b][given.rollout.attention_mask[b]].tolist()[len(prompt.ids) :]
        content = [i for i in tail if i != own_tok.eos_token_id]
        written = bytes(u for i in content for u in table_of(own_tok).units[i]).decode()
        head = vocabularies.encode(tok, tok.apply_chat_template(t_row(b), tokenize=False, add_generation_prompt=True))
        judged = [*vocabularies.encode(tok, written), *([tok.eos_token_id] if tail != content else [])]
        own = student(torch.tensor([[*prompt.ids, *tail]])).logits[0, len(prompt.ids) - 1 : -1]
        other = model(torch.tensor([head + judged])).logits[0, len(head) - 1 : -1].detach()
        starts = [(a.start, c.start) for a, c in align_chunks(tail, judged, own_tok, tok)]
        s, q = own[[i for i, _ in starts]], other[[j for _, j in starts]]
        losses += list(loss(maps[0].logprobs(s), maps[1].logprobs(q)))
    return torch.stack(losses).mean()


def test_a_mean_of_sequences_is_over_the_rows_where_the_judge_stands(tmp_path: Path) -> None:
    t = behind("opd", tmp_path, mean="sequence")
    given = text(t)
    loss, whole = rounds.gradients(t, given)
    of_each = [rounds.gradients(t, given.reorder([b]))[0] for b in range(len(given))]
    token_mean = behind("opd", tmp_path / "b")
    assert of_each[0] == pytest.approx(rounds.gradients(token_mean, given.reorder([0]))[0], rel=1e-5)
    with torch.no_grad():  # the chunks beside are a mean over all of them either way
        of_chunks = binary_divergence(*chunks_by_hand(t, given, t.model, word_ends=False), temperature=1.0)
        counts = [len(chunks_by_hand(t, given.reorder([b]), t.model, word_ends=False)[0]) for b in range(len(given))]
    classes = [x - float(c.mean()) for x, c in zip(of_each, of_chunks.split(counts), strict=True)]
    assert loss == pytest.approx(sum(classes) / len(classes) + float(of_chunks.mean()), rel=1e-5)
    again, found = rounds.gradients(t, text(t, left=3), 4)
    assert again == pytest.approx(loss, rel=1e-5)
    rounds.assert_same(found, whole, 5e-5)


def test_a_front_door_names_another_or_the_view(tmp_path: Path) -> None:
    """One line, where nothing is said about the other tokenizer, and where what is asked has no classes."""
    args = OPDConfig(output_dir=str(tmp_path / "a"), rollouts=RolloutConfig(max_new_tokens=5))
    t = OPDTrainer(tiny.llama(1), args, other_teacher(), train_dataset=tiny.rows(4), processing_class=tiny.tokenizer(),
                   preflight=True)  # fmt: skip
    with pytest.raises(UserError) as refused:
        t.train()
    line = str(refused.value)
    assert "\n" not in line and "260 shared ids are different tokens" in line
    assert "Fix: llmdistill.cross_tokenizer, which compares chunks of text, or --teacher.view classes here" in line
    with pytest.raises(UserError, match="teacher.view is classes, and term 'divergence' takes more .* chunk_opd"):
        behind("opd", tmp_path / "b", estimator="sampled")
    with pytest.raises(UserError, match="teacher.view is classes, and term 'mixed_target' takes more"):
        behind("taid", tmp_path / "c", divergence="forward_kl", xi=0.5)


@pytest.mark.parametrize("case", ["p_kl", "h_kl", "simct"])
def test_a_round_without_a_counted_token_has_no_loss(tmp_path: Path, case: str) -> None:
    """As after rollouts.mask_truncated: 0, and no NaN; and one sequence without any is as none."""
    t = make(tmp_path, case)
    loss, found = rounds.gradients(t, masked(text(t), slice(None)), 4)
    assert loss == 0.0 and all(not g.any() for g in found.values())
    loss, found = rounds.gradients(t, masked(text(t), 1), 2)
    expected, by_hand = rounds.gradients(t, text(t).reorder([0, 2, 3]))
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
    rounds.assert_same(found, by_hand, 5e-5)
