"""Objectives made of others: exact expectations, the references in float32, what carries gradient, what is excluded."""

from functools import partial

import pytest
import torch
from objective_cases import golden, logits, value_and_grad

from llmdistill.objectives import clipping, divergences, policy
from llmdistill.objectives.composed import extrapolated, extrapolated_logits, extrapolated_sampled, on_samples
from llmdistill.objectives.metrics import target_entropy
from llmdistill.objectives.rows import HiddenRows, LogitRows, PairedRows, RoutedRows, TokenRows
from llmdistill.objectives.streaming import streamed
from llmdistill.objectives.taid import TAIDSchedule, sparse_taid, taid

SCALES = [0.0, 0.5, 1.0, 1.25, 1.5]
INF = float("inf")
V = 7


def models(n: int = 3, width: int = V) -> tuple[torch.Tensor, ...]:
    return tuple(logits(seed, n, width, dtype=torch.float64) for seed in (0, 1, 2))


def near(found: torch.Tensor, expected: object, tolerance: float = 1e-5) -> None:
    """Relative to the largest entry: the smallest ones are differences of large ones in float32."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def expectation(drawn_from: torch.Tensor, gradient_of) -> torch.Tensor:
    """sum_y p(y) gradient_of(y), every token enumerated in every row."""
    total = torch.zeros_like(drawn_from)
    for y in range(drawn_from.shape[-1]):
        token = torch.full(drawn_from.shape[:1], y)
        total += drawn_from[:, y, None] * gradient_of(token)
    return total


def sampled_gradient(student, teacher, reference, scale, wrap=lambda loss: loss, extra=lambda token: ()):
    def gradient(token):
        lp = partial(policy.token_logprobs, token_ids=token)
        evidence = (token, lp(teacher), token, lp(reference), *extra(token))
        return value_and_grad(lambda z: wrap(extrapolated_sampled(scale))(z, *evidence), student)[1]

    return gradient


class TestExpectations:
    @pytest.mark.parametrize("scale", SCALES)
    def test_the_sampled_estimator_is_unbiased_at_every_scale(self, scale):
        """E_{y ~ S} of its gradient is that of KL(S || target), to 1e-12."""
        student, teacher, reference = models()
        full = extrapolated(divergences.reverse_kl, scale)
        _, exact = value_and_grad(lambda z: full(z, teacher, reference), student)
        found = expectation(student.softmax(-1), sampled_gradient(student, teacher, reference, scale))
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("scale", [1.0, 1.25])
    def test_importance_weights_make_another_sampler_unbiased(self, scale):
        """y ~ B with w = S/B, no cap: the same expectation. A cap that bites changes it."""
        student, teacher, reference = models()
        behavior = logits(9, 3, V, scale=1.0, dtype=torch.float64)
        full = extrapolated(divergences.reverse_kl, scale)
        _, exact = value_and_grad(lambda z: full(z, teacher, reference), student)

        def found(cap):
            return expectation(
                behavior.softmax(-1),
                sampled_gradient(
                    student,
                    teacher,
                    reference,
                    scale,
                    partial(on_samples, cap=cap),
                    lambda y: (y, policy.token_logprobs(behavior, y)),
                ),
            )

        torch.testing.assert_close(found(INF), exact, rtol=0, atol=1e-12)
        assert (found(0.5) - exact).abs().max() > 1e-3

    def test_at_a_tempered_sampler(self):
        """What rollouts.temperature .7 draws, weighed: unbiased for the policy at temperature 1."""
        student, teacher, reference = models()
        _, exact = value_and_grad(lambda z: divergences.reverse_kl(z, teacher), student)
        found = expectation(
            (student / 0.7).softmax(-1),
            sampled_gradient(
                student,
                teacher,
                reference,
                1.0,
                partial(on_samples, cap=INF),
                lambda y: (y, policy.token_logprobs(student, y, 0.7)),
            ),
        )
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)

    def test_a_task_reward_adds_its_policy_gradient(self):
        """E_{y ~ S}[-c r(y) log S(y)] has the gradient of -c E_S[r]."""
        student, *_ = models(1)
        reward = logits(5, V, dtype=torch.float64)

        def gradient(token):
            return value_and_grad(lambda z: policy.policy_gradient(z, token, 0.3 * reward[token]), student)[1]

        def plain(z):
            return -0.3 * (z.softmax(-1) * reward).sum(-1)

        torch.testing.assert_close(expectation(student.softmax(-1), gradient), value_and_grad(plain, student)[1])


class TestReferencesInFloat32:
    """The authors' numbers, by the functions that training calls, in the dtype it computes in."""

    @pytest.mark.parametrize("case", golden("gopd")["cases"], ids=lambda case: case["name"])
    def test_gopd(self, case):
        i = golden("gopd")["inputs"]
        mask, student = i["mask"], i["student_logits"].float()
        tokens, teacher, reference, rollout = (
            i[k] if k == "tokens" else i[k].float() for k in ("tokens", "teacher_logp", "ref_logp", "rollout_logp")
        )
        near(
            policy.gopd_advantage(i["student_logp"].float(), teacher, reference, case["lam"]),
            case["advantage_per_token"],
        )
        for kind, cap in (("noIS", 0.0), ("tis5", 5.0)):
            unweighted, evidence = extrapolated_sampled(case["lam"]), (tokens, teacher, tokens, reference)
            loss = on_samples(unweighted, cap=cap) if cap else unweighted
            evidence += (tokens, rollout) if cap else ()
            value, grad = value_and_grad(lambda z, f=loss, e=evidence: f(z, *e)[mask].mean(), student)
            near(grad, case[f"grad_student_logits[token-mean][{kind}]"])
            # PPO's value is -A at ratio 1 and ours -A log S; the aggregations are of theirs.
            logp = policy.token_logprobs(student, tokens)
            advantage = policy.gopd_advantage(logp, teacher, reference, case["lam"])
            per_token = clipping.clipped_policy_loss(logp, logp.detach(), advantage)
            if cap:
                per_token = per_token * clipping.truncated_importance_weights(logp, rollout, cap)
            sums = (per_token * mask).sum(1)
            for name, mean in (
                ("token-mean", sums.sum() / mask.sum()),
                ("seq-mean-token-sum", sums.mean()),
                ("seq-mean-token-mean", (sums / mask.sum(1)).mean()),
            ):
                assert mean.item() == pytest.approx(case[f"pg_loss[{name}][{kind}]"], rel=1e-5)

    @pytest.mark.parametrize("case", golden("gopd")["multi_teacher"], ids=lambda case: str(case["lam"]))
    def test_gopd_with_a_teacher_for_each_domain(self, case):
        """Through the rows a routed teacher and a reference answer with."""
        i = golden("gopd")["inputs"]
        assert case["opd_teacher"] == ["math", "code"]
        width = i["tokens"].shape[1]
        parts = tuple(
            TokenRows(i["tokens"][b], i[k][b].float()) for b, k in ((0, "teacher_logp"), (1, "teacher2_logp"))
        )
        routed = RoutedRows(parts, (torch.arange(width), torch.arange(width, 2 * width)))
        rows = PairedRows((routed, TokenRows(i["tokens"].flatten(), i["ref_logp"].flatten().float())))
        pieces = [rows.chunk(slice(a, a + 5), None) for a in range(0, 2 * width, 5)]
        ids, teacher, again, reference = (torch.cat(x) for x in zip(*pieces, strict=True))
        assert ids.tolist() == again.tolist() == i["tokens"].flatten().tolist()
        found = policy.gopd_advantage(i["student_logp"].flatten().float(), teacher, reference, case["lam"])
        near(found.view(2, width), case["advantage"])

    @pytest.mark.parametrize("case", golden("gopd")["stale_policy_cases"], ids=lambda case: str(case["lam"]))
    def test_gopd_with_a_stale_policy(self, case):
        i, old = golden("gopd")["inputs"], torch.tensor(case["old_log_probs"])
        advantage = policy.gopd_advantage(old, i["teacher_logp"].float(), i["ref_logp"].float(), case["lam"])
        near(advantage, case["advantage"])

        def mean(z):
            return clipping.clipped_policy_loss(policy.token_logprobs(z, i["tokens"]), old, advantage)[i["mask"]].mean()

        value, grad = value_and_grad(mean, i["student_logits"].float())
        assert value.item() == pytest.approx(case["pg_loss"], rel=1e-5)
        near(grad, case["grad_student_logits"])

    def test_opd_full_and_sampled(self):
        data = golden("opd_estimators")
        i, mask = data["inputs"], data["inputs"]["mask"]
        student, teacher, tokens = i["student_logits"].float(), i["teacher_logits"].float(), i["tokens"]
        value, grad = value_and_grad(lambda z: divergences.reverse_kl(z, teacher)[mask].mean(), student)
        assert value.item() == pytest.approx(data["full_vocab"]["expected"], rel=1e-5)
        near(grad, data["full_vocab"]["grad_student_logits"])
        teacher_lp = policy.token_logprobs(teacher, tokens)
        per_token = policy.sampled_token(student, tokens, teacher_lp)
        expected = torch.tensor(data["sampled_token"]["per_token_value"])
        near(per_token[mask], expected[mask])
        _, grad = value_and_grad(lambda z: policy.sampled_token(z, tokens, teacher_lp)[mask].mean(), student)
        near(grad, data["sampled_token"]["grad_student_logits"])

    @pytest.mark.parametrize("case", golden("taid")["loss_cases"], ids=lambda case: case["name"])
    def test_taid_dense_and_listed(self, case):
        """Loss, gradient, and with `target_entropy` the cross-entropy of the released code."""
        i, t = golden("taid")["inputs"], case["t"]
        student, teacher, mask = i["student_logits"].float(), i["teacher_logits"].float(), i["mask"]
        listed, ids = teacher.log_softmax(-1).topk(teacher.shape[-1])
        for loss, evidence in ((taid, (teacher,)), (sparse_taid, (ids, listed))):
            value, grad = value_and_grad(lambda z, f=loss, e=evidence: f(z, *e, t=t)[mask].mean(), student)
            assert value.item() == pytest.approx(case["paper_KL_float64"], rel=1e-5, abs=1e-7)
            expected = torch.tensor(case["grad_student_logits_float64"])
            assert (grad - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1e-2)
            entropy = target_entropy(student, *evidence, t=t)["target_entropy"][mask].mean()
            assert (value + entropy).item() == pytest.approx(case["code_value_float64"], rel=1e-5)


