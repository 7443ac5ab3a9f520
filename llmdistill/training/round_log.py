"""What of a round is logged: rates, each term's metrics, losses and gradient norms, and the completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmdistill.composition.batch import MicroBatch, Text
from llmdistill.composition.loss import Result
from llmdistill.composition.term import Term
from llmdistill.training.making import MadeRounds


class RoundLog(MadeRounds):
    """The part of a trainer that says what a round came to."""

    def _prefix(self, term: Term) -> str:
        return "distill/" if len(self.method.terms) == 1 else f"distill/{term.name}/"

    def _log_groups(self, result: Result) -> None:
        for term in result.terms.values():
            for name, (total, count) in term.group_sums.items():
                self.meters.add(name, total, count)

    def _log_terms(self, batch: MicroBatch, result: Result) -> None:
        has_several_terms = len(self.method.terms) > 1
        for s in batch.slices:
            if (term_result := result.terms.get(s.term.name)) is None:
                continue
            prefix, rows = self._prefix(s.term), s.rows.stop - s.rows.start
            count = s.term.group.count(s.groups) if s.term.group else rows
            weight, watched = count, count
            if s.term.group is not None:  # of whose rows metrics are plain sums
                watched = s.term.group.count(replace(s.groups, weights_N=None))
            elif s.weights_N is not None:
                weight = watched = float(s.weights_N.sum())
            self.meters.add_all(term_result.metric_sums, watched, prefix)
            if has_several_terms:
                self.meters.add(f"{prefix}loss", term_result.loss_sum, weight)
                self.meters.add_root(f"{prefix}grad_norm", term_result.squared_norm)
        if result.router_balance is not None:
            self.meters.add("distill/router_balance", result.router_balance)
        logged_slice = next(
            (s for s in batch.slices if s.term.name in result.per_token and len(s.term.texts) == 1), None
        )
        if logged_slice is not None:
            self._log_completions(
                batch.texts[logged_slice.term.texts[0]], torch.cat(result.per_token[logged_slice.term.name])
            )
        elif batch.slices and len(self.method.terms[0].texts) == 1:
            self._log_completions(next(iter(batch.texts.values())), None)

    def _note_round(self, texts: Mapping[str, Text]) -> None:
        rollouts = [text.rollout for text in texts.values()]
        tokens = sum(r.num_countable for r in rollouts)
        self.meters.add("rollout/mean_length", tokens, sum(map(len, rollouts)))
        for r in rollouts:
            if r.finish:
                self.meters.add("rollout/truncated_fraction", sum(f == "length" for f in r.finish), len(r))
            self.meters.add("rollout/staleness", self.state.global_step - r.policy_version)
        for source in self.method.texts.values():
            for name, value in source.numbers().items():
                self.meters.add(f"rollout/{name}", value)
        for rate, timer in (
            ("rollout/tokens_per_second", "time/rollout"),
            ("teacher/positions_per_second", "time/teacher"),
        ):  # of all processes together: flush() adds up tokens and seconds
            sums, processes = self.meters.sums, self.accelerator.num_processes
            sums[rate] = [sums.get(rate, [0.0])[0] + tokens * processes, sums.get(timer, [0.0])[0]]

    def _log_completions(self, text: Text, reverse_kl_N: Tensor | None) -> None:
        if not self.is_world_process_zero():  # only that one writes; elsewhere they would pile up
            return
        rollout = text.rollout
        rows = [None] * len(text) if reverse_kl_N is None else reverse_kl_N.split(rollout.row_counts)
        finish = rollout.finish or ("stop",) * len(rollout)
        rewards: Sequence[float | None] = text.rewards or [None] * len(rollout)
        samples = zip(text.prompts, self._completions(rollout, text.prompts), finish, rewards, rows, strict=True)
        for prompt, completion, reason, reward, values in samples:
            self.run_folder.add_completion(
                step=self.state.global_step + 1,
                prompt=prompt.text,
                completion=completion,
                domain=prompt.domain,
                finish=reason,
                **({} if reward is None else {"reward": reward}),
                reverse_kl=[] if values is None else values.tolist(),
            )

    def _logs_this_step(self) -> bool:
        step, every = self.state.global_step + 1, max(int(self.state.logging_steps or 0), 1)
        return self.model.training and (step % every == 0 or (step == 1 and self.args.logging_first_step))
