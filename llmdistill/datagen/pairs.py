"""``build_pairs``: from judged traces to positives and pairs, in the form that REDI's recipe and TRL read as they are.

    pairs.jsonl             {"prompt": [messages], "chosen": [message], "rejected": [message], ...}
    pairs.positives.jsonl   {"prompt": [messages], "chosen": [message], ...}: every right trace, for stage 1

REDI's filters (arXiv 2505.24850): right and finished traces are positives; a pair is a right and a wrong one of the
same prompt; prompts of at most 800 and completions of at most 19,000 tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from llmdistill.datagen.schema import as_messages, prompt_of
from llmdistill.datagen.steps import Paths, Step, beside, run_step
from llmdistill.datagen.tables import MOST_REJECTED, Row
from llmdistill.errors import UserError
from llmdistill.evals.records import as_line
from llmdistill.record.manifest import Manifest

Rule = Literal["redi", "dpo"]
Choose = Literal["first", "closest_length"]
COLUMNS = ("id", "prompt_id", "prompt", "answer", "domain", "teacher", "fingerprint")  # of a trace that its pair keeps
MAX_PROMPT_TOKENS, MAX_TOKENS = 800, 19_000
CHARS_PER_TOKEN = 3.0  # where nothing is known of a text's tokens


def build_pairs(
    src: Paths,
    out: str | Path,
    *,
    rule: Rule = "redi",
    per_prompt: int = 1,
    choose: Choose = "first",
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
    max_tokens: int = MAX_TOKENS,
    truncated_rejected: bool = False,
    tokenizer: str = "",
    max_rejected: float = MOST_REJECTED,
) -> Manifest:
    """Pairs of every prompt that has a right and a wrong trace.

    Args:
        rule: "redi": pairs, and beside them the positives; "dpo": pairs alone.
        per_prompt: pairs of one prompt, none of whose traces is in two; 0: as many as there are.
        choose: which right trace goes with which wrong one: in the order of the file, or those closest in length, so
            that length tells them apart as little as can be.
        max_prompt_tokens, max_tokens: longer ones are left out.
        truncated_rejected: take traces that were cut off as wrong ones too.
        tokenizer: folder or hub name whose tokens are counted; empty: the traces' own counts (a third of the
            characters where there are none).

    Raises:
        UserError: traces without verdicts, or too many rows that are no traces.
    """
    if rule not in ("redi", "dpo") or choose not in ("first", "closest_length"):
        raise UserError(f"rule is {rule!r}, choose {choose!r}. Fix: redi or dpo; first or closest_length.")
    settings = {
        "rule": rule,
        "per_prompt": per_prompt,
        "choose": choose,
        "max_prompt_tokens": max_prompt_tokens,
        "max_tokens": max_tokens,
        "truncated_rejected": truncated_rejected,
        "tokenizer": tokenizer,
    }

    def work(step: Step) -> None:
        with tempfile.TemporaryFile(dir=step.out.parent) as spool:
            traces = _Traces(spool, _counter(tokenizer))
            prompts = defaultdict[str, list[_Side]](list)
            for row in step.rows(("prompt", "completion", "verdict")):
                side, lost = traces.side(row, max_prompt_tokens, max_tokens, truncated_rejected)
                if side is None:
                    step.lose(lost)
                else:
                    prompts[side.prompt].append(side)
            chosen = [(p, pair) for p, sides in prompts.items() for pair in matched(sides, per_prompt, choose)]
            step.write(traces.pair(*pair) for _, pair in chosen)
            rights = [side for sides in prompts.values() for side in sides if side.right]
            wrongs = sum(map(len, prompts.values())) - len(rights)
            if rule == "redi":
                step.write((traces.positive(side) for side in rights), positives_file(step.out))
            step.details.update(
                positives=len(rights),
                negatives=wrongs,
                pairs=len(chosen),
                prompts=len(prompts),
                prompts_with_pairs=len({p for p, _ in chosen}),
            )

    return run_step("build_pairs", work, src=src, out=out, settings=settings, max_rejected=max_rejected)


def positives_file(out: str | Path) -> Path:
    """Where the positives stand beside the pairs."""
    return beside(out, "positives")


@dataclass(frozen=True)
class _Side:
    """A trace that may be one side of a pair. Its text is on disk."""

    prompt: str
    right: bool
    tokens: int
    place: int


def matched(sides: Sequence[_Side], most: int, choose: Choose) -> list[tuple[_Side, _Side]]:
    """(right, wrong) of one prompt; no trace is in two pairs."""
    rights, wrongs = [s for s in sides if s.right], [s for s in sides if not s.right]
    count = min(len(rights), len(wrongs), most or len(sides))
    if choose == "first":
        return list(zip(rights[:count], wrongs[:count], strict=True))
    pairs = list[tuple[_Side, _Side]]()
    for _ in range(count):
        pair = min(((r, w) for r in rights for w in wrongs), key=lambda p: abs(p[0].tokens - p[1].tokens))
        pairs.append(pair)
        rights.remove(pair[0])
        wrongs.remove(pair[1])
    return pairs


class _Traces:
    """The traces that may be used, in a file, so that only their places are in memory."""

    def __init__(self, spool: IO[bytes], count: Callable[[str], int] | None) -> None:
        self.spool, self.count, self._end = spool, count, 0

    def side(
        self, row: Row, max_prompt_tokens: int, max_tokens: int, truncated_rejected: bool
    ) -> tuple[_Side | None, str]:
        """The trace as a side, or why it is none."""
        if row.get("passed") is None:
            return None, "not judged"
        cut = row.get("finish") == "length"
        if cut and (row["passed"] or not truncated_rejected):
            return None, "truncated"
        messages = as_messages(row["prompt"])
        prompt_tokens, tokens = self._tokens(row, messages)
        if prompt_tokens > max_prompt_tokens:
            return None, "prompt too long"
        if tokens > max_tokens:
            return None, "completion too long"
        key = prompt_of(row)
        kept = {name: row.get(name) for name in COLUMNS} | {"prompt": messages, "prompt_id": key, "tokens": tokens}
        line = as_line({**kept, "completion": row["completion"], "verdict": row["verdict"]}).encode()
        self.spool.seek(self._end)
        self.spool.write(line)
        place, self._end = self._end, self._end + len(line)
        return _Side(key, bool(row["passed"]), tokens, place), ""

    def pair(self, right: _Side, wrong: _Side) -> Row:
        """A row of the pairs."""
        chosen, rejected = self._read(right), self._read(wrong)
        about = {"chosen_id": chosen["id"], "rejected_id": rejected["id"], "rejected_verdict": rejected["verdict"]}
        lengths = {"chosen_tokens": chosen["tokens"], "rejected_tokens": rejected["tokens"]}
        return {**self._row(chosen), "rejected": [_answer(rejected["completion"])], **about, **lengths}

    def positive(self, side: _Side) -> Row:
        """A row of the positives."""
        trace = self._read(side)
        return {**self._row(trace), "chosen_id": trace["id"], "chosen_tokens": trace["tokens"]}

    def _row(self, trace: Mapping[str, Any]) -> Row:
        about = {name: trace[name] for name in COLUMNS if name not in ("id", "prompt")}
        return {"prompt": trace["prompt"], "chosen": [_answer(trace["completion"])], **about}

    def _read(self, side: _Side) -> Row:
        self.spool.seek(side.place)
        return json.loads(self.spool.readline())  # type: ignore[no-any-return]

    def _tokens(self, row: Row, messages: list[dict[str, str]]) -> tuple[int, int]:
        asked = "\n".join(message["content"] for message in messages)
        if self.count is not None:
            return self.count(asked), self.count(row["completion"])
        prompt = len(row.get("prompt_ids") or ()) or int(len(asked) / CHARS_PER_TOKEN)
        return prompt, row.get("tokens") or int(len(row["completion"]) / CHARS_PER_TOKEN)


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _counter(tokenizer: str) -> Callable[[str], int] | None:
    if not tokenizer:
        return None
    from llmdistill.evals.engines.make import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])
