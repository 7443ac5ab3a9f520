"""The streaming engine equals the naive computation, in value and gradient, wherever it may be called."""

from functools import partial

import pytest
import torch
from objective_cases import CASES, logits
from torch import nn

from llmdistill.objectives import divergences, policy, sparse
from llmdistill.objectives.metrics import dense_metrics, sampled_metrics, sparse_metrics
from llmdistill.objectives.rows import HiddenRows, LogitRows, SparseRows, TokenRows
from llmdistill.objectives.streaming import streamed, streamed_metrics

H = 6
shapes = pytest.mark.parametrize(("N", "V"), [(1, 11), (7, 257), (33, 11), (33, 257)])
chunks = pytest.mark.parametrize("chunk_tokens", [1, 5, 64])


def make_head(V, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(H, V, bias=bias).to(dtype)


def make_hidden(N, dtype=torch.float32, seed=0):
    return logits(seed, N, H, dtype=dtype).requires_grad_()


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None and leaf.requires_grad])


def leaves(hidden, head):
    return hidden, head.weight, head.bias


def finish(x, scale=1.0, softcap=None):
    x = x * scale
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def teacher_forms(N, V):
    """Every form of teacher rows, an objective for it, and what that takes in the naive computation."""
    teacher_hidden, teacher_head = logits(7, N, H), make_head(V, seed=7)
    dense = teacher_head(teacher_hidden).detach()
    logprobs, ids = dense.log_softmax(-1).topk(min(5, V))
    tokens = ids[:, 0]
    teacher_lp, reference_lp = logprobs[:, 0], logprobs[:, 1]
    capped = finish(dense, 0.5, 4.0)
    gopd = partial(policy.sampled_token, scale=1.25)
    return {
        "logits": (dense, divergences.reverse_kl, (dense,)),
        "logit_rows": (LogitRows(dense), divergences.jsd, (dense,)),
        "pair": ((teacher_hidden, teacher_head), divergences.forward_kl, (dense,)),
        "hidden_rows": (
            HiddenRows(teacher_hidden, teacher_head, logit_scale=0.5, softcap=4.0),
            divergences.reverse_kl,
            (capped,),
        ),
        "sparse_rows": (SparseRows(ids, logprobs), sparse.reverse_kl, (ids, logprobs)),
        "token_rows": (
            TokenRows(tokens, teacher_lp, reference_lp),
            gopd,
            (tokens, teacher_lp, reference_lp),
        ),
    }


FORMS = list(teacher_forms(1, 11))


