"""Preference pairs: one prompt, a chosen (correct) and a rejected (wrong) completion; and their log-probs.

A pair is two sequences, ``prompt + chosen`` and ``prompt + rejected``, each closed by the template's end of turn (by
the eos, where it has none) and cut after ``max_completion_tokens``. |y|, by which log-probs are divided, counts the
completion tokens that are left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts import Prompt, Rollout, collate
from llmdistill.texts.encoded_rows import encode_rows
from llmdistill.texts.messages import from_json, is_chat
from llmdistill.texts.pair import Pair, RejectedTokens
from llmdistill.texts.prompts import Completion, Overlong, PromptEncoder, located
from llmdistill.texts.sources import Drawn, Round, Stateless
from llmdistill.texts.streams import has_length
from llmdistill.texts.turns import Turn, is_empty

logger = logging.getLogger(__name__)

BadPairs = Literal["error", "skip"]


def numbers_of(pairs: Sequence[Pair], name: str, of: Callable[[Pair], int]) -> Any:
    """A number of every pair, [P]: the column ``name`` where they stand in columns."""
    return pairs.numbers(name) if hasattr(pairs, "numbers") else np.array([of(pair) for pair in pairs], dtype=np.int64)


class _Unfit(UserError):
    """A row that cannot be trained on: for its length, or for what its sides say."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Apart(Exception):
    """Takes an :class:`_Unfit` past what is done with rows that cannot be read."""

    def __init__(self, error: _Unfit) -> None:
        super().__init__(str(error))
        self.error = error


OVER = "longer than max_completion_tokens"


