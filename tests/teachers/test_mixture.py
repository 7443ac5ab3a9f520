"""Several teachers as one: routed by domain, and averaged. Against the teachers alone, and against plain tensors."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmdistill import UserError
from llmdistill.objectives import divergences, sparse
from llmdistill.objectives.rows import HiddenRows, LogitRows, MixtureRows, RoutedRows, SparseRows
from llmdistill.objectives.streaming import streamed
from llmdistill.teachers.base import DenseTeacher
from llmdistill.teachers.evidence import gather
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mixture import EnsembleTeacher, RoutedTeacher, leaves
from llmdistill.texts import Prompt, Rollout, Sampling, collate
from tests import tiny

VOCAB = 264
DOMAINS = ("math", "code", "prose", "math", None)
WEIGHTS = (1.0, 3.0)


class Elsewhere:
    """A teacher known by the protocol only. It counts like a remote one, so it is asked in a thread."""

    def __init__(self, inner: LocalTeacher, before: Callable[[], Any] = lambda: None, chooses: bool = True) -> None:
        self.inner, self.before, self.chooses = inner, before, chooses
        self.info, self.generate = inner.info, inner.generate
        self.bytes_received, self.closed, self.threads = 7, 0, set[str]()
        self.asked: list[tuple[int, Tensor | None]] = []

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> Any:
        self.threads.add(threading.current_thread().name)
        self.before()
        self.asked.append((top_k, chosen))
        if chosen is not None and not self.chooses:
            raise UserError("the caller chose the ids to score; this engine cannot.")
        return self.inner.score(rollout, top_k, chosen)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def teachers() -> list[LocalTeacher]:
    return [LocalTeacher(tiny.llama(seed), tiny.tokenizer(), chunk_tokens=5) for seed in (1, 2, 3)]


def rollout() -> Rollout:
    """Five sequences of all lengths, one without a counted token, their domains interleaved."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(4, 260, (n,), generator=generator).tolist()  # noqa: E731
    lengths = ((3, 9), (12, 1), (5, 0), (2, 6), (7, 4))
    return collate([draw(p) for p, _ in lengths], [draw(c) for _, c in lengths], pad_id=0, domain=DOMAINS)


def routed(a: Any, b: Any, rest: Any) -> RoutedTeacher:
    return RoutedTeacher({"A": (a, ["math"]), "B": (b, ["code", "law"]), "rest": (rest, [])})


def owners(teachers: list[Any]) -> list[Any]:
    """The teacher of each of DOMAINS."""
    return [teachers[{"math": 0, "code": 1}.get(d or "", 2)] for d in DOMAINS]


def softmaxes(teacher: LocalTeacher, of: Rollout) -> Tensor:
    """[N, V] float64, one unpadded sequence at a time."""
    rows = []
    for ids, real, counted in zip(of.input_ids, of.attention_mask, of.completion_mask, strict=True):
        at = counted[real].nonzero().flatten() - 1
        with torch.no_grad():
            rows.append(teacher.model(ids[real][None]).logits[0, at].double().softmax(-1))
    return torch.cat(rows)


def averaged(teachers: list[LocalTeacher], of: Rollout) -> Tensor:
    total = sum(WEIGHTS)
    return sum((w / total * softmaxes(t, of) for t, w in zip(teachers, WEIGHTS, strict=False)), torch.zeros(()))


def whole(rows: Any, vocab_size: int | None = None) -> tuple[Tensor, ...]:
    return rows.chunk(slice(0, len(rows)), vocab_size)


# ---------------------------------------------------------------- routed


