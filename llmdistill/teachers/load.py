"""From the teachers of a recipe to one :class:`~llmdistill.teachers.base.Teacher`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmdistill.errors import UserError
from llmdistill.recipe.config import TeacherConfig, bearer_token
from llmdistill.recipe.groups import in_section, teacher_groups
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mixture import EnsembleTeacher, RoutedTeacher
from llmdistill.teachers.student import StudentTeacher


def load_teachers(
    configs: Sequence[TeacherConfig], device: torch.device | str, longest: int, sections: Sequence[str]
) -> Teacher:
    """One teacher; an ensemble of those that share their domains; a router where domains are told apart.

    Args:
        longest: tokens of the longest sequence, for engines that reserve memory for it.
        sections: how messages name each config: ``teacher``, or ``teachers[i]``.

    Raises:
        UserError: a teacher cannot be had, or they do not fit together. What was opened by then is closed.
    """
    groups = teacher_groups(configs)
    if len(configs) > 1 and (own := next((s for c, s in zip(configs, sections, strict=True) if c.student), "")):
        raise UserError(
            f"{own}.student: the student judges alone, not as one of several teachers. Fix: teacher: {{student: ...}}."
        )
    labels = [config.label for config in configs]
    names = [f"{x} ({s})" if labels.count(x) > 1 else x for x, s in zip(labels, sections, strict=True)]
    loading = _Loading(device, longest)
    try:
        teachers = []
        for config, section in zip(configs, sections, strict=True):
            try:
                teachers.append(loading.teacher(config))
            except UserError as error:
                raise in_section(error, section) from error
        together = [_averaged([(names[i], teachers[i], configs[i].weight) for i in group]) for group in groups]
        domains = [configs[group[0]].domains for group in groups]
        if domains == [[]]:
            return together[0]
        titles = [" + ".join(names[i] for i in group) for group in groups]
        return RoutedTeacher(dict(zip(titles, zip(together, domains, strict=True), strict=True)))
    except BaseException:
        loading.close()
        raise


def _averaged(members: Sequence[tuple[str, Teacher, float]]) -> Teacher:
    if len(members) == 1:
        return members[0][1]
    return EnsembleTeacher([(teacher, weight) for _, teacher, weight in members], [name for name, _, _ in members])


class _Loading:
    """What has been opened so far: a model that several entries name is loaded once."""

    def __init__(self, device: torch.device | str, longest: int) -> None:
        self.device, self.longest = device, longest
        self.models: dict[object, Teacher] = {}
        self.opened: list[Teacher] = []

    def teacher(self, config: TeacherConfig) -> Teacher:
        live = self._live(config)
        if not config.stored:
            assert live is not None
            return live
        from llmdistill.teachers.openai import tokenizer_named
        from llmdistill.teachers.stored import StoredTeacher

        tokenizer = tokenizer_named(config.tokenizer) if config.tokenizer and live is None else None
        if config.hidden:
            from llmdistill.teachers.stored_hidden import HiddenStoredTeacher

            kept = HiddenStoredTeacher(config.stored, live, form=config.hidden, device=self.device, tokenizer=tokenizer)
            self.opened.append(kept)
            return kept
        dtype = "float32" if config.lossless else "float16"
        self.opened.append(StoredTeacher(config.stored, live, dtype, tokenizer))
        return self.opened[-1]

    def close(self) -> None:
        for teacher in reversed(self.opened):
            teacher.close()

    def _live(self, config: TeacherConfig) -> Teacher | None:
        if config.student:
            return StudentTeacher(config.student, config.ema_decay)
        if config.url:
            from llmdistill.teachers.connecting import connect

            self.opened.append(
                connect(
                    config.url,
                    token=bearer_token(config.token_env, "teacher.token_env"),
                    timeout_s=config.timeout_s,
                    max_outage_s=config.max_outage_s,
                    in_flight=config.in_flight,
                    lossless=config.lossless,
                    tokenizer=config.tokenizer or None,
                    hidden=config.hidden,
                    device=self.device,
                )
            )
            return self.opened[-1]
        if config.stored and not config.model:
            return None
        key = (
            *(config.model, config.engine, config.dtype, config.batch_tokens),
            *(config.attn_implementation, config.trust_remote_code, config.revision, config.tokenizer),
            config.placement,
        )
        if key not in self.models:
            self.models[key] = self._load(config)
            self.opened.append(self.models[key])
        return self.models[key]

    def _load(self, config: TeacherConfig) -> Teacher:
        if config.engine == "hf":
            return LocalTeacher.load(config, self.device)
        from llmdistill.teachers.vllm import VLLMTeacher

        # The full estimator and the self-check list every token; vLLM has to be told at loading.
        return VLLMTeacher.load(config, max_model_len=self.longest, max_top_k=1 << 30)
