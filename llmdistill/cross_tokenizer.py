"""Cross-tokenizer distillation: any teacher into any student, whatever their vocabularies.

    accelerate launch -m llmdistill.cross_tokenizer --config recipes/alm.yaml

The student's text is read by the teacher in its own tokens behind its own template, and both are compared on the
smallest chunks of text that end at a token of both (:mod:`llmdistill.tokenization.align`). ``objective.method`` says
how: ``alm`` (the default) matches the chunks' likelihoods on given text, ``chunk_opd`` is on-policy distillation;
``p_kl``, ``h_kl`` and ``simct`` also compare what else might have come next, in classes of tokens that both can tell.
The same methods run behind ``llmdistill.opd``.

Logged: ``teacher/aligned_bytes`` and ``teacher/aligned_rows``, the shares that were aligned, and of digits and ends of
turns (``aligned_digits``, ``aligned_ends``) alone; ``inexact_rows``, those aligned only when case, accents and spaces
are ignored; ``tokens_in_chunks``, the share of the student's tokens that learn; ``single_chunks``, of one token on
either side; ``template_tokens``, which the teacher reads around a text and nobody learns from; ``align_seconds``, which
all this took in a step. A run in which less than ``teacher.min_aligned`` of the bytes can be aligned is refused, with
the characters that part the two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmdistill import methods
from llmdistill.composition.method import Method
from llmdistill.composition.term import OTHER_TOKENIZER
from llmdistill.errors import UserError
from llmdistill.methods import alm
from llmdistill.recipe.config import DistillationConfig
from llmdistill.recipe.settings import setting
from llmdistill.training.method_trainer import MethodTrainer

METHODS = ("alm", "chunk_opd", "p_kl", "h_kl", "simct")
SUMMARY = "Cross-tokenizer distillation: a teacher of any family, compared on chunks of text that both have tokens for."


@dataclass
class CrossTokenizerConfig(alm.Settings, DistillationConfig):
    """Settings of cross-tokenizer distillation by ``alm``; another method's: ``llmdistill.methods.config_class``."""

    method: str = setting("alm", "alm (what follows), chunk_opd, p_kl, h_kl or simct")

    def build(self) -> Method:
        """The composition these settings name."""
        return alm.build(self)


class CrossTokenizerTrainer(MethodTrainer):
    """Distils ``teacher`` into ``model``; ``args`` are settings of a method on chunks: ``alm`` or another of METHODS.

    Example::

        args = CrossTokenizerConfig(output_dir="run", debias=True)
        CrossTokenizerTrainer("student", args, "teacher", train_dataset=rows).train()

    Raises:
        UserError: a method that compares tokens; what :class:`~llmdistill.training.trainer.DistillationTrainer` raises.
    """

    def __init__(self, model: Any, args: Any, teacher: Any = None, **kwargs: Any) -> None:
        if not any(ask.kind in OTHER_TOKENIZER for term in args.build().terms for ask in term.asks):
            raise UserError(
                f"objective.method is {args.method!r}, which compares tokens that student and teacher share. "
                f"Fix: --method {', '.join(METHODS)}; or llmdistill.opd, for a teacher of the student's family."
            )
        super().__init__(model, args, teacher, **kwargs)


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit status."""
    from llmdistill.pipeline.run import run
    from llmdistill.recipe.command_line import help_text, named, parse

    name = named(argv, "objective", "method") or "alm"
    config: type[DistillationConfig] = CrossTokenizerConfig if name == "alm" else methods.config_class(name)
    if "--help" in argv or "-h" in argv:
        print(help_text(config, "llmdistill.cross_tokenizer", SUMMARY))
        return 0
    return run(parse(config, argv), CrossTokenizerTrainer)


if __name__ == "__main__":
    from llmdistill.recipe.command_line import run_front_door

    run_front_door(main, sys.argv[1:])
