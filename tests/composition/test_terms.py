"""Terms on texts: their loss and gradients are those of whole logits in float64, however the round is cut up.

Micro-batches, padding, the order of sequences and the size of a chunk must not show: a term is normalised once, over
all that the round has of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill import Ask, DistillationConfig, DistillationTrainer, Method, Term
from llmdistill.composition.batch import Text
from llmdistill.composition.method import Schedule
from llmdistill.composition.plan import in_order
from llmdistill.composition.term import Groups, Rows
from llmdistill.objectives import divergences, sparse
from llmdistill.objectives.labels import cross_entropy
from llmdistill.objectives.selection import entropy
from llmdistill.texts import Prompt, Rollout, collate
from llmdistill.texts.sources import Only
from tests import tiny
from tests.trainer.test_loss import padded

DOMAINS = {"math": 2.0, "code": 0.25}


def prompt(ids: list[int], row: int, domain: str = "", weight: Any = 1.0, hint: tuple[int, ...] = ()) -> Prompt:
    return Prompt(ids, "", domain or None, row, weight=weight, contexts={"hint": hint} if hint else {})


# Prompts and completions of other lengths everywhere; weights of rows, of tokens and of domains; hints for some.
A = [
    (prompt([5, 6, 7, 8], 0, "math", hint=(40, 41)), [9, 10, 1]),
    (prompt([11, 12], 1, "code", weight=3.0), [13, 14, 15, 16, 17]),
    (prompt([20] * 9, 2, hint=(42,) * 12), [1]),
    (prompt([30, 31, 32], 3, "math", weight=(0.5, 2.0), hint=(43, 44, 45)), [33, 34]),
    (prompt([50, 51], 4, weight=0.0), [52, 53, 54]),
]
B = [
    (prompt([60, 61, 62], 5, "code"), [63] * 7),
    (prompt([64], 6, weight=(1.0, 0.0, 4.0, 0.5)), [65, 66, 67, 1]),
    (prompt([68, 69], 7, "math"), [70, 71]),
]


def text(of: list[tuple[Prompt, list[int]]]) -> Text:
    prompts = [p for p, _ in of]
    return Text(collate([p.ids for p in prompts], [c for _, c in of], pad_id=0), prompts)


@dataclass(frozen=True)
class Relative:
    """A survey over the whole round: every row's entropy over the mean of all, and what it is over the largest."""

    def measure(self, student_logits: Tensor, *evidence: Tensor) -> dict[str, Tensor]:
        return {"entropy": entropy(student_logits)}

    def derive(self, rows: Rows) -> Mapping[str, Tensor]:
        own, everywhere = rows.values["entropy"], rows.everywhere["entropy"]
        assert sum(rows.counts) == len(own)
        return {"weight": own / everywhere.mean(), "share": own / everywhere.max()}


def squared(student_logits: Tensor, teacher_logits: Tensor, share: Tensor) -> Tensor:
    return divergences.reverse_kl(student_logits, teacher_logits) * share.square()


def both(student_logits: Tensor, ids: Tensor, lp: Tensor, other_ids: Tensor, other_lp: Tensor) -> Tensor:
    assert torch.equal(ids, other_ids)
    return sparse.forward_kl(student_logits, ids, lp) + 0.5 * sparse.jsd(student_logits, other_ids, other_lp, beta=0.3)


TEACHER = (Ask("teacher"),)
LISTS = (Ask("teacher", "top_k"), Ask("reference", "top_k"))
TERMS = {
    "token means on two texts": (
        Term("kl", divergences.reverse_kl, TEACHER, text="a", weight=0.7),
        Term("labels", cross_entropy, (), ("tokens",), text="b", weight=1.3),
    ),
    "two terms on one text, sequence mean": (
        Term("kl", divergences.forward_kl, TEACHER, text="a", mean="sequence"),
        Term("labels", cross_entropy, (), ("tokens",), text="a", weight=lambda: 0.2),
        Term("more", divergences.total_variation, TEACHER, text="b", mean="sequence", weight=3.0),
    ),
    "one term over two texts": (
        Term("kl", divergences.reverse_kl, TEACHER, text=("a", "b")),
        Term("labels", cross_entropy, (), ("tokens",), text="b", mean="sequence", weight=0.5),
    ),
    "in another context": (
        Term("hinted", divergences.forward_kl, (Ask("teacher", context="hint"),), text="a"),
        Term("labels", cross_entropy, (), ("tokens",), text="b"),
    ),
    "in another context, sequence mean": (
        Term("hinted", divergences.forward_kl, (Ask("teacher", context="hint"),), text="a", mean="sequence"),
    ),
    "a survey": (
        Term("surveyed", squared, TEACHER, ("share",), text="a", survey=Relative()),
        Term("labels", cross_entropy, (), ("tokens",), text="b"),
    ),
    "a survey of two texts": (Term("surveyed", squared, TEACHER, ("share",), text=("a", "b"), survey=Relative()),),
    "lists of the teacher": (
        Term("lists", both, LISTS, text="a", top_k=5),
        Term("labels", cross_entropy, (), ("tokens",), text="b"),
    ),
    "lists of the student": (Term("lists", both, LISTS, text="b", top_k=5, support="student"),),
    "lists of both": (Term("lists", both, LISTS, text=("a", "b"), top_k=5, support="union"),),
}


