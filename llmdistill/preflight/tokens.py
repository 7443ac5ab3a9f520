"""Checks of what the tokens mean: vocabularies, endings, templates, lengths, prompts."""

from __future__ import annotations

from collections.abc import Iterator

from llmdistill.preflight.finding import Finding, Subject, fail, notice, ok
from llmdistill.teachers.fingerprint import template_hash, tokenizer_fingerprint
from llmdistill.tokenization.compare import compare_tokenizers
from llmdistill.tokenization.special import context_length

SHOWN = 3  # examples in a message


def tokenizers(s: Subject) -> Iterator[Finding]:
    """Every id means the same token on both sides."""
    fix = "a teacher with the student's vocabulary (one model family)"
    if s.teacher_tokenizer is None:
        if tokenizer_fingerprint(s.tokenizer) == s.info.tokenizer:
            yield ok(f"vocabularies have the same fingerprint {s.info.tokenizer}")
        else:
            message = f"the vocabulary of teacher {s.info.name!r} has another fingerprint than the student's"
            yield fail(f"{message}; the teacher would score other tokens than the student wrote", fix)
        return
    c = compare_tokenizers(s.tokenizer, s.teacher_tokenizer)
    if c.differing:
        shown = "; ".join(f"{i} is {a!r} to the student, {b!r} to the teacher" for i, a, b in c.differing[:SHOWN])
        yield fail(f"{len(c.differing)} of {c.shared} shared ids are different tokens: {shown}", fix)
    else:
        yield ok(f"{c.shared} shared ids are the same tokens")
    if c.student_only or c.teacher_only:
        yield notice(f"past them the student has {c.student_only} more tokens and the teacher {c.teacher_only}")
    if c.special:
        shown = ", ".join(f"{token!r} ({i})" for i, token in c.special[:SHOWN])
        yield notice(f"special on one side only: {shown}; ids are scored alike, decoded texts may differ")
    if not c.same_splits:
        yield notice("the tokenizers split a probe text differently; the teacher is scored on the student's splits")


def logit_width(s: Subject) -> Iterator[Finding]:
    """Heads are padded past the tokenizer, by different amounts in one family."""
    student, teacher = s.columns
    for side, width in (("student", student), (f"teacher {s.info.name!r}", teacher)):
        if width < s.ids:
            yield fail(
                f"{side} has {width} logit columns, the student's tokenizer {s.ids} ids; the last ids have no logit",
                "model.resize_token_embeddings(len(tokenizer)), or the tokenizer that belongs to the model",
            )
    if student == teacher:
        yield ok(f"both heads have {student} columns")
    else:
        yield notice(
            f"teacher {s.info.name!r} has {teacher} logit columns, the student {student}; columns past "
            f"{min(student, teacher)} are dropped"
        )


def eos_pad(s: Subject) -> Iterator[Finding]:
    """Both sides end a text with the same ids."""
    student, teacher = set(s.trainer.eos_ids), set(s.info.eos_ids)
    fix = "set eos_token_id in the student's generation_config.json to the teacher's"
    if not student:
        yield fail("the student has no eos id: its rollouts never stop", fix)
    elif student == teacher:
        yield ok(f"eos ids {sorted(student)} on both sides")
    elif teacher and teacher < student:
        extra = sorted(student - teacher)
        yield notice(f"the student also ends at {extra}, where teacher {s.info.name!r} goes on; it will unlearn that")
    else:
        yield fail(
            f"the student ends at {sorted(student)}, teacher {s.info.name!r} at {sorted(teacher)}: it would learn to "
            "write an ending that does not stop it",
            fix,
        )
    if s.tokenizer.eos_token_id not in student | {None}:
        message = f"the tokenizer's eos {s.tokenizer.eos_token_id} is none of the student's eos ids {sorted(student)}"
        if s.trainer.on_policy:
            yield notice(message)
        else:
            yield fail(f"{message}: the dataset's completions would end with a token that stops nothing", fix)
    if s.tokenizer.pad_token_id is None:
        yield notice(f"the tokenizer has no pad token; {s.trainer.pad_id} fills in, and padding is masked by position")
    elif student == {s.tokenizer.pad_token_id}:
        yield notice("pad is the only eos; here it counts where it ends a text, but libraries that mask by id drop it")


