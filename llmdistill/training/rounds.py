"""The texts of a round: who writes them, what they are worth, which contexts they are given, in which order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from llmdistill.compat.models import generation_ready
from llmdistill.composition.batch import Text
from llmdistill.composition.method import Method
from llmdistill.composition.mixture import DomainMixture
from llmdistill.errors import UserError
from llmdistill.models.generation import BATCH_TOKENS, HFRollouts
from llmdistill.ranks import on_every_rank
from llmdistill.rollouts.choose import sampling_of
from llmdistill.rollouts.engine import Hear, LaterEngine, RolloutEngine
from llmdistill.teachers.base import Teacher
from llmdistill.texts import Prompt, Rollout, Sampling, request_seed
from llmdistill.texts.prompts import completed
from llmdistill.texts.sources import Drawn, Round
from llmdistill.training.contexts import ContextFunction, build_contexts
from llmdistill.training.rewards import Reward, group_advantages, task_rewards
from llmdistill.training.student_trainer import StudentTrainer

Sample = Callable[[Sequence[Prompt], Sampling], Rollout]
SampleLater = Callable[[Sequence[Prompt], Sampling, Hear], Rollout]


class RoundTexts(StudentTrainer):
    """The part of a trainer that makes the texts of an optimizer step."""

    method: Method
    judges: dict[str, Teacher]
    reward: Reward | None
    rollout_engine: RolloutEngine
    context_functions: Mapping[str, ContextFunction]
    mixture: DomainMixture | None  # of the rows, where the shares of the domains move
    eos_ids: Any
    pad_id: int
    vocab_size: int
    _pushed: tuple[int, int]  # the interval of push_every steps, and the step, last pushed

    @property
    def teacher(self) -> Teacher:
        """The judge that the student is measured against.

        Raises:
            UserError: the method asks none.
        """
        judge = self.judges.get("teacher") or next(iter(self.judges.values()), None)
        if judge is None:
            raise UserError(
                "this method asks no teacher, and there is none. Fix: teacher=MODEL to measure against one."
            )
        return judge

    def draw(self, examples: Sequence[Any], step: int | None = None, sample: Sample | None = None) -> dict[str, Text]:
        """The texts of a round.

        Args:
            step: optimizer steps done when they are trained on; None: as many as now.
            sample: how the student writes; None: with the weights of now.
        """
        step, sample = self.state.global_step if step is None else step, sample or self._student_samples
        sampling = self._sampling(step)
        places, prompts_everywhere = self._places(len(examples))

        def with_prompts(rollout: Rollout, of: Sequence[Prompt]) -> Drawn:
            n = len(rollout) // len(of)
            return rollout, [p for p in of for _ in range(n)]

        def off_policy(rollout: Rollout, of: Sequence[Prompt]) -> Drawn:
            """What no student wrote is neither stale nor off its sampler's log-probs."""
            return with_prompts(replace(rollout, policy_version=step, behavior_logprobs=None), of)

        round_ = Round(
            examples,
            step,
            self.state.max_steps,
            self.args.seed,
            self.accelerator.process_index,
            self.args.rollouts.samples_per_prompt,
            self.pad_id,
            {
                "student": lambda of: with_prompts(sample(of, sampling), of),
                "dataset": lambda of: off_policy(completed(of, self.pad_id), of),
                "teacher": lambda of: off_policy(self.teacher.generate(of, sampling), of),
            },
            places=places,
            prompts_everywhere=prompts_everywhere,
        )
        # one by one: a service may be down to one rank while the others' next text is made by all together
        return {name: on_every_rank(partial(self._text, round_, source)) for name, source in self.method.texts.items()}

    def sampler_of_now(self) -> SampleLater:
        """Has the student write with the weights of now, also when training has gone on."""
        if not self.on_policy:
            return lambda prompts, sampling, hear: self.rollout_engine.generate(prompts, sampling)
        engine = self.rollout_engine
        assert isinstance(engine, LaterEngine)  # others are refused before the first step
        snapshot = engine.snapshot(self.forward_model(), self.state.global_step)

        def sample(prompts: Sequence[Prompt], sampling: Sampling, hear: Hear) -> Rollout:
            engine.install(snapshot)
            return engine.generate(prompts, sampling, hear)

        return sample

    @property
    def on_policy(self) -> bool:
        """The student may be sampled."""
        return "student" in self.method.uses

    def _places(self, prompts: int) -> tuple[list[int], int]:
        """Where the prompts of this process stand in the global batch, and how many places that has.

        Batches go to the processes in turn, so this numbers the prompts as one process would see them.
        """
        size, world, rank = self.args.train_batch_size, self.accelerator.num_processes, self.accelerator.process_index
        places = [(i // size * world + rank) * size + i % size for i in range(prompts)]
        return places, -(-prompts // size) * world * size

    def _of_mixture(self, examples: Sequence[Any]) -> Sequence[Any]:
        """As many examples, of the domains whose turn it is, where their shares move; else those that came."""
        if self.mixture is None:
            return examples
        rows = self.mixture.draw(self.state.global_step, *self._places(len(examples)))
        return [self.train_dataset[row] for row in rows]  # type: ignore[index]

    def _text(self, round_: Round, source: Any) -> Text:
        rollout, prompts = source.draw(round_)
        return Text(self.readable(rollout, prompts), prompts, author=round_.last_author)

    def readable(self, rollout: Rollout, prompts: Sequence[Prompt]) -> Rollout:
        """The rollout with completions ended before an id that one of the models has no column for.

        Heads are padded past the tokenizer by different amounts; what one model samples out there (rarely, after
        training), another cannot read.

        Raises:
            UserError: for a prompt with such an id, which is the wrong tokenizer.
        """
        for prompt in prompts:
            if max(prompt.ids, default=0) >= self.vocab_size:
                raise UserError(
                    f"the prompt of row {prompt.row} has the id {max(prompt.ids)}, and student and teacher have "
                    f"{self.vocab_size} columns in common. Fix: a teacher with the student's vocabulary."
                )
        rollout, cut = rollout.within(self.vocab_size, self.pad_id)
        if cut:
            self.meters.add("rollout/cut_at_unreadable_id", cut)
        return rollout

    def _student_samples(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        # Counted from step 0 and not from the last push: a run resumed at a multiple pushes as the undisturbed one.
        # By intervals and not at the multiples alone: the student need not be the one who writes there.
        interval = self.state.global_step // self.args.rollouts.push_every
        if self._pushed[0] != interval:
            self._push(interval)
        return self.rollout_engine.generate(prompts, sampling)

    def sync_engine(self) -> None:
        """Puts the weights of now into the rollout engine for a measurement, unless they are there."""
        self.wait_for_rounds()
        if self._pushed[1] != self.state.global_step:
            self._push(-1)

    def wait_for_rounds(self) -> None:
        """Until no round is being made ahead: engine and judges are free, and nothing changes what is looked at."""

    def samples_of_now(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """What the student writes with the weights of now, for a measurement."""
        step, every = self.state.global_step, self.args.rollouts.push_every
        if self.is_in_train and self._pushed[0] == step // every and self._pushed[1] != step:
            # The engine writes the rest of its interval with the weights it has: looking does not change what is
            # trained on.
            limit = self.args.rollouts.batch_tokens or BATCH_TOKENS
            parts = {"eos_ids": self.eos_ids, "pad_id": self.pad_id, "tokenizer": self.encode.tokenizer}
            beside_engine = HFRollouts(ready=self._generating, batch_tokens=limit, **parts)
            beside_engine.sync(self.forward_model(), step)
            return beside_engine.generate(prompts, sampling)
        self.sync_engine()
        return self.rollout_engine.generate(prompts, sampling)

    def _generating(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        return generation_ready(model, self.accelerator)

    def _push(self, interval: int) -> None:
        self.rollout_engine.sync(self.forward_model(), self.state.global_step)
        self._pushed = (interval, self.state.global_step)

    def _sampling(self, step: int) -> Sampling:
        return sampling_of(self.args.rollouts, request_seed(self.args.seed, step, self.accelerator.process_index))

    def _rewards(self, text: Text) -> Text:
        """The text with the task reward of every sequence, and its advantage over the samples of a prompt."""
        if self.reward is None:
            return text
        with self.meters.timed("time/reward"):
            completions = self._completions(text.rollout, text.prompts, skip_special_tokens=True)
            rewards = task_rewards(self.reward, text.prompts, completions)
        if len(rewards) != len(text):
            raise UserError(f"the reward returned {len(rewards)} numbers for {len(text)} completions")
        for prompt, reward in zip(text.prompts, rewards, strict=True):
            if not math.isfinite(reward):
                raise UserError(
                    f"the reward is {reward} on row {prompt.row}; it must be a finite number. Fix: return 0."
                )
        self.meters.add("rollout/reward", sum(rewards), len(rewards))
        group_size = self.args.rollouts.samples_per_prompt
        reads_advantages = any("advantage" in term.reads for term in self.method.terms)
        advantages = group_advantages(rewards, group_size) if reads_advantages else [0.0] * len(rewards)
        return replace(text, rewards=rewards, advantages=advantages)

    def _in_new_contexts(self, text: Text) -> Text:
        """The text with the contexts that are built from what was sampled and how it was rewarded."""
        if not self.context_functions:
            return text
        return build_contexts(
            text, self.context_functions, self.encode, self.args.rollouts.samples_per_prompt, self._completions
        )

    def _completions(self, rollout: Rollout, prompts: Sequence[Prompt], skip_special_tokens: bool = False) -> list[str]:
        """All that was written, also what the loss leaves out."""
        ends = rollout.attention_mask.sum(1).tolist()
        completion_ids = [
            ids[len(p.ids) : end].tolist() for ids, p, end in zip(rollout.input_ids, prompts, ends, strict=True)
        ]
        return self.encode.tokenizer.batch_decode(completion_ids, skip_special_tokens=skip_special_tokens)