def trainer(folder: Path, terms: tuple[Term, ...], **settings: Any) -> DistillationTrainer:
    args = DistillationConfig(output_dir=str(folder), report_to="none", **settings)
    judges = {"reference": tiny.llama(3)}
    method = Method(terms, {"a": Only("dataset"), "b": Only("dataset")})
    tok = tiny.tokenizer()
    return DistillationTrainer(tiny.llama(1), args, tiny.llama(2), method=method, judges=judges, processing_class=tok)


def found(t: DistillationTrainer, texts: dict[str, Text], parts: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a round in so many micro-batches."""
    t.model.zero_grad()
    t.model.train()
    total = 0.0
    for batch in t.batches(texts, parts):
        loss = t.compute_loss(t.model, {"micro_batch": batch})
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}


def same(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]], tolerance: float = 2e-5) -> None:
    assert a[0] == pytest.approx(b[0], rel=tolerance, abs=1e-6)
    assert a[1].keys() == b[1].keys()
    scale = max(float(g.abs().max()) for g in b[1].values())
    assert scale > 1e-3
    for name in a[1]:
        assert float((a[1][name] - b[1][name]).abs().max()) <= tolerance * scale, name


# ---------------------------------------------------------------- whole logits, by hand


def logits_of(model: Any, before: list[int], completion: list[int]) -> Tensor:
    """Of the completion's tokens, [n, V] float64."""
    ids = torch.tensor([[*before, *completion]])
    return model(ids).logits[0, len(before) - 1 : -1]  # type: ignore[no-any-return]


def weight_of(p: Prompt, n: int, domains: Mapping[str, float]) -> tuple[float, Tensor]:
    """Of the sequence, and of each of its tokens."""
    per_token = torch.tensor(p.weight if isinstance(p.weight, tuple) else [1.0] * n, dtype=torch.float64)
    return (1.0 if isinstance(p.weight, tuple) else p.weight) * domains.get(p.domain or "", 1.0), per_token


Judged = list[tuple[float, Tensor, Tensor]]  # of every sequence: its weight, its tokens' weights, its losses


def judged(term: Term, of: list[tuple[Prompt, list[int]]], models: dict[str, Any], domains: Any) -> Judged:
    rows, surveyed = [], []
    for p, completion in of:
        s = logits_of(models["student"], p.ids, completion)
        sequence, tokens = weight_of(p, len(completion), domains)
        evidence: list[Any] = []
        for ask in term.asks:
            before = list(p.contexts.get(ask.context, ())) if ask.context else p.ids
            if not before:
                break
            z = logits_of(models[ask.judge], before, completion).detach()
            if ask.kind == "full":
                evidence.append(z)
                continue
            ids = listed(term, s.detach(), logits_of(models["teacher"], p.ids, completion).detach())
            gone = ids < 0
            evidence += [ids, z.log_softmax(-1).gather(-1, ids.clamp_min(0)).masked_fill(gone, -torch.inf)]
        else:
            surveyed.append(entropy(s.detach()))
            evidence += [torch.tensor(completion)] if "tokens" in term.reads else []
            rows.append((sequence, tokens, s, evidence))
    if term.survey is None:
        assert term.loss is not None
        return [(w, tokens, term.loss(s, *evidence)) for w, tokens, s, evidence in rows]
    everywhere, result = torch.cat(surveyed), []
    for (w, tokens, s, evidence), own in zip(rows, surveyed, strict=True):
        loss = divergences.reverse_kl(s, *evidence) * (own / everywhere.max()).square()
        result.append((w, tokens * own / everywhere.mean(), loss))
    return result


def listed(term: Term, student: Tensor, teacher: Tensor) -> Tensor:
    by_teacher, by_student = teacher.topk(term.top_k).indices, student.topk(term.top_k).indices
    if term.support != "union":
        return by_teacher if term.support == "teacher" else by_student
    again = (by_student[:, :, None] == by_teacher[:, None, :]).any(-1)
    return torch.cat([by_teacher, by_student.masked_fill(again, -1)], -1)


def by_hand(
    t: DistillationTrainer, of: dict[str, Any], domains: Mapping[str, float]
) -> tuple[float, dict[str, Tensor]]:
    student = copy.deepcopy(t.model).double()
    student.zero_grad()
    models = {"student": student, "teacher": tiny.llama(2).double(), "reference": tiny.llama(3).double()}
    total = torch.zeros((), dtype=torch.float64)
    for term in t.method.terms:
        rows = judged(term, [row for name in term.texts for row in of[name]], models, domains)
        if term.mean == "token":
            value = sum((w * tokens * loss).sum() for w, tokens, loss in rows)
            count = sum(float((w * tokens).sum()) for w, tokens, _ in rows)
        else:
            value = sum(w * (tokens * loss).sum() / tokens.sum() for w, tokens, loss in rows)
            count = sum(w for w, *_ in rows)
        total = total + term.weight_now * value / count
    total.backward()  # type: ignore[no-untyped-call]
    return total.item(), {n: p.grad.float() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_a_round_is_what_whole_logits_say_however_it_is_cut_up(tmp_path: Path, name: str, weighted: bool) -> None:
    of = {"a": A, "b": B}
    if not weighted:
        of = {n: [(replace(p, weight=1.0), c) for p, c in rows] for n, rows in of.items()}
    domains = DOMAINS if weighted else {}
    t = trainer(tmp_path, TERMS[name], domain_weights=domains)
    texts = {n: text(rows) for n, rows in of.items()}
    expected = by_hand(t, of, domains)
    for parts in (1, 2, 3, 5):  # of five: some have nothing of b
        same(found(t, texts, parts), expected)
    t.args.chunk_tokens = 3
    same(found(t, texts, 2), expected)
    for left, right in ((0, 5), (3, 4)):
        wider = {n: replace_rollout(x, padded(x.rollout, left, right)) for n, x in texts.items()}
        same(found(t, wider, 2), expected)
    turned = {n: x.reorder(range(len(x) - 1, -1, -1)) for n, x in texts.items()}
    same(found(t, turned, 3), expected)
    ordered = in_order(texts, t.method.terms)
    same(found(t, ordered, 3), expected)
    t.passes = replace(t.passes, tokens=24)  # and by tokens, padding included
    assert max(batch.rollout.input_ids.numel() for batch in t.batches(ordered, 1)) <= 24
    same(found(t, ordered, 1), expected)
    same(found(t, ordered, 12), expected)  # more than are needed: some have nothing
    t.passes = replace(t.passes, packed=True)  # or of the sequences' own
    ordered = in_order(texts, t.method.terms, packed=True)
    batches = t.batches(ordered, 1)
    assert max(int(batch.rollout.attention_mask.sum()) for batch in batches) <= 24
    assert sum(batch.rollout.attention_mask.numel() for batch in batches) > sum(
        int(batch.rollout.attention_mask.sum()) for batch in batches
    )
    same(found(t, ordered, 1), expected)
    same(found(t, ordered, 12), expected)


def replace_rollout(text: Text, rollout: Rollout) -> Text:
    return Text(rollout, text.prompts)


def test_a_term_whose_text_has_no_counted_token_adds_nothing(tmp_path: Path) -> None:
    t = trainer(tmp_path, TERMS["token means on two texts"])
    texts = {"a": text(A[:4]), "b": text(B)}
    nothing = texts["b"].rollout
    texts["b"] = replace_rollout(
        texts["b"], replace(nothing, completion_mask=torch.zeros_like(nothing.completion_mask))
    )
    alone = trainer(tmp_path, (replace(t.method.terms[0]),))
    same(found(t, texts, 2), found(alone, {"a": texts["a"], "b": texts["b"]}, 2))


# ---------------------------------------------------------------- losses of groups


class Spread:
    """The variance of a sequence's log-probs: no sum over rows."""

    def values(self, student_logits: Tensor, /, *evidence: Tensor) -> Tensor:
        return -cross_entropy(student_logits, evidence[0])

    def reduce(self, values_N: Tensor, groups: Groups) -> Tensor:
        return sum((v.var(correction=0) for v in values_N.split(list(groups.counts))), values_N.new_zeros(()))

    def count(self, groups: Groups) -> int:
        return len(groups.counts)

    def observe(self, values_N: Tensor, groups: Groups) -> dict[str, tuple[float, float]]:
        return {"spread": (float(self.reduce(values_N, groups)), float(self.count(groups)))}


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_a_group_loss_beside_another_term_divides_by_its_groups(tmp_path: Path, parts: int) -> None:
    """Value and gradient: the other term must not take the group's place in the denominator or the scale."""
    of = {"a": [(replace(p, weight=1.0), c) for p, c in A], "b": [(replace(p, weight=1.0), c) for p, c in B]}
    terms = (
        Term("labels", cross_entropy, (), ("tokens",), text="b", weight=5.0),
        Term("spread", group=Spread(), reads=("tokens",), text="a", weight=0.3),
    )
    t = trainer(tmp_path, terms)
    student = copy.deepcopy(t.model).double()

    def lp(p: Prompt, c: list[int]) -> Tensor:
        return -cross_entropy(logits_of(student, p.ids, c), torch.tensor(c))

    labels = torch.cat([-lp(p, c) for p, c in of["b"]]).mean()
    spread = torch.stack([lp(p, c).var(correction=0) for p, c in of["a"]]).mean()
    total = 5.0 * labels + 0.3 * spread
    total.backward()  # type: ignore[no-untyped-call]
    expected = total.item(), {n: p.grad.float() for n, p in student.named_parameters()}
    same(found(t, {n: text(rows) for n, rows in of.items()}, parts), expected)


# ---------------------------------------------------------------- what a schedule hears


def test_a_schedule_hears_means_that_are_weighted_as_the_loss_is(tmp_path: Path) -> None:
    heard = []

    class Listens(Schedule):
        def update(self, measured: Any) -> None:
            heard.append(measured)

    watch: dict[str, Callable[..., Tensor]] = {"entropy": lambda s, *_: entropy(s)}
    terms = (
        Term("kl", divergences.reverse_kl, TEACHER, text="a", watch=watch, mean="sequence", weight=0.7),
        Term("labels", cross_entropy, (), ("tokens",), text="b", watch=watch),
    )
    method = Method(terms, {"a": Only("dataset"), "b": Only("dataset")}, {"x": Listens()})
    args = DistillationConfig(output_dir=str(tmp_path), report_to="none", domain_weights=DOMAINS)
    t = DistillationTrainer(tiny.llama(1), args, tiny.llama(2), method=method, processing_class=tiny.tokenizer())
    for parts in (1, 2, 5):
        found(t, {"a": text(A), "b": text(B)}, parts)
        t.progress.step_done(1, t.accelerator)
    models = {"student": tiny.llama(1).double(), "teacher": tiny.llama(2).double()}
    for term, rows in zip(terms, (A, B), strict=True):
        mean = partial(mean_of, term.mean)
        of = judged(term, rows, models, DOMAINS)
        entropies = judged(replace(term, loss=lambda s, *_: entropy(s)), rows, models, DOMAINS)
        for measured in heard:
            assert measured.losses[term.name] == pytest.approx(mean(of), rel=1e-5)
            assert measured.watched[term.name, "entropy"] == pytest.approx(mean(entropies), rel=1e-5)
            by_domain = measured.by(term.name, "domain")
            prompts = [p for p, _ in rows]
            for domain in {p.domain or "" for p in prompts if p.weight != 0.0}:
                own = [row for row, p in zip(of, prompts, strict=True) if (p.domain or "") == domain]
                assert by_domain[domain] == pytest.approx(mean(own), rel=1e-5)


def mean_of(mean: str, rows: Judged) -> float:
    if mean == "token":
        return float(sum((w * x * loss).sum() for w, x, loss in rows) / sum((w * x).sum() for w, x, _ in rows))
    return float(sum(w * (x * loss).sum() / x.sum() for w, x, loss in rows) / sum(w for w, *_ in rows))


def test_a_round_of_fewer_sequences_than_micro_batches(tmp_path: Path) -> None:
    """The micro-batches that get none make a pass in which nothing counts; the loss is that of one micro-batch."""
    t = trainer(tmp_path, (Term("kl", divergences.reverse_kl, (Ask("teacher"),), text="a"),))
    alone = {"a": text(A[:1])}
    one, several = t.batches(alone, 1), t.batches(alone, 3)
    losses = [t.compute_loss(t.model.train(), {"micro_batch": b}).item() for b in several]
    assert len(several) == 3 and sum(loss != 0 for loss in losses) == 1
    assert sum(losses) == t.compute_loss(t.model, {"micro_batch": one[0]}).item()
