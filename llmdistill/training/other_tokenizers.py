"""Judges whose tokenizer is not the student's: which are asked in chunks, and what that takes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, Trainer

from llmdistill.composition.chunks import ChunkLoss, asked_of_chunks
from llmdistill.composition.classes import InClasses
from llmdistill.composition.method import Method
from llmdistill.composition.term import OTHER_TOKENIZER
from llmdistill.errors import UserError
from llmdistill.objectives.classes import Classes
from llmdistill.recipe.data_config import DataConfig
from llmdistill.record.meters import Meters
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.chunks import ChunkTeacher, in_chunks, tokenizer_of
from llmdistill.texts.chat import ChatTemplate
from llmdistill.texts.retokenized import Shares
from llmdistill.tokenization.compare import compare_tokenizers
from llmdistill.training.student_trainer import gathered_sums

logger = logging.getLogger(__name__)


def with_chunks(
    method: Method,
    judges: Mapping[str, Teacher],
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    data: DataConfig,
    min_aligned: float,
) -> dict[str, Teacher]:
    """The judges, with those that a term asks about chunks as a :class:`~llmdistill.teachers.chunks.ChunkTeacher`.

    Raises:
        UserError: one is asked about chunks and tokens alike, in another context, or what only a model in this process
            can say; its tokenizer is not here.
    """
    found = dict(judges)
    for name, judge in judges.items():
        asks = [ask for _, ask in method.asks_of(name)]
        if not any(ask.kind in OTHER_TOKENIZER for ask in asks) or isinstance(judge, ChunkTeacher):
            continue
        if tokens := [ask.kind for ask in asks if ask.kind not in OTHER_TOKENIZER]:
            raise UserError(
                f"the method asks {name} about chunks and about its {tokens[0]} tokens, which only a teacher of the "
                "student's tokenizer has. Fix: another judge for one of the two."
            )
        if context := next((ask.context for ask in asks if ask.context), ""):
            raise UserError(
                f"{name}.context is {context!r}, and a judge in chunks reads the prompt by its own template. "
                "Fix: leave it out."
            )
        other = tokenizer_of(judge, name)
        if compare_tokenizers(tokenizer, other).alike:
            logger.warning(
                "%s %r has the student's tokenizer: every token is a chunk. A method on whole distributions "
                "(llmdistill.opd) learns more from it",
                name,
                judge.info().name,
            )
        template = ChatTemplate(other, system_prompt=data.system_prompt, kwargs=_read(other, data))
        found[name] = asked = in_chunks(judge, name, tokenizer, ends, template, min_aligned=min_aligned)
        for term, ask in method.asks_of(name):
            asked.check(asked_of_chunks(term, ask))
    return found


def _read(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> dict[str, Any]:
    """The template's settings that this one reads."""
    source = ChatTemplate(tokenizer).source
    return {name: value for name, value in data.chat_template_kwargs.items() if name in source}


def tokenizers(judges: Mapping[str, Teacher]) -> dict[str, PreTrainedTokenizerBase]:
    """Of the judges in chunks, by name."""
    return {name: judge.retokenizer.judge for name, judge in judges.items() if isinstance(judge, ChunkTeacher)}


def widths(judges: Mapping[str, Teacher]) -> list[int]:
    """Logit columns of the judges that speak of the student's tokens."""
    return [judge.info().vocab_size for judge in judges.values() if not isinstance(judge, ChunkTeacher)]


def bind(method: Method, judges: Mapping[str, Teacher], ends: Collection[int]) -> None:
    """Tells judges what ends the student's turns, and losses which of its tokens begin words, and their classes."""
    for name, judge in judges.items():
        if isinstance(judge, ChunkTeacher):
            judge.retokenizer.student_ends_at(ends)
            for term, _ in method.asks_of(name):
                if isinstance(term.group, ChunkLoss):
                    term.group.bind(judge.retokenizer.student_table, judge.student_digits)
                for loss in (term.loss, term.group, *term.watch.values()):
                    if isinstance(loss, InClasses):
                        own, _, same = judge.retokenizer.classes
                        loss.bind_classes(Classes(own, len(same)), same, judge.student_digits.of_V)


def check_alignment(trainer: Trainer, judges: Mapping[str, Teacher]) -> None:
    """Refuses judges in chunks of which too little was aligned, on all processes together. Every one must call it.

    One may have met nothing but texts that cannot be aligned: alone it would raise while the others wait for it.

    Raises:
        UserError: on every process, of a judge with less than ``min_aligned`` over all of them.
    """
    several = trainer.accelerator.num_processes > 1
    for judge in judges.values():
        if not isinstance(judge, ChunkTeacher):
            continue
        s = judge.shares
        aligned_bytes, all_bytes = gathered_sums(trainer, [s.aligned_bytes, s.bytes], trainer.args.device)
        if judge.too_little(aligned_bytes, all_bytes):  # so say all: reasons are exchanged once, for the message
            everywhere = Shares()
            for shares in gather_object([s]) if several else [s]:
                everywhere.add(shares)
            judge.refuse_unaligned(everywhere)


def note_alignment(judges: Mapping[str, Teacher], meters: Meters) -> None:
    """Logs what was aligned since the last time."""
    for name, judge in judges.items():
        if isinstance(judge, ChunkTeacher):
            for what, (total, count) in judge.numbers().items():
                meters.add(f"{name}/{what}", total, count)
