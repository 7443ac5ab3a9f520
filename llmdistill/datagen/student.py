"""What a student makes of others' texts: the log-prob of every token of a completion behind its prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmdistill.datagen.schema import as_messages
from llmdistill.models.heads import head_of
from llmdistill.models.loading import load_model
from llmdistill.models.passes import metrics_at_head
from llmdistill.objectives.policy import token_logprobs
from llmdistill.objectives.rows import TokenRows
from llmdistill.recipe.config import DType
from llmdistill.texts.chat import ChatTemplate
from llmdistill.texts.rollout import collate
from llmdistill.texts.seam import behind_with_offsets, text_ids

_CHUNK = 128  # rows whose logits exist at a time


@dataclass(frozen=True)
class Read:
    """A completion in a student's tokens.

    Attributes:
        offsets: (start, end) of each token in the completion's characters.
        logprobs: of each token, natural logarithms, temperature 1.
    """

    offsets: list[tuple[int, int]]
    logprobs: list[float]


class Student:
    """A model that reads traces, one forward pass each.

    Args:
        model: folder or hub name.
        dtype: of its weights.
        batch_tokens: of prompts and completions read together.

    Raises:
        UserError: the model cannot be loaded, or its tokenizer cannot say where its tokens stand.
    """

    def __init__(self, model: str, dtype: DType = "auto", *, batch_tokens: int = 8192) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded, self.tokenizer = load_model(model, dtype, "student")
        self.model = loaded.to(device).eval()  # type: ignore[arg-type]
        self.template, self.batch_tokens = ChatTemplate(self.tokenizer), batch_tokens

    def read(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Read]:
        """The completion of each row behind its prompt, which the student's own template writes; in order."""
        batch: list[tuple[list[int], list[int], list[tuple[int, int]]]] = []
        longest = 0
        for row in rows:
            encoded = self._encoded(row)
            size = max(longest, len(encoded[0]) + len(encoded[1]))
            if batch and size * (len(batch) + 1) > self.batch_tokens:
                yield from self._read(batch)
                batch, size = [], len(encoded[0]) + len(encoded[1])
            batch.append(encoded)
            longest = size
        if batch:
            yield from self._read(batch)

    def _encoded(self, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        messages = as_messages(row["prompt"])
        if self.template.source:
            prompt = self.template.prompt(messages)
        else:
            prompt = "".join(message["content"] + "\n" for message in messages)
        special = not self.template.source
        prompt_ids = text_ids(self.tokenizer, prompt, special=special)
        ids, offsets = behind_with_offsets(self.tokenizer, prompt, prompt_ids, str(row["completion"]), special=special)
        return prompt_ids, ids, offsets

    def _read(self, batch: list[tuple[list[int], list[int], list[tuple[int, int]]]]) -> Iterator[Read]:
        head = head_of(self.model)
        # without a token before the completion its first one has no prediction
        rollout = collate([p or [self._first()] for p, _, _ in batch], [c for _, c, _ in batch], pad_id=0)
        rollout = rollout.to(head.linear.weight.device)
        found = metrics_at_head(
            self.model,
            head,
            [(rollout, TokenRows(rollout.token_rows()))],
            lambda logits_nV, token_ids_n: {"logprob": token_logprobs(logits_nV, token_ids_n)},
            chunk_tokens=_CHUNK,
        )["logprob"].tolist()
        for _, ids, offsets in batch:
            mine, found = found[: len(ids)], found[len(ids) :]
            yield Read(offsets, mine)

    def _first(self) -> int:
        return int(next(i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0) if i is not None))
