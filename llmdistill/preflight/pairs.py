"""Checks of a run on pairs (REDI, SimPO, DPO, fine-tuning on the chosen sides): there is no teacher to examine.

What a row can be wrong in by itself (an empty side, two sides alike, too many tokens) was refused when it was encoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmdistill.models.heads import head_of
from llmdistill.models.modes import evaluating, own_precision
from llmdistill.preflight.finding import HELDOUT, Finding, Subject, fail, notice, ok
from llmdistill.preflight.tokens import columns, leaks, too_narrow
from llmdistill.texts import Prompt, position_ids, predicting_rows
from llmdistill.texts.facts import Facts, facts_of
from llmdistill.texts.pair import Pair, whole
from llmdistill.texts.pairs import collate_pairs, numbers_of
from llmdistill.texts.prompts import PromptEncoder
from llmdistill.texts.streams import at_hand
from llmdistill.tokenization.special import eos_ids, pad_id

PROBED, TOKENS = 2, 32  # pairs that are looked at, and how much of each
LOOKED_AT = 10_000  # pairs whose words are read: what a template does it does to all


@dataclass(frozen=True)
class Uses:
    """What of a method the checks of pairs ask for: whose texts are trained on."""

    uses: frozenset[str] = frozenset({"dataset"})


@dataclass(frozen=True)
class PairRun:
    """What a run on pairs is made of, before there is a trainer.

    Attributes:
        args: settings of the stage that is trained last.
        train_dataset: pairs, and positives of stage 1.
        stages: run folders that will keep checkpoints.
    """

    args: Any
    model: nn.Module
    encode: PromptEncoder
    train_dataset: Sequence[Pair]
    eval_dataset: Sequence[Pair]
    stages: int = 1
    method: Uses = Uses()

    @property
    def eos_ids(self) -> Any:
        return eos_ids(self.model, self.encode.tokenizer)  # type: ignore[arg-type]

    @property
    def pad_id(self) -> int:
        return pad_id(self.encode.tokenizer)


class ChosenSides(Sequence[Prompt]):
    """The prompts of pairs, each with its chosen side as the completion."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        found = self.pairs[index]
        return [_chosen(pair) for pair in found] if isinstance(index, slice) else _chosen(found)

    @property
    def facts(self) -> Facts:
        pairs: Any = self.pairs
        if not hasattr(pairs, "facts"):
            return facts_of([_chosen(pair) for pair in pairs])
        return replace(pairs.facts, completions=pairs.lengths("chosen"), last=pairs.numbers("chosen_last"))


def _chosen(pair: Pair) -> Prompt:
    return replace(pair.prompt, completion=pair.chosen)


class PairSubject(Subject):
    """A run on pairs in the terms of the checks: its prompts, each with its chosen side as the completion."""

    def __init__(self, run: Any) -> None:
        self.trainer, self.args, self.student = run, run.args, run.model
        self.tokenizer: PreTrainedTokenizerBase = run.encode.tokenizer
        self.sides, self.router, self.live = [], None, False
        self.stages = getattr(run, "stages", 1)
        self.pairs: Sequence[Pair] = at_hand(run.train_dataset)
        self.heldout_pairs: Sequence[Pair] = at_hand(run.eval_dataset)
        self.prompts, self.heldout = ChosenSides(self.pairs), ChosenSides(self.heldout_pairs)


def width(s: Subject) -> Iterator[Finding]:
    """Every id of the student's tokenizer has a logit."""
    yield from too_narrow("the student", s.columns, s.ids)
    yield ok(f"{s.columns} logit columns for {s.ids} ids")


def pairs(s: Subject) -> Iterator[Finding]:
    """What is trained on is apart from what is measured on, and goes on where its prompt ends."""
    assert isinstance(s, PairSubject)
    yield from leaks(s.facts, s.heldout_facts)
    opened = _opened(s)
    for side in ("chosen", "rejected"):
        if found := [p.row for p in opened if _begins_with_thoughts(s, getattr(p, side))]:
            yield fail(
                f"{len(found)} {side} sides begin with <think> (first: row {found[0]}), and the template has written "
                "it already: the student would learn to open its thoughts twice",
                f"cut it from the {side} column",
            )
    distinct = len(np.unique(numbers_of(s.pairs, "whole", whole)))
    if distinct < len(s.pairs):
        yield notice(f"{len(s.pairs) - distinct} training pairs are repetitions of others")
    if (cut := int(numbers_of(s.pairs, "cut", lambda pair: pair.cut).sum())) > len(s.pairs) // 2:
        yield notice(
            f"{cut} completions of {len(s.pairs)} pairs are cut by objective.max_completion_tokens, and have no end",
            "raise it",
        )
    yield from columns(s)
    if not s.heldout:
        yield notice("no held-out pairs: nothing is measured before and after", HELDOUT)
    yield ok(f"{len(s.pairs)} pairs to train on, {len(s.heldout)} held out")


def _opened(s: PairSubject) -> list[Pair]:
    """The pairs whose prompt the template ends with <think>, among the first so many."""
    return [pair for pair in s.pairs[:LOOKED_AT] if pair.prompt.text.rstrip().endswith("<think>")]


def _begins_with_thoughts(s: PairSubject, side: tuple[int, ...]) -> bool:
    return str(s.tokenizer.decode(list(side[:8]))).lstrip().startswith("<think>")


@torch.no_grad()
def likelihood(s: Subject) -> Iterator[Finding]:
    """The student reads the pairs' tokens: their log-probs are numbers, and better than guessing."""
    assert isinstance(s, PairSubject)
    if s.sharded:
        yield notice("not checked: ZeRO-3 holds the student in shards until training starts")
        return
    shortest = sorted(s.pairs or s.heldout_pairs, key=lambda p: p.num_tokens)[:PROBED]
    cut = [
        replace(
            p,
            prompt=replace(p.prompt, ids=p.prompt.ids[-TOKENS:]),
            chosen=p.chosen[:TOKENS],
            rejected=p.rejected[:TOKENS],
            chosen_counts=(),  # all of them, whatever the loss reads
            rejected_counts=(),
        )
        for p in shortest
    ]
    device = next(s.student.parameters()).device
    rollout = collate_pairs(cut, s.trainer.pad_id).to(device)
    with evaluating(s.student), own_precision(s.student):
        logits_BTV = s.student(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=position_ids(rollout.attention_mask),
            use_cache=False,
        ).logits
    rows_NV = predicting_rows(logits_BTV, rollout.completion_mask).float()
    logp_N = rows_NV.log_softmax(-1).gather(1, rollout.token_rows()[:, None]).squeeze(1)
    counts = [len(p.chosen) for p in cut]
    chosen = float(logp_N[: sum(counts)].mean())
    guessing = -math.log(head_of(s.student).vocab_size)
    if not bool(logp_N.isfinite().all()):
        yield fail("the student's log-probs of the pairs are no numbers: its weights are damaged", "another student")
    elif chosen < guessing - 0.01:  # rounding
        yield notice(
            f"the student gives the chosen sides {chosen:.2f} nats a token, guessing gives {guessing:.2f}: it was "
            "trained with another tokenizer or template, or not at all",
            "the tokenizer that belongs to the student",
        )
    yield ok(f"{chosen:.2f} nats a token on the chosen sides of {len(cut)} pairs, guessing gives {guessing:.2f}")
