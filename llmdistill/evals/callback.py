"""Evaluation during training: the student itself, on a subsample of some suites, every so many steps.

    trainer.add_callback(EvalCallback(trainer, ["gsm8k"], every_steps=50, problems=100))

or, in a recipe, ``evals: {suites: [gsm8k], every_steps: 50}``. The numbers go to every place the trainer logs to, as
``eval/SUITE/avg@N`` with ``_low`` and ``_high``; samples, verdicts and page are in ``evals/step-N/SUITE`` of the run.
What draws is the run's own
vLLM engine, where there is one that holds the suite's prompts and answers and ``rollouts.push_every`` is 1; else
``generate``. A subsample says how training goes. What is published comes from ``llmdistill eval`` on the whole suite.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from llmdistill.compat.models import generation_ready
from llmdistill.compat.patching import random_state_kept
from llmdistill.errors import UserError
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.engines.base import Engine
from llmdistill.evals.engines.diffusion import DiffusionEngine
from llmdistill.evals.engines.local import HFEngine, VLLMSampler
from llmdistill.evals.engines.make import Source
from llmdistill.evals.following import followed
from llmdistill.evals.jobs import Job, begin, prepare
from llmdistill.evals.records import EvalFolder
from llmdistill.evals.runner import draw, finish
from llmdistill.evals.suite import load_suite
from llmdistill.models.modes import evaluating
from llmdistill.ranks import from_first_rank, is_first, on_every_rank
from llmdistill.rollouts.vllm import VLLMRollouts
from llmdistill.tokenization.special import context_length


class EvalCallback(TrainerCallback):
    """Works with any ``transformers.Trainer``. Every process draws its share; the first one grades, as soon as a
    problem's last sample is there, and logs.

    Args:
        trainer: whose model is evaluated.
        suites: YAML files or names of bundled suites.
        every_steps: optimizer steps between evaluations; 0: only before the first and after the last.
        problems: of each suite, drawn at random with the trainer's seed; 0: all.
        samples: of every problem; None: the suite's.
        longest: new tokens; None: the suite's.
        batch: sequences generated at one time.
        data_dir: folder with the benchmarks' files.
        system_prompt, chat_template_kwargs: how the student's prompts are written in training.

    Raises:
        UserError: a suite or its data is not as it must be. Before training, so nothing is lost.
    """

    def __init__(
        self,
        trainer: Any,
        suites: Sequence[str],
        *,
        every_steps: int = 0,
        problems: int = 100,
        samples: int | None = None,
        longest: int | None = None,
        batch: int = 16,
        data_dir: str = "",
        system_prompt: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.trainer, self.every_steps, self.batch = trainer, every_steps, batch
        denoiser = getattr(trainer, "denoiser", None)  # of a student that writes by denoising
        self.config = EvalConfig(
            model="student",
            engine="hf" if denoiser is None else "diffusion",
            diffusion={} if denoiser is None else dict(trainer.args.writing),
            n=samples,
            temperature=0.0 if samples == 1 else None,
            max_new_tokens=longest,
            limit=problems,
            seed=trainer.args.seed,
            data_dir=data_dir,
            system_prompt=system_prompt,
            chat_template_kwargs=dict(chat_template_kwargs or {}),
        )
        tokenizer = trainer.processing_class
        context = context_length(trainer.model.config)
        dtype = str(trainer.model.dtype).removeprefix("torch.")
        source = Source("student", None, dtype, tokenizer, context, lambda longest: HFEngine(trainer.model, tokenizer))
        loaded = [load_suite(suite) for suite in suites]
        names = [suite.name for suite in loaded]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UserError(f"evals.suites has {sorted(repeated)[0]!r} twice; they would share a folder.")
        for suite in loaded:
            if (samples or 1) > 1 and not suite.sampling.get("temperature", 0):
                raise UserError(
                    f"evals.samples is {samples} and suite {suite.name!r} is greedy: all would be the same. "
                    "Fix: evals.samples 1, or a suite with a temperature."
                )
        self.jobs = [prepare(suite, self.config, source) for suite in loaded]
        self.done: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done.clear()
        if state.global_step == 0:
            self.evaluate(state)
        elif all((self._at(job, state.global_step).folder.results_file).is_file() for job in self.jobs):
            self.done.add(state.global_step)  # resumed where everything is done already

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every_steps and state.global_step % self.every_steps == 0:
            self.evaluate(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluate(state)

    def evaluate(self, state: Any) -> None:
        """All suites with the weights of now."""
        step, accelerator = state.global_step, self.trainer.accelerator
        if step in self.done:
            return
        self.done.add(step)
        console = Console(stderr=True, markup=False)
        jobs = [self._at(job, step) for job in self.jobs]
        from_first_rank(lambda: self._begin(jobs, console))
        grading = followed(jobs, self.config) if is_first() else nullcontext()
        with self._engine(jobs) as engine, grading:  # what is drawn is judged meanwhile
            on_every_rank(lambda: self._draw(jobs, engine, console))
        # grading may take longer than a collective waits, and an error of one rank is everybody's
        for numbers in from_first_rank(
            lambda: [self._numbers(job, finish(job, self.config, console).results) for job in jobs]
        ):
            if accelerator.is_main_process:
                self.trainer.log(numbers)

    @contextmanager
    def _engine(self, jobs: Sequence[Job]) -> Iterator[Engine]:
        """What draws: the run's own vLLM engine with the weights of now, where it has one and may be given them; else
        transformers' generate. Entered by every rank, also by one that has nothing to draw: pushing and gathering
        sharded weights are collectives."""
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        rollouts = getattr(trainer, "rollout_engine", None)
        longest = max(len(a.ids) + a.room for job in jobs for a in job.asked)
        # In the middle of an interval of push_every the engine has older weights to go on with.
        free = isinstance(rollouts, VLLMRollouts) and trainer.args.rollouts.push_every == 1
        if isinstance(rollouts, VLLMRollouts) and free and rollouts.engine.longest >= longest:
            trainer.sync_engine()
            with random_state_kept():  # vLLM's sampler on CPU draws from the global state
                yield VLLMSampler(rollouts.engine, tokenizer, rollouts.eos_ids)
            return
        wrapped = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
        denoiser = getattr(trainer, "denoiser", None)
        with generation_ready(wrapped, trainer.accelerator) as model:
            if denoiser is None:
                yield HFEngine(model, tokenizer, batch_size=self.batch)
                return
            with evaluating(model):  # which generate of transformers sees to by itself
                student = denoiser.around(model)
                yield DiffusionEngine(student, tokenizer, trainer.args.writing, batch_size=self.batch)

    def _begin(self, jobs: Sequence[Job], console: Console) -> None:
        for job in jobs:  # of a run that was killed behind its last checkpoint: those weights are gone
            shutil.rmtree(job.folder.path, ignore_errors=True)
            begin(job, console)

    def _draw(self, jobs: Sequence[Job], engine: Engine, console: Console) -> None:
        rank, world = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        for job in jobs:
            draw(job, job.asked[rank::world], engine, console, rank)

    def _at(self, job: Job, step: int) -> Job:
        folder = Path(self.trainer.args.output_dir) / "evals" / f"step-{step:06d}" / job.suite.name
        return replace(job, folder=EvalFolder(folder))

    def _numbers(self, job: Job, results: dict[str, Any]) -> dict[str, float]:
        name = f"eval/{job.suite.name}/avg@{job.n}"
        average = results["avg"]
        return {
            name: average["value"],
            f"{name}_low": average["low"],
            f"{name}_high": average["high"],
            f"eval/{job.suite.name}/truncated": results["health"]["truncated"],
            # Without these a score says little: longer answers and other temperatures score otherwise.
            f"eval/{job.suite.name}/tokens": results["lengths"]["all"]["mean"],
            f"eval/{job.suite.name}/temperature": results["sampling"]["temperature"],
        }