@dataclass
class PairEncoder:
    """Rows to :class:`Pair`, with the student's chat template.

    Args:
        prompts: encodes the prompts, and says how long they may be.
        chosen_column, rejected_column: completions: strings, or lists of chat messages whose last one is it. Of
            positives it may be missing, where the prompt is a conversation that ends with the answer.
        max_completion_tokens: completions are cut after so many; 0: never.
        context: tokens the student was built for.
        bad_pairs: what to do with rows that have an empty side or two sides alike. Rows that are too long are
            ``data.overlong``'s.
        rejected_tokens: which of the rejected side the loss pushes down: see :meth:`Pair.penalised`.
    """

    prompts: PromptEncoder
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    max_completion_tokens: int = 0
    context: int = 1 << 30
    bad_pairs: BadPairs = "error"
    rejected_tokens: RejectedTokens = "all"
    skipped: dict[str, int] = field(default_factory=dict)  # rows left out so far, by reason

    def __call__(self, row: Mapping[str, Any], index: int = 0, *, positive: bool = False) -> Pair:
        """One row; without its rejected side for a ``positive``.

        Raises:
            UserError: an empty side, two sides alike, or more tokens than the limits allow.
        """
        row = self.prompts.columns.row(row)
        sides = [self._turn(row, c, index) for c in (self.chosen_column, self.rejected_column)[: 2 - positive]]
        return self._pair([self.prompts.fitted(turn, index) for turn in sides], row, index)

    def _pair(self, sides: Sequence[Turn], row: Mapping[str, Any], index: int) -> Pair:
        """The pair of two turns with one prompt, or the positive of one."""
        (chosen, cut_chosen), *other = [
            self._side(turn, column, index)
            for turn, column in zip(sides, (self.chosen_column, self.rejected_column), strict=False)
        ]
        rejected, cut_rejected = other[0] if other else (Completion(()), False)
        if chosen.ids == rejected.ids:
            until = ", up to objective.max_completion_tokens" if cut_chosen else ""
            raise _Unfit(
                "identical",
                f"row {index}: {self.chosen_column} and {self.rejected_column} are the same text{until}; nothing tells "
                "them apart. Fix: remove the row, or --bad_pairs skip.",
            )
        if any(turn.prompt != sides[0].prompt for turn in sides):
            raise UserError(
                f"row {index}: {self.chosen_column} and {self.rejected_column} are conversations that part before "
                "their last messages; a pair has one prompt. Fix: end both where they part."
            )
        if len(sides) > 1 and len(self.prompts.turns.counted(sides[0])) > 1:
            raise UserError(
                f"row {index}: data.assistant_turns is all, and of a pair's conversation the last answers are "
                "compared. Fix: data.assistant_turns last."
            )
        prompt = self._prompt(sides[0], row, index)
        pair = Pair(prompt, chosen.ids, rejected.ids, cut_chosen + cut_rejected, chosen.counts, rejected.counts)
        if other and not any(pair.penalised(self.rejected_tokens)):
            raise _Unfit(
                "without a divergence",
                f"row {index}: {self.rejected_column} is the beginning of {self.chosen_column}, and "
                f"objective.rejected_tokens {self.rejected_tokens} counts what it says otherwise. "
                "Fix: remove the row, --bad_pairs skip, or --rejected_tokens all.",
            )
        if pair.num_tokens > self.context:
            raise _Unfit(
                "longer than the context",
                f"row {index}: prompt and completion have {pair.num_tokens} tokens, the student's context is "
                f"{self.context}. Fix: --objective.max_completion_tokens "
                f"{max(self.context - len(pair.prompt.ids), 1)} or less, or --data.overlong drop.",
            )
        return pair

    def encode_all(self, rows: Iterable[Mapping[str, Any]], source: str, *, positive: bool = False) -> Sequence[Pair]:
        """Every row that can be trained on. What is left out is counted in ``skipped`` and logged.

        Args:
            rows: with the columns named above.
            source: the setting they came from, for messages.
            positive: leave the rejected sides alone, whether there are any or not.

        Raises:
            UserError: a column is missing, a row cannot be trained on (and is not to be skipped), or none is left.
        """
        bad, where = len(self.prompts.bad), getattr(rows, "where", None)
        first = next((row for row in rows if isinstance(row, Mapping)), None) if has_length(rows) else None
        if first is not None:
            self._check_columns(self.prompts.columns.row(first), source, positive)
        from llmdistill.texts.pair_columns import PairColumns

        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("prompts", "skipped")}
        pairs, skipped, count = encode_rows(
            rows,
            self.prompts,
            lambda row, index, out: self.of_row(row, index, source, out, positive=positive, where=where),
            lambda rows: self.prompts.stored(rows, PairColumns),
            {"pairs": settings, "positive": positive, "source": source},
        )
        for kind, found in skipped.items():
            self.skipped[kind] = self.skipped.get(kind, 0) + len(found)
            few = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
            logger.warning("%s: %d of %d rows skipped, %s: rows %s", source, len(found), count, kind, few)
        if bad := len(self.prompts.bad) - bad:
            self.skipped["unreadable"] = self.skipped.get("unreadable", 0) + bad
            skipped["unreadable"] = list(self.prompts.bad)[-bad:]
        self.prompts.warn(source)
        if cut := int(numbers_of(pairs, "cut", lambda pair: pair.cut).sum()):
            logger.warning(
                "%s: %d completions cut after %d tokens (objective.max_completion_tokens); they are not closed",
                *(source, cut, self.max_completion_tokens),
            )
        if not pairs:
            why = ", ".join(f"{len(found)} {kind}" for kind, found in skipped.items()) or "it has no rows"
            raise UserError(f"{source}: no pair is left to train on ({why}). Fix: raise the limits, or mend the data.")
        return pairs

    def of_row(
        self,
        row: Any,
        index: int,
        source: str,
        skipped: dict[str, list[int]],
        *,
        positive: bool = False,
        where: Callable[[int], str] | None = None,
    ) -> list[Pair]:
        """The pairs of a row; none of one that the settings leave out, which ``skipped`` then holds.

        Raises:
            UserError: the row cannot be trained on.
        """
        encode = self._positives if positive else lambda row, index: [self(row, index)]
        try:
            return self.prompts.kept(row, index, self._unfit_apart(encode), where)
        except _Apart as apart:
            error = apart.error
        if error.kind == OVER:
            leave = self.prompts.config.completion_overlong == "drop"
        elif error.kind.startswith("longer"):
            leave = self.prompts.config.overlong == "drop"
        else:
            leave = self.bad_pairs == "skip"
        if not leave:
            raise UserError(f"{source}, {located(error, index, where)}") from None
        skipped.setdefault(error.kind, []).append(index)
        return []

    def _unfit_apart(self, encode: Callable[[Any, int], list[Pair]]) -> Callable[[Any, int], list[Pair]]:
        """``encode`` with what settings of their own decide about as another kind of error."""

        def encoded(row: Any, index: int) -> list[Pair]:
            try:
                return encode(row, index)
            except _Unfit as error:
                raise _Apart(error) from None

        return encoded

    def _check_columns(self, row: Mapping[str, Any], source: str, positive: bool) -> None:
        answered = positive and self.chosen_column not in row and self.prompts.turns.has_answer(row)
        for column, setting in (
            (self.prompts.config.prompt_column, "data.prompt_column"),
            *([] if answered else [(self.chosen_column, "objective.chosen_column")]),
            *([] if positive else [(self.rejected_column, "objective.rejected_column")]),
        ):
            if column not in row:
                raise UserError(f"{source} has no column {column!r} (it has {', '.join(row)}). Fix: --{setting} NAME.")

    def _positives(self, row: Mapping[str, Any], index: int) -> list[Pair]:
        """The row's last answer, or all of its answers, each for fine-tuning."""
        answered = self.chosen_column not in row  # a prompt with its completion, or a conversation that ends in one
        turn = self.prompts.turns.of(row, index) if answered else self._turn(row, self.chosen_column, index)
        turns = self.prompts.turns.counted(turn)
        return [self._pair([self.prompts.fitted(turn, index)], row, index) for turn in turns]

    def _turn(self, row: Mapping[str, Any], column: str, index: int) -> Turn:
        chat = any(is_chat(from_json(row.get(c))) for c in (self.chosen_column, self.rejected_column))
        return self.prompts.turns.with_completion(row, row.get(column), column, index, chat=chat)

    def _prompt(self, turn: Turn, row: Mapping[str, Any], index: int) -> Prompt:
        try:
            return self.prompts.prompt(turn, row, index)
        except Overlong as error:
            raise _Unfit("longer than max_prompt_tokens", str(error)) from None

    def _side(self, turn: Turn, column: str, index: int) -> tuple[Completion, bool]:
        """One side, and whether it was cut."""
        if is_empty(turn.answer):
            raise _Unfit("empty", f"row {index}: {column} is empty. Fix: remove the row, or --bad_pairs skip.")
        made = self.prompts.completion(turn, column, index)
        limit = self.max_completion_tokens or self.prompts.config.max_answer_tokens or len(made.ids)
        if len(made.ids) > limit and self.prompts.config.completion_overlong != "truncate":
            raise _Unfit(
                OVER,
                f"row {index}: {column} has {len(made.ids)} tokens, {limit} are allowed "
                "(objective.max_completion_tokens, or data.max_answer_tokens). Fix: raise it, or "
                "--data.completion_overlong truncate or drop.",
            )
        return Completion(made.ids[:limit], made.counts[:limit]), len(made.ids) > limit