@pytest.mark.parametrize("kind", ["full", "top_k", "sampled"])
@pytest.mark.parametrize("form", ["embedded", "elsewhere", "both"])
def test_routed_says_what_each_teacher_says_alone(teachers: list[LocalTeacher], kind: Any, form: str) -> None:
    """Row by row, whatever the evidence and wherever the teachers are."""
    made = rollout()
    given = [t if form == "embedded" or (form == "both" and i) else Elsewhere(t) for i, t in enumerate(teachers)]
    rows = gather(routed(*given), made, kind, 8)
    assert len(rows) == made.num_rows
    assert isinstance(rows, RoutedRows) == (kind == "full" and form == "embedded")
    start = 0
    for i, owner in enumerate(owners(teachers)):
        count = made.row_counts[i]
        alone = gather(owner, made.sequences([i]), kind, 8)
        for found, expected in zip(whole(rows[start : start + count]), whole(alone), strict=True):
            if kind == "full":  # listed log-probs and logits differ by a constant
                found, expected = found.log_softmax(-1), expected.log_softmax(-1)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        start += count


def test_blocks_stand_where_they_stood_and_name_their_teacher(teachers: list[LocalTeacher]) -> None:
    """Also where a teacher's sequences all begin late: padding on the left is not cut away."""
    made = rollout()
    shifted = Rollout(
        *(torch.nn.functional.pad(m, (3, 0)) for m in (made.input_ids, made.attention_mask, made.completion_mask)),
        domain=DOMAINS,
    )
    router = routed(*teachers)
    for of in (made, shifted):
        whole_batch = [t.score(of, 2) for t in teachers]
        for i, (block, owner) in enumerate(zip(router.score(of, 2), owners(teachers), strict=True)):
            assert block.positions == whole_batch[teachers.index(owner)][i].positions
            assert block.header.teacher == owner.info().fingerprint


def test_chosen_ids_find_their_rows(teachers: list[LocalTeacher]) -> None:
    made = rollout()
    chosen = torch.arange(made.num_rows * 2).view(-1, 2) % 250
    chosen[3, 1] = -1
    alone = {id(t): t.score(made, 3, chosen) for t in teachers}
    for i, (block, owner) in enumerate(zip(routed(*teachers).score(made, 3, chosen), owners(teachers), strict=True)):
        assert torch.equal(block.topk_ids, alone[id(owner)][i].topk_ids)
        torch.testing.assert_close(block.topk_logprobs, alone[id(owner)][i].topk_logprobs, rtol=1e-4, atol=1e-5)


def test_every_prompt_is_completed_by_its_teacher(teachers: list[LocalTeacher]) -> None:
    """What a teacher writes for its prompts is what it writes alone; samples of a prompt stay adjacent."""
    prompts = [Prompt([5 + i, 9, 30 + i] * (1 + i % 2), "", domain, i) for i, domain in enumerate(DOMAINS)]
    sampling = Sampling(6, samples_per_prompt=2, seed=3)
    found = routed(*teachers).generate(prompts, sampling)
    assert found.domain == tuple(d for d in DOMAINS for _ in range(2)) and len(found.finish) == 10
    for teacher in teachers:
        mine = [i for i, owner in enumerate(owners(teachers)) if owner is teacher]
        alone = teacher.generate([prompts[i] for i in mine], sampling)
        rows = [2 * i + j for i in mine for j in range(2)]
        for a, b in zip(rows, range(len(alone)), strict=True):
            assert found.input_ids[a][found.attention_mask[a]].tolist() == (
                alone.input_ids[b][alone.attention_mask[b]].tolist()
            )
            assert found.completion_mask[a].sum() == alone.completion_mask[b].sum()
            assert found.finish[a] == alone.finish[b]


def test_an_unknown_domain_is_named(teachers: list[LocalTeacher]) -> None:
    strict = RoutedTeacher({"A": (teachers[0], ["math"]), "B": (teachers[1], ["code", "law"])})
    with pytest.raises(UserError, match=r"sequence 2 has domain 'prose', and no teacher takes it \('A' has math; 'B'"):
        gather(strict, rollout(), "full", 0)
    with pytest.raises(UserError, match="sequence 0 has no domain"):
        strict.score(replace(rollout(), domain=None), 4)
    with pytest.raises(UserError, match="row 17 has domain 'prose'"):
        strict.generate([Prompt([5], "", "math", 16), Prompt([5], "", "prose", 17)], Sampling(2))
    assert routed(*teachers).route("prose") == "rest"  # the one without domains takes what is left


