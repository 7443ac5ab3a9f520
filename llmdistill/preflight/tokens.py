"""Checks of what the tokens mean: vocabularies, endings, templates, lengths, prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.preflight.finding import HELDOUT, Finding, Side, Subject, fail, notice, ok
from llmdistill.teachers.fingerprint import template_hash, tokenizer_fingerprint
from llmdistill.teachers.mixture import UNKNOWN_FIX
from llmdistill.texts.chat import ChatTemplate
from llmdistill.texts.facts import Facts, Marks, facts_of
from llmdistill.texts.streams import ExampleStream
from llmdistill.tokenization.compare import compare_tokenizers
from llmdistill.tokenization.special import context_length

SHOWN = 3  # examples in a message


def tokenizers(s: Subject) -> Iterator[Finding]:
    """Every id means the same token to the student and to each teacher."""
    for side in s.sides:
        yield from _tokenizer(s, side)


def _tokenizer(s: Subject, side: Side) -> Iterator[Finding]:
    fix = (
        "llmdistill.cross_tokenizer, which compares chunks of text, or --teacher.view classes here; or a teacher with "
        "the student's vocabulary (one model family)"
    )
    if side.tokenizer is None:
        if tokenizer_fingerprint(s.tokenizer) == side.info.tokenizer:
            yield ok(s.says(side, f"vocabularies have the same fingerprint {side.info.tokenizer}"))
        else:
            message = f"the vocabulary of teacher {side.name!r} has another fingerprint than the student's"
            yield fail(f"{message}; the teacher would score other tokens than the student wrote", fix)
        return
    c = compare_tokenizers(s.tokenizer, side.tokenizer)
    if c.differing:
        shown = "; ".join(f"{i} is {a!r} to the student, {b!r} to the teacher" for i, a, b in c.differing[:SHOWN])
        yield fail(s.says(side, f"{len(c.differing)} of {c.shared} shared ids are different tokens: {shown}"), fix)
    else:
        yield ok(s.says(side, f"{c.shared} shared ids are the same tokens"))
    if c.student_only or c.teacher_only:
        more = f"past them the student has {c.student_only} more tokens and the teacher {c.teacher_only}"
        yield notice(s.says(side, more))
    if c.special:
        shown = ", ".join(f"{token!r} ({i})" for i, token in c.special[:SHOWN])
        message = f"special on one side only: {shown}; ids are scored alike, decoded texts may differ"
        yield notice(s.says(side, message))
    if not c.same_splits:
        message = "the tokenizers split a probe text differently; the teacher is scored on the student's splits"
        yield notice(s.says(side, message))


def _foreign(s: Subject, side: Side) -> bool:
    """Whether an id means another token to a teacher."""
    if side.tokenizer is None:
        return tokenizer_fingerprint(s.tokenizer) != side.info.tokenizer
    return bool(compare_tokenizers(s.tokenizer, side.tokenizer).differing)


def logit_width(s: Subject) -> Iterator[Finding]:
    """Heads are padded past the tokenizer, by different amounts in one family."""
    student, teacher = s.columns, s.info.vocab_size  # of several teachers it is one number, or there is no run
    for who, width in (("student", student), *((f"teacher {side.name!r}", teacher) for side in s.sides)):
        yield from too_narrow(who, width, s.ids)
    if student == teacher:
        yield ok(f"all heads have {student} columns")
    else:
        yield notice(
            f"teacher {s.info.name!r} has {teacher} logit columns, the student {student}; columns past "
            f"{min(student, teacher)} are dropped"
        )


def too_narrow(who: str, width: int, ids: int) -> Iterator[Finding]:
    """That a model has fewer logit columns than the tokenizer has ids, if it has."""
    if width < ids:
        yield fail(
            f"{who} has {width} logit columns, the student's tokenizer {ids} ids; the last ids have no logit",
            "model.resize_token_embeddings(len(tokenizer)), or the tokenizer that belongs to the model",
        )


def leaks(prompts: Facts, heldout: Facts) -> Iterator[Finding]:
    """That held-out prompts are trained on, if any are."""
    leaked = heldout.rows[np.isin(heldout.digests, prompts.digests)]
    if len(leaked):
        yield fail(
            f"{len(leaked)} of {len(heldout)} held-out prompts are also trained on (first: row {leaked[0]}), so the "
            "held-out numbers would flatter the student",
            "take them out of data.train or data.heldout",
        )


def eos_pad(s: Subject) -> Iterator[Finding]:
    """All sides end a text with the same ids."""
    student = set(s.trainer.eos_ids)
    fix = "set eos_token_id in the student's generation_config.json to the teacher's"
    if not student:
        yield fail("the student has no eos id: its rollouts never stop", fix)
    for side in s.sides if student else ():
        teacher = set(side.info.eos_ids)
        if _foreign(s, side):  # the same id is another token there: the vocabularies are the trouble
            continue
        if student == teacher:
            yield ok(s.says(side, f"eos ids {sorted(student)} on both sides"))
        elif teacher and teacher < student:
            extra = sorted(student - teacher)
            yield notice(f"the student also ends at {extra}, where teacher {side.name!r} goes on; it will unlearn that")
        else:
            yield fail(
                f"the student ends at {sorted(student)}, teacher {side.name!r} at {sorted(teacher)}: it would learn to "
                "write an ending that does not stop it",
                fix,
            )
    if student and not s.sides:
        yield ok(f"the student ends at {sorted(student)}")
    yield from _endings(s, student, fix)
    if s.tokenizer.pad_token_id is None:
        yield notice(f"the tokenizer has no pad token; {s.trainer.pad_id} fills in, and padding is masked by position")
    elif student == {s.tokenizer.pad_token_id}:
        yield notice("pad is the only eos; here it counts where it ends a text, but libraries that mask by id drop it")


def _endings(s: Subject, student: set[int], fix: str) -> Iterator[Finding]:
    """What stands at the end of completions and turns stops the student."""
    eos, encode = s.tokenizer.eos_token_id, s.trainer.encode
    if eos not in student | {None}:
        message = f"the tokenizer's eos {eos} is none of the student's eos ids {sorted(student)}"
        closed = "dataset" in s.trainer.method.uses and bool((s.facts.last == eos).any())
        if closed:
            yield fail(f"{message}: the dataset's completions would end with a token that stops nothing", fix)
        else:
            yield notice(message)
    end = encode.template.closing.token if encode.chats else None
    if end is not None and s.tokenizer.convert_tokens_to_ids(end) not in student:
        yield notice(
            f"the template ends a turn with {end!r}, where the student goes on: its rollouts would not stop at it",
            "add its id to eos_token_id in the student's generation_config.json",
        )


def chat_template(s: Subject) -> Iterator[Finding]:
    """The teacher reads the student's rendering of a prompt, whatever its own template."""
    own, encode = template_hash(s.tokenizer), s.trainer.encode
    written = _written(s, s.tokenizer) if own else None
    if isinstance(written, str):
        yield fail(f"the student's template cannot render a user message: {written}", "mend tokenizer.chat_template")
    elif written is not None and "strftime_now" in encode.template.source and time.strftime("%Y") in "".join(written):
        yield notice(
            "the student's template writes today's date: tomorrow's prompts are others, also for a run that is resumed "
            "or a store of the teacher's scores",
            "data.chat_template_kwargs with the name that the template keeps the date under (often date_string)",
        )
    for message, rows in encode.notes.items():
        yield notice(f"{message} ({len(rows)} rows; first: row {min(rows)})")
    bos = s.tokenizer.bos_token_id
    doubled = s.facts.rows[s.facts.doubled == (-2 if bos is None else bos)]
    if len(doubled):
        yield fail(
            f"{len(doubled)} prompts begin with bos twice (first: row {doubled[0]}): their text holds it already",
            "give prompts as chat messages, or cut the bos from the strings",
        )
    if not s.sides:
        yield ok("the student's own template" if own else "no template: prompts are plain text")
    for side in s.sides:
        if own == side.info.template:
            same = "same template on both sides" if own else "no template on either side: prompts are plain text"
            yield ok(s.says(side, same))
        elif own is None:
            message = "the student has no chat template, the teacher has: it will see prompts as plain text"
            yield notice(s.says(side, message))
        elif side.tokenizer is not None and side.info.template and written == _written(s, side.tokenizer):
            yield ok(s.says(side, "the templates differ, and write conversations alike under these settings"))
        else:
            message = (
                f"the student's template ({own}) is not the teacher's ({side.info.template}): the teacher is scored on "
                "the student's rendering of each prompt"
            )
            fix = "give the student the teacher's chat_template if both were tuned on it"
            yield notice(s.says(side, message), fix)


