"""Reading prompts (and, for off-policy methods, completions) and turning them into ids with the student's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    if config.prompt_column not in rows.column_names:
        raise UserError(
            f"{setting} {source!r} has no column {config.prompt_column!r} (it has {', '.join(rows.column_names)}). "
            "Fix: --data.prompt_column NAME."
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
        )

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
        return [*ids, self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else list(ids)

    def encode_all(self, rows: Dataset | Sequence[Mapping[str, Any]], *, completions: bool = False) -> list[Prompt]:
        """Every row (with its completion when asked), or every row that fits when ``data.overlong`` is ``drop``."""
        prompts = []
        for index, row in enumerate(rows):
            try:
                prompt = self(row, index)
                if completions:
                    prompt = replace(prompt, completion=tuple(self.completion(row, index)))
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


def completed(prompts: Sequence[Prompt], pad_id: int) -> Rollout:
    """The prompts with the dataset's own completions."""
    ids, completions = [p.ids for p in prompts], [p.completion for p in prompts]
    return collate(ids, completions, pad_id=pad_id, domain=[p.domain for p in prompts])
