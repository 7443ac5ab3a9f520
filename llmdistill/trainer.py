"""DistillationTrainer: the one training loop. transformers.Trainer underneath, sequences × evidence × objective on top.

An optimizer step is one round: its prompts are gathered, the sequences made (sampled from the student, or read from
the dataset), the teacher heard on all of them, and only then are they split into micro-batches. So the number of
counted tokens of the *global* batch is known before the first backward pass, and the loss does not depend on how the
batch was split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, set_seed

from llmdistill.config import DataConfig, DistillationConfig, RolloutConfig, TeacherConfig
from llmdistill.errors import UserError
from llmdistill.heads import forward_to_head, head_of
from llmdistill.measure import HeldOut, Measurement
from llmdistill.meters import Meters, peak_memory_gib
from llmdistill.objectives.metrics import dense_metrics, sampled_metrics, sparse_metrics
from llmdistill.objectives.streaming import streamed
from llmdistill.prompts import PromptEncoder, completed
from llmdistill.rollouts import (
    Prompt,
    Rollout,
    RolloutEngine,
    Sampling,
    predicting_rows,
    request_seed,
)
from llmdistill.rollouts.choose import make_rollout_engine
from llmdistill.run_folder import RunFolder, RunFolderCallback
from llmdistill.support import Support, likeliest_ids
from llmdistill.teachers.base import Teacher, bytes_received
from llmdistill.teachers.evidence import Evidence, Kind, gather
from llmdistill.teachers.local import LocalTeacher, load_model
from llmdistill.tokenization.special import eos_ids, pad_id


@dataclass(frozen=True)
class Objective:
    """A per-token loss and the evidence it reads.

    ``loss(student_logits [n, V], *evidence) -> [n]``; what follows the student's logits depends on ``evidence``:
    ``full``: teacher logits [n, V]; ``top_k``: ids and log-probs [n, K]; ``sampled``: token ids, their log-probs [n].
    """

    loss: Callable[..., Tensor]
    evidence: Kind = "full"
    top_k: int = 0
    support: Support = "teacher"  # whose likeliest tokens ``top_k`` lists


@dataclass
class MicroBatch:
    """What one backward pass needs."""

    rollout: Rollout
    evidence: Evidence
    prompts: list[Prompt] = field(default_factory=list)  # one per sequence


class DistillationTrainer(Trainer):
    """Trains ``model`` on what ``teacher`` says about its sequences.

    Args:
        model: the student, or a folder or hub name.
        args: a :class:`~llmdistill.config.DistillationConfig`.
        teacher: a Teacher, a model (scored in this process), or a folder or hub name.
        objective: per-token loss and the evidence it needs.
        train_dataset, eval_dataset: rows with a prompt; with a completion too when ``on_policy`` is false (held-out
            rows need it only where the teacher does not answer: see :class:`~llmdistill.measure.HeldOut`).
        processing_class: the student's tokenizer; loaded from the model's folder when absent.
        peft_config: trains an adapter instead of the weights.
        on_policy: sample the sequences from the student; else take the dataset's completions.
        rollout_engine: samples from the student; by default transformers' generate.
        data: names of the columns and the limits.
    """

    # What compute_loss returns is already divided by the global count.
    loss_is_scaled_for_ga = True
    # Narrower than transformers declares them.
    args: DistillationConfig
    model: PreTrainedModel
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
        on_policy: bool = True,
        rollout_engine: RolloutEngine | None = None,
        data: DataConfig | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if isinstance(model, str):
            model, tokenizer = load_model(model, "float32", "student")
            processing_class = processing_class or tokenizer
        if processing_class is None:
            raise UserError("processing_class is None; with a model object give its tokenizer too")
        self.objective, self.on_policy, self.data_config = objective, on_policy, data or DataConfig()
        self.encode = PromptEncoder(processing_class, self.data_config)
        if args.freeze_embeddings:
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.requires_grad_(False)  # type: ignore[union-attr]
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)  # the adapter's start is random
            model = get_peft_model(model, peft_config)  # type: ignore[assignment]
        if args.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        self.eos_ids, self.pad_id = eos_ids(model, processing_class), pad_id(processing_class)
        self.run_folder = RunFolder(args.output_dir or "runs/default")
        self.meters = Meters()
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # rows stay rows until a whole round of them is there
            train_dataset=None if train_dataset is None else self._encoded(train_dataset),
            eval_dataset=None if eval_dataset is None else self._encoded(eval_dataset, heldout=True),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.teacher = self._as_teacher(teacher, processing_class)
        self.vocab_size = min(head_of(self.model).vocab_size, self.teacher.info().vocab_size)
        self.heldout = HeldOut(self)
        self.rollout_engine = rollout_engine or make_rollout_engine(
            args.rollouts if on_policy else RolloutConfig(),  # the dataset's completions need no engine of their own
            self.model,
            self.accelerator,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            longest=self.data_config.max_prompt_tokens + args.rollouts.max_new_tokens,
            seed=args.seed,
        )
        self._pushed = False
        self.remove_callback(PrinterCallback)  # RunFolderCallback shows the same, readably
        self._run_folder_callback = RunFolderCallback(self.run_folder, self.meters)
        self.add_callback(self._run_folder_callback)

    # ---------------------------------------------------------------- sequences and evidence

    def sequences(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """Where the sequences of a round come from."""
        if not self.on_policy:
            return completed(prompts, self.pad_id)
        # Counted from step 0 and not from the last push: a run resumed at a multiple pushes as the undisturbed one.
        if not self._pushed or self.state.global_step % self.args.rollouts.push_every == 0:
            self.rollout_engine.sync(self.forward_model(), self.state.global_step)
            self._pushed = True
        rollout = self.rollout_engine.generate(prompts, sampling)
        return rollout.without_truncated() if self.args.rollouts.mask_truncated else rollout

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Prompt]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """One round: all micro-batches of the next optimizer step, and the global number of counted tokens."""
        groups = list(islice(epoch_iterator, num_batches))
        if not groups:
            return [], None
        prompts = [p for group in groups for p in group]
        with self.meters.timed("time/rollout"):
            rollout = self.sequences(prompts, self._sampling(self.state.global_step))
        n = len(rollout) // len(prompts)
        per_sequence = [p for p in prompts for _ in range(n)]
        # Neighbours in length share a micro-batch: less padding. Ties keep their order, so a round is reproducible.
        lengths = rollout.attention_mask.sum(1).tolist()
        order = sorted(range(len(rollout)), key=lambda i: lengths[i])
        rollout, per_sequence = rollout.sequences(order), [per_sequence[i] for i in order]
        with self.meters.timed("time/student", 0):  # a part of it
            chosen = self.chosen_ids(rollout)
        received = bytes_received(self.teacher)
        with self.meters.timed("time/teacher"):
            evidence = self.evidence(rollout, chosen)
        if received is not None:
            self.meters.add("teacher/bytes_per_token", (bytes_received(self.teacher) or 0) - received, rollout.num_rows)
        self._note_round(rollout)
        count = torch.tensor(rollout.num_rows, device=device)
        total = self.accelerator.gather(count).sum()
        return self._split(rollout, evidence, per_sequence, len(groups)), total

    def evidence(self, rollout: Rollout, chosen: Tensor | None = None, teacher: Teacher | None = None) -> Evidence:
        """What the teacher (or another one) says about ``rollout``, as the objective reads it."""
        wanted = self.objective
        listed = 0 if wanted.support == "student" else wanted.top_k
        return gather(teacher or self.teacher, rollout, wanted.evidence, listed, self.args.device, chosen)

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

    def _split(self, rollout: Rollout, evidence: Evidence, prompts: list[Prompt], parts: int) -> list[dict[str, Any]]:
        """Micro-batches of (nearly) equally many sequences, with the rows of evidence that belong to them."""
        edges = [len(rollout) * k // parts for k in range(parts + 1)]
        rows = [0]
        for count in rollout.row_counts:
            rows.append(rows[-1] + count)
        batches = []
        for a, b in zip(edges, edges[1:], strict=False):
            part = rollout.sequences(range(a, b)).to(self.args.device)
            micro = MicroBatch(part, evidence[rows[a] : rows[b]], prompts[a:b])
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
        head, logging = head_of(self.model), self._logs_this_step()
        per_token: list[Tensor] = []
        found: dict[str, Any] = {}

        def observe(student_nV: Tensor, *evidence: Tensor) -> dict[str, Tensor]:
            values = self._metrics(student_nV, *evidence)
            per_token.append(values["reverse_kl"].cpu())
            return values

        def at_the_head(hidden_BTH: Tensor) -> Tensor:
            found["loss"], found["sums"] = streamed(
                self.objective.loss,
                predicting_rows(hidden_BTH, rollout.completion_mask),
                head.linear,
                micro.evidence,
                chunk_tokens=self.args.chunk_tokens,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                vocab_size=self.vocab_size,
                metrics=observe if logging else None,
            )
            return found["loss"]

        output = forward_to_head(model, head.linear, rollout, at_the_head)
        total = max(int(num_items_in_batch if num_items_in_batch is not None else rollout.num_rows), 1)
        # By way of the model's output too (see in_place_of): ZeRO-3 and DDP hang their backward hooks on that.
        loss = (found["loss"] + 0 * output.logits.sum()) * (self.accelerator.num_processes / total)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; training cannot go on from it. Fix: "
                "lower train.learning_rate or use train.bf16 instead of fp16, then --resume from the last checkpoint."
            )
        if logging:
            self.meters.add_all(found["sums"], rollout.num_rows, "distill/")
            self._log_completions(micro, torch.cat(per_token) if per_token else torch.zeros(0))
        return (loss, None) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.meters.timed("time/student", 1 / self.current_gradient_accumulation_steps):
            return super().training_step(*args, **kwargs)

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
        prompts = self.eval_dataset if eval_dataset is None else self._encoded(eval_dataset, heldout=True)
        if not prompts:
            raise UserError("evaluate() needs held-out prompts. Fix: --data.heldout FILE, or pass eval_dataset.")
        results: dict[str, float] = {}
        for name, measured in self.measure_heldout(prompts[: self.args.heldout_sequences]).items():
            results.update({f"{metric_key_prefix}_{name}/{k}": v for k, v in measured.flat().items()})
        if results:
            self.log(dict(results))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def measure_heldout(self, prompts: Sequence[Prompt]) -> dict[str, Measurement]:
        """See :class:`~llmdistill.measure.HeldOut`."""
        return self.heldout.measure(prompts)

    # ---------------------------------------------------------------- small things

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._run_folder_callback.stop()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was measured since the last line."""
        if "loss" in logs:
            logs.update(self.meters.flush(self.accelerator))
            logs["memory/peak_gib"] = peak_memory_gib()
        super().log(logs, start_time)

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
        decoded = self.processing_class.batch_decode(  # type: ignore[union-attr]
            [ids[mask].tolist() for ids, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)]
        )
        finish = rollout.finish or ("stop",) * len(rollout)
        for prompt, completion, reason, values in zip(micro.prompts, decoded, finish, rows, strict=True):
            self.run_folder.add_completion(
                step=self.state.global_step + 1,
                prompt=prompt.text,
                completion=completion,
                domain=prompt.domain,
                finish=reason,
                reverse_kl=values.tolist(),
            )

    def _logs_this_step(self) -> bool:
        step, every = self.state.global_step + 1, max(int(self.state.logging_steps or 0), 1)
        return self.model.training and (step % every == 0 or (step == 1 and self.args.logging_first_step))

    def _encoded(self, rows: Any, heldout: bool = False) -> list[Prompt]:
        if isinstance(rows, list) and rows and isinstance(rows[0], Prompt):
            return rows
        optional = heldout and not all(row.get(self.data_config.completion_column) for row in rows)
        return self.encode.encode_all(rows, completions=not (self.on_policy or optional))

    def _as_teacher(self, teacher: Any, tokenizer: PreTrainedTokenizerBase) -> Teacher:
        if isinstance(teacher, str):
            return LocalTeacher.load(TeacherConfig(model=teacher), self.args.device)
        if isinstance(teacher, nn.Module):
            return LocalTeacher(teacher.to(self.args.device), tokenizer)  # type: ignore[arg-type]
        return teacher  # type: ignore[no-any-return]

    def forward_model(self) -> nn.Module:
        """The student to run: DeepSpeed's engine puts sharded parameters together, everything else is the model."""
        return self.model_wrapped if self.is_deepspeed_enabled else self.model
