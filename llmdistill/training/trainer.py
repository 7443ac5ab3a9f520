"""DistillationTrainer: the one training loop, for every method that is a composition of texts, judges and terms.

An optimizer step is one round: its prompts are gathered, the texts made (sampled from the student, or read from the
dataset), the judges asked about all of them, and only then are they split into micro-batches.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from llmdistill.compat import fsdp, trainers
from llmdistill.compat.placing import put_weights
from llmdistill.composition import plan
from llmdistill.composition.batch import (
    MicroBatch,
    TermInputs,
    Text,
    micro_batches,
    row_weights,
    with_evidence,
    with_reads,
)
from llmdistill.composition.classes import in_classes
from llmdistill.composition.judges import RoundEvidence
from llmdistill.composition.loss import Result, loss_on
from llmdistill.composition.method import Method
from llmdistill.composition.mixture import mixed_domains
from llmdistill.errors import UserError
from llmdistill.models import helpers
from llmdistill.models.heads import head_of
from llmdistill.models.helpers import attach
from llmdistill.models.weights import gathered
from llmdistill.preflight import preflight
from llmdistill.recipe.config import DistillationConfig, TeacherConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.rollouts.choose import make_rollout_engine
from llmdistill.rollouts.engine import RolloutEngine
from llmdistill.teachers.base import Teacher, bytes_received
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.student import StudentTeacher
from llmdistill.texts import Prompt, Rollout
from llmdistill.texts.prompts import PromptEncoder
from llmdistill.texts.streams import (
    ExampleStream,
    HeldOutSets,
    are_examples,
    at_hand,
    has_length,
    spans_of,
    to_measure,
)
from llmdistill.tokenization.special import also_end_at, eos_ids, pad_id
from llmdistill.training.ahead import RoundsAhead
from llmdistill.training.consistency import check_heldout, check_hidden, check_parts, check_ready
from llmdistill.training.contexts import load_functions
from llmdistill.training.layout import is_relaid, named_checkpoint
from llmdistill.training.likeliest import likeliest_ids
from llmdistill.training.measure import HeldOut, Measurement
from llmdistill.training.method_state import MethodState
from llmdistill.training.other_tokenizers import bind, check_alignment, note_alignment, tokenizers, widths, with_chunks
from llmdistill.training.parted import ranks_of_a_text, shared
from llmdistill.training.progress import FirstValidation, Progress, ProgressCallback
from llmdistill.training.rewards import Reward
from llmdistill.training.round_log import RoundLog
from llmdistill.training.streamed_rows import checked_rows
from llmdistill.training.student_trainer import gathered_sums, ready_student
from llmdistill.training.surveys import survey

HELPERS_FILE = "helpers.safetensors"  # in a checkpoint
_EXAMINED: set[tuple[str, ...]] = set()  # kinds of runs that the preflight has seen in this process
logger = logging.getLogger(__name__)


class DistillationTrainer(RoundLog):
    """Trains ``model`` with a :class:`~llmdistill.composition.method.Method`.

    Args:
        model: the student, or a folder or hub name.
        args: a :class:`~llmdistill.recipe.config.DistillationConfig`.
        teacher: a Teacher, a model (scored in this process), or a folder or hub name; None where no term asks it.
        method: terms, where their texts come from, schedules.
        train_dataset, eval_dataset: rows with a prompt; with a completion too where the dataset is trained
            on (held-out rows need it only where the teacher does not answer: see ``HeldOut``).
        processing_class: the student's tokenizer; loaded from the model's folder when absent.
        peft_config: trains an adapter instead of the weights.
        judges: other models that terms ask, by name, given as ``teacher`` may be.
        contexts: the context of a row (``data.contexts``) that a judge reads its completions in, by the judge's name.
        reward: the task reward of a completion, for terms that read its advantage.
        rollout_engine: samples from the student; by default what ``args.rollouts`` names.
        data: names of the columns and the limits.
        min_aligned: of judges with another tokenizer: the least share of the bytes that must be in chunks of both.
        view: how the teacher is compared: token by token, or, where it has another tokenizer, in ``classes`` of tokens
            that both can tell (:func:`~llmdistill.composition.classes.in_classes`).
        preflight: whether :meth:`train` begins with the start-up checks; None: once per process and kind of run.
    """

    eval_dataset: Sequence[Any] | None
    # Of what is measured on held-out prompts: the loss is the first that there is.
    heldout_losses: ClassVar = tuple(
        f"{text}/{kl}" for kl in ("forward_kl", "reverse_kl") for text in ("dataset", "teacher", "student")
    )

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: DistillationConfig,
        teacher: Teacher | PreTrainedModel | str | None = None,
        *,
        method: Method,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[Any] | None = None,
        peft_config: Any = None,
        judges: Mapping[str, Teacher | PreTrainedModel | str] | None = None,
        contexts: Mapping[str, str] | None = None,
        reward: Reward | None = None,
        rollout_engine: RolloutEngine | None = None,
        data: DataConfig | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preflight: bool | None = None,
        min_aligned: float = 0.9,
        view: Literal["tokens", "classes"] = "tokens",
    ) -> None:
        self.wants_preflight = preflight
        check_heldout(args, eval_dataset is not None)
        model, tokenizer = ready_student(model, processing_class, args, peft_config)
        method = in_classes(method) if view == "classes" else method
        self.method, self.data_config, self.reward = method.in_contexts(contexts or {}), data or DataConfig(), reward
        self.eos_ids, self.pad_id = eos_ids(model, tokenizer), pad_id(tokenizer)
        named_judges = {**({} if teacher is None else {"teacher": teacher}), **(judges or {})}
        self.judges = {name: self._as_teacher(judge, tokenizer, args.device) for name, judge in named_judges.items()}
        self.helpers = attach(model, method.helpers, check_hidden(self.method, model, self.judges), args.seed)
        self.judges = with_chunks(self.method, self.judges, tokenizer, self.eos_ids, self.data_config, min_aligned)
        encode = PromptEncoder(tokenizer, self.data_config, tokenizers(self.judges))
        train_dataset = checked_rows(train_dataset, args, self.data_config.split)
        train_dataset = None if train_dataset is None else self._encoded(train_dataset, encode)
        self.mixture = None if train_dataset is None else mixed_domains(self.method, train_dataset, args)
        if self.mixture is not None:
            self.method = replace(self.method, schedules={**self.method.schedules, "mixture": self.mixture})
        self.progress = Progress(self.method, self.judges)
        super().__init__(
            model,
            args,
            encode=encode,
            train_dataset=train_dataset,
            eval_dataset=None
            if eval_dataset is None
            else self._encoded_sets(eval_dataset, encode, args.heldout_sequences),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.eos_ids = also_end_at(model, tokenizer, encode.ends)
        for judge in self.judges.values():
            if isinstance(judge, StudentTeacher):
                parts = (self.model, tokenizer, self.forward_model)
                judge.bind(*parts, passes=self.passes, chunk_tokens=args.chunk_tokens)
        bind(self.method, self.judges, self.eos_ids)
        self.vocab_size = min([head_of(self.model).vocab_size, *widths(self.judges)])
        self.heldout = HeldOut(self)
        self.rollout_engine = rollout_engine or make_rollout_engine(
            args.rollouts,
            self.model,
            self.accelerator,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            longest=self.data_config.max_prompt_tokens + args.rollouts.max_new_tokens,
            seed=args.seed,
            lazy=not self.on_policy,
            tokenizer=tokenizer,
        )
        self._pushed: tuple[int, int] = (-1, -1)  # the interval of push_every steps, and the step, last pushed
        self.add_callback(ProgressCallback(self.progress, self.meters, self.accelerator, self.judges))
        self.add_callback(FirstValidation(self))
        self.context_functions = load_functions(encode.built_later)
        self.ahead = RoundsAhead(self) if args.rollouts.staleness or args.num_iterations > 1 else None
        trainers.beside_random_states(self, lambda folder: self.save_rounds(folder))
        trainers.beside_random_states(self, lambda folder: self._method_state().save(folder))
        if len(self.helpers):
            trainers.save_without(self, helpers.own, HELPERS_FILE)
            trainers.after_weights_are_loaded(self, self._load_helpers)
            if self.is_fsdp_enabled:  # which saves no more than the adapter beside them
                trainers.beside_random_states(self, self._save_helpers)
        self.ranks_of_a_text = ranks_of_a_text(self)
        self._method_start = copy.deepcopy(self._method_state().values())
        check_parts(self)

    # ---------------------------------------------------------------- the parts

    # ---------------------------------------------------------------- a round

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """One round: all micro-batches of the next optimizer step, and the global number of counted tokens."""
        made = self.made(epoch_iterator, num_batches)
        if made is None:
            return [], None
        texts, judges = dict(made.texts), made.judges
        name = next(iter(texts))
        if texts[name].rewards is None:  # of what was written, whatever the loss then leaves out
            texts[name] = made.texts[name] = self._rewards(texts[name])
        texts[name] = self._in_new_contexts(texts[name])
        if self.args.rollouts.mask_truncated:
            texts = {n: replace(t, rollout=t.rollout.without_truncated()) for n, t in texts.items()}
        own_texts, together = texts, 1
        if self.ranks_of_a_text is not None:
            texts, together = shared(texts, self.ranks_of_a_text, self.pad_id), self.ranks_of_a_text.size
        texts = plan.in_order(texts, self.method.terms, self.passes.packed)
        received = bytes_received(self.teacher) if self.judges else None
        inputs = made.inputs or made.parts
        batches = self.batches(texts, max(made.parts, inputs) * together, judges)
        if received is not None:
            rows = sum(text.rollout.num_rows for text in texts.values())
            more = (bytes_received(self.teacher) or 0) - received
            self.meters.add("teacher/bytes_per_token", more if made.received is None else made.received, rows)
        self._note_round(own_texts)
        return self.as_inputs(batches, inputs), torch.tensor(batches[0].total, device=device)

    def batches(
        self, texts: Mapping[str, Text], parts: int, judges: Mapping[str, Teacher] | None = None
    ) -> list[MicroBatch]:
        """The texts of a round as micro-batches, with all that their terms read, over the counts of all processes.

        Args:
            parts: how many there are; where ``objective.batch_tokens`` bounds them, at least so many.
        """
        terms = self.method.terms
        bounds = plan.planned(texts, terms, self.passes, parts)  # before teachers are asked: what is too large is cheap
        inputs = self.term_inputs(texts, judges)
        totals = self._totals(inputs, self.args.device)
        return micro_batches(texts, terms, inputs, totals, bounds, self.pad_id, self.passes.packed)

    def term_inputs(
        self, texts: Mapping[str, Text], judges: Mapping[str, Teacher] | None = None
    ) -> dict[str, TermInputs]:
        """What every term reads about the texts: of its judges, of the rows themselves, of its survey."""
        with self.meters.timed("time/teacher"):
            evidence = RoundEvidence(judges or self.judges, self.likeliest, self.args.device, self.pad_id)
            answers = {t.name: [evidence.of(t, n, texts[n]) for n in t.texts] for t in self.method.terms}
        check_alignment(self, judges or self.judges)
        inputs = {}
        for term in self.method.terms:
            term_texts = [texts[name] for name in term.texts]
            term_inputs = row_weights(term, term_texts, self.args.domain_weights, self.pad_id)
            derived: Mapping[str, Tensor] = {}
            if term.survey is not None:
                with self.meters.timed("time/student", 0):  # a part of it
                    derived = survey(self, term, term_texts, answers[term.name])
            if "weight" in derived:
                term_inputs = term_inputs.times(derived["weight"].cpu())
            rows = with_reads(term, term_texts, answers[term.name], derived)
            inputs[term.name] = with_evidence(term, term_inputs, term_texts, rows)
        note_alignment(self.judges, self.meters)
        return inputs

    def likeliest(self, rollout: Rollout, k: int) -> Tensor:
        """The student's likeliest tokens, which a judge is then asked about."""
        # Before train() there is no engine to gather what ZeRO-3 sharded while loading.
        sharded = list(self.model.parameters()) if self.model_wrapped is self.model else []
        with self.meters.timed("time/student", 0), self.accelerator.autocast(), gathered(sharded):
            return likeliest_ids(
                self.forward_model(),
                head_of(self.model),
                rollout,
                k,
                vocab_size=self.vocab_size,
                chunk_tokens=self.args.chunk_tokens,
                passes=self.passes,
            )

    def _totals(self, inputs: Mapping[str, TermInputs], device: torch.device) -> dict[str, float]:
        """The denominator of every term: over all processes, gathered at once."""
        terms, counts = self.method.terms, list[float]()
        for term in terms:
            term_inputs = inputs[term.name]
            counts += [term_inputs.count, *term_inputs.effective, float(term_inputs.weights_N is not None)]
        sums = gathered_sums(self, counts, device)
        for i, term in enumerate(terms):
            weight, squared, weighted = sums[4 * i + 1 : 4 * i + 4]
            if weighted and squared > 0 and term.group is None:  # on any process: those of all count
                self.meters.add(f"{self._prefix(term)}effective_rows", weight * weight / squared)
        return {term.name: sums[4 * i] for i, term in enumerate(terms)}

    # ---------------------------------------------------------------- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the loss of the global batch, times the ranks gradients are averaged over."""
        batch: MicroBatch = inputs["micro_batch"].to(self.args.device)
        logging = self._logs_this_step()
        result = loss_on(
            model,
            batch,
            head=head_of(self.model),
            vocab_size=self.vocab_size,
            chunk_tokens=self.args.chunk_tokens,
            scale=self.accelerator.num_processes,
            metrics=logging,
            norms=self.progress.hears_norms,
            helpers=self.helpers,  # type: ignore[arg-type]
        )
        if not torch.isfinite(result.loss):
            raise self._not_finite(result.loss.item(), self._rows_without_number(batch, result))
        if self.model.training:
            self.progress.note(batch, result)
            self._log_groups(result)
        if logging:
            self._log_terms(batch, result)
        return (result.loss, None) if return_outputs else result.loss

    def _rows_without_number(self, batch: MicroBatch, result: Result) -> list[int]:
        """The dataset rows whose losses are no number; of all of the micro-batch where none of them stands out."""
        all_rows = [p.row for text in batch.texts.values() for p in text.prompts]
        bad_rows = list[int]()
        for s in batch.slices:
            term = result.terms.get(s.term.name)
            prompts = [p for name in s.term.texts if name in batch.texts for p in batch.texts[name].prompts]
            if term is None or s.term.group is None:
                continue
            for prompt, values in zip(prompts, term.row_losses.split(list(s.groups.counts)), strict=True):
                if not bool(values.isfinite().all()):
                    bad_rows.append(prompt.row)
        return bad_rows or all_rows

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The distillation metrics on held-out prompts: on the student's own samples and on the teacher's text.

        Keys: ``{prefix}_student/reverse_kl`` … and ``{prefix}_teacher/…``, with the bounds of the 95 % interval as
        ``…_low`` and ``…_high``. ``{prefix}_dataset/…`` instead, or nothing, where the teacher is only stored.
        """
        self.wait_for_rounds()
        prompts = self._to_evaluate(eval_dataset, "prompts")
        results: dict[str, float] = {}
        for name, found in self.measure_heldout(to_measure(prompts, self.args.heldout_sequences)).items():
            results.update({f"{metric_key_prefix}_{name}/{k}": v for k, v in found.flat().items()})
            for each, span in spans_of(prompts).items():  # beside what all of them come to
                part = found.part(span).flat()
                results.update({f"{metric_key_prefix}_{each}_{name}/{k}": v for k, v in part.items()})
        if results:
            keys = [f"{metric_key_prefix}_{name}" for name in self.heldout_losses]
            loss = next(results[key] for key in keys if key in results)
            results[f"{metric_key_prefix}_loss"] = loss  # metric_for_best_model's default
            if eval_dataset is None and self.is_in_train:  # looking does not move a schedule
                for source in self.method.texts.values():
                    source.evaluated(loss)
            self.log(dict(results))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def measure_heldout(self, prompts: Sequence[Any]) -> dict[str, Measurement]:
        """See :class:`~llmdistill.training.measure.HeldOut`."""
        return self.heldout.measure(prompts)

    # ---------------------------------------------------------------- small things

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        resume_from_checkpoint = checkpoint = named_checkpoint(resume_from_checkpoint, self.args)
        if checkpoint is True:  # transformers says so where there is none
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
        # Again, or after a run that broke off: from where the method starts, which is what the checks look at. An
        # average of the student's, of a checkpoint, is another model than the student that it was not loaded into yet.
        self._method_state().restore(copy.deepcopy(self._method_start))
        check_ready(self)
        self._preflight()
        if checkpoint:
            self._method_state().load(str(checkpoint), relaid=is_relaid(checkpoint, self.args))
        self.restart_rounds(checkpoint)
        self.progress.forget()  # nothing of a run that broke off
        self._pushed = (-1, -1)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self.wait_for_rounds()  # a guard may have stopped it with some under way
            return result
        except BaseException:
            self.abandon_rounds()
            raise
        finally:
            self.encode.warn("the rows trained on")  # of a stream, what was noted since its first rows

    def _preflight(self) -> None:
        """The start-up checks, where they are due: what they find is logged, and a failed one stops the run."""
        prompts = at_hand(self.train_dataset)
        if self.judges and len(prompts) and isinstance(prompts[0], Prompt):
            names = (term.name for term in self.method.terms)
            self._examine_once((type(self.model).__name__, self.teacher.info().name, *names))

    def _examine_once(self, kind: tuple[str, ...]) -> None:
        """``kind`` of run: one that was examined in this process is sound, unless the caller asks for it again."""
        if self.wants_preflight is False or (self.wants_preflight is None and kind in _EXAMINED):
            return
        _EXAMINED.add(kind)
        for finding in preflight(self):
            logger.log(logging.WARNING if finding.level == "notice" else logging.INFO, "preflight: %s", finding)

    def close(self) -> None:
        """Frees what engine and judges hold. The trainer is not used afterwards."""
        self.abandon_rounds()
        self.rollout_engine.close()
        for judge in self.judges.values():
            judge.close()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, with the helpers at their learning rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            helpers.with_learning_rate(optimizer, self.helpers, self.method.helper_learning_rate)
        return optimizer

    def _load_helpers(self, checkpoint: str) -> None:
        file = Path(checkpoint) / HELPERS_FILE
        if file.is_file() and not self.relaid:  # DeepSpeed keeps them in its own files
            put_weights(self.helpers, load_file(file))

    def _save_helpers(self, checkpoint: str) -> None:
        state = {name: fsdp.whole(p).cpu() for name, p in self.helpers.named_parameters()}
        if self.args.should_save:
            save_file(state, Path(checkpoint) / HELPERS_FILE)

    def _method_state(self) -> MethodState:
        return MethodState(self.method, self.judges, self.args.process_index, self.args.world_size)

    def _encoded(self, rows: Any, encode: PromptEncoder, heldout: bool = False) -> Sequence[Any]:
        if are_examples(rows, Prompt):
            return rows  # type: ignore[no-any-return]
        if not has_length(rows) and not heldout:
            return self._streamed(rows, encode)  # type: ignore[return-value]
        needs_completions = "dataset" in self.method.uses
        lacks_completions = heldout and not all(encode.turns.has_answer(row) for row in rows)
        optional = self._optional_completions
        return encode.encode_all(rows, completions=needs_completions and not lacks_completions, optional=optional)

    @property
    def _optional_completions(self) -> bool:
        return all(getattr(s, "optional", False) for s in self.method.texts.values() if "dataset" in s.uses)

    def _streamed(self, rows: Any, encode: PromptEncoder) -> ExampleStream:
        """The examples of rows without a length."""
        asked: dict[str, Any] = {"completions": "dataset" in self.method.uses, "optional": self._optional_completions}
        of_row = encode.document if encode.config.text_column else partial(encode.of_row, **asked)
        where = getattr(rows, "where", None)
        return ExampleStream(rows, lambda row, index: self._sound(encode.kept(row, index, of_row, where)))

    def _sound(self, examples: list[Any]) -> list[Any]:
        """What is streamed, looked at as what is there from the start is."""
        return examples

    def _to_evaluate(self, rows: Any, what: str) -> Sequence[Any]:
        """The held-out examples, or those of the rows that :meth:`evaluate` was given.

        Raises:
            UserError: there are none of ``what``.
        """
        given = rows is not None
        found = self._encoded_sets(rows, self.encode, self.args.heldout_sequences) if given else self.eval_dataset
        if not found:
            raise UserError(f"evaluate() needs held-out {what}. Fix: --data.heldout FILE, or pass eval_dataset.")
        return found

    def _encoded_sets(self, rows: Any, encode: PromptEncoder, most: int) -> Sequence[Any]:
        """Held-out rows, or of several sets the first ``most`` of each."""
        if isinstance(rows, Mapping):
            return HeldOutSets(
                {str(name): self._encoded_sets(each, encode, most)[:most] for name, each in rows.items()}
            )
        return self._encoded(rows if has_length(rows) else list(islice(iter(rows), most)), encode, heldout=True)

    @staticmethod
    def _as_teacher(teacher: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Teacher:
        if isinstance(teacher, StudentTeacher):
            return teacher  # bound when the student is ready
        if isinstance(teacher, str):
            return LocalTeacher.load(TeacherConfig(model=teacher), device)
        if isinstance(teacher, nn.Module):
            return LocalTeacher(teacher.to(device), tokenizer)  # type: ignore[arg-type]
        return teacher  # type: ignore[no-any-return]