def test_routes_that_contradict_each_other(teachers: list[LocalTeacher]) -> None:
    a, b, _ = teachers
    with pytest.raises(UserError, match="'A' and 'B' have no domains"):
        RoutedTeacher({"A": (a, []), "B": (b, [])})
    with pytest.raises(UserError, match="'math' belongs to teachers 'A' and 'B'"):
        RoutedTeacher({"A": (a, ["math"]), "B": (b, ["code", "math"])})
    with pytest.raises(UserError, match="there is no teacher"):
        RoutedTeacher({})
    longer = tiny.tokenizer()
    longer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="'A' and 'B' have different tokenizers"):
        EnsembleTeacher([(a, 1.0), (LocalTeacher(tiny.llama(2), longer), 1.0)], names=["A", "B"])


# ---------------------------------------------------------------- ensemble


def test_the_dense_ensemble_is_the_log_of_the_averaged_softmax(teachers: list[LocalTeacher]) -> None:
    made, ensemble = rollout(), EnsembleTeacher(list(zip(teachers, WEIGHTS, strict=False)))
    assert isinstance(ensemble, DenseTeacher)
    (found,) = whole(gather(ensemble, made, "full", 0))
    torch.testing.assert_close(found.double(), averaged(teachers, made).log(), rtol=1e-4, atol=1e-5)
    listed = EnsembleTeacher([(Elsewhere(t), w) for t, w in zip(teachers, WEIGHTS, strict=False)])  # type: ignore[misc]
    assert not isinstance(listed, DenseTeacher)
    (found,) = whole(gather(listed, made, "full", 0))
    torch.testing.assert_close(found.double(), averaged(teachers, made).log(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("top_k", [0, 1, 8, 40, VOCAB])
def test_ensemble_lists_exact_values(teachers: list[LocalTeacher], elsewhere: bool, top_k: int) -> None:
    """Every listed log-prob is the mixture's; nothing left out is likelier than the docstring's bound."""
    made, members = rollout(), [Elsewhere(t) if elsewhere else t for t in teachers[:2]]
    blocks = EnsembleTeacher(list(zip(members, WEIGHTS, strict=True))).score(made, top_k)
    exact = averaged(teachers, made)
    assert {b.header.support for b in blocks} == ({"union"} if elsewhere and top_k else {"teacher"})
    tokens = torch.cat([b.token_logprobs for b in blocks])
    torch.testing.assert_close(
        tokens.double(), exact.gather(1, made.token_rows()[:, None]).log()[:, 0], rtol=1e-4, atol=1e-5
    )
    ids, lps = torch.cat([b.topk_ids for b in blocks]).long(), torch.cat([b.topk_logprobs for b in blocks])
    assert ids.shape == (made.num_rows, top_k)
    torch.testing.assert_close(lps.double(), exact.gather(1, ids).log(), rtol=1e-4, atol=1e-5)
    assert (lps.diff(dim=1) <= 0).all() and all(len(set(row)) == top_k for row in ids.tolist())
    if not top_k:
        return
    best = exact.topk(top_k).indices
    if not elsewhere:
        assert (exact.gather(1, ids) >= exact.gather(1, best)[:, -1:] - 1e-9).all()
        return
    last = [softmaxes(t, made).topk(top_k).values[:, -1] for t in teachers[:2]]
    bound = sum(w / sum(WEIGHTS) * k for w, k in zip(WEIGHTS, last, strict=True))
    left_out = exact.scatter(1, ids, 0.0).amax(1)
    worst = torch.maximum(torch.as_tensor(bound), exact.gather(1, ids)[:, -1])
    assert (left_out <= worst + 1e-9).all()
    sure = exact.gather(1, ids)[:, -1] > bound
    assert [set(a) for a in ids[sure].tolist()] == [set(b) for b in best[sure].tolist()]
    if top_k == 8:  # both cases occur, so both statements are tested
        assert 0 < int(sure.sum()) < len(sure)


def test_an_ensemble_asks_again_only_for_what_a_member_did_not_list(teachers: list[LocalTeacher]) -> None:
    """Every answer has its price on the wire: the second question is about the others' ids, and about none twice."""
    made, members = rollout(), [Elsewhere(t) for t in teachers[:2]]
    ensemble = EnsembleTeacher(list(zip(members, WEIGHTS, strict=True)))
    ensemble.score(made, 8)
    own = [torch.cat([b.topk_ids for b in t.score(made, 8)]).tolist() for t in teachers[:2]]
    for member, mine, others in zip(members, own, own[::-1], strict=True):
        (first, nothing), (again, chosen) = member.asked
        assert (first, nothing, again) == (8, None, 0) and chosen is not None
        for row, listed, other in zip(chosen.tolist(), mine, others, strict=True):
            wanted = [i for i in row if i >= 0]
            assert sorted(wanted) == sorted(set(other) - set(listed))
    for member in members:
        member.asked.clear()
    ensemble.score(made, VOCAB)
    ensemble.score(made, 0)
    assert all([k for k, _ in member.asked] == [VOCAB, 0] for member in members)  # all is listed, or nothing asked


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("top_k", [0, 6])
def test_ensemble_lists_what_the_caller_chose(teachers: list[LocalTeacher], elsewhere: bool, top_k: int) -> None:
    made, members = rollout(), [Elsewhere(t) if elsewhere else t for t in teachers[:2]]
    chosen = (torch.arange(made.num_rows * 3).view(-1, 3) * 37) % 260
    chosen[1, 2] = -1
    nothing = EnsembleTeacher(list(zip(members, WEIGHTS, strict=True))).score(made, 0, chosen * 0 - 1)
    assert all((b.topk_ids == -1).all() and b.topk_ids.shape[1] == 3 for b in nothing)
    blocks = EnsembleTeacher(list(zip(members, WEIGHTS, strict=True))).score(made, top_k, chosen)
    ids, lps = torch.cat([b.topk_ids for b in blocks]).long(), torch.cat([b.topk_logprobs for b in blocks])
    assert {b.header.support for b in blocks} == ({"union"} if top_k else {"caller"})
    assert {b.header.top_k for b in blocks} == {ids.shape[1]} == {top_k + 3}
    for row, listed in zip(chosen.tolist(), ids.tolist(), strict=True):
        assert set(row) - {-1} <= set(listed)
    real, exact = ids >= 0, averaged(teachers, made)
    torch.testing.assert_close(lps[real].double(), exact.gather(1, ids.clamp(min=0)).log()[real], rtol=1e-4, atol=1e-5)
    assert (lps[~real] == -torch.inf).all() and (real.sum(1) >= top_k).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_a_divergence_from_the_listed_ensemble_is_below_the_dense_one(teachers: list[LocalTeacher], name: str) -> None:
    made, members = rollout(), [Elsewhere(t) for t in teachers[:2]]
    (listed_ids, listed_lps) = whole(
        gather(EnsembleTeacher(list(zip(members, WEIGHTS, strict=True))), made, "top_k", 8)
    )
    student = softmaxes(teachers[2], made).log()
    dense = getattr(divergences, name)(student, averaged(teachers, made).log())
    coarse = getattr(sparse, name)(student, listed_ids, listed_lps)
    assert (coarse <= dense + 1e-5).all() and (coarse >= -1e-6).all() and coarse.sum() > 0.1


def test_whole_sequences_are_drawn_from_members_by_weight(teachers: list[LocalTeacher]) -> None:
    """Greedy answers tell the members apart. 400 draws at 3/4: mean 300, standard deviation 8.7; 5 of them are
    missed with probability 6e-7. Two samples of a prompt choose independently: the same bound on agreeing pairs."""
    prompts = [Prompt([5 + i % 200, 6, 7 + i // 200], "", "math", i) for i in range(200)]
    ensemble = EnsembleTeacher(list(zip(teachers, WEIGHTS, strict=False)))
    greedy = Sampling(3, temperature=0.0, samples_per_prompt=2, seed=11)
    found = ensemble.generate(prompts, greedy)
    again = ensemble.generate(prompts, greedy)
    assert torch.equal(found.input_ids, again.input_ids) and len(found) == 400
    assert found.domain == ("math",) * 400

    def texts(made: Rollout) -> list[tuple[int, ...]]:
        return [tuple(ids[m].tolist()) for ids, m in zip(made.input_ids, made.completion_mask, strict=True)]

    alone = [texts(t.generate(prompts, replace(greedy, samples_per_prompt=1))) for t in teachers[:2]]
    owner = []
    for i, text in enumerate(texts(found)):
        assert text in (alone[0][i // 2], alone[1][i // 2])
        if alone[0][i // 2] != alone[1][i // 2]:
            owner.append((i, text == alone[1][i // 2]))
    assert len(owner) > 380  # hardly any prompt has the same answer from both
    second, n = sum(is_second for _, is_second in owner), len(owner)
    assert abs(second - 0.75 * n) < 5 * math.sqrt(n * 0.75 * 0.25)
    by_prompt: dict[int, list[bool]] = {}
    for i, is_second in owner:
        by_prompt.setdefault(i // 2, []).append(is_second)
    pairs = [a == b for a, b in by_prompt.values()]
    same = 0.75**2 + 0.25**2
    assert abs(sum(pairs) - same * len(pairs)) < 5 * math.sqrt(len(pairs) * same * (1 - same))


def test_members_with_equal_weights_do_not_draw_alike(teachers: list[LocalTeacher]) -> None:
    """The same model twice: many samples of one prompt are as varied as the model's own, not pairs of copies."""
    ensemble = EnsembleTeacher([(teachers[0], 1.0), (teachers[0], 1.0)])
    sampling = Sampling(12, temperature=2.0, samples_per_prompt=16, seed=5)
    found = ensemble.generate([Prompt([5, 6, 7], "")], sampling)
    counts = Counter(tuple(row.tolist()) for row in found.input_ids)
    assert len(counts) == 16


def test_weights_must_be_positive(teachers: list[LocalTeacher]) -> None:
    for weight in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="must be > 0"):
            EnsembleTeacher([(teachers[0], 1.0), (teachers[1], weight)])


def test_a_member_that_cannot_score_chosen_ids_is_named(teachers: list[LocalTeacher]) -> None:
    blind = Elsewhere(teachers[1], chooses=False)
    ensemble = EnsembleTeacher([(Elsewhere(teachers[0]), 1.0), (blind, 1.0)], names=["sees", "blind"])  # type: ignore[list-item]
    assert len(ensemble.score(rollout(), 0)) == 5  # nothing chosen, nothing refused
    with pytest.raises(UserError, match=r"'blind' refuses: the caller chose.*teacher\.engine hf"):
        ensemble.score(rollout(), 4)


# ---------------------------------------------------------------- both


def forms(made: Rollout, teachers: list[LocalTeacher]) -> dict[str, tuple[Any, Tensor]]:
    """Rows of every composition and the logits they stand for."""
    a, b, c = teachers
    mixed = EnsembleTeacher([(a, WEIGHTS[0]), (b, WEIGHTS[1])])
    nested = RoutedTeacher({"both": (mixed, ["math"]), "rest": (c, [])})
    log = [softmaxes(t, made).log() for t in teachers]
    pick = torch.tensor([i for i, d in enumerate(DOMAINS) for _ in range(made.row_counts[i])])
    is_math = torch.tensor([d == "math" for d in DOMAINS])[pick][:, None]
    is_code = torch.tensor([d == "code" for d in DOMAINS])[pick][:, None]
    return {
        "routed": (
            gather(routed(a, b, c), made, "full", 0),
            torch.where(is_math, log[0], torch.where(is_code, *log[1:])),
        ),
        "ensemble": (gather(mixed, made, "full", 0), averaged(teachers, made).log()),
        "nested": (gather(nested, made, "full", 0), torch.where(is_math, averaged(teachers, made).log(), log[2])),
    }


@pytest.mark.parametrize("form", ["routed", "ensemble", "nested"])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 64])
@pytest.mark.parametrize("vocab_size", [None, 200])
def test_streamed_equals_naive(
    teachers: list[LocalTeacher], form: str, chunk_tokens: int, vocab_size: int | None
) -> None:
    """Value and gradients; under a vocabulary cut every teacher is renormalised before it is mixed."""
    made = rollout()
    rows, logits = forms(made, teachers)[form]
    if vocab_size is not None and form != "routed":
        cut = [softmaxes(t, made)[:, :vocab_size] for t in teachers[:2]]
        mixed = sum(w * p / p.sum(1, keepdim=True) for w, p in zip(WEIGHTS, cut, strict=True)).log()  # type: ignore[union-attr]
        is_math = torch.tensor([d == "math" for i, d in enumerate(DOMAINS) for _ in range(made.row_counts[i])])
        logits = mixed if form == "ensemble" else torch.where(is_math[:, None], mixed, logits[:, :vocab_size])
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, VOCAB), torch.randn(made.num_rows, 6, requires_grad=True)
    loss, _ = streamed(divergences.reverse_kl, hidden, head, rows, chunk_tokens=chunk_tokens, vocab_size=vocab_size)
    naive = divergences.reverse_kl(head(hidden)[:, :vocab_size], logits[:, :vocab_size].float()).sum()
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=1e-4)
    leaves_ = (hidden, head.weight, head.bias)
    for found, expected in zip(torch.autograd.grad(loss, leaves_), torch.autograd.grad(naive, leaves_), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("form", ["routed", "ensemble", "nested"])
def test_rows_are_indexed_like_a_tensor(teachers: list[LocalTeacher], form: str) -> None:
    rows, _ = forms(rollout(), teachers)[form]
    (everything,) = whole(rows)
    n, mask = len(rows), torch.arange(len(rows)) % 3 == 1
    for index in (
        slice(2, 7),
        slice(0, 0),
        slice(n - 1, None),
        slice(None, None, 2),
        torch.tensor([5, 0, 5, n - 1]),
        mask,
    ):
        (found,) = whole(rows[index])
        assert len(rows[index]) == len(found) == len(everything[index])
        torch.testing.assert_close(found, everything[index], rtol=1e-6, atol=1e-6)
    parts = rows[3:9][1:4]  # a part of a part
    torch.testing.assert_close(whole(parts)[0], everything[4:7])
    (narrow,) = rows.chunk(slice(1, 4), 100)
    assert narrow.shape == (3, 100)


def test_rows_of_a_16_bit_and_a_32_bit_teacher(teachers: list[LocalTeacher]) -> None:
    """The wider dtype holds both; in autocast every teacher's head is cast as a single one's would be."""
    hidden, head = torch.randn(4, 6), nn.Linear(6, 11)
    low = HiddenRows(hidden[:2].bfloat16(), nn.Linear(6, 11).bfloat16())
    rows = RoutedRows((low, HiddenRows(hidden[2:], head)), (torch.tensor([0, 3]), torch.tensor([1, 2])))
    (found,) = whole(rows)
    assert found.dtype == torch.float32
    assert torch.equal(found[[1, 2]], whole(rows.parts[1])[0])
    assert torch.equal(found[[0, 3]].bfloat16(), whole(low)[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = streamed(divergences.forward_kl, torch.randn(4, 6, requires_grad=True), nn.Linear(6, 11), rows)
    assert loss.isfinite()


def test_rows_that_do_not_fit_together() -> None:
    two, three = LogitRows(torch.zeros(2, 5)), LogitRows(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="each row has a place"):
        RoutedRows((two,), (torch.arange(3),))
    with pytest.raises(ValueError, match=r"\[2, 3\] rows"):
        MixtureRows((two, three), (1.0, 1.0))
    with pytest.raises(ValueError, match="weight > 0"):
        MixtureRows((two, two), (1.0, 0.0))
    listed = SparseRows(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))
    assert RoutedRows((listed,), (torch.arange(1),)).width is None


@pytest.mark.parametrize("compose", ["routed", "ensemble"])
def test_a_student_equal_to_all_teachers_has_nothing_to_learn(compose: str) -> None:
    same = [LocalTeacher(tiny.llama(1), tiny.tokenizer()) for _ in range(2)]
    several: Any = (
        RoutedTeacher({"A": (same[0], ["math"]), "B": (same[1], [])})
        if compose == "routed"
        else EnsembleTeacher([(same[0], 1.0), (same[1], 2.0)])
    )
    made, student = rollout(), tiny.llama(1)
    rows: Any = same[0].dense(made)
    hidden = rows.hidden_NH.clone().requires_grad_()
    loss, _ = streamed(divergences.reverse_kl, hidden, student.lm_head, gather(several, made, "full", 0))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(loss.item()) < 1e-4 and gradient.abs().max() < 1e-5


def test_teachers_elsewhere_are_asked_at_the_same_time(teachers: list[LocalTeacher]) -> None:
    """Two wait for each other: asked one after the other they would time out. The embedded one stays in this thread."""
    together = threading.Barrier(2)
    far = [Elsewhere(t, lambda: together.wait(timeout=30)) for t in teachers[:2]]
    blocks = routed(far[0], far[1], teachers[2]).score(rollout(), 2)
    assert len(blocks) == 5
    assert all(name != threading.current_thread().name for t in far for name in t.threads)
    near = Elsewhere(teachers[0])
    near.bytes_received = None  # type: ignore[assignment]
    routed(near, teachers[1], teachers[2]).score(rollout(), 2)
    assert near.threads == {threading.current_thread().name}


def test_an_error_elsewhere_is_raised_here(teachers: list[LocalTeacher]) -> None:
    def broken() -> None:
        raise UserError("service is gone")

    far = [Elsewhere(teachers[0]), Elsewhere(teachers[1], broken)]
    with pytest.raises(UserError, match="service is gone"):
        routed(far[0], far[1], teachers[2]).score(rollout(), 2)


def test_identity_and_end(teachers: list[LocalTeacher]) -> None:
    a, b, c = teachers
    infos = [
        routed(a, b, c).info(),
        routed(b, a, c).info(),
        EnsembleTeacher([(a, 1.0), (b, 1.0)]).info(),
        EnsembleTeacher([(a, 1.0), (b, 2.0)]).info(),
        a.info(),
    ]
    assert len({i.fingerprint for i in infos}) == len(infos)
    assert {(i.tokenizer, i.vocab_size, i.eos_ids, i.context_length, i.template) for i in infos} == {
        (a.info().tokenizer, VOCAB, (1,), 256, a.info().template)
    }
    assert infos[0] == routed(a, b, c).info()
    assert (
        infos[3] == EnsembleTeacher([(a, 2.0), (b, 4.0)], names=list(EnsembleTeacher([(a, 1), (b, 1)]).members)).info()
    )
    far, stored = Elsewhere(a), Elsewhere(b)
    stored.live = False  # type: ignore[attr-defined]
    several = routed(far, far, c)
    assert several.live and several.bytes_received == 7
    several.close()
    assert far.closed == 1  # shared by two routes, closed once
    assert not routed(far, stored, c).live and routed(a, b, c).bytes_received is None
    nested = RoutedTeacher({"mix": (EnsembleTeacher([(a, 1.0), (b, 1.0)], names=["a", "b"]), ["math"]), "c": (c, [])})
    assert leaves(nested) == [("a", a), ("b", b), ("c", c)]
    assert leaves(a, "x") == [("x", a)]
