"""The texts of a round, the weights of their rows, and how both are split into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmdistill.composition.term import Groups, Term, consecutive_slices
from llmdistill.errors import UserError
from llmdistill.objectives.placed_rows import told_rows
from llmdistill.objectives.rows import PairedRows, RoutedRows, TeacherRows, TensorRows
from llmdistill.texts import Prompt, Rollout
from llmdistill.texts.batches import uncounted
from llmdistill.texts.views import in_context, stacked


@dataclass
class ContextView:
    """A text under another context, and which of its sequences have that context, [B] bool."""

    rollout: Rollout
    has: Tensor


@dataclass
class Text:
    """One text of a round: sequences, the prompt of each, and what is known of them. B sequences, N rows."""

    rollout: Rollout
    prompts: list[Prompt]
    rewards: list[float] | None = None
    advantages: list[float] | None = None
    author: str = ""

    def __post_init__(self) -> None:
        self._contexts: dict[str, ContextView] = {}

    def __len__(self) -> int:
        return len(self.rollout)

    def view(self, context: str, pad_id: int) -> ContextView:
        """As a judge reads it: under the prompt, or under a context of the rows."""
        if not context:
            return ContextView(self.rollout, torch.ones(len(self), dtype=torch.bool))
        if context not in self._contexts:
            self._contexts[context] = ContextView(*in_context(self.rollout, self.prompts, context, pad_id))
        return self._contexts[context]

    def reorder(self, order: Sequence[int]) -> Text:
        """The same sequences in another order."""

        def each(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in order]

        return Text(
            self.rollout.sequences(order),
            [self.prompts[i] for i in order],
            each(self.rewards),
            each(self.advantages),
            self.author,
        )

    @cached_property
    def countable(self) -> Text:
        """The text with all that might have been rows for rows, of a noised one: what its losses are divided by."""
        noise = self.rollout.noise
        if noise is None:
            return self
        return replace(self, rollout=replace(self.rollout, completion_mask=noise.countable, noise=None))

    def of_rows(self, values_U: Tensor) -> Tensor:
        """Of values of all that is countable, [U], those of the rows, [N]."""
        if self.rollout.noise is None:
            return values_U
        rows_BT = self.rollout.completion_mask[:, 1:]
        return values_U[rows_BT[self.rollout.noise.countable[:, 1:]].cpu()]

    @cached_property
    def row_tensors(self) -> dict[str, Tensor]:
        """The tensors of the rows that a term may read by name, [N] each."""
        read = {name: read(self) for name, read in ROW_READS.items()}
        return read if self.rollout.noise is None else read | _of_noise(self.rollout)

    def weights(self, domain_weights: Mapping[str, float]) -> tuple[Tensor, Tensor] | None:
        """(weight of every sequence [B], of every row within its sequence [N]); None where all are 1."""
        prompts = self.prompts
        unweighted = all(isinstance(p.weight, float | int) and p.weight == 1 for p in prompts)
        if unweighted and not domain_weights:
            return None
        # Weights of tokens are those of the row's own completion: on what others wrote they would lie anywhere.
        is_row_completion = self.author in ("", "dataset")
        sample_weights = [1.0 if isinstance(p.weight, tuple) else float(p.weight) for p in prompts]
        weights_of_domain = [domain_weights.get(p.domain or "", 1.0) for p in prompts]
        positions_by_sequence = self.row_tensors["position"].split(self.rollout.row_counts)
        token_weights = [
            torch.tensor(p.weight)[at] if is_row_completion and isinstance(p.weight, tuple) else torch.ones(len(at))
            for p, at in zip(prompts, positions_by_sequence, strict=True)
        ]
        per_sequence = torch.tensor(sample_weights) * torch.tensor(weights_of_domain)
        return per_sequence, torch.cat(token_weights) if token_weights else torch.zeros(0)


def _behavior(text: Text) -> Tensor:
    mask, logprobs_BT = text.rollout.completion_mask[:, 1:], text.rollout.behavior_logprobs
    return torch.full((text.rollout.num_rows,), torch.nan) if logprobs_BT is None else logprobs_BT[:, 1:][mask]


def _advantages(text: Text) -> Tensor:
    return torch.tensor(text.advantages or [0.0] * len(text)).repeat_interleave(torch.tensor(text.rollout.row_counts))


def _positions(text: Text) -> Tensor:
    r, counts = text.rollout, torch.tensor(text.rollout.row_counts)
    starts = r.attention_mask.long().argmax(1).cpu() + torch.tensor([len(p.ids) for p in text.prompts])
    positions = torch.arange(1, r.input_ids.shape[1]).expand(len(r), -1)[r.completion_mask[:, 1:].cpu()]
    return positions - starts.repeat_interleave(counts)


NOISE_READS = {"noise_weight": "weight", "no_suffix": "no_suffix"}  # and of a noised text: name -> tensor of its noise


def _of_noise(rollout: Rollout) -> dict[str, Tensor]:
    mask = rollout.completion_mask[:, 1:]
    return {name: getattr(rollout.noise, of_noise)[:, 1:][mask] for name, of_noise in NOISE_READS.items()}


# What a term may read of the rows themselves, see Term.reads. Any other name is a tensor that its survey derives.
ROW_READS: Mapping[str, Callable[[Text], Tensor]] = {
    "tokens": lambda text: text.rollout.token_rows(),
    "behavior": _behavior,
    "advantage": _advantages,
    "position": _positions,
}


def before_survey(term: Term) -> Term:
    """The term with only those of its reads that are there before its survey."""
    return replace(term, reads=tuple(name for name in term.reads if name in {**ROW_READS, **NOISE_READS}))


@dataclass
class TermInputs:
    """What one term reads about its texts in this round, in the order of their rows. N rows of all its texts."""

    evidence: TeacherRows
    weights_N: Tensor | None  # of the rows in the loss, sequence means included; None: 1
    count: float  # what this process adds to the denominator
    effective: tuple[float, float] = (0.0, 0.0)  # sums of w and of w squared

    def times(self, weights_N: Tensor) -> TermInputs:
        """With the rows' weights multiplied; the denominator is then the sum of the products."""
        product = weights_N.float() if self.weights_N is None else self.weights_N * weights_N.float()
        return TermInputs(
            self.evidence, product, float(product.sum()), (float(product.sum()), float(product.square().sum()))
        )


