"""Reading prompts (and, for off-policy methods, completions) and turning them into ids with the student's template.

A row is strings, or a conversation: chat messages whose last one is what is asked, with the answer in a column of its
own or as one more message. Conversations go through the chat template as a whole, strings stay as they are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts import Prompt, Reading, Rollout, collate
from llmdistill.texts.chat import ChatTemplate, reads
from llmdistill.texts.columns import Columns
from llmdistill.texts.encoded_rows import encode_rows
from llmdistill.texts.lines import Unreadable
from llmdistill.texts.messages import Message, check_characters
from llmdistill.texts.seam import behind, text_ids
from llmdistill.texts.shortened import shortened
from llmdistill.texts.turns import Turn, TurnReader, is_empty, with_hint

logger = logging.getLogger(__name__)


class Overlong(UserError):
    """A prompt or a completion over its limit. ``dropped``: the settings leave such rows out."""

    def __init__(self, message: str, dropped: bool) -> None:
        super().__init__(message)
        self.dropped = dropped


@dataclass(frozen=True)
class Completion:
    """Ids of an answer with its end of turn, and which of them count (empty: all)."""

    ids: tuple[int, ...]
    counts: tuple[bool, ...] = ()


class PromptEncoder:
    """Rows to :class:`Prompt`: applies the chat template to message lists, tokenises strings as they stand.

    Args:
        judges: tokenizers of judges of another family by name: each prompt is also given as they read it.

    Raises:
        UserError: settings of chats that the tokenizer's template does not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        judges: Mapping[str, PreTrainedTokenizerBase] | None = None,
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.readers = {name: PromptEncoder(judge, _read_by(judge, config)) for name, judge in (judges or {}).items()}
        self.columns = Columns(config)
        self.dropped = 0  # rows left out so far for their length
        self.truncated: set[int] = set()  # rows whose prompts were shortened
        self.cut = 0  # completions that data.max_answer_tokens shortened
        self.bad: dict[int, str] = {}  # rows left out by data.bad_rows, and why
        self.notes: dict[str, set[int]] = {}  # what was done around rows and template -> the rows
        self.ends: set[int] = set()  # ids with which the template closed a completion
        self.chats = 0  # prompts that the template has written so far
        self._row = 0
        self._last: tuple[int, Turn, str, list[int]] | None = None  # what was written last: a row asks twice
        self._told: dict[str, set[int]] = {}
        self._left_out = (0, 0, 0)
        self.template = ChatTemplate(
            tokenizer, system_prompt=config.system_prompt, kwargs=config.chat_template_kwargs, note=self._note
        )
        self.turns = TurnReader(config, tokenizer.all_special_tokens, self._note)

    def __call__(self, row: Mapping[str, Any], index: int = 0) -> Prompt:
        """The row's (last) prompt.

        Raises:
            UserError: an empty prompt, a missing template, messages that it refuses, or a prompt over the limit.
        """
        row = self.columns.row(row)
        return self.prompt(self.fitted(self.turns.of(row, index), index), row, index)

    def prompt(self, turn: Turn, row: Mapping[str, Any], index: int = 0) -> Prompt:
        """The prompt of a turn of ``row``. Raises as calling does."""
        text, ids = self._written(turn, index)
        if len(ids) > self.config.max_prompt_tokens:
            raise Overlong(
                f"row {index}: the prompt has {len(ids)} tokens, data.max_prompt_tokens is "
                f"{self.config.max_prompt_tokens}. Fix: raise it, or --data.overlong drop or truncate_prompt.",
                self.config.overlong == "drop",
            )
        domain, answer = row.get(self.config.domain_column), row.get(self.config.answer_column)
        return Prompt(
            ids,
            text,
            None if domain is None else str(domain),
            index,
            answer="" if answer is None else str(answer),
            weight=self.weight(row, index),
            contexts=self.contexts(row, index),
            record=dict(row) if self.built_later else None,
            readings={name: reader.reading(turn, name, index) for name, reader in self.readers.items()},
        )

    def fitted(self, turn: Turn, index: int = 0) -> Turn:
        """The turn with its prompt shortened, where it is over the limit and ``data.overlong`` says so."""
        limit = self.config.max_prompt_tokens
        if self.config.overlong != "truncate_prompt" or len(self._written(turn, index)[1]) <= limit:
            return turn
        shorter = shortened(turn, limit, lambda t: len(self._written(t, index)[1]), self.tokenizer)
        if shorter is None:
            raise UserError(
                f"row {index}: without a word of the question the prompt has more than data.max_prompt_tokens {limit} "
                "tokens: those of the template and of messages that are not shortened. Fix: raise it."
            )
        self.truncated.add(index)
        return shorter

    def reading(self, turn: Turn, name: str, index: int = 0) -> Reading:
        """The prompt of a turn as the judge ``name``, whose encoder this is, reads it.

        Raises:
            UserError: no template, messages that it refuses, or a template that writes nothing of what they say.
        """
        try:
            text, ids = self._written(turn, index)
        except UserError as error:
            raise UserError(str(error).replace("the student's", f"{name}'s")) from None
        is_chat = not isinstance(turn.prompt, str)
        if is_chat and not self.template.has_content:
            raise UserError(
                f"row {index}: {name}'s chat template writes nothing of what the user says, so {name} would judge "
                f"answers to no question. Fix: --{name}.tokenizer FOLDER, of one with a template that does."
            )
        return Reading(text, tuple(ids), is_chat)

    @property
    def built_later(self) -> dict[str, str]:
        """The contexts that are functions of what was sampled: name -> module:function."""
        return {name: where for name, where in self.config.contexts.items() if ":" in where}

    def contexts(self, row: Mapping[str, Any], index: int = 0) -> dict[str, tuple[int, ...]]:
        """Ids of the row's other contexts; one that is null in this row is left out."""
        found = {}
        for name, column in self.config.contexts.items():
            if ":" in column:
                continue
            if column not in row:
                raise UserError(
                    f"row {index} has no column {column!r}, which data.contexts.{name} names; it has "
                    f"{', '.join(map(repr, row))}. Fix: --data.contexts, or null where a row has no such context."
                )
            if row[column] is not None:
                found[name] = self.in_context(row, row[column], f"data.contexts.{name}", index)
        return found

    def in_context(self, row: Mapping[str, Any], context: Any, setting: str, index: int = 0) -> tuple[int, ...]:
        """Ids of a prompt in another context: chat messages in the prompt's place, or a string that is added to it.

        A string goes behind a blank line at the end of the last user message (of the prompt, where that is text), and
        the whole through the template: nothing is decoded and encoded again.

        Raises:
            UserError: messages that do not end where the completion begins, or say nothing.
        """
        turn = self.turns.of(row, index)
        prompt: str | list[Message]
        if isinstance(context, str):
            check_characters(context, f"row {index}: {setting}")
            prompt = f"{turn.prompt}\n\n{context}" if isinstance(turn.prompt, str) else with_hint(turn.prompt, context)
        elif not isinstance(context, list | tuple) or not all(isinstance(m, Mapping) for m in context):
            raise UserError(
                f"row {index}: {setting} is {context!r}; it must be a string or chat messages. Fix: mend the row, or "
                "null where it has no such context."
            )
        else:
            prompt = self.turns.read(context, setting, index)
            if not prompt or prompt[-1]["role"] == "assistant":
                raise UserError(
                    f"row {index}: {setting} ends with {'nothing' if not prompt else 'an assistant message'}; it must "
                    "end where the completion begins. Fix: end it with the user's message."
                )
        return tuple(self._written(Turn(prompt, tools=turn.tools), index)[1])

    def weight(self, row: Mapping[str, Any], index: int = 0) -> float | tuple[float, ...]:
        """The row's weight in the loss, or one for every token of its completion."""
        column = self.config.weight_column
        if not column:
            return 1.0
        value = row.get(column)
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in numbers):
            raise UserError(
                f"row {index}: {column} is {value!r}; a weight is a finite number >= 0, or a list of one for each "
                "token of the completion. Fix: mend the row, or leave data.weight_column out."
            )
        return tuple(map(float, numbers)) if isinstance(value, list | tuple) else float(numbers[0])  # type: ignore[arg-type]

    def document(self, row: Mapping[str, Any], index: int) -> list[Prompt]:
        """A row of text without a prompt, in windows of ``data.max_text_tokens``.

        The first token of a window conditions and the rest counts; a window begins with the last token of the one
        before, so that every token but the document's first is predicted once. The eos closes a document.
        """
        column, size, eos = self.config.text_column, self.config.max_text_tokens, self.tokenizer.eos_token_id
        text = row.get(column)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"row {index}: {column} is empty. Fix: --data.text_column NAME, or remove the row.")
        ids = text_ids(self.tokenizer, text, special=True)
        ids += [] if eos is None or ids[-1:] == [eos] else [eos]
        domain, weight = row.get(self.config.domain_column), self.weight(row, index)
        if isinstance(weight, tuple):
            raise UserError(
                f"row {index}: {self.config.weight_column} is a list, and a document has one weight. Fix: a number."
            )
        name = None if domain is None else str(domain)
        made = (ids[start : start + size] for start in range(0, max(len(ids) - 1, 1), size - 1))
        return [Prompt(w[:1], "", name, index, tuple(w[1:]), weight=weight) for w in made if len(w) > 1]

    def _written(self, turn: Turn, index: int = 0) -> tuple[str, list[int]]:
        """The prompt as the model sees it, and its ids."""
        last = self._last
        if last is not None and (last[0], last[1].prompt, last[1].tools) == (index, turn.prompt, turn.tools):
            return last[2:]
        chat, text = not isinstance(turn.prompt, str), turn.prompt
        if not isinstance(text, str):
            self._row, self.chats = index, self.chats + 1
            try:
                text = self.template.prompt(text, turn.tools)
            except UserError as error:
                raise UserError(f"row {index}: {error}") from None
        ids = text_ids(self.tokenizer, text, special=not chat)
        self._last = (index, turn, text, ids)
        return text, ids

    def completion(self, turn: Turn, column: str, index: int = 0) -> Completion:
        """The turn's answer behind its prompt, closed by the template's end of turn, or by the eos where it has none.

        Raises:
            UserError: no answer, or one that the template cannot write.
        """
        answer, tokenizer = turn.answer, self.tokenizer
        if is_empty(answer):
            raise UserError(f"row {index}: {column} is empty. Fix: --data.completion_column NAME.")
        self._row, eos = index, tokenizer.eos_token_id
        prompt, prompt_ids = self._written(turn, index)
        if isinstance(turn.prompt, str):
            assert isinstance(answer, str)
            text, closed = answer, False
            ended = [end for end in (tokenizer.eos_token, self.template.closing.token) if end]
            text = text.rstrip() if text.rstrip().endswith(tuple(ended)) else text
        else:
            assert isinstance(answer, dict)
            try:
                made = self.template.answered(turn.prompt, answer, turn.tools, prompt=prompt)
            except UserError as error:
                raise UserError(f"row {index}: {error}") from None
            text, closed = made.completion, made.closed
        ids, meets = behind(tokenizer, prompt, prompt_ids, text, special=isinstance(turn.prompt, str))
        if not meets:
            self._note("a token of the joined text reaches from the prompt into the completion; it is split there")
        counts = () if isinstance(turn.prompt, str) else self._counted(turn, prompt_ids, ids, closed)
        if closed:
            self.ends.add(ids[-1])
        token = self.template.closing.token
        ends = {eos} if token is None else {eos, tokenizer.convert_tokens_to_ids(token)}
        if not closed and eos is not None and (not ids or ids[-1] not in ends):
            ids, counts = [*ids, eos], (*counts, True) if counts else ()
        return Completion(tuple(ids), counts)

    def _counted(self, turn: Turn, prompt_ids: list[int], ids: list[int], closed: bool) -> tuple[bool, ...]:
        """Which of the completion's tokens are the assistant's, where the template says so; empty: all.

        The end of turn is, whether the template's generation tags hold it or not: nothing else teaches to stop.
        """
        assert isinstance(turn.prompt, list) and isinstance(turn.answer, dict)
        marked = self.template.assistant_tokens(turn.prompt, turn.answer, turn.tools)
        if marked is None:
            return ()
        whole, mask = marked
        start, end = len(prompt_ids), len(prompt_ids) + len(ids)
        if whole[:end] != [*prompt_ids, *ids] or not any(mask[start:end]):
            self._note("the template's generation tags mark nothing of the completion; all of it counts")
            return ()
        if closed and not mask[end - 1]:
            self._note("the template's generation tags leave out the end of turn; it counts all the same")
            mask[end - 1] = 1
        counts = tuple(bool(m) for m in mask[start:end])
        return () if all(counts) else counts

    def _note(self, message: str, row: int | None = None) -> None:
        self.notes.setdefault(message, set()).add(self._row if row is None else row)

    def warn(self, source: str = "") -> None:
        """Logs what was noted since the last time, a line for each kind."""
        for message, rows in self.notes.items():
            if fresh := sorted(rows - self._told.get(message, set())):
                few = ", ".join(map(str, fresh[:3])) + (", ..." if len(fresh) > 3 else "")
                logger.warning("%s%s (%d rows: %s)", f"{source}: " if source else "", message, len(fresh), few)
                self._told[message] = set(rows)
        told = (len(self.bad), len(self.truncated), self.cut)
        if told != self._left_out:
            self._left_out = told
            for line in self.left_out():
                logger.warning("%s%s", f"{source}: " if source else "", line)
        for name, reader in self.readers.items():
            reader.warn(f"{source or 'prompts'} as {name} reads them")

    def counts(self) -> dict[str, int]:
        """How many rows were not read as they stand, by what was done with them."""
        found = {"unreadable": len(self.bad), "too long": self.dropped, "shortened": len(self.truncated)}
        return {name: n for name, n in {**found, "completions cut": self.cut}.items() if n}

    def left_out(self) -> list[str]:
        """What was not read as it stands, a line for each kind."""
        lines = []
        if self.bad:
            rows, first = ", ".join(map(str, list(self.bad)[:5])), next(iter(self.bad.values()))
            lines.append(f"{len(self.bad)} rows cannot be read and are left out: {rows}; the first: {first}")
        if self.truncated:
            limit = self.config.max_prompt_tokens
            lines.append(f"{len(self.truncated)} prompts are shortened to data.max_prompt_tokens {limit}")
        if self.cut:
            limit = self.config.max_answer_tokens
            lines.append(f"{self.cut} completions are cut after data.max_answer_tokens {limit}; they are not closed")
        return lines

    # ---------------------------------------------------------------- all rows

    def encode_all(
        self, rows: Iterable[Mapping[str, Any]], *, completions: bool = False, optional: bool = False
    ) -> Sequence[Prompt]:
        """Every row (with its completion when asked), but those that ``data.overlong``, ``completion_overlong`` and
        ``bad_rows`` leave out. See :func:`~llmdistill.texts.encoded_rows.encode_rows`, also for what every rank does.

        ``optional``: a row may have no completion.

        Raises:
            UserError: a row cannot be read (its place in its file is named), or none is left.
        """
        documents, where = bool(self.config.text_column), getattr(rows, "where", None)
        asked: dict[str, Any] = {} if documents else {"completions": completions, "optional": optional}
        encode = self.document if documents else partial(self.of_row, **asked)
        prompts, _, count = encode_rows(
            rows, self, lambda row, index, _: self.kept(row, index, encode, where), self.stored, asked
        )
        self.warn()
        if not count:
            raise UserError("there are no rows. Fix: give at least one.")
        if not prompts and documents:
            raise UserError("no document is left: none has two tokens. Fix: other data.")
        if not prompts:
            first = f"; the first: {next(iter(self.bad.values()))}" if self.bad else ""
            read = f", {len(self.bad)} cannot be read{first}" if self.bad else ""
            long = f"{self.dropped} are longer than data.max_prompt_tokens or data.max_answer_tokens"
            raise UserError(f"no prompt is left: {long}{read}. Fix: raise the limits, or other data.")
        return prompts

    def stored(self, rows: Any, kind: Any = None) -> Any:
        """How the prompts of ``rows`` stand in columns: a :class:`~llmdistill.texts.columnar.PromptColumns`, or a
        ``kind`` of it."""
        from llmdistill.texts.columnar import PromptColumns

        names = [name for name in self.config.contexts if name not in self.built_later]
        records = (lambda row: self.columns.row(rows[row])) if self.built_later else None
        return (kind or PromptColumns)(names, list(self.readers), records)

    def kept(
        self,
        row: Any,
        index: int,
        encode: Callable[[Mapping[str, Any], int], list[Any]],
        where: Callable[[int], str] | None = None,
    ) -> list[Any]:
        """What ``encode`` makes of a row; nothing of one that the settings leave out, which is counted.

        Args:
            where: says the file and line of a row.

        Raises:
            UserError: the row cannot be read, or is too long.
        """
        try:
            if isinstance(row, Unreadable):
                raise UserError(f"row {index}: {row.reason}. Fix: mend it, or --data.bad_rows skip.")
            if not isinstance(row, Mapping):
                what = f"{str(row)[:40]!r}, a {type(row).__name__}"
                raise UserError(f"row {index}: it is {what}; a row has columns. Fix: {{'prompt': ...}} for each.")
            return encode(self.columns.row(row), index)
        except Overlong as error:
            if not error.dropped:
                raise located(error, index, where) from None
            self.dropped += 1
        except UserError as error:
            if self.config.bad_rows == "error":
                raise located(error, index, where) from None
            self.bad[index] = str(located(error, index, where))
        return []

    def of_row(
        self, row: Mapping[str, Any], index: int, *, completions: bool = False, optional: bool = False
    ) -> list[Prompt]:
        """The prompts of one row, whose columns are called as usual: one, or with ``assistant_turns: all`` several."""
        turns, prompts = self.turns.counted(self.turns.of(row, index)), list[Prompt]()
        if completions and len(turns) > 1 and turns[-1].answer is None:
            turns = turns[:-1]  # nobody answered the last one
        if not completions and turns[-1].answer is not None and not row.get(self.config.completion_column):
            self._note("conversations end with an answer; the student is asked for its own in that place", index)
        for full in turns:
            try:
                turn = self.fitted(full, index)
                prompt = self.prompt(turn, row, index)
                if completions and not (optional and turn.answer is None):
                    prompt = self._completed(prompt, turn, len(turns))
                prompts.append(prompt)
            except Overlong as error:
                if not error.dropped:
                    raise
                self.dropped += 1
        return prompts

    def _completed(self, prompt: Prompt, turn: Turn, turns: int) -> Prompt:
        """The prompt with its turn's answer, one of ``turns`` of the row."""
        column, weight = self.config.completion_column, prompt.weight
        made = self.completion(turn, column, prompt.row)
        n = len(made.ids)
        if isinstance(weight, tuple) and (turns > 1 or len(weight) not in (n - 1, n)):
            several = f" and the row {turns} turns" if turns > 1 else ""
            raise UserError(
                f"row {prompt.row}: {self.config.weight_column} has {len(weight)} weights, and the completion {n - 1} "
                f"tokens (with the eos {n}){several}. Fix: one weight for each of them."
            )
        weight, limit = _closed(weight, n), self.config.max_answer_tokens
        if not limit or n <= limit:
            return replace(prompt, completion=made.ids, counts=made.counts, weight=weight)
        if self.config.completion_overlong != "truncate":
            raise Overlong(
                f"row {prompt.row}: {column} has {n} tokens, data.max_answer_tokens is {limit}. Fix: raise it, or "
                "--data.completion_overlong truncate or drop.",
                self.config.completion_overlong == "drop",
            )
        self.cut += 1
        cut = weight[:limit] if isinstance(weight, tuple) else weight
        return replace(prompt, completion=made.ids[:limit], counts=made.counts[:limit], weight=cut)


def located(error: UserError, index: int, where: Callable[[int], str] | None) -> UserError:
    """The error of a row with the file and line it stands in."""
    place = where(index) if where is not None else ""
    return UserError(f"{error} (Row {index} is {place}.)") if place else error


def _read_by(judge: PreTrainedTokenizerBase, config: DataConfig) -> DataConfig:
    """The settings without what a judge of another family has in no template of its own."""
    kwargs = {name: value for name, value in config.chat_template_kwargs.items() if reads(judge, name)}
    return replace(config, chat_template_kwargs=kwargs)


def _closed(weight: float | tuple[float, ...], tokens: int) -> float | tuple[float, ...]:
    """Weights of tokens, with 1 for the eos where it has none of its own."""
    return (*weight, 1.0) if isinstance(weight, tuple) and len(weight) == tokens - 1 else weight


def completed(prompts: Sequence[Prompt], pad_id: int) -> Rollout:
    """The prompts with the dataset's own completions."""
    ids, completions = [p.ids for p in prompts], [p.completion for p in prompts]
    counts = [p.counts for p in prompts]
    return collate(ids, completions, pad_id=pad_id, counts=counts, domain=[p.domain for p in prompts])
