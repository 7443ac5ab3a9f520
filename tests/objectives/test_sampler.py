"""Tokens drawn with a temperature, top_k or top_p: the sampler's distribution, and estimators made for it."""

import math
from functools import partial

import pytest
import torch
from objective_cases import INF, logits, value_and_grad
from torch import Tensor

from llmdistill.objectives import divergences, policy
from llmdistill.objectives import sampler as sampler_module
from llmdistill.objectives.composed import extrapolated_sampled, on_samples
from llmdistill.objectives.sampler import nucleus, sampler_logprobs, token_logprobs

V = 7
# (temperature, top_k, top_p, min_p)
SETTINGS = [
    *((1.0, 0, 1.0, 0.0), (1.0, 3, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (0.6, 0, 1.0, 0.0), (0.6, 3, 0.9, 0.0)),
    *((1.5, 0, 1.0, 0.0), (1.5, 5, 0.7, 0.0), (1.0, 0, 1.0, 0.2), (1.5, 5, 0.8, 0.1)),
]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def models(n: int = 4) -> tuple[Tensor, ...]:
    return tuple(logits(seed, n, V, scale=1.5, dtype=torch.float64) for seed in (0, 1, 2))


def drawable(z: list[float], temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> list[bool]:
    """K of one row by a loop over its tokens, likeliest first."""
    weight = [math.exp(x / temperature) for x in z]
    order = sorted(range(len(z)), key=lambda v: -weight[v])
    order = [v for v in order if weight[v] >= min_p * weight[order[0]]][: top_k or len(z)]
    total, mass, kept = sum(weight[v] for v in order), 0.0, [False] * len(z)
    for v in order:
        if mass < top_p * (1 - 1e-12):
            kept[v] = True
        mass += weight[v] / total
    return kept


def kept_tokens(student: Tensor, setting: tuple) -> Tensor:
    return torch.tensor([drawable(row.tolist(), *setting) for row in student])


def sampler(student: Tensor, setting: tuple) -> Tensor:
    """S_{tau,K} [n, V], differentiable on a fixed K."""
    return (student / setting[0]).masked_fill(~kept_tokens(student.detach(), setting), -INF).softmax(-1)


def sampler_kl(student: Tensor, target: Tensor, setting: tuple) -> Tensor:
    """KL(S_{tau,K} || softmax(target / tau)) [n] with its autograd gradient; target [n, V] are log-probs."""
    s = sampler(student, setting)
    gap = s.masked_fill(s == 0, 1.0).log() - (target / setting[0]).log_softmax(-1)
    return (s * gap).sum(-1)


def expected_gradient(student: Tensor, setting: tuple, gradient_of) -> Tensor:
    """sum_y S_{tau,K}(y) gradient_of(y), every token enumerated."""
    drawn, total = sampler(student, setting), torch.zeros_like(student)
    for y in range(V):
        total += drawn[:, y, None] * gradient_of(torch.full((len(student),), y))
    return total


def named(setting: tuple) -> dict:
    return dict(zip(("temperature", "top_k", "top_p", "min_p"), setting, strict=True))


class TestLogprobs:
    @every_setting
    def test_they_are_those_of_the_truncated_softmax(self, setting):
        student, *_ = models(50)
        expected = sampler(student, setting)
        kept = kept_tokens(student, setting)
        assert torch.equal(nucleus(student / setting[0], top_k=setting[1], top_p=setting[2], min_p=setting[3]), kept)
        for y in range(V):
            found = sampler_logprobs(student, torch.full((50,), y), **named(setting))
            torch.testing.assert_close(found[kept[:, y]], expected[kept[:, y], y].log())

    def test_without_truncation_they_are_bitwise_those_of_the_softmax(self):
        z, ids = logits(0, 9, 31), torch.randint(31, (9,), generator=torch.Generator().manual_seed(0))
        for temperature in (1.0, 0.6):
            one = value_and_grad(partial(sampler_logprobs, token_ids=ids, temperature=temperature), z)
            other = value_and_grad(partial(token_logprobs, token_ids=ids, temperature=temperature), z)
            assert all(map(torch.equal, one, other))
        assert sampler_logprobs(z.bfloat16(), ids, top_p=0.9).dtype == torch.float32

    def test_the_realised_token_belongs_to_the_nucleus(self):
        """An engine in another precision drew a token just outside: it is one more choice."""
        z = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
        found, grad = value_and_grad(lambda z: sampler_logprobs(z, torch.tensor([2]), top_k=2), z)
        torch.testing.assert_close(found, z[:, [0, 1, 2]].log_softmax(-1)[:, 2])
        assert grad[0, 3] == 0 and grad[0, :3].all()

    def test_ties_are_kept_together(self):
        z = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
        assert nucleus(z, top_k=2).tolist() == [[True, True, True, False]]
        assert nucleus(z, top_p=0.6).tolist() == [[True, True, True, False]]  # e^2 / sum = .53
        assert nucleus(z, top_p=0.5).tolist() == [[True, False, False, False]]

    @pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
    @pytest.mark.parametrize("top_k", [0, 300])
    def test_few_candidates_find_what_a_sort_finds(self, monkeypatch, top_p, top_k):
        z = logits(0, 6, 700, scale=2.0, dtype=torch.float64)
        z[0] *= 10
        whole = nucleus(z, top_k=top_k, top_p=top_p)  # 700 tokens are sorted at once
        monkeypatch.setattr(sampler_module, "_FIRST_CANDIDATES", 4)
        assert torch.equal(nucleus(z, top_k=top_k, top_p=top_p), whole)
        by_hand = torch.tensor([drawable(row.tolist(), 1.0, top_k, top_p) for row in z])
        assert torch.equal(whole, by_hand)

    def test_excluded_tokens_huge_logits_and_more_tokens_than_there_are(self):
        z = torch.tensor([[1e4, -1e4, -INF, 0.0]])
        for setting in ({"top_k": 50}, {"top_k": 2, "top_p": 0.5}, {"top_p": 0.999}):
            for y in range(2):
                value, grad = value_and_grad(lambda z, y=y, s=setting: sampler_logprobs(z, torch.tensor([y]), **s), z)
                assert value.isfinite().all() and grad.isfinite().all()

    @pytest.mark.parametrize("setting", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.5}])
    def test_a_diverged_model_shows(self, setting):
        z = torch.tensor([[1.0, torch.nan, 2.0]])
        assert sampler_logprobs(z, torch.tensor([0]), **setting).isnan().all()

    def test_errors(self):
        z, y = logits(0, 1, 5), torch.tensor([1])
        with pytest.raises(ValueError, match="top_k is -1"):
            sampler_logprobs(z, y, top_k=-1)
        for top_p in (0.0, 1.5, math.nan):
            with pytest.raises(ValueError, match="top_p is"):
                sampler_logprobs(z, y, top_p=top_p)
        with pytest.raises(ValueError, match="temperature is 0.0"):
            sampler_logprobs(z, y, temperature=0.0, top_k=2)