@dataclass
class Slice:
    """The part of a term that lies in one micro-batch."""

    term: Term
    evidence: TeacherRows
    rows: slice  # among the rows of the micro-batch
    weights_N: Tensor | None
    groups: Groups
    total: float = 0.0  # the denominator, of the global batch

    def to(self, device: Any) -> Slice:
        evidence = self.evidence.to(device)
        weights_N = None if self.weights_N is None else self.weights_N.to(device, non_blocking=True)
        groups = replace(self.groups, evidence=_tensors(evidence), weights_N=weights_N)
        return replace(self, evidence=evidence, weights_N=weights_N, groups=groups)


@dataclass
class MicroBatch:
    """What one backward pass needs: texts stacked into one batch of sequences, and the terms on its rows.

    It waits on the host, with all others of the round.
    """

    rollout: Rollout
    texts: dict[str, Text]
    slices: list[Slice]
    total: float = 0.0  # the denominator of the method's first term
    counts: bool = True  # whether anything counts, for any term, in the round it is a part of

    def to(self, device: Any) -> MicroBatch:
        """The same with what a pass reads on ``device``."""
        if torch.device(device).type == "cpu":
            return self
        return replace(self, rollout=self.rollout.to(device), slices=[s.to(device) for s in self.slices])


def row_weights(term: Term, texts: Sequence[Text], domain_weights: Mapping[str, float], pad_id: int) -> TermInputs:
    """The weights of a term's rows before evidence is there: of samples, tokens, domains, contexts, sequence means."""
    weights, count, weighted = list[Tensor](), 0.0, False
    of_rows = list[Tensor]()
    for noised in texts:
        text = noised.countable
        row_counts = torch.tensor(text.rollout.row_counts)
        text_weights = text.weights(domain_weights)
        per_sequence, per_row = text_weights or (torch.ones(len(text)), torch.ones(int(row_counts.sum())))
        if term.select is not None:
            per_row = per_row * term.select(text.row_tensors).float()
        has_contexts = torch.stack(
            [text.view(ask.context, pad_id).has for ask in term.asks if ask.context]
            or [torch.ones(len(text), dtype=torch.bool)]
        ).all(0)
        per_sequence = per_sequence * has_contexts
        weighted |= text_weights is not None or term.select is not None or term.mean != "token"
        weighted |= not bool(has_contexts.all())
        if term.mean != "token":
            split = per_row.split(row_counts.tolist())
            weight_sums = torch.stack([w.sum() for w in split]) if len(row_counts) else torch.zeros(0)
            if term.mean == "sequence":
                per_row = per_row / weight_sums.repeat_interleave(row_counts).clamp_min(1e-30)
            count += float(per_sequence[weight_sums > 0].sum())
        weights.append(per_row * per_sequence.repeat_interleave(row_counts))
        of_rows.append(noised.of_rows(weights[-1]))
    if term.mean == "token":
        weights_U = torch.cat(weights) if weights else torch.zeros(0)
        count = float(weights_U.sum()) if weighted else float(len(weights_U))
    weights_N = torch.cat(of_rows) if of_rows else torch.zeros(0)
    if term.group is not None:
        if weighted and not getattr(term.group, "weighs", False):
            raise UserError(
                f"term {term.name!r} is a loss of groups of rows, and rows have weights, which it would not read. Fix: "
                "leave data.weight_column and objective.domain_weights out."
            )
        count = 0.0  # of groups, which are counted when the evidence is there
    effective = (float(weights_N.sum()), float(weights_N.square().sum()))
    return TermInputs(TensorRows((), len(weights_N)), weights_N if weighted else None, count, effective)