class TestEqualsNaive:
    @shapes
    @chunks
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
    def test_in_value_and_gradient(self, N, V, chunk_tokens, bias, scale, softcap):
        """Hidden, weight and bias, to 1e-5 relative in float32, with per-row weights of which some are 0."""
        hidden, head, teacher = make_hidden(N), make_head(V, bias), logits(9, N, V)
        weights = logits(3, N).abs() * (torch.arange(N) % 3 > 0)
        loss, _ = streamed(
            divergences.reverse_kl,
            hidden,
            head,
            teacher,
            chunk_tokens=chunk_tokens,
            logit_scale=scale,
            softcap=softcap,
            weights_N=weights,
        )
        naive = (divergences.reverse_kl(finish(head(hidden), scale, softcap), teacher) * weights).sum()
        torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-6)
        for actual, expected in zip(
            gradients(loss, *leaves(hidden, head)), gradients(naive, *leaves(hidden, head)), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())

    @pytest.mark.parametrize("form", FORMS)
    @shapes
    @chunks
    def test_for_every_form_of_teacher(self, form, N, V, chunk_tokens):
        rows, objective, args = teacher_forms(N, V)[form]
        hidden, head = make_hidden(N), make_head(V)
        loss, _ = streamed(objective, hidden, head, rows, chunk_tokens=chunk_tokens)
        naive = objective(head(hidden), *args).sum()
        torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-5)
        for actual, expected in zip(
            gradients(loss, *leaves(hidden, head)), gradients(naive, *leaves(hidden, head)), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_for_every_divergence(self, case):
        hidden, head, teacher = make_hidden(7), make_head(11), logits(9, 7, 11)
        logprobs, ids = teacher.log_softmax(-1).topk(4)
        for objective, rows, args in (
            (case.dense, teacher, (teacher,)),
            (case.sparse, SparseRows(ids, logprobs), (ids, logprobs)),
        ):
            loss, _ = streamed(objective, hidden, head, rows, chunk_tokens=3)
            naive = objective(head(hidden), *args).sum()
            torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-6)
            for actual, expected in zip(
                gradients(loss, *leaves(hidden, head)), gradients(naive, *leaves(hidden, head)), strict=True
            ):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())

    @pytest.mark.parametrize("form", FORMS)
    def test_with_a_narrower_vocabulary(self, form):
        """vocab_size cuts both sides: columns past it get no gradient, ids past it fall to the tail."""
        student_V, cut = 13, 11
        teacher_V = 17 if form in ("logits", "logit_rows", "pair", "hidden_rows") else 13
        rows, objective, args = teacher_forms(9, teacher_V)[form]
        if form == "sparse_rows":
            ids, logprobs = args
            assert (ids >= cut).any()
            args = (ids.masked_fill(ids >= cut, -1), logprobs)
        elif form == "token_rows":
            rows = TokenRows(rows.token_ids_N.clamp_max(cut - 1), *rows.per_row)
            args = (rows.token_ids_N, *args[1:])
        else:
            args = (args[0][:, :cut],)
        hidden, head = make_hidden(9), make_head(student_V)
        loss, _ = streamed(objective, hidden, head, rows, chunk_tokens=4, vocab_size=cut)
        naive = objective(head(hidden)[:, :cut], *args).sum()
        torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-5)
        actual = gradients(loss, *leaves(hidden, head))
        for got, expected in zip(actual, gradients(naive, *leaves(hidden, head)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert (actual[1][cut:] == 0).all()

    @chunks
    def test_in_bfloat16(self, chunk_tokens):
        """Against float32 on the same rounded numbers: 2 % of the largest entry (bfloat16 keeps 8 bits)."""
        hidden, head = make_hidden(33, torch.bfloat16), make_head(257, dtype=torch.bfloat16)
        teacher = logits(9, 33, 257, dtype=torch.bfloat16)
        loss, _ = streamed(divergences.reverse_kl, hidden, head, teacher, chunk_tokens=chunk_tokens)
        assert loss.dtype == torch.float32
        wide_hidden, wide_head = hidden.detach().float().requires_grad_(), make_head(257)
        wide_head.load_state_dict(head.state_dict())
        naive = divergences.reverse_kl(wide_head(wide_hidden), teacher).sum()
        torch.testing.assert_close(loss, naive, rtol=5e-3, atol=0)
        for actual, expected in zip(
            gradients(loss, *leaves(hidden, head)),
            gradients(naive, *leaves(wide_hidden, wide_head)),
            strict=True,
        ):
            assert actual.dtype == torch.bfloat16
            torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())

    def test_in_bfloat16_the_weight_gradient_accumulates_in_float32(self):
        """4,096 equal rows in chunks of one: a bfloat16 sum would stop growing at 256 of them."""
        hidden = torch.ones(4096, H, dtype=torch.bfloat16).requires_grad_()
        head = make_head(3, dtype=torch.bfloat16)
        teacher = torch.tensor([0.0, 1.0, 2.0]).repeat(4096, 1)
        loss, _ = streamed(divergences.forward_kl, hidden, head, teacher, chunk_tokens=1)
        one, _ = streamed(divergences.forward_kl, hidden[:1], head, teacher[:1], chunk_tokens=1)
        expected = gradients(one, head.weight)[0].float() * 4096
        torch.testing.assert_close(gradients(loss, head.weight)[0].float(), expected, rtol=0.01, atol=0)

    @pytest.mark.parametrize("form", ["pair", "logits"])
    def test_under_autocast(self, form):
        """Equals the naive computation under autocast to bfloat16's precision; gradients are float32."""
        rows, objective, _ = teacher_forms(33, 257)[form]
        hidden, head = make_hidden(33), make_head(257)
        seen = []

        def objective_and_dtype(student_logits, teacher_logits):
            seen.append((student_logits.dtype, teacher_logits.dtype))
            return objective(student_logits, teacher_logits)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = streamed(objective_and_dtype, hidden, head, rows, chunk_tokens=8)
            teacher = rows[1](rows[0]) if form == "pair" else rows
            naive = objective(head(hidden), teacher.detach()).sum()
        assert {dtypes[0] for dtypes in seen} == {torch.bfloat16}
        assert {dtypes[1] for dtypes in seen} == {torch.bfloat16 if form == "pair" else torch.float32}
        torch.testing.assert_close(loss, naive, rtol=1e-4, atol=1e-4)
        for actual, expected in zip(
            gradients(loss, *leaves(hidden, head)), gradients(naive, *leaves(hidden, head)), strict=True
        ):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01 * expected.abs().max().item())

    def test_in_float64(self):
        hidden, head = make_hidden(7, torch.float64), make_head(11, dtype=torch.float64)
        teacher = logits(9, 7, 11, dtype=torch.float64)
        loss, _ = streamed(divergences.reverse_kl, hidden, head, teacher, chunk_tokens=2)
        naive = divergences.reverse_kl(head(hidden), teacher).sum()
        torch.testing.assert_close(loss, naive, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradients(loss, *leaves(hidden, head)), gradients(naive, *leaves(hidden, head)))