class TestExtrapolation:
    @pytest.mark.parametrize("scale", SCALES)
    def test_its_target_has_no_loss(self, scale):
        _, teacher, reference = models()
        target = scale * teacher.log_softmax(-1) + (1 - scale) * reference.log_softmax(-1)
        value, grad = value_and_grad(
            lambda z: extrapolated(divergences.reverse_kl, scale)(z, teacher, reference), target + 0.7
        )
        assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12

    def test_scale_one_is_the_teacher_whatever_the_reference_excludes(self):
        student, teacher, reference = models()
        reference[:, 1] = reference[:, 4] = -INF
        found = value_and_grad(lambda z: extrapolated(divergences.reverse_kl, 1.0)(z, teacher, reference), student)
        torch.testing.assert_close(found, value_and_grad(lambda z: divergences.reverse_kl(z, teacher), student))

    @pytest.mark.parametrize("scale", SCALES)
    def test_a_token_nobody_has_does_not_exist(self, scale):
        student, teacher, reference = models()
        kept = [0, 1, 3, 4, 6]
        loss = extrapolated(divergences.reverse_kl, scale)
        expected = value_and_grad(lambda z: loss(z, teacher[:, kept], reference[:, kept]), student[:, kept])
        for z in (student, teacher, reference):
            z[:, [2, 5]] = -INF
        value, grad = value_and_grad(lambda z: loss(z, teacher, reference), student)
        torch.testing.assert_close(value, expected[0])
        torch.testing.assert_close(grad[:, kept], expected[1])
        assert (grad[:, [2, 5]] == 0).all()

    @pytest.mark.parametrize("scale", [0.5, 1.25])
    def test_what_the_teacher_excludes_stays_excluded(self, scale):
        _, teacher, reference = models()
        teacher[:, 2] = -INF
        for other in (reference, reference.index_fill(1, torch.tensor([2]), -INF)):
            target = extrapolated_logits(teacher, other, scale)
            assert (target[:, 2] == -INF).all() and target[:, :2].isfinite().all()

    def test_a_reference_that_excludes_a_token_gives_a_finite_target_beyond_the_teacher(self):
        student, teacher, reference = models()
        reference[:, 2] = -INF
        loss = extrapolated(divergences.reverse_kl, 1.25)
        value, grad = value_and_grad(lambda z: loss(z, teacher, reference), student)
        assert value.isfinite().all() and grad.isfinite().all()

    def test_a_diverged_model_shows(self):
        student, teacher, reference = models()
        teacher[0, 3] = reference[1, 3] = torch.nan
        value = extrapolated(divergences.reverse_kl, 1.25)(student, teacher, reference)
        assert value[:2].isnan().all() and value[2].isfinite()