def with_evidence(term: Term, inputs: TermInputs, texts: Sequence[Text], evidence: TeacherRows) -> TermInputs:
    """The inputs with the evidence, by which a loss of groups counts them; rows that it says nothing of weigh none."""
    if term.group is not None:
        counts = tuple(c for text in texts for c in text.rollout.row_counts)
        groups = Groups(counts, tuple(map(len, texts)), _tensors(evidence), inputs.weights_N)
        return replace(inputs, evidence=evidence, count=float(term.group.count(groups)))
    told_N = told_rows(evidence)
    if told_N is not None:
        inputs = inputs.times(told_N) if term.mean == "token" else _means_of(inputs, told_N, texts)
    return replace(inputs, evidence=evidence)


def _means_of(inputs: TermInputs, told_N: Tensor, texts: Sequence[Text]) -> TermInputs:
    """Sequence means over the told rows alone; a sequence without any has none."""
    assert inputs.weights_N is not None
    counts = [count for text in texts for count in text.rollout.row_counts]
    told = inputs.weights_N * told_N.float()
    sums, whole = (torch.stack([x.sum() for x in values.split(counts)]) for values in (told, inputs.weights_N))
    scale = torch.where(sums > 0, whole / sums.clamp_min(1e-30), 0.0)
    weights_N = told * scale.repeat_interleave(torch.tensor(counts))
    effective = float(weights_N.sum()), float(weights_N.square().sum())
    return TermInputs(inputs.evidence, weights_N, float(whole[sums > 0].sum()), effective)


def _tensors(evidence: TeacherRows) -> tuple[Tensor, ...]:
    if isinstance(evidence, PairedRows):
        return tuple(tensor for part in evidence.parts for tensor in _tensors(part))
    return evidence.tensors if isinstance(evidence, TensorRows) else ()