class TestGraph:
    @pytest.mark.parametrize("form", FORMS)
    def test_no_rows(self, form):
        """A rank without a counted token still takes part: loss 0, zero gradients, every metric at 0."""
        rows, objective, _ = teacher_forms(3, 11)[form]
        rows = (rows[0][:0], rows[1]) if form == "pair" else rows[:0]
        hidden, head = make_hidden(0), make_head(11)
        metrics = {"sparse_rows": sparse_metrics, "token_rows": None}.get(form, dense_metrics)
        loss, sums = streamed(objective, hidden, head, rows, metrics=metrics)
        assert loss.item() == 0 and all(total.item() == 0 for total in sums.values())
        assert metrics is None or "reverse_kl" in sums
        loss.backward()
        for leaf in leaves(hidden, head):
            assert leaf.grad.shape == leaf.shape and (leaf.grad == 0).all()

    def test_all_weights_zero(self):
        hidden, head = make_hidden(7), make_head(11)
        loss, _ = streamed(divergences.reverse_kl, hidden, head, logits(9, 7, 11), weights_N=torch.zeros(7))
        loss.backward()
        assert loss.item() == 0 and all((leaf.grad == 0).all() for leaf in leaves(hidden, head))

    def test_weights_carry_no_gradient(self):
        weights = torch.ones(7, requires_grad=True)
        hidden, head = make_hidden(7), make_head(11)
        streamed(divergences.reverse_kl, hidden, head, logits(9, 7, 11), weights_N=weights)[0].backward()
        assert weights.grad is None

    def test_scales_with_the_gradient_it_receives(self):
        """As under loss / count, gradient accumulation, or a loss scaler."""
        hidden, head, teacher = make_hidden(7), make_head(11), logits(9, 7, 11)
        loss, _ = streamed(divergences.reverse_kl, hidden, head, teacher, chunk_tokens=2)
        naive = divergences.reverse_kl(head(hidden), teacher).sum()
        torch.testing.assert_close(
            gradients(-0.37 * loss, *leaves(hidden, head)), gradients(-0.37 * naive, *leaves(hidden, head))
        )

    @pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("weight",)])
    def test_frozen_inputs_get_no_gradient_and_the_others_are_unchanged(self, frozen):
        hidden, head, teacher = make_hidden(7), make_head(11), logits(9, 7, 11)
        for name in frozen:
            (hidden if name == "hidden" else getattr(head, name)).requires_grad_(False)
        streamed(divergences.reverse_kl, hidden, head, teacher, chunk_tokens=2)[0].backward()
        got = {"hidden": hidden.grad, "weight": head.weight.grad, "bias": head.bias.grad}
        assert {name for name, grad in got.items() if grad is None} == set(frozen)
        hidden.grad = head.weight.grad = head.bias.grad = None
        divergences.reverse_kl(head(hidden), teacher).sum().backward()
        for name, leaf in (("hidden", hidden), ("weight", head.weight), ("bias", head.bias)):
            if name not in frozen:
                torch.testing.assert_close(got[name], leaf.grad, rtol=1e-5, atol=1e-6)

    def test_teacher_gets_no_gradient(self):
        head, teacher_head = make_head(11), make_head(11, seed=7)
        hidden, teacher_hidden = make_hidden(7), make_hidden(7, seed=7)
        streamed(divergences.reverse_kl, hidden, head, (teacher_hidden, teacher_head))[0].backward()
        assert teacher_hidden.grad is None and teacher_head.weight.grad is None

    def test_without_grad_only_values_are_computed(self):
        hidden, head, teacher = make_hidden(7), make_head(11), logits(9, 7, 11)
        grad_modes = []

        def objective(student_logits, teacher_logits):
            grad_modes.append(student_logits.requires_grad)
            return divergences.reverse_kl(student_logits, teacher_logits)

        with torch.no_grad():
            loss, _ = streamed(objective, hidden, head, teacher, chunk_tokens=2)
        assert not loss.requires_grad and not any(grad_modes)
        torch.testing.assert_close(loss, divergences.reverse_kl(head(hidden), teacher).sum().detach())

    def test_runs_inside_a_replaced_forward_of_the_head(self):
        """So that wrappers that hook modules (DDP, ZeRO, FSDP) see the head being used."""
        hidden, head, teacher = make_hidden(7), make_head(11), logits(9, 7, 11)
        naive = divergences.reverse_kl(head(hidden), teacher).sum()
        head.forward = lambda x: streamed(divergences.reverse_kl, x, head, teacher, chunk_tokens=2)[0]
        torch.testing.assert_close(head(hidden), naive)

    def test_gradient_reaches_a_tied_embedding_from_both_ends(self):
        embedding, head = nn.Embedding(11, H), make_head(11, bias=False)
        head.weight = embedding.weight
        ids, teacher = torch.arange(7), logits(9, 7, 11)
        loss, _ = streamed(divergences.reverse_kl, embedding(ids).tanh(), head, teacher, chunk_tokens=2)
        naive = divergences.reverse_kl(head(embedding(ids).tanh()), teacher).sum()
        torch.testing.assert_close(gradients(loss, head.weight), gradients(naive, head.weight))

    def test_a_second_backward_is_refused(self):
        loss, _ = streamed(divergences.reverse_kl, make_hidden(7), make_head(11), logits(9, 7, 11))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward through a streamed loss"):
            loss.backward()