def chat_template(s: Subject) -> Iterator[Finding]:
    """The teacher reads the student's rendering of a prompt, whatever its own template."""
    own = template_hash(s.tokenizer)
    if own is not None:
        messages = [{"role": "user", "content": "2+2?"}]
        try:
            s.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs and raise what they like
            yield fail(f"the student's template cannot render a user message: {error}", "mend tokenizer.chat_template")
    bos = s.tokenizer.bos_token_id
    doubled = [p.row for p in s.prompts if bos is not None and p.ids[:2] == [bos, bos]]
    if doubled:
        yield fail(
            f"{len(doubled)} prompts begin with bos twice (first: row {doubled[0]}): their text holds it already",
            "give prompts as chat messages, or cut the bos from the strings",
        )
    if own == s.info.template:
        yield ok("same template on both sides" if own else "no template on either side: prompts are plain text")
    elif own is None:
        yield notice("the student has no chat template, the teacher has: it will see prompts as plain text")
    else:
        yield notice(
            f"the student's template ({own}) is not the teacher's ({s.info.template}): the teacher is scored on the "
            "student's rendering of each prompt",
            "give the student the teacher's chat_template if both were tuned on it",
        )


def context(s: Subject) -> Iterator[Finding]:
    """Prompt and completion fit into both models."""
    prompts = s.prompts + s.heldout
    longest = max((len(p.ids) for p in prompts), default=0)
    sampled = s.args.rollouts.max_new_tokens if s.trainer.on_policy or s.heldout else 0
    new = max([sampled, *(len(p.completion) for p in s.prompts)])
    # Engines that score prompts (vLLM) refuse one that leaves no room for the token they decode after it.
    spare = 0 if s.teacher is not None else 1
    limits = {
        "the student": context_length(s.student.config),
        f"teacher {s.info.name!r}": s.info.context_length - spare,
    }
    for side, limit in limits.items():
        if longest + new > limit:
            yield fail(
                f"the longest prompt ({longest} tokens) and its completion (up to {new}) need {longest + new} "
                f"positions, {side} has {limit}",
                "lower rollouts.max_new_tokens, or data.max_prompt_tokens with --data.overlong drop",
            )
    yield ok(f"prompt {longest} + completion {new} tokens, context {min(limits.values())}")


def prompts(s: Subject) -> Iterator[Finding]:
    """What is trained on is there, and apart from what is measured on."""
    if not s.prompts:
        yield notice("there are no training prompts")
        return
    empty = [p.row for p in s.prompts + s.heldout if not p.ids]
    if empty:
        yield fail(f"{len(empty)} prompts have no token (first: row {empty[0]})", "remove them")
    if not s.trainer.on_policy and (bare := [p.row for p in s.prompts if not p.completion]):
        yield fail(f"{len(bare)} rows have no completion (first: row {bare[0]})", "--data.completion_column NAME")
    limit = s.trainer.data_config.max_prompt_tokens
    if over := [p.row for p in s.prompts + s.heldout if len(p.ids) > limit]:
        yield fail(
            f"{len(over)} prompts are longer than data.max_prompt_tokens {limit} (first: row {over[0]})",
            "raise it, or --data.overlong drop",
        )
    seen = {tuple(p.ids) for p in s.prompts}
    if leaked := [p.row for p in s.heldout if tuple(p.ids) in seen]:
        yield fail(
            f"{len(leaked)} of {len(s.heldout)} held-out prompts are also trained on (first: row {leaked[0]}), so the "
            "held-out numbers would flatter the student",
            "take them out of data.train or data.heldout",
        )
    if len(seen) < len(s.prompts):
        yield notice(f"{len(s.prompts) - len(seen)} training prompts are repetitions of others")
    if not s.heldout:
        yield notice("no held-out prompts: nothing is measured before and after", "--data.heldout FILE")
    yield ok(f"{len(s.prompts)} to train on, {len(s.heldout)} held out")