def pair_encoder(
    tokenizer: Any, data: DataConfig, *, max_completion_tokens: int = 0, context: int = 1 << 30, **names: Any
) -> PairEncoder:
    """A :class:`PairEncoder` over a tokenizer.

    Raises:
        UserError: a tokenizer without an eos: nothing would teach the student to stop; or weights of rows.
    """
    if data.weight_column:
        raise UserError(
            f"data.weight_column is {data.weight_column!r}, and a loss of pairs, and what is fine-tuned before it, is "
            "a mean that reads no weights. Fix: leave it out."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the student's tokenizer has no eos token, so no completion could be closed. Fix: set tokenizer.eos_token "
            "and save it beside the student."
        )
    prompts = PromptEncoder(tokenizer, data)
    return PairEncoder(prompts, max_completion_tokens=max_completion_tokens, context=context, **names)


def collate_pairs(pairs: Sequence[Pair], pad_id: int) -> Rollout:
    """All chosen sequences, then all rejected ones of those that have one, right-padded."""
    sides = [(p, p.chosen) for p in pairs] + [(p, p.rejected) for p in pairs if p.rejected]
    counts = [p.chosen_counts for p in pairs] + [p.rejected_counts for p in pairs if p.rejected]
    return collate([p.prompt.ids for p, _ in sides], [ids for _, ids in sides], pad_id=pad_id, counts=counts)


class Side(Stateless):
    """One side of the round's pairs, as a source of text; tokens of the rejected one that are not penalised weigh 0."""

    uses = frozenset({"dataset"})

    def __init__(self, name: str, pad_id: int, rejected_tokens: RejectedTokens = "all") -> None:
        self.name, self.pad_id, self.rejected_tokens = name, pad_id, rejected_tokens

    def draw(self, round_: Round) -> Drawn:
        pairs: Sequence[Any] = round_.prompts
        round_.drawn.append("dataset")
        sides = [getattr(pair, self.name) for pair in pairs]
        counts = [getattr(pair, f"{self.name}_counts") for pair in pairs]
        prompts = [p.prompt.ids for p in pairs]
        rollout = collate(prompts, sides, pad_id=self.pad_id, counts=counts, policy_version=round_.step)
        if self.name == "chosen" or self.rejected_tokens == "all":
            return rollout, [p.prompt for p in pairs]
        penalised = [tuple(map(float, p.penalised(self.rejected_tokens))) for p in pairs]
        return rollout, [replace(p.prompt, weight=of_tokens) for p, of_tokens in zip(pairs, penalised, strict=True)]