class TestEstimators:
    @every_setting
    @pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.25])
    def test_unbiased_for_the_kl_to_the_tempered_target(self, setting, scale):
        """E over y ~ S_{tau,K}, at the cap training uses, is the gradient of KL(S_{tau,K} || target_tau), to 1e-12.

        behavior_lp is the engine's, of the distribution it drew from: after temperature, top_k and top_p.
        """
        student, teacher, reference = models()
        target = scale * teacher.log_softmax(-1) + (1 - scale) * reference.log_softmax(-1)
        _, exact = value_and_grad(lambda z: sampler_kl(z, target, setting), student)
        loss = on_samples(extrapolated_sampled(scale, **named(setting)), cap=5.0, **named(setting))

        def gradient(y):
            lp = [token_logprobs(z, y) for z in (teacher, reference)]
            behavior = sampler_logprobs(student, y, **named(setting))
            evidence = (y, lp[0], y, lp[1], y, behavior)
            return value_and_grad(lambda z: loss(z, *evidence), student)[1]

        torch.testing.assert_close(expected_gradient(student, setting, gradient), exact, rtol=0, atol=1e-12)
        outside = ~kept_tokens(student, setting)
        assert (expected_gradient(student, setting, gradient)[outside] == 0).all()

    @every_setting
    def test_a_task_reward_s_gradient_is_that_of_the_sampler_s_expected_reward(self, setting):
        student, *_ = models()
        reward = logits(5, V, dtype=torch.float64)

        def gradient(y):
            return value_and_grad(lambda z: policy.policy_gradient(z, y, reward[y], **named(setting)), student)[1]

        def plain(z):
            return -(sampler(z, setting) * reward).sum(-1)

        found = expected_gradient(student, setting, gradient)
        torch.testing.assert_close(found, value_and_grad(plain, student)[1], rtol=0, atol=1e-12)

    @every_setting
    def test_a_student_that_is_its_teacher_gets_no_gradient_at_any_token(self, setting):
        student, *_ = models()
        for y in range(V):
            ids = torch.full((4,), y)
            teacher_lp = token_logprobs(student + 0.7, ids)
            value, grad = value_and_grad(
                lambda z, y=ids, t=teacher_lp: policy.sampled_token(z, y, t, **named(setting)), student
            )
            assert value.abs().max() < 1e-13 and grad.abs().max() < 1e-13

    def test_plain_settings_change_nothing_bitwise(self):
        student, teacher = logits(0, 9, 31), logits(1, 9, 31)
        ids = torch.randint(31, (9,), generator=torch.Generator().manual_seed(0))
        lp = token_logprobs(teacher, ids)

        def before(z):
            log_s = z.gather(-1, ids[:, None])[:, 0] - z.logsumexp(-1)
            return -(lp - log_s).detach() * log_s

        found = value_and_grad(lambda z: policy.sampled_token(z, ids, lp), student)
        assert all(map(torch.equal, found, value_and_grad(before, student)))

    @pytest.mark.parametrize("setting", [s for s in SETTINGS if s[1] or s[2] < 1 or s[3]], ids=str)
    def test_no_mass_drifts_to_tokens_that_cannot_be_drawn(self, setting):
        """Descent along the expected gradient, the nucleus moving with the student, which cannot match its teacher.

        One student row stands for two positions whose teachers disagree about the head, so KL(S_K || T_K) stays
        above .5 nats, as with any student that is smaller than its teacher. With the log-probs of the whole softmax a
        token j that is never drawn has the gradient S_j E[A], and E[A] = log T(K) - log S(K) - KL(S_K || T_K) < 0: it
        gains mass, until S(K) is down to about e^-KL.
        """
        student = torch.tensor([[2.0, 1.6, 1.2, -2.0, -2.3, -2.6, -3.0]], dtype=torch.float64)
        teacher = torch.tensor(
            [[3.0, 0.0, 0.0, -3.0, -3.3, -3.6, -4.0], [0.0, 3.0, 0.0, -3.0, -3.3, -3.6, -4.0]], dtype=torch.float64
        )

        every_y = torch.arange(V).repeat(2)  # both positions, every token
        teacher_lp = token_logprobs(teacher.repeat_interleave(V, 0), every_y)

        def descend(settings):
            z = student.clone()
            for _ in range(400):
                drawn = sampler(z, setting).repeat(1, 2).squeeze(0) / 2

                def expected(x, drawn=drawn):
                    rows = x.expand(2 * V, V)
                    return (drawn * policy.sampled_token(rows, every_y, teacher_lp, **settings)).sum()

                z = z - 0.5 * value_and_grad(expected, z)[1]
            return z

        def tail(z):
            return z.softmax(-1)[:, 3:].sum().item()

        def kl(z):
            return divergences.reverse_kl(z.expand(2, V), teacher).mean().item()

        ours, old = descend(named(setting)), descend({})
        assert kl(ours) < kl(student) - 0.01
        assert torch.equal(ours[:, 3:], student[:, 3:])
        assert tail(ours) < 1.05 * tail(student)  # other tokens flatten a little
        assert tail(old) > 5 * tail(student) and kl(old) > kl(ours) + 0.1


def test_the_estimator_of_one_microbatch_is_finite_where_the_teacher_excludes_a_token():
    """-inf advantages are what they were: the loss is infinite at such a token, and only there."""
    student, teacher, _ = models()
    teacher[:, 2] = -INF
    for setting in SETTINGS:
        loss = partial(policy.sampled_token, **named(setting))
        ids = torch.tensor([2, 0, 0, 0])
        value = loss(student, ids, token_logprobs(teacher, ids))
        assert value[0].isinf() and value[1:].isfinite().all()
