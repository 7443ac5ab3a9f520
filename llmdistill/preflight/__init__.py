"""The start-up checks: every classic silent failure of distillation, found before the first step, with what to change.

A check is a generator of :class:`Finding`; its name is the function's. Probes run the models on a handful of tokens,
and only when nothing before them failed. Runs on pairs ask no teacher, those with a teacher of another tokenizer
compare no ids, and those of a denoiser may do either: they have checks of their own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmdistill.compat.patching import random_state_kept
from llmdistill.errors import UserError
from llmdistill.models.saving import SKIPPED_BY
from llmdistill.preflight import authors, chunks, denoising, installed, machine, models, pairs, tokens
from llmdistill.preflight.finding import STYLE, Finding, Run, Subject, fail, notice
from llmdistill.teachers.chunks import ChunkTeacher
from llmdistill.texts.pair import Pair
from llmdistill.texts.streams import at_hand

if TYPE_CHECKING:
    from llmdistill.recipe.command_line import Recipe

__all__ = ["CHECKS", "CHUNK_CHECKS", "DENOISING_CHECKS", "PAIR_CHECKS", "STYLE", "Finding", "examine", "preflight"]

Check = Callable[[Subject], Iterator[Finding]]
PROBES: tuple[Check, ...] = (
    *(models.head, chunks.head, models.round_trip, models.self_),
    *(pairs.likelihood, denoising.both_ways),
)
MACHINE: tuple[Check, ...] = (machine.disk, machine.memory, machine.device, installed.versions, installed.gpu)
CHECKS: tuple[Check, ...] = (
    tokens.tokenizers,
    tokens.logit_width,
    tokens.eos_pad,
    tokens.chat_template,
    tokens.context,
    tokens.prompts,
    tokens.domains,
    authors.authors,
    *MACHINE,
    machine.objective,
    models.stored,
    models.head,
    models.round_trip,
    models.self_,
)
CHUNK_CHECKS: tuple[Check, ...] = (
    chunks.alignment,
    chunks.eos_pad,
    chunks.chat_template,
    tokens.prompts,
    *MACHINE,
    models.stored,
    chunks.head,
)
PAIR_CHECKS: tuple[Check, ...] = (
    pairs.width,
    tokens.eos_pad,
    tokens.chat_template,
    pairs.pairs,
    *MACHINE,
    models.head,
    pairs.likelihood,
)
DENOISING_CHECKS: tuple[Check, ...] = (
    tokens.tokenizers,
    denoising.width,
    tokens.eos_pad,
    tokens.chat_template,
    tokens.context,
    tokens.prompts,
    *MACHINE,
    denoising.writing,
    models.head,
    denoising.both_ways,
)


def name_of(check: Check) -> str:
    """As in ``--skip-check NAME``."""
    return check.__name__.rstrip("_").replace("_", "-")


def preflight(trainer: Run | pairs.PairRun, recipe: Recipe | None = None, skip: Sequence[str] = ()) -> list[Finding]:
    """Runs every check but those in ``skip`` and returns what they found. Random states are left as they were.

    Args:
        trainer: a trainer, or what a run on pairs will be made of.

    Raises:
        UserError: a check failed (one line each), or ``skip`` names an unknown check.
    """
    findings = examine(trainer, recipe, skip)
    failed = [str(f) for f in findings if f.level == "fail"]
    if failed:
        head = f"{len(failed)} preflight checks failed\n  " if len(failed) > 1 else "preflight, "
        raise UserError(head + "\n  ".join(failed))
    return findings


def examine(trainer: Run | pairs.PairRun, recipe: Recipe | None = None, skip: Sequence[str] = ()) -> list[Finding]:
    """As :func:`preflight`, with failures among what is returned."""
    on_pairs = isinstance((at_hand(trainer.train_dataset) or [None])[0], Pair)
    denoises = getattr(trainer, "denoiser", None) is not None
    in_chunks = not (on_pairs or denoises) and isinstance(trainer.teacher, ChunkTeacher)  # type: ignore[union-attr]
    checks = PAIR_CHECKS if on_pairs else DENOISING_CHECKS if denoises else CHUNK_CHECKS if in_chunks else CHECKS
    known = [*(name_of(check) for check in checks), SKIPPED_BY]  # the last is made when all is trained
    for name in skip:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"--skip-check {name}: unknown check{hint} The checks are {', '.join(known)}.")
    subject = pairs.PairSubject(trainer) if on_pairs else Subject(trainer, recipe)  # type: ignore[arg-type]
    findings = list[Finding]()
    with random_state_kept():
        for check in checks:
            failed = [f.check for f in findings if f.level == "fail"]
            if name_of(check) in skip:
                found = [notice("skipped by --skip-check")]
            elif check in PROBES and failed:
                found = [notice(f"not checked: it needs {', '.join(dict.fromkeys(failed))} to pass")]
            elif check in PROBES and not (subject.prompts or subject.heldout):
                found = [notice("not checked: there are no prompts")]
            else:
                found = _outcome(check, subject)
            findings += [replace(f, check=name_of(check)) for f in found]
    return findings


def _outcome(check: Check, subject: Subject) -> list[Finding]:
    """What a check yields; an error inside it is a failure too, of whatever the check touched first."""
    try:
        found = list(check(subject))
        failed = any(f.level == "fail" for f in found)
        return [f for f in found if not (failed and f.level == "ok")]
    except UserError as error:
        return [Finding("fail", "", str(error))]
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        fix = f"mend that, or go on without this check: --skip-check {name_of(check)}"
        return [fail(f"could not be carried out: {type(error).__name__} {reason}", fix)]
