"""DistillationTrainer: the one training loop of a student and its teachers: sequences × evidence × objective.

An optimizer step is one round: its prompts are gathered, the sequences made (sampled from the student, or read from
the dataset), the teacher heard on all of them, and only then are they split into micro-batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from llmdistill.errors import UserError
from llmdistill.models.heads import forward_to_head, head_of
from llmdistill.objectives.metrics import dense_metrics, sampled_metrics, sparse_metrics
from llmdistill.objectives.rows import PairedRows
from llmdistill.objectives.streaming import streamed
from llmdistill.recipe.config import DataConfig, DistillationConfig, RolloutConfig, TeacherConfig
from llmdistill.rollouts.choose import make_rollout_engine
from llmdistill.rollouts.engine import RolloutEngine
from llmdistill.teachers.base import Teacher, bytes_received
from llmdistill.teachers.evidence import Evidence, gather
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Rollout, Sampling, predicting_rows, request_seed
from llmdistill.texts.prompts import PromptEncoder, completed
from llmdistill.tokenization.special import eos_ids, pad_id
from llmdistill.training.consistency import check_parts, check_ready
from llmdistill.training.measure import HeldOut, Measurement
from llmdistill.training.method import ARGUMENTS, MicroBatch, Objective
from llmdistill.training.method_state import MethodState
from llmdistill.training.rewards import Reward, group_advantages
from llmdistill.training.sequences import Drawn, Only, Round, Sequences
from llmdistill.training.student_trainer import StudentTrainer, gathered_count, ready_student, split_evenly
from llmdistill.training.support import likeliest_ids


class DistillationTrainer(StudentTrainer):
    """Trains ``model`` on what ``teacher`` says about its sequences.

    Args:
        model: the student, or a folder or hub name.
        args: a :class:`~llmdistill.recipe.config.DistillationConfig`.
        teacher: a Teacher, a model (scored in this process), or a folder or hub name.
        objective: per-token loss and the evidence it needs.
        train_dataset, eval_dataset: rows with a prompt; with a completion too where the dataset is trained
            on (held-out rows need it only where the teacher does not answer: see ``HeldOut``).
        processing_class: the student's tokenizer; loaded from the model's folder when absent.
        peft_config: trains an adapter instead of the weights.
        sequences: where the text comes from: ``student``, ``dataset``, ``teacher``, or a policy of
            :mod:`llmdistill.training.sequences`.
        reference: another model the objective reads, as ``teacher`` may be given.
        reward, reward_weight: the task reward of a completion, added to the advantage of every token it has.
        rollout_engine: samples from the student; by default transformers' generate.
        data: names of the columns and the limits.
    """

    eval_dataset: list[Prompt] | None
    objective: Objective

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: DistillationConfig,
        teacher: Teacher | PreTrainedModel | str,
        *,
        objective: Objective,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[Any] | None = None,
        peft_config: Any = None,
        sequences: Sequences | str = "student",
        reference: Teacher | PreTrainedModel | str | None = None,
        reward: Reward | None = None,
        reward_weight: float = 0.0,
        rollout_engine: RolloutEngine | None = None,
        data: DataConfig | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        model, tokenizer = ready_student(model, processing_class, args, peft_config)
        self.objective, self.data_config = objective, data or DataConfig()
        self.data_policy = Only(sequences) if isinstance(sequences, str) else sequences
        self.reward, self.reward_weight = reward, reward_weight if reward else 0.0
        self.eos_ids, self.pad_id = eos_ids(model, tokenizer), pad_id(tokenizer)
        encode = PromptEncoder(tokenizer, self.data_config)
        super().__init__(
            model,
            args,
            encode=encode,
            train_dataset=None if train_dataset is None else self._encoded(train_dataset, encode),
            eval_dataset=None if eval_dataset is None else self._encoded(eval_dataset, encode, heldout=True),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.teacher = self._as_teacher(teacher, tokenizer)
        self.reference = None if reference is None else self._as_teacher(reference, tokenizer)
        judges = [t for t in (self.teacher, self.reference) if t is not None]
        self.vocab_size = min(head_of(self.model).vocab_size, *(judge.info().vocab_size for judge in judges))
        self.heldout = HeldOut(self)
        self.rollout_engine = rollout_engine or make_rollout_engine(
            args.rollouts
            if self.on_policy
            else RolloutConfig(),  # the dataset's completions need no engine of their own
            self.model,
            self.accelerator,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            longest=self.data_config.max_prompt_tokens + args.rollouts.max_new_tokens,
            seed=args.seed,
        )
        self._pushed = -1  # the stretch of push_every steps in which weights were last pushed
        self._step_loss = 0.0  # of the micro-batches of this optimizer step, on this rank
        self._step_tokens = 0  # and the tokens they count, of all ranks
        self.add_callback(_Schedule(self))
        self._method_start = copy.deepcopy(self._method_state().values())
        check_parts(self)

    # ---------------------------------------------------------------- sequences and evidence

    @property
    def on_policy(self) -> bool:
        """The student may be sampled."""
        return "student" in self.data_policy.uses

    def draw(self, prompts: Sequence[Prompt]) -> Drawn:
        """The sequences of a round, and the prompt of each."""
        r = self.args.rollouts
        sampling = self._sampling(self.state.global_step)

        def each(rollout: Rollout, of: Sequence[Prompt]) -> Drawn:
            n = len(rollout) // len(of)
            return rollout, [p for p in of for _ in range(n)]

        def others(rollout: Rollout, of: Sequence[Prompt]) -> Drawn:  # what no student wrote is neither stale nor off
            return each(replace(rollout, policy_version=self.state.global_step, behavior_logprobs=None), of)

        round_ = Round(
            prompts,
            self.state.global_step,
            self.state.max_steps,
            self.args.seed,
            self.accelerator.process_index,
            r.samples_per_prompt,
            self.pad_id,
            {
                "student": lambda of: each(self._student_samples(of, sampling), of),
                "dataset": lambda of: others(completed(of, self.pad_id), of),
                "teacher": lambda of: others(self.teacher.generate(of, sampling), of),
            },
        )
        rollout, per_sequence = self.data_policy.draw(round_)
        return self.readable(rollout, prompts), per_sequence

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
        # In stretches and not at the multiples alone: the student need not be the one who writes there.
        stretch = self.state.global_step // self.args.rollouts.push_every
        if self._pushed != stretch:
            self.rollout_engine.sync(self.forward_model(), self.state.global_step)
            self._pushed = stretch
        return self.rollout_engine.generate(prompts, sampling)

    def _rewards(self, rollout: Rollout, prompts: Sequence[Prompt]) -> list[float] | None:
        if self.reward is None:
            return None
        with self.meters.timed("time/reward"):
            rewards = [
                float(r) for r in self.reward(prompts, self._completions(rollout, prompts, skip_special_tokens=True))
            ]
        if len(rewards) != len(rollout):
            raise UserError(f"the reward returned {len(rewards)} numbers for {len(rollout)} completions")
        if bad := [(p.row, r) for p, r in zip(prompts, rewards, strict=True) if not math.isfinite(r)]:
            raise UserError(f"the reward is {bad[0][1]} on row {bad[0][0]}; it must be a finite number. Fix: return 0.")
        self.meters.add("rollout/reward", sum(rewards), len(rewards))
        return rewards

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Prompt]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """One round: all micro-batches of the next optimizer step, and the global number of counted tokens."""
        groups = self._groups(epoch_iterator, num_batches)
        if not groups:
            return [], None
        prompts = [p for group in groups for p in group]
        with self.meters.timed("time/rollout"):
            rollout, per_sequence = self.draw(prompts)
        rewards = self._rewards(rollout, per_sequence)  # of what was written, whatever the loss then leaves out
        if self.args.rollouts.mask_truncated and rollout.finish:
            rollout = rollout.without_truncated()
        # Neighbours in length share a micro-batch: less padding. Ties keep their order, so a round is reproducible.
        lengths = rollout.attention_mask.sum(1).tolist()
        order = sorted(range(len(rollout)), key=lambda i: lengths[i])
        scored = None
        if rewards is not None:
            group = self.args.rollouts.samples_per_prompt
            advantages = group_advantages(rewards, group) if self.reward_weight else [0.0] * len(rewards)
            scored = [(advantages[i], rewards[i]) for i in order]
        rollout, per_sequence = rollout.sequences(order), [per_sequence[i] for i in order]
        with self.meters.timed("time/student", 0):  # a part of it
            chosen = self.chosen_ids(rollout)
        received = bytes_received(self.teacher)
        with self.meters.timed("time/teacher"):
            evidence = self.evidence(rollout, chosen)
        if received is not None:
            self.meters.add("teacher/bytes_per_token", (bytes_received(self.teacher) or 0) - received, rollout.num_rows)
        self._note_round(rollout)
        total = gathered_count(self, rollout.num_rows, device)
        return self._split(rollout, evidence, per_sequence, scored, len(groups)), total

    def evidence(self, rollout: Rollout, chosen: Tensor | None = None, teacher: Teacher | None = None) -> Evidence:
        """What the teacher (or another one, then in the reference's place too) says about ``rollout``."""
        wanted, device = self.objective, self.args.device
        listed = 0 if wanted.support == "student" else wanted.top_k
        said = gather(teacher or self.teacher, rollout, wanted.evidence, listed, device, chosen)
        if not wanted.reference:
            return said
        assert self.reference is not None
        return PairedRows((said, gather(teacher or self.reference, rollout, wanted.evidence, listed, device)))

    def chosen_ids(self, rollout: Rollout) -> Tensor | None:
        """The student's likeliest tokens, where the teacher is asked about those."""
        if self.objective.evidence != "top_k" or self.objective.support == "teacher":
            return None
        size = self.args.per_device_train_batch_size * self.args.rollouts.samples_per_prompt
        with self.accelerator.autocast():
            return likeliest_ids(
                self.forward_model(),
                head_of(self.model),
                rollout,
                self.objective.top_k,
                vocab_size=self.vocab_size,
                chunk_tokens=self.args.chunk_tokens,
                batch_sequences=size,
            )

    def _split(
        self,
        rollout: Rollout,
        evidence: Evidence,
        prompts: list[Prompt],
        scored: list[tuple[float, float]] | None,
        parts: int,
    ) -> list[dict[str, Any]]:
        """Micro-batches of (nearly) equally many sequences, with the rows of evidence that belong to them."""
        rows = [0]
        for count in rollout.row_counts:
            rows.append(rows[-1] + count)
        batches = []
        for a, b in split_evenly(len(rollout), parts):
            part = rollout.sequences(range(a, b)).to(self.args.device)
            micro = MicroBatch(part, evidence[rows[a] : rows[b]], prompts[a:b])
            if scored is not None:
                micro.advantages, micro.rewards = [x for x, _ in scored[a:b]], [r for _, r in scored[a:b]]
            # input_ids beside the micro-batch: transformers counts tokens and FLOPs by that key.
            batches.append({"micro_batch": micro, "input_ids": part.input_ids})
        return batches

    def _sampling(self, step: int) -> Sampling:
        r = self.args.rollouts
        seed = request_seed(self.args.seed, step, self.accelerator.process_index)
        return Sampling(r.max_new_tokens, r.temperature, r.top_p, r.top_k, r.samples_per_prompt, seed)

    # ---------------------------------------------------------------- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the per-token losses over the global count of tokens, times the ranks gradients are averaged over."""
        micro: MicroBatch = inputs["micro_batch"]
        rollout = micro.rollout
        head, logging, watch = head_of(self.model), self._logs_this_step(), self.objective.watch
        objective, rows = micro.rows(self.objective, self.reward_weight)
        per_token: list[Tensor] = []
        watched: set[str] = set()
        found: dict[str, Any] = {}

        def observe(student_nV: Tensor, *evidence: Tensor) -> dict[str, Tensor]:
            values = watch(student_nV, *evidence[: self.objective.arguments]) if watch else {}
            watched.update(values)
            if logging:
                values |= self._metrics(student_nV, *evidence[: ARGUMENTS[self.objective.evidence]])
                per_token.append(values["reverse_kl"].cpu())
            return values

        def at_the_head(hidden_BTH: Tensor) -> Tensor:
            found["loss"], found["sums"] = streamed(
                objective,
                predicting_rows(hidden_BTH, rollout.completion_mask),
                head.linear,
                rows,
                chunk_tokens=self.args.chunk_tokens,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                vocab_size=self.vocab_size,
                metrics=observe if logging or watch else None,
            )
            return found["loss"]

        output = forward_to_head(model, head.linear, rollout, at_the_head)
        total = max(int(num_items_in_batch if num_items_in_batch is not None else rollout.num_rows), 1)
        loss = self._of_global_batch(found["loss"], output, total)
        if not torch.isfinite(loss):
            raise self._not_finite(loss.item(), (p.row for p in micro.prompts))
        if self.objective.schedule is not None and self.model.training:
            sums = [found["loss"].detach(), *(found["sums"][name] for name in watched)]
            self._step_loss += sum(map(float, sums)) / total
            self._step_tokens = total if num_items_in_batch is None else int(num_items_in_batch)
        if logging:
            self.meters.add_all(found["sums"], rollout.num_rows, "distill/")
            self._log_completions(micro, torch.cat(per_token) if per_token else torch.zeros(0))
        return (loss, None) if return_outputs else loss

    def _metrics(self, student_nV: Tensor, *evidence: Tensor) -> dict[str, Tensor]:
        kind = self.objective.evidence
        if kind == "sampled":
            return sampled_metrics(student_nV, *evidence)
        if len(evidence) == 1:
            return dense_metrics(student_nV, *evidence)
        return sparse_metrics(student_nV, *evidence)

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The distillation metrics on held-out prompts: on the student's own samples and on the teacher's text.

        Keys: ``{prefix}_student/reverse_kl`` … and ``{prefix}_teacher/…``, with the bounds of the 95 % interval as
        ``…_low`` and ``…_high``. ``{prefix}_dataset/…`` instead, or nothing, where the teacher is only stored.
        """
        prompts = self.eval_dataset if eval_dataset is None else self._encoded(eval_dataset, self.encode, heldout=True)
        if not prompts:
            raise UserError("evaluate() needs held-out prompts. Fix: --data.heldout FILE, or pass eval_dataset.")
        results: dict[str, float] = {}
        for name, measured in self.measure_heldout(prompts[: self.args.heldout_sequences]).items():
            results.update({f"{metric_key_prefix}_{name}/{k}": v for k, v in measured.flat().items()})
        if results:
            texts = [f"{metric_key_prefix}_{name}/forward_kl" for name in ("dataset", "teacher", "student")]
            loss = next(results[text] for text in texts if text in results)
            results[f"{metric_key_prefix}_loss"] = loss  # metric_for_best_model's default
            if eval_dataset is None and self.is_in_train:  # looking does not move a schedule
                self.data_policy.evaluated(loss)
            self.log(dict(results))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def measure_heldout(self, prompts: Sequence[Prompt]) -> dict[str, Measurement]:
        """See :class:`~llmdistill.training.measure.HeldOut`."""
        return self.heldout.measure(prompts)

    # ---------------------------------------------------------------- small things

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = resume_from_checkpoint
        if checkpoint is True:  # transformers says so where there is none
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
        if checkpoint:
            self._method_state().load(str(checkpoint))
        else:  # again, or after a run that broke off: from where the method starts
            self._method_state().restore(copy.deepcopy(self._method_start))
        check_ready(self)
        self._step_loss, self._step_tokens, self._pushed = 0.0, 0, -1  # nothing of a run that broke off
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def close(self) -> None:
        """Frees what engine, teacher and reference hold. The trainer is not used afterwards."""
        self.rollout_engine.close()
        self.teacher.close()
        if self.reference is not None:
            self.reference.close()

    def _save_rng_state(self, output_dir: str) -> None:
        # Where transformers writes the random states: in every rank, and before trainer_state.json, which says that a
        # checkpoint is complete.
        super()._save_rng_state(output_dir)
        self._method_state().save(output_dir)

    def _method_state(self) -> MethodState:
        return MethodState(self.objective, self.data_policy, self.args.process_index)

    def _note_round(self, rollout: Rollout) -> None:
        tokens = rollout.num_rows
        self.meters.add("rollout/mean_length", tokens, len(rollout))
        if rollout.finish:
            self.meters.add("rollout/truncated_fraction", sum(f == "length" for f in rollout.finish), len(rollout))
        self.meters.add("rollout/staleness", self.state.global_step - rollout.policy_version)
        for rate, clock in (
            ("rollout/tokens_per_second", "time/rollout"),
            ("teacher/positions_per_second", "time/teacher"),
        ):  # of all processes together: flush() adds up tokens and seconds
            sums, processes = self.meters.sums, self.accelerator.num_processes
            sums[rate] = [sums.get(rate, [0.0])[0] + tokens * processes, sums[clock][0]]

    def _log_completions(self, micro: MicroBatch, reverse_kl_N: Tensor) -> None:
        if not self.is_world_process_zero():  # only that one writes; elsewhere they would pile up
            return
        rollout, rows = micro.rollout, reverse_kl_N.split(micro.rollout.row_counts)
        finish = rollout.finish or ("stop",) * len(rollout)
        rewards: Sequence[float | None] = micro.rewards or [None] * len(rollout)
        every = zip(micro.prompts, self._completions(rollout, micro.prompts), finish, rewards, rows, strict=True)
        for prompt, completion, reason, reward, values in every:
            self.run_folder.add_completion(
                step=self.state.global_step + 1,
                prompt=prompt.text,
                completion=completion,
                domain=prompt.domain,
                finish=reason,
                **({} if reward is None else {"reward": reward}),
                reverse_kl=values.tolist(),
            )

    def _completions(self, rollout: Rollout, prompts: Sequence[Prompt], skip_special_tokens: bool = False) -> list[str]:
        """All that was written, also what the loss leaves out."""
        ends = rollout.attention_mask.sum(1).tolist()
        written = [ids[len(p.ids) : end].tolist() for ids, p, end in zip(rollout.input_ids, prompts, ends, strict=True)]
        return self.encode.tokenizer.batch_decode(written, skip_special_tokens=skip_special_tokens)

    def _logs_this_step(self) -> bool:
        step, every = self.state.global_step + 1, max(int(self.state.logging_steps or 0), 1)
        return self.model.training and (step % every == 0 or (step == 1 and self.args.logging_first_step))

    def _encoded(self, rows: Any, encode: PromptEncoder, heldout: bool = False) -> list[Prompt]:
        if isinstance(rows, list) and rows and isinstance(rows[0], Prompt):
            return rows
        optional = heldout and not all(row.get(self.data_config.completion_column) for row in rows)
        return encode.encode_all(rows, completions="dataset" in self.data_policy.uses and not optional)

    def _as_teacher(self, teacher: Any, tokenizer: PreTrainedTokenizerBase) -> Teacher:
        if isinstance(teacher, str):
            return LocalTeacher.load(TeacherConfig(model=teacher), self.args.device)
        if isinstance(teacher, nn.Module):
            return LocalTeacher(teacher.to(self.args.device), tokenizer)  # type: ignore[arg-type]
        return teacher  # type: ignore[no-any-return]


class _Schedule(TrainerCallback):
    """Moves the objective's schedule: once per optimizer step, by the loss of the global batch, alike on every rank."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t, schedule = self.trainer, self.trainer.objective.schedule
        if schedule is None:
            return
        loss = t.accelerator.reduce(torch.tensor(t._step_loss, dtype=torch.float64, device=t.args.device))
        counted, t._step_loss, t._step_tokens = t._step_tokens, 0.0, 0
        if not counted:  # of no rank, for all have the same count: there is no loss to move by
            return
        t.meters.add("distill/schedule", schedule.update(float(loss), state.global_step))