class TestRows:
    @pytest.mark.parametrize("form", FORMS)
    def test_micro_batches_add_up(self, form):
        """rows[a:b] and rows[index] speak of the same rows of hidden."""
        rows, objective, _ = teacher_forms(9, 11)[form]
        rows = HiddenRows(*rows) if form == "pair" else LogitRows(rows) if form == "logits" else rows
        hidden, head = make_hidden(9).detach(), make_head(11)
        whole, _ = streamed(objective, hidden, head, rows)
        assert len(rows) == 9 and len(rows[2:5]) == 3
        for parts in (
            (slice(0, 4), slice(4, 9)),
            (torch.tensor([8, 1, 3]), torch.tensor([0, 2, 4, 5, 6, 7])),
        ):
            split = sum(streamed(objective, hidden[part], head, rows[part])[0] for part in parts)
            torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)

    def test_inner_lengths_must_agree(self):
        with pytest.raises(ValueError, match=r"topk_ids_NK is \(3, 4\), topk_logprobs_NK \(3, 5\)"):
            SparseRows(torch.zeros(3, 4), torch.zeros(3, 5))
        with pytest.raises(ValueError, match="tensor 2 after token_ids_N has 2 rows, token_ids_N 3"):
            TokenRows(torch.zeros(3), torch.zeros(3), torch.zeros(2))