def _written(s: Subject, tokenizer: PreTrainedTokenizerBase) -> list[str] | str:
    """What a side's template makes of a few conversations under the settings of the data; or why it makes nothing."""
    user, data = {"role": "user", "content": "2+2?"}, s.trainer.encode.config
    answered = [user, {"role": "assistant", "content": "4"}, {"role": "user", "content": "3+3?"}]
    talks = [[user], [{"role": "system", "content": "Be brief."}, user], answered]
    try:
        template = ChatTemplate(tokenizer, system_prompt=data.system_prompt, kwargs=data.chat_template_kwargs)
        return [template.prompt(talk) for talk in talks]
    except UserError as error:
        return str(error)


def context(s: Subject) -> Iterator[Finding]:
    """Prompt and completion fit into the student, and into the teacher that is asked about them."""
    limits = [("the student", context_length(s.student.config), _lengths(s, s.facts, s.heldout_facts))]
    for side in s.sides:
        # Engines that score prompts (vLLM) refuse one that leaves no room for the token they decode after it.
        spare = 0 if side.model is not None or not s.live else 1
        asked = (s.facts, s.heldout_facts if s.live else facts_of([]))
        lengths = _lengths(s, *(s.asked_of(side, facts) for facts in asked))
        limits.append((f"teacher {side.name!r}", side.info.context_length - spare, lengths))
    for who, limit, (longest, new) in limits:
        if longest + new > limit:
            yield fail(
                f"the longest prompt ({longest} tokens) and its completion (up to {new}) need {longest + new} "
                f"positions, {who} has {limit}",
                "lower rollouts.max_new_tokens, or data.max_prompt_tokens with --data.overlong drop",
            )
    longest, new = limits[0][2]
    if 0 < s.args.batch_tokens < longest + new:
        yield fail(
            f"the longest prompt ({longest} tokens) and its completion (up to {new}) need {longest + new} tokens in "
            f"one pass, objective.batch_tokens is {s.args.batch_tokens}",
            f"objective.batch_tokens {longest + new} or more, or shorter texts: rollouts.max_new_tokens",
        )
    yield ok(f"prompt {longest} + completion {new} tokens, context {min(limit for _, limit, _ in limits)}")