class TestPlausibility:
    """Rows as large vocabularies have them: a head that matters, and a tail where both models are noise."""

    def rows(self, width: int = 2000):
        """A head of four tokens; in the tail T is below 1e-4 and R up to e^30 times smaller."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(20, width, generator=generator, dtype=torch.float64)
        teacher, reference = -13.0 + 1.5 * noise, -13.0 + 1.5 * noise
        reference[:, 4:] -= 30 * torch.rand(20, width - 4, generator=generator, dtype=torch.float64)
        teacher[:, :4] = torch.tensor([2.0, 1.5, 1.0, 0.5]) + 0.3 * noise[:, :4]
        reference[:, :4] = torch.tensor([1.5, 2.0, 0.5, 1.0]) - 0.3 * noise[:, :4]
        return teacher, reference

    @pytest.mark.parametrize("scale", [1.25, 1.5, 3.0])
    @pytest.mark.parametrize("alpha", [0.1, 0.5])
    def test_the_tail_keeps_its_mass_and_the_likeliest_token_is_plausible(self, scale, alpha):
        """With h the head's mass, Z >= h^scale + 1 - h by Jensen, so the tail gains at most the inverse of that.

        Without the constraint the same rows put a tail token on top, or most of the mass there.
        """
        teacher, reference = self.rows()
        t = teacher.softmax(-1)
        head = t >= alpha * t.amax(-1, keepdim=True)
        h = (t * head).sum(-1)
        tail = t < 1e-4
        assert tail.sum(-1).min() > 1900 and not (tail & head).any()

        def tail_growth(target):
            return (target.softmax(-1) * tail).sum(-1) / (t * tail).sum(-1)

        target = extrapolated_logits(teacher, reference, scale, plausibility=alpha)
        assert target.isfinite().all()
        assert (tail_growth(target) <= 1 / (h**scale + 1 - h) * (1 + 1e-9)).all()
        assert head.gather(-1, target.argmax(-1, keepdim=True)).all()
        torch.testing.assert_close(target[~head], teacher.log_softmax(-1)[~head])
        plain = extrapolated_logits(teacher, reference, scale)
        torch.testing.assert_close(target[head], plain[head])
        assert tail_growth(plain).min() > 10
        if scale >= 1.5:
            assert not head.gather(-1, plain.argmax(-1, keepdim=True)).any()

    def test_the_bounds_of_the_docstring(self):
        """1 / min_h (h^scale + 1 - h)."""
        h = torch.linspace(0, 1, 10001, dtype=torch.float64)
        for scale, factor in ((1.25, 1.09), (1.5, 1.18)):
            assert factor - 0.01 < (1 / (h**scale + 1 - h)).max() < factor

    @pytest.mark.parametrize("scale", SCALES)
    def test_it_constrains_extrapolation_only_and_0_is_none(self, scale):
        _, teacher, reference = models()
        plain = extrapolated_logits(teacher, reference, scale)
        assert torch.equal(extrapolated_logits(teacher, reference, scale, plausibility=0.0), plain)
        assert torch.equal(extrapolated_logits(teacher, reference, scale, plausibility=0.1), plain) == (scale <= 1)

    def test_excluded_tokens_and_a_reference_that_is_the_teacher(self):
        student, teacher, reference = models()
        teacher[:, 2] = -INF
        reference[:, 4] = -INF
        target = extrapolated_logits(teacher, reference, 1.25, plausibility=0.1)
        assert (target[:, 2] == -INF).all() and target[:, [0, 1, 3, 4, 5, 6]].isfinite().all()
        loss = extrapolated(divergences.reverse_kl, 1.25, plausibility=0.1)
        found = value_and_grad(lambda z: loss(z, student, student), teacher)
        torch.testing.assert_close(found, value_and_grad(lambda z: divergences.reverse_kl(z, student), teacher))
        value, grad = value_and_grad(lambda z: loss(z, teacher + 1.0, teacher), teacher)
        assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12

    def test_it_is_a_share(self):
        for alpha in (-0.1, 1.5):
            with pytest.raises(ValueError, match="plausibility is"):
                extrapolated(divergences.reverse_kl, 1.25, plausibility=alpha)


class TestOnSamples:
    def evidence(self, n=3):
        return torch.tensor([1, 4, 6]), logits(7, n, scale=1.0).abs().neg()

    def test_value_and_weights_by_hand(self):
        """w KL, w exactly min(ratio, cap), 1 where nobody drew."""
        student, teacher, _ = models()
        ids, _ = self.evidence()
        logp = student.log_softmax(-1)[range(3), ids]
        behavior = torch.stack([logp[0] - 3.0, logp[1] + 0.5, torch.tensor(torch.nan, dtype=torch.float64)])
        weights = torch.tensor([2.0, torch.exp(torch.tensor(-0.5, dtype=torch.float64)), 1.0], dtype=torch.float64)
        loss = on_samples(divergences.reverse_kl, cap=2.0)

        def plain(z):
            return weights * divergences.reverse_kl(z, teacher)

        found = value_and_grad(lambda z: loss(z, teacher, ids, behavior), student)
        torch.testing.assert_close(found, value_and_grad(plain, student))

    def test_only_the_student_gets_gradient(self):
        student, teacher, reference = (z.requires_grad_() for z in models())
        ids, behavior = self.evidence()
        behavior = behavior.requires_grad_()
        lp = [policy.token_logprobs(z, ids) for z in (teacher, reference)]
        full = on_samples(extrapolated(divergences.reverse_kl, 1.25), cap=5.0)
        sampled = on_samples(extrapolated_sampled(1.25), cap=5.0)
        full(student, teacher, reference, ids, behavior).sum().backward()
        sampled(student, ids, lp[0], ids, lp[1], ids, behavior).sum().backward()
        assert student.grad is not None
        assert all(x.grad is None for x in (teacher, reference, behavior))


@pytest.mark.parametrize("widths", [(264, 260, 270), (260, 264, 262), (40, 40, 40)])
def test_heads_of_different_width_are_cut_before_any_softmax(widths):
    """Student, teacher, reference; through a service (logits) or in this process (hidden states)."""
    student, teacher, reference = (torch.nn.Linear(8, w, bias=False) for w in widths)
    generator = torch.Generator().manual_seed(0)
    hidden, theirs, other = (torch.randn(11, 8, generator=generator) for _ in range(3))
    cut, loss = min(widths), extrapolated(divergences.reverse_kl, 1.25)
    hidden.requires_grad_()
    naive = loss(student(hidden)[:, :cut], teacher(theirs)[:, :cut], reference(other)[:, :cut]).sum()
    expected = torch.autograd.grad(naive, [hidden, student.weight])
    for rows in (
        PairedRows((HiddenRows(theirs, teacher), HiddenRows(other, reference))),
        PairedRows((LogitRows(teacher(theirs)), HiddenRows(other, reference))),
    ):
        total, _ = streamed(loss, hidden, student, rows, chunk_tokens=4, vocab_size=cut)
        torch.testing.assert_close(total, naive)
        for a, b in zip(torch.autograd.grad(total, [hidden, student.weight]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="logit columns"):
            streamed(loss, hidden, student, rows, vocab_size=cut + 1)
    with pytest.raises(ValueError, match="all must speak of the same tokens"):
        PairedRows((LogitRows(theirs), LogitRows(other[:3])))


class TestSchedule:
    def test_a_loss_of_nothing_does_not_overflow(self):
        """At t = 0 the target is the student: the first losses are 0, and what follows is infinitely worse."""
        schedule = TAIDSchedule(t_start=0.0, num_steps=10)
        moved = [schedule.update(loss, step) for step, loss in enumerate([0.0, 0.0, 0.5, 0.2, 1e-30, 3.0], start=1)]
        assert moved == sorted(moved) and moved[-1] == pytest.approx(0.6)

    def test_it_ends_at_the_end(self):
        schedule = TAIDSchedule(t_start=0.2, t_end=0.9, num_steps=5)
        for step in range(1, 6):
            schedule.update(1.0, step)
        assert schedule.t == pytest.approx(0.9)