class TestMetrics:
    @chunks
    def test_sums_are_unweighted_over_all_rows(self, chunk_tokens):
        hidden, head, teacher = make_hidden(33), make_head(11), logits(9, 33, 11)
        _, sums = streamed(
            divergences.jsd,
            hidden,
            head,
            teacher,
            chunk_tokens=chunk_tokens,
            weights_N=torch.zeros(33),
            metrics=dense_metrics,
        )
        for name, values in dense_metrics(head(hidden), teacher).items():
            assert sums[name].dtype == torch.float64 and not sums[name].requires_grad
            torch.testing.assert_close(sums[name], values.double().sum(), rtol=1e-5, atol=1e-6)

    @chunks
    @pytest.mark.parametrize("form", FORMS)
    def test_per_token_values_come_in_row_order(self, form, chunk_tokens):
        rows, _, args = teacher_forms(33, 257)[form]
        metrics = {"sparse_rows": sparse_metrics, "token_rows": policy_metrics}.get(form, dense_metrics)
        hidden, head = make_hidden(33), make_head(257)
        values = streamed_metrics(metrics, hidden, head, rows, chunk_tokens=chunk_tokens, logit_scale=0.5)
        expected = metrics(head(hidden).detach() * 0.5, *args)
        assert values.keys() == expected.keys()
        for name, value in values.items():
            assert value.shape == (33,) and not value.requires_grad
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def policy_metrics(student_logits, token_ids, teacher_lp, reference_lp):
    return sampled_metrics(student_logits, token_ids, teacher_lp)


class TestErrors:
    def test_row_counts(self):
        with pytest.raises(ValueError, match="student has 7 hidden rows, the teacher 6 rows"):
            streamed(divergences.reverse_kl, make_hidden(7), make_head(11), logits(9, 6, 11))
        with pytest.raises(ValueError, match="student has 7 hidden rows, the teacher 6 rows"):
            streamed_metrics(dense_metrics, make_hidden(7), make_head(11), logits(9, 6, 11))

    def test_chunk_tokens(self):
        with pytest.raises(ValueError, match="chunk_tokens is -1; it must be at least 1"):
            streamed(divergences.reverse_kl, make_hidden(7), make_head(11), logits(9, 7, 11), chunk_tokens=-1)

    def test_weights(self):
        with pytest.raises(ValueError, match=r"weights_N has shape \(6,\); it needs one weight for"):
            streamed(
                divergences.reverse_kl,
                make_hidden(7),
                make_head(11),
                logits(9, 7, 11),
                weights_N=torch.ones(6),
            )

    @pytest.mark.parametrize(("vocab_size", "side"), [(12, "student has 11"), (10, "teacher has 9"), (0, "student")])
    def test_vocab_size(self, vocab_size, side):
        with pytest.raises(ValueError, match=f"vocab_size is {vocab_size}, but the {side}.*smaller of the two"):
            streamed(divergences.reverse_kl, make_hidden(7), make_head(11), logits(9, 7, 9), vocab_size=vocab_size)

    def test_widths_differ_without_a_cut(self):
        with pytest.raises(ValueError, match="11 columns, teacher logits 9: cut both.*`vocab_size`"):
            streamed(divergences.reverse_kl, make_hidden(7), make_head(11), logits(9, 7, 9))
