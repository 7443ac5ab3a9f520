"""Teachers of one tokenizer with heads of different width, against plain softmaxes over the columns they share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, UserError
from llmdistill.objectives import sparse
from llmdistill.recipe.config import TeacherConfig
from llmdistill.teachers.base import TeacherInfo
from llmdistill.teachers.evidence import gather
from llmdistill.teachers.load import load_teachers
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mixture import EnsembleTeacher, RoutedTeacher
from llmdistill.teachers.narrow import score_within
from llmdistill.texts import Rollout, collate, span
from llmdistill.wire.blocks import BlockHeader, ScoreBlock, decode, encode
from llmdistill.wire.listing import columns, listed, support_of
from tests import tiny

V, WIDE = 264, 300  # as 151,936 and 152,064 are to each other, but with much of the mass past the narrower
WEIGHTS = (0.25, 0.75)
DOMAINS = ("a", "b", "a", "b")


class Wired:
    """What a teacher says as it comes over a wire: blocks, encoded and decoded; of an embedded one or of a table."""

    bytes_received = 1

    def __init__(self, inner: Any) -> None:
        self.inner, self.info, self.questions = inner, inner.info, list[tuple[int, Tensor | None]]()

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        self.questions.append((top_k, chosen))
        return [decode(encode(block, "float32")) for block in self.inner.score(rollout, top_k, chosen)]


class Table:
    """A teacher that gives every row of one sequence the distribution in a table, [N, V]."""

    def __init__(self, probabilities: list[list[float]], name: str = "table") -> None:
        self.p_NV = torch.tensor(probabilities)
        self.name = name

    def info(self) -> TeacherInfo:
        return TeacherInfo(self.name, self.name, "tokenizer", self.p_NV.shape[1], (1,), 64, None)

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        lp_NV = self.p_NV.log()
        own = lp_NV.gather(1, rollout.token_rows()[:, None]).squeeze(1)
        width = columns(top_k, chosen, lp_NV.shape[1])
        header = BlockHeader(self.name, "tokenizer", width, lp_NV.shape[1], support=support_of(top_k, chosen))
        return [ScoreBlock(span(rollout.completion_mask[0]), own, *listed(lp_NV, top_k, chosen), header)]


@pytest.fixture(scope="module")
def teachers() -> tuple[LocalTeacher, LocalTeacher]:
    tokenizer = tiny.tokenizer()
    return LocalTeacher(tiny.llama(1, vocab=V), tokenizer), LocalTeacher(tiny.llama(2, vocab=WIDE), tokenizer)


def rollout() -> Rollout:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(4, 260, (n,), generator=generator).tolist()  # noqa: E731
    return collate([draw(3), draw(8), draw(2), draw(5)], [draw(6), draw(2), draw(4), draw(5)], pad_id=0, domain=DOMAINS)


def softmaxes(teacher: LocalTeacher, of: Rollout, width: int | None) -> Tensor:
    """[N, width] float64, over the first ``width`` columns."""
    with torch.no_grad():
        (logits,) = teacher.dense(of).chunk(slice(0, of.num_rows), None)
    return logits[:, :width].double().softmax(-1)


def expected(several: str, teachers: tuple[LocalTeacher, LocalTeacher], of: Rollout) -> Tensor:
    narrow, wide = (softmaxes(t, of, V) for t in teachers)
    if several == "averaged":
        return WEIGHTS[0] * narrow + WEIGHTS[1] * wide
    is_a = torch.tensor([d == "a" for i, d in enumerate(DOMAINS) for _ in range(of.row_counts[i])])
    return torch.where(is_a[:, None], narrow, wide)


def composed(several: str, members: list[Any]) -> Any:
    if several == "averaged":
        return EnsembleTeacher(list(zip(members, WEIGHTS, strict=True)), ["narrow", "wide"])
    return RoutedTeacher({"narrow": (members[0], ["a"]), "wide": (members[1], ["b"])})


def where(members: tuple[LocalTeacher, LocalTeacher], form: str) -> list[Any]:
    """Embedded, elsewhere, or the one with the narrow head here and the other there."""
    return [t if form == "here" or (form == "both" and i == 0) else Wired(t) for i, t in enumerate(members)]


@pytest.mark.parametrize("several", ["averaged", "routed"])
@pytest.mark.parametrize("form", ["here", "there", "both"])
def test_the_whole_distribution_is_that_over_the_common_columns(several: str, form: str, teachers: Any) -> None:
    made, teacher = rollout(), composed(several, where(teachers, form))
    assert teacher.info().vocab_size == V
    (logits,) = gather(teacher, made, "full", 0).chunk(slice(0, made.num_rows), None)
    exact = expected(several, teachers, made)
    torch.testing.assert_close(logits.double().softmax(-1), exact, rtol=1e-4, atol=1e-7)
    past = 1 - softmaxes(teachers[1], made, None)[:, :V].sum(1)
    assert past.mean() > 0.05  # the cut is no formality here


@pytest.mark.parametrize("several", ["averaged", "routed"])
@pytest.mark.parametrize("top_k", [0, 1, 12, V])
@pytest.mark.parametrize("caller", [False, True])
def test_embedded_teachers_list_exactly_that(several: str, top_k: int, caller: bool, teachers: Any) -> None:
    """Tokens, lists and what the caller chose; every block is as wide as the others and goes over a wire."""
    made, exact = rollout(), expected(several, teachers, rollout())
    chosen = (torch.arange(made.num_rows * 3).view(-1, 3) * 37) % 260 if caller else None
    blocks = composed(several, list(teachers)).score(made, top_k, chosen)
    assert {b.header.vocab_size for b in blocks} == {V}
    ids, lps = torch.cat([b.topk_ids for b in blocks]).long(), torch.cat([b.topk_logprobs for b in blocks])
    tokens = torch.cat([b.token_logprobs for b in blocks])
    real = ids >= 0
    torch.testing.assert_close(lps[real].double(), exact.gather(1, ids.clamp(min=0)).log()[real], rtol=1e-4, atol=1e-5)
    own = exact.gather(1, made.token_rows()[:, None])[:, 0].log()
    torch.testing.assert_close(tokens.double(), own, rtol=1e-4, atol=1e-5)
    assert not bool((ids >= V).any())
    for block in blocks:
        decode(encode(block))


@pytest.mark.parametrize("several", ["averaged", "routed"])
@pytest.mark.parametrize("form", ["there", "both"])
@pytest.mark.parametrize("top_k", [8, 60])
def test_listed_over_a_wire_it_is_off_by_the_unlisted_mass_past_the_cut(
    several: str, form: str, top_k: int, teachers: Any
) -> None:
    """P is known but for what the wide teacher did not list; so every listed probability is at most that much low."""
    made, exact = rollout(), expected(several, teachers, rollout())
    wide = softmaxes(teachers[1], made, None)
    best = wide.topk(top_k)
    past = wide[:, V:].sum(1)
    known = best.values.masked_fill(best.indices < V, 0).sum(1)
    low = ((1 - past) / (1 - known)).log()[:, None]  # of the wide teacher's log-probs, <= 0
    blocks = composed(several, where(teachers, form)).score(made, top_k)
    ids, lps = torch.cat([b.topk_ids for b in blocks]).long(), torch.cat([b.topk_logprobs for b in blocks]).double()
    real = ids >= 0
    error = torch.where(real, lps - exact.gather(1, ids.clamp(min=0)).log(), 0)
    assert int(ids.max()) < V and bool((known > 0).any())
    assert bool((error <= 1e-5).all()) and bool((error >= low - 1e-5).all())
    assert bool(((lps.exp() * real).sum(1) <= 1 + 1e-5).all())
    assert bool((lps.diff(dim=1)[real[:, 1:]] <= 0).all())
    own = exact.gather(1, made.token_rows()[:, None])[:, 0].log()
    error = torch.cat([b.token_logprobs for b in blocks]).double() - own
    assert bool((error <= 1e-5).all()) and bool((error >= low[:, 0] - 1e-5).all())


def one_sequence() -> Rollout:
    return collate([[0]], [[1, 2]], pad_id=0, domain=["a"])


# Two rows over 4 and over 6 columns; ids 4 and 5 are past the narrower head.
NARROW = Table([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], "narrow")
BROAD = Table([[0.30, 0.20, 0.05, 0.05, 0.40, 0.00001], [0.12, 0.08, 0.60, 0.10, 0.05, 0.05]], "wide")


def test_by_hand_a_listed_id_past_the_cut_is_dropped_and_divided_out() -> None:
    """Row 0 lists ids 4 (.40) and 0 (.30): of .60 that are left, id 0 has .50. Row 1 lists nothing past the cut."""
    (block,), _ = score_within(Wired(BROAD), 4, one_sequence(), 2)  # type: ignore[arg-type]
    assert block.topk_ids.tolist() == [[0, -1], [2, 0]]
    torch.testing.assert_close(block.topk_logprobs.exp(), torch.tensor([[0.5, 0.0], [0.6, 0.12]]))
    torch.testing.assert_close(block.token_logprobs.exp(), torch.tensor([0.2 / 0.6, 0.6]))
    assert (block.header.top_k, block.header.vocab_size) == (2, 4)
    decode(encode(block))


def test_by_hand_the_average_mixes_what_is_left_of_each() -> None:
    """Row 0: the union is {3, 2} of the narrow and {0} of the wide one, asked about 2 and 3, with P = .6 still."""
    members = [Wired(NARROW), Wired(BROAD)]
    ensemble = EnsembleTeacher([(members[0], 0.5), (members[1], 0.5)], ["narrow", "wide"])  # type: ignore[list-item]
    (block,) = ensemble.score(one_sequence(), 2)
    # of both rows: .5 narrow + .5 wide / P, P = .6 and 1; the two likeliest of the union
    row0 = {0: 0.05 + 0.25, 2: 0.15 + 0.025 / 0.6, 3: 0.2 + 0.025 / 0.6}
    row1 = {0: 0.2 + 0.06, 1: 0.15 + 0.04, 2: 0.1 + 0.3}
    assert block.topk_ids.tolist() == [[0, 3], [2, 0]]
    torch.testing.assert_close(block.topk_logprobs.exp(), torch.tensor([[row0[0], row0[3]], [row1[2], row1[0]]]))
    torch.testing.assert_close(block.token_logprobs.exp(), torch.tensor([0.1 + 0.5 * 0.2 / 0.6, 0.1 + 0.3]))


def test_by_hand_the_tokens_alone() -> None:
    """Nothing is listed, so nothing is known of what lies past the cut."""
    ensemble = EnsembleTeacher([(Wired(NARROW), 0.5), (Wired(BROAD), 0.5)], ["narrow", "wide"])  # type: ignore[list-item]
    (block,) = ensemble.score(one_sequence(), 0)
    torch.testing.assert_close(block.token_logprobs.exp(), torch.tensor([0.1 + 0.1, 0.1 + 0.3]))


def test_a_member_that_lacks_only_padding_is_not_asked_again() -> None:
    """A list from which an id was cut has room left, and nothing to put there."""
    twins = [Wired(Table(BROAD.p_NV.tolist(), f"wide {i}")) for i in range(2)]
    small = Wired(Table([[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]], "narrow"))
    ensemble = EnsembleTeacher([(t, 1.0) for t in (*twins, small)])  # type: ignore[misc]
    ensemble.score(one_sequence(), 1)
    # Row 0: the twins list id 4, which goes, and are asked for id 0; row 1: all list id 2. The narrow one has all.
    assert [len(t.questions) for t in (*twins, small)] == [2, 2, 1]


def test_the_divergence_against_a_narrow_student_is_the_one_over_its_columns() -> None:
    """With every column listed: reverse KL from buckets, by hand over 4 columns."""
    student = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    (block,), _ = score_within(Wired(BROAD), 4, one_sequence(), 4)  # type: ignore[arg-type]
    found = sparse.reverse_kl(student.log(), block.topk_ids.long(), block.topk_logprobs)
    target = BROAD.p_NV[:, :4] / BROAD.p_NV[:, :4].sum(1, keepdim=True)
    torch.testing.assert_close(found, (student * (student / target).log()).sum(1), rtol=1e-4, atol=1e-6)


def test_a_teacher_with_nearly_all_of_its_mass_past_the_cut_gives_finite_numbers() -> None:
    absurd = Wired(Table([[0.0, 1e-12, 0.0, 0.0, 1.0, 0.0]] * 2))
    (block,), _ = score_within(absurd, 4, one_sequence(), 2)  # type: ignore[arg-type]
    assert bool((block.topk_logprobs <= 0).all()) and not bool(block.topk_logprobs.isnan().any())
    assert math.isfinite(block.token_logprobs[0].item())


def test_different_tokenizers_are_refused_whatever_the_width() -> None:
    other = Table([[0.25] * 4] * 2, "other")
    other.info = lambda: TeacherInfo("other", "x", "another", 4, (1,), 64, None)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="'narrow' and 'other' have different tokenizers"):
        EnsembleTeacher([(NARROW, 1.0), (other, 1.0)], ["narrow", "other"])  # type: ignore[list-item]


@pytest.mark.parametrize("estimator", ["full", "top_k", "sampled"])
@pytest.mark.parametrize("domains", ["both", "each"])
def test_a_run_with_two_widths_of_one_family(estimator: str, domains: str, tiny_run: Path, tmp_path: Path) -> None:
    """From a recipe's teachers to a trained step: the student is cut to the narrowest head as well."""
    tiny.llama(3, vocab=WIDE).save_pretrained(tmp_path / "wide")
    tiny.tokenizer().save_pretrained(tmp_path / "wide")
    configs = [
        TeacherConfig(
            model=str(folder), dtype="float32", **({"domains": [name]} if domains == "each" else {"weight": 1})
        )
        for folder, name in ((tiny_run / "teacher", "a"), (tmp_path / "wide", "b"))
    ]
    teacher = load_teachers(configs, "cpu", 100, ["teachers[0]", "teachers[1]"])
    args = OPDConfig(
        output_dir=str(tmp_path / "run"),
        estimator=estimator,  # type: ignore[arg-type]
        max_steps=1,
        save_strategy="no",
        rollouts=RolloutConfig(max_new_tokens=6),
    )
    rows = [{**row, "domain": "ab"[i % 2]} for i, row in enumerate(tiny.rows(8, completion=False))]
    trainer = OPDTrainer(
        tiny.llama(1, vocab=WIDE), args, teacher, train_dataset=rows, processing_class=tiny.tokenizer()
    )
    assert trainer.vocab_size == V
    assert math.isfinite(trainer.train().training_loss)
