"""Reading prompts (and, for off-policy methods, completions) and turning them into ids with the student's template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.recipe.config import DataConfig
from llmdistill.texts import Prompt, Rollout, collate


def load_rows(source: str, config: DataConfig, setting: str) -> Dataset:
    """The rows of a file or hub dataset.

    Raises:
        UserError: nothing there, not parseable, no prompt column, or no rows.
    """
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
    suffix = Path(source).suffix
    try:
        if suffix in kind:
            rows = load_dataset(kind[suffix], data_files=source, split="train")
        else:
            rows = load_dataset(source, split=config.split)
    except Exception as error:  # datasets raises whatever its readers raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{setting} {source!r} cannot be read: {reason}") from error
    key = "text_column" if config.text_column else "prompt_column"
    if (column := getattr(config, key)) not in rows.column_names:
        raise UserError(
            f"{setting} {source!r} has no column {column!r} (it has {', '.join(rows.column_names)}). "
            f"Fix: --data.{key} NAME."
        )
    if len(rows) == 0:
        raise UserError(f"{setting} {source!r} has no rows")
    return rows.select(range(min(config.limit, len(rows)))) if config.limit else rows


class PromptEncoder:
    """Rows to :class:`Prompt`: applies the chat template to message lists, tokenises strings as they stand."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.dropped = 0  # rows left out by data.overlong drop so far

    def __call__(self, row: Mapping[str, Any], index: int = 0) -> Prompt:
        """Raises :class:`UserError` for an empty prompt, a missing template, or a prompt over the limit."""
        text = self.text(row, index)
        # The template writes its own special tokens; a second BOS would be a silent change of prompt.
        ids = self.tokenizer(text, add_special_tokens=isinstance(row[self.config.prompt_column], str))["input_ids"]
        if len(ids) > self.config.max_prompt_tokens:
            raise UserError(
                f"row {index}: the prompt has {len(ids)} tokens, data.max_prompt_tokens is "
                f"{self.config.max_prompt_tokens}. Fix: raise it, or --data.overlong drop."
            )
        domain, answer = row.get(self.config.domain_column), row.get(self.config.answer_column)
        return Prompt(
            list(ids),
            text,
            None if domain is None else str(domain),
            index,
            answer="" if answer is None else str(answer),
            weight=self.weight(row, index),
            contexts=self.contexts(row, index),
            record=dict(row) if self.built_later else None,
        )

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
        prompt = row[self.config.prompt_column]
        if isinstance(context, str):
            changed = f"{prompt}\n\n{context}" if isinstance(prompt, str) else _added(prompt, context)
        elif not isinstance(context, list | tuple) or not all(isinstance(m, Mapping) for m in context):
            raise UserError(
                f"row {index}: {setting} is {context!r}; it must be a string or chat messages. Fix: mend the row, or "
                "null where it has no such context."
            )
        else:
            changed = list(context)
            if not changed or changed[-1].get("role") == "assistant":
                raise UserError(
                    f"row {index}: {setting} ends with {'nothing' if not changed else 'an assistant message'}; it must "
                    "end where the completion begins. Fix: end it with the user's message."
                )
        text = self.text({self.config.prompt_column: changed}, index)
        return tuple(self.tokenizer(text, add_special_tokens=isinstance(changed, str))["input_ids"])

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

    def documents(self, rows: Iterable[Mapping[str, Any]]) -> list[Prompt]:
        """Rows of text without a prompt, in windows of ``data.max_text_tokens``.

        The first token of a window conditions and the rest counts; a window begins with the last token of the one
        before, so that every token but the document's first is predicted once. The eos closes a document.
        """
        column, size, eos = self.config.text_column, self.config.max_text_tokens, self.tokenizer.eos_token_id
        windows = []
        for index, row in enumerate(rows):
            text = row.get(column)
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"row {index}: {column} is empty. Fix: --data.text_column NAME, or remove the row.")
            ids = [*self.tokenizer(text)["input_ids"], *([] if eos is None else [eos])]
            domain, weight = row.get(self.config.domain_column), self.weight(row, index)
            if isinstance(weight, tuple):
                raise UserError(
                    f"row {index}: {self.config.weight_column} is a list, and a document has one weight. Fix: a number."
                )
            for start in range(0, max(len(ids) - 1, 1), size - 1):
                window = ids[start : start + size]
                if len(window) > 1:
                    name = None if domain is None else str(domain)
                    windows.append(Prompt(window[:1], "", name, index, tuple(window[1:]), weight=weight))
        if not windows:
            raise UserError("no document is left: none has two tokens. Fix: other data.")
        return windows

    def text(self, row: Mapping[str, Any], index: int = 0) -> str:
        """The prompt as the model sees it."""
        prompt = row.get(self.config.prompt_column)
        if prompt is None and self.config.prompt_column not in row:
            raise UserError(
                f"row {index} has no column {self.config.prompt_column!r}, it has {', '.join(map(repr, row))}. "
                "Fix: --data.prompt_column NAME."
            )
        if isinstance(prompt, str):
            if not prompt:
                raise UserError(f"row {index}: {self.config.prompt_column} is empty. Fix: remove the row.")
            return prompt
        if not prompt or not any(m.get("content") for m in prompt):
            raise UserError(
                f"row {index}: {self.config.prompt_column} has no message with content. Fix: remove the row."
            )
        if not self.tokenizer.chat_template:
            raise UserError(
                "the student's tokenizer has no chat template, and the prompts are chat messages. "
                "Fix: set tokenizer.chat_template and save it beside the student, or give prompts as strings."
            )
        return str(self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True))

    def completion(self, row: Mapping[str, Any], index: int = 0) -> list[int]:
        """Ids of the row's completion, closed by the eos."""
        completion = row.get(self.config.completion_column)
        content = completion if isinstance(completion, str | None) else completion and completion[-1].get("content")
        if not (content or "").strip():
            raise UserError(
                f"row {index}: {self.config.completion_column} is empty. Fix: --data.completion_column NAME."
            )
        ids = self.tokenizer(content, add_special_tokens=False)["input_ids"]
        weight = row.get(self.config.weight_column) if self.config.weight_column else None
        if isinstance(weight, list | tuple) and len(weight) not in (len(ids), len(ids) + 1):
            raise UserError(
                f"row {index}: {self.config.weight_column} has {len(weight)} weights, and the completion {len(ids)} "
                f"tokens (with the eos {len(ids) + 1}). Fix: one weight for each of them."
            )
        return [*ids, self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else list(ids)

    def encode_all(
        self, rows: Dataset | Sequence[Mapping[str, Any]], *, completions: bool = False, optional: bool = False
    ) -> list[Prompt]:
        """Every row (with its completion when asked), or every row that fits when ``data.overlong`` is ``drop``.

        ``optional``: a row may have no completion.
        """
        if self.config.text_column:
            return self.documents(rows)
        prompts = []
        for index, row in enumerate(rows):
            try:
                prompt = self(row, index)
                if completions and not (optional and not row.get(self.config.completion_column)):
                    ids = tuple(self.completion(row, index))
                    prompt = replace(prompt, completion=ids, weight=_closed(prompt.weight, len(ids)))
                prompts.append(prompt)
            except UserError as error:
                if self.config.overlong != "drop" or "max_prompt_tokens" not in str(error):
                    raise
                self.dropped += 1
        if not len(rows):
            raise UserError("there are no rows. Fix: give at least one.")
        if not prompts:
            raise UserError("no prompt is left: all are longer than data.max_prompt_tokens. Fix: raise it.")
        return prompts


def _closed(weight: float | tuple[float, ...], tokens: int) -> float | tuple[float, ...]:
    """Weights of tokens, with 1 for the eos where it has none of its own."""
    return (*weight, 1.0) if isinstance(weight, tuple) and len(weight) == tokens - 1 else weight


def _added(messages: Sequence[Mapping[str, Any]], context: str) -> list[dict[str, Any]]:
    """The messages with ``context`` at the end of the last user message."""
    changed = [dict(message) for message in messages]
    last = next((m for m in reversed(changed) if m.get("role") == "user"), changed[-1])
    content = last.get("content")
    if isinstance(content, list):  # parts, as multimodal templates take them
        last["content"] = [*content, {"type": "text", "text": f"\n\n{context}"}]
    else:
        last["content"] = f"{content}\n\n{context}"
    return changed


def completed(prompts: Sequence[Prompt], pad_id: int) -> Rollout:
    """The prompts with the dataset's own completions."""
    ids, completions = [p.ids for p in prompts], [p.completion for p in prompts]
    return collate(ids, completions, pad_id=pad_id, domain=[p.domain for p in prompts])