def with_reads(
    term: Term, texts: Sequence[Text], answers: Sequence[TeacherRows | None], derived: Mapping[str, Tensor]
) -> TeacherRows:
    """Judges' answers and the rows' own tensors as one: what the term's loss is given, text after text."""
    evidence = list[TeacherRows]()
    counts = [text.rollout.num_rows for text in texts]
    for text, judge_rows, span in zip(texts, answers, consecutive_slices(counts), strict=True):
        tensors = (derived[name][span] if name in derived else text.row_tensors[name] for name in term.reads)
        reads = TensorRows(tuple(x.cpu() for x in tensors), text.rollout.num_rows)
        evidence.append(
            reads if judge_rows is None else judge_rows if not term.reads else PairedRows((judge_rows, reads))
        )
    if len(evidence) == 1:
        return evidence[0]
    rows_of_texts = tuple(torch.arange(span.start, span.stop) for span in consecutive_slices(counts))
    return RoutedRows(tuple(evidence), rows_of_texts)


def micro_batches(
    texts: Mapping[str, Text],
    terms: Sequence[Term],
    term_inputs: Mapping[str, TermInputs],
    totals: Mapping[str, float],
    bounds: Mapping[str, Sequence[tuple[int, int]]],
    pad_id: int,
    packed: bool = False,
) -> list[MicroBatch]:
    """Micro-batches of the given sequences of every text, with the rows of evidence that belong to them: views of the
    round's, on the host like these.

    Args:
        bounds: of each text, of every micro-batch: from which sequence to which, see ``composition/plan.py``.
        packed: the student reads the sequences of each one behind another.
    """
    names, counted = list(texts), any(total > 0 for total in totals.values())
    starts = {name: torch.tensor([0, *texts[name].rollout.row_counts]).cumsum(0).tolist() for name in names}
    batches = []
    for part in range(len(bounds[names[0]])):
        part_texts = {
            n: texts[n].reorder(range(*bounds[n][part])) for n in names if bounds[n][part][0] < bounds[n][part][1]
        }
        if not part_texts:  # fewer sequences than micro-batches: a pass in which nothing counts, for ranks keep in step
            rollout = replace(uncounted(texts[names[0]].rollout), packed=packed)
            batches.append(MicroBatch(rollout, {}, [], totals[terms[0].name], counted))
            continue
        row_spans = dict(
            zip(part_texts, consecutive_slices([text.rollout.num_rows for text in part_texts.values()]), strict=True)
        )
        slices = []
        for term in terms:
            names_here = [name for name in term.texts if name in part_texts]
            if not names_here:
                continue
            index, offset = list[Tensor](), 0
            for name in term.texts:
                a, b = bounds[name][part]
                index.append(torch.arange(offset + starts[name][a], offset + starts[name][b]))
                offset += starts[name][-1]
            rows: Any = (
                torch.cat(index)
                if len(index) > 1
                else slice(int(index[0][0]), int(index[0][-1]) + 1)
                if len(index[0])
                else slice(0, 0)
            )
            inputs = term_inputs[term.name]
            counts = tuple(c for name in names_here for c in part_texts[name].rollout.row_counts)
            evidence = inputs.evidence[rows]
            span = slice(row_spans[names_here[0]].start, row_spans[names_here[-1]].stop)
            weights = None if inputs.weights_N is None else inputs.weights_N[rows]
            groups = Groups(counts, tuple(len(part_texts[name]) for name in names_here), _tensors(evidence), weights)
            slices.append(Slice(term, evidence, span, weights, groups, totals[term.name]))
        rollout = replace(stacked([text.rollout for text in part_texts.values()], pad_id), packed=packed)
        batches.append(MicroBatch(rollout, part_texts, slices, totals[terms[0].name], counted))
    return batches
