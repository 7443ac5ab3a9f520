"""DiffusionRLTrainer: reinforcement of a masked diffusion student, over the one loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmdistill.composition.batch import Text
from llmdistill.diffusion.losses import token_ce, without_mask_token
from llmdistill.diffusion.reinforced import Reinforced
from llmdistill.diffusion.repeated import Repeated
from llmdistill.diffusion.rl_stage import LAST, DiffusionRLConfig
from llmdistill.diffusion.trainers import MaskedDiffusionTrainer
from llmdistill.errors import UserError
from llmdistill.models.heads import head_of
from llmdistill.models.layers import captured
from llmdistill.models.passes import at_head, metrics_at_head
from llmdistill.objectives.rows import TokenRows
from llmdistill.teachers.student import StudentTeacher
from llmdistill.texts import Prompt, Rollout
from llmdistill.texts.batches import Passes
from llmdistill.texts.views import View
from llmdistill.training.rewards import Reward, load_reward, task_rewards


class DiffusionRLTrainer(MaskedDiffusionTrainer):
    """Trains ``model`` on what its own completions are worth.

    Args:
        args: a :class:`~llmdistill.diffusion.rl_stage.DiffusionRLConfig`.
        reward: a function with TRL's signature, which goes before ``args.reward``.
        process_reward: likewise, that returns a number for each token of every completion.

    Example::

        args = DiffusionRLConfig(output_dir="run", rollouts=RolloutConfig(samples_per_prompt=8, max_new_tokens=64))
        DiffusionRLTrainer("student", args, reward=math_reward, train_dataset=rows_with_answers).train()

    Raises:
        UserError: no reward, and what :class:`~llmdistill.diffusion.trainers.MaskedDiffusionTrainer` raises.
    """

    args: DiffusionRLConfig  # type: ignore[assignment]

    def __init__(
        self,
        model: Any,
        args: DiffusionRLConfig,
        teacher: Any = None,
        *,
        reward: Reward | None = None,
        process_reward: Callable[..., Sequence[Sequence[float]]] | None = None,
        **kwargs: Any,
    ) -> None:
        if reward is None and not args.reward:
            raise UserError("objective.reward is empty, and nothing else says what a completion is worth. Fix: math.")
        reward = reward or load_reward(args.reward)
        if args.reference_beta:  # it reads slices as the student does, so it is the student's own start
            kwargs["judges"] = {"reference": _Start(self._parts)}
        super().__init__(model, args, teacher, reward=reward, **kwargs)
        if process_reward is None and args.process_reward:
            process_reward = load_reward(args.process_reward)  # type: ignore[assignment]
        self.process_reward = process_reward
        source = self.method.texts["main"]
        if isinstance(source, Repeated):
            source.scored, source = self._logps, source.source
        assert isinstance(source, Reinforced)
        source.rewarded = self._worth
        source.stepwise = self._worth_of_tokens if process_reward is not None else None
        source.valued = self._values if args.value else None

    def _rewards(self, text: Text) -> Text:
        return text  # its slices have their advantages already

    def _worth(self, rollout: Rollout, prompts: Sequence[Prompt]) -> list[float]:
        """The reward of every completion, up to its end; what was written is logged with it."""
        assert self.reward is not None
        completions = self._written(rollout)
        with self.meters.timed("time/reward"):
            rewards = task_rewards(self.reward, prompts, completions)
        if len(rewards) != len(rollout):
            raise UserError(f"the reward returned {len(rewards)} numbers for {len(rollout)} completions")
        for prompt, reward in zip(prompts, rewards, strict=True):
            if not math.isfinite(reward):
                raise UserError(
                    f"the reward is {reward} on row {prompt.row}; it must be a finite number. Fix: return 0."
                )
        if self.is_world_process_zero() and self._logs_this_step():
            for prompt, text, reason, reward in zip(prompts, completions, rollout.finish, rewards, strict=True):
                self.run_folder.add_completion(
                    step=self.state.global_step + 1,
                    prompt=prompt.text,
                    completion=text,
                    domain=prompt.domain,
                    finish=reason,
                    reward=reward,
                    reverse_kl=[],
                )
        return rewards

    def _worth_of_tokens(self, rollout: Rollout, prompts: Sequence[Prompt]) -> list[list[float]]:
        """What the process reward says, one number for each counted token."""
        assert self.process_reward is not None
        counts = rollout.completion_mask.sum(-1).tolist()
        answers = [p.answer for p in prompts]
        found = self.process_reward([p.text for p in prompts], self._written(rollout), answer=answers, tokens=counts)
        rows = [[float(x) for x in row] for row in found]
        if [len(row) for row in rows] != counts:
            raise UserError(
                f"the process reward returned {[len(row) for row in rows][:4]}… numbers for completions of "
                f"{counts[:4]}… tokens. Fix: one number for each token."
            )
        return rows

    @torch.no_grad()
    def _values(self, noised: Rollout) -> Tensor:
        """V of every row, [N], by the value head on the student of now."""
        head = head_of(self.model)
        with self.accelerator.autocast(), captured(self.model, (LAST,)) as states:

            def read(rows_NH: Tensor, view: View, _: Any) -> Tensor:
                return self.helpers["value"](view.rows(states[LAST]))  # type: ignore[no-any-return]

            return torch.cat(at_head(self.forward_model(), head, self._parts(noised), read))[: noised.num_rows]

    @torch.no_grad()
    def _logps(self, noised: Rollout) -> Tensor:
        """Log-probs of the rows under the student of now, [N]."""

        def of_rows(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
            return {"logp": -token_ce(without_mask_token(logits, self.denoiser.mask_token_id), tokens)}

        with self.accelerator.autocast():
            found = metrics_at_head(
                self.forward_model(),
                head_of(self.model),
                self._parts(noised),
                of_rows,
                chunk_tokens=self.args.chunk_tokens,
                vocab_size=self.vocab_size,
            )
        return found["logp"][: noised.num_rows]

    def _parts(self, noised: Rollout) -> Iterator[tuple[Rollout, TokenRows]]:
        """The text in batches, equally many on every rank, for ZeRO-3 gathers parameters in each pass: the first comes
        again, behind all others."""
        parts = list(Passes(self.args.per_device_eval_batch_size).of(noised, self.args.device))
        counts = self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device))
        for part in [*parts, *[parts[0]] * (int(counts.max()) - len(parts))]:  # type: ignore[union-attr]
            yield part, TokenRows(part.token_rows())

    def _written(self, rollout: Rollout) -> list[str]:
        counted = [ids[mask].tolist() for ids, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)]
        return self.encode.tokenizer.batch_decode(counted, skip_special_tokens=True)

    def _log_completions(self, text: Text, reverse_kl_N: Tensor | None) -> None:
        """They were, when they were rewarded: here each would come once for every slice."""


class _Start(StudentTeacher):
    """The student as training began, asked about slices, of which ranks have different numbers."""

    def __init__(self, parts: Callable[[Rollout], Iterator[tuple[Rollout, TokenRows]]]) -> None:
        super().__init__("initial")
        self.parts = parts

    def _batches(self, rollout: Rollout) -> Iterator[tuple[Rollout, None]]:
        return ((part, None) for part, _ in self.parts(rollout))