def _lengths(s: Subject, train: Facts, heldout: Facts) -> tuple[int, int]:
    """Of the longest prompt, and of the longest completion it may get."""
    is_sampled = (s.trainer.method.uses != {"dataset"} and len(train) > 0) or len(heldout) > 0
    completions = [int(facts.completions.max(initial=0)) for facts in (train, heldout)]
    longest = max(int(facts.tokens.max(initial=0)) for facts in (train, heldout))
    return longest, max(s.args.rollouts.max_new_tokens if is_sampled else 0, *completions)


def domains(s: Subject) -> Iterator[Finding]:
    """Every row has a teacher, and every teacher has rows."""
    if s.router is None:
        yield ok("all rows have one teacher" if len(s.sides) == 1 else "all rows have one ensemble of teachers")
        return
    route = s.router.route
    for what, facts in (("training", s.facts), ("held-out", s.heldout_facts)):
        strange = facts.where(facts.of_domains(lambda domain: route(domain) is None))
        if len(strange):
            first = f"row {strange.rows[0]} {s.router.unknown(strange.names[strange.domains[0]])}"
            yield fail(f"{len(strange)} {what} rows have no teacher; {first}", UNKNOWN_FIX)
    counts = {
        name: int(s.facts.of_domains(lambda domain, name=name: route(domain) == name).sum())  # type: ignore[misc]
        for name in s.router.members
    }
    for name, count in counts.items():
        if not count and s.prompts:
            yield notice(f"teacher {name!r} has no training row", "correct its domains, or leave it out")
    yield ok("; ".join(f"{count} rows for teacher {name!r}" for name, count in counts.items()))


def prompts(s: Subject) -> Iterator[Finding]:
    """What is trained on is there, and apart from what is measured on."""
    if not s.prompts:
        yield notice("there are no training prompts")
        return
    train, heldout = s.facts, s.heldout_facts

    def rows(of: Callable[[Facts], Marks], *where: Facts) -> list[int]:
        return [row for facts in where for row in facts.rows[of(facts)].tolist()]

    empty = rows(lambda facts: facts.tokens == 0, train, heldout)
    if empty:
        yield fail(f"{len(empty)} prompts have no token (first: row {empty[0]})", "remove them")
    needed = [t for t in s.trainer.method.texts.values() if "dataset" in t.uses and not getattr(t, "optional", False)]
    if needed and (bare := rows(lambda facts: facts.completions == 0, train)):
        yield fail(f"{len(bare)} rows have no completion (first: row {bare[0]})", "--data.completion_column NAME")
    reads_answers = getattr(s.trainer.reward, "reads_answers", False)
    if bare := rows(lambda facts: ~facts.answered, train) if reads_answers else []:
        yield fail(f"{len(bare)} rows have no answer to verify (first: row {bare[0]})", "--data.answer_column NAME")
    limit = s.trainer.data_config.max_prompt_tokens
    if over := rows(lambda facts: facts.tokens > limit, train, heldout):
        yield fail(
            f"{len(over)} prompts are longer than data.max_prompt_tokens {limit} (first: row {over[0]})",
            "raise it, or --data.overlong drop",
        )
    yield from leaks(train, heldout)
    if (distinct := len(np.unique(train.digests))) < len(s.prompts):
        yield notice(f"{len(s.prompts) - distinct} training prompts are repetitions of others")
    yield from columns(s)
    if dropped := s.trainer.encode.dropped:
        longest = f"data.max_prompt_tokens {limit}" + (
            f" or data.max_answer_tokens {most}" if (most := s.trainer.data_config.max_answer_tokens) else ""
        )
        yield notice(f"{dropped} rows left out: they are longer than {longest}")
    if not s.heldout:
        yield notice("no held-out prompts: nothing is measured before and after", HELDOUT)
    first = "the first " if isinstance(s.trainer.train_dataset, ExampleStream) else ""
    yield ok(f"{first}{len(s.prompts)} to train on, {len(s.heldout)} held out")


def columns(s: Subject) -> Iterator[Finding]:
    """Columns that are read under other names, and rows that are not read as they stand."""
    for setting, column in s.trainer.encode.columns.read_as.items():
        if column != getattr(s.trainer.encode.config, setting):
            yield notice(f"column {column!r} is read as the {setting.removesuffix('_column')} (data.{setting})")
    for line in s.trainer.encode.left_out():
        yield notice(line)
