"""What rounding evidence costs: bytes of a token against the error of the distribution, per kind of evidence.

    OMP_NUM_THREADS=1 python -m eval.perf.hidden --model data/quickstart/teacher

The model writes the texts itself, at temperature 1. Exact is its log-softmax in float32; each kind is written and read
back as it travels (log-probs in 16 bits), and what is not on the wire (int8 and fp8 with one scale a row) is rounded
alike. Reported are bytes a token at this model's width, and at H = 4,096 and V = 151,936; the KL divergence of exact to
rounded, mean and largest; and the mean error of a log-prob, weighted by its probability. A list of likeliest tokens
gives the divergence over its buckets, which is what a loss sees of it: beside it the mass that it does not list.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eval.perf.record import add_results_option, note
from llmdistill.objectives.sparse import forward_kl
from llmdistill.recipe.config import TeacherConfig
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Sampling
from llmdistill.wire.blocks import decode, encode
from llmdistill.wire.hidden import (
    GROUP,
    Form,
    HeadWeights,
    HiddenBlock,
    HiddenHeader,
    decode_hidden,
    encode_hidden,
    from_groups,
    row_bytes,
    to_groups,
)

PROMPTS = (
    "A short history of the bicycle:", "def fibonacci(n):\n", "Question: what is 37 times 12?\nAnswer:",
    "The three laws of thermodynamics are", "Once upon a time, in a village by the sea,", "Dear Sir or Madam,",
)  # fmt: skip
WIDE, VOCAB = 4096, 151936


def travelled(form: Form) -> Callable[[Tensor], Tensor]:
    """States as they come out at the other end."""

    def rounded(hidden_NH: Tensor) -> Tensor:
        header = HiddenHeader("t", "v", "h", hidden_NH.shape[1], 2, form)
        return decode_hidden(encode_hidden(HiddenBlock(slice(1, 1 + len(hidden_NH)), hidden_NH, header))).hidden.float()

    return rounded


def per_row(hidden_NH: Tensor) -> Tensor:
    return from_groups(*to_groups(hidden_NH, hidden_NH.shape[1]), hidden_NH.shape[1])


def fp8(hidden_NH: Tensor) -> Tensor:
    scale_N1 = hidden_NH.abs().amax(1, keepdim=True) / 448  # e4m3's largest
    return (hidden_NH / scale_N1).to(torch.float8_e4m3fn).float() * scale_N1


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    teacher = LocalTeacher.load(TeacherConfig(model=options.model, dtype="float32"))
    tokenizer = teacher.tokenizer
    prompts = [Prompt(tokenizer(text)["input_ids"], text) for text in PROMPTS]
    rollout = teacher.generate(prompts, Sampling(max_new_tokens=options.tokens, temperature=1.0, seed=0))
    rows = teacher.dense(rollout)
    head = HeadWeights(rows.lm_head.weight.detach(), rows.lm_head.bias, rows.logit_scale, rows.softcap).linear()
    exact_NV = head(rows.hidden_NH).double().log_softmax(-1)
    vocab, width = exact_NV.shape[1], rows.hidden_NH.shape[1]
    print(json.dumps({"model": options.model, "rows": len(rows), "H": width, "V": vocab}))

    def report(kind: str, here: float, wide: float, kl_N: Tensor, error_N: Tensor, more: str = "") -> None:
        shown = f"{here:.0f} bytes here, {wide:.0f} at H = 4096, V = 152k; |error| {error_N.mean():.1e} nats{more}"
        print(f"{kind:<28} KL {kl_N.mean():.1e} mean, {kl_N.max():.1e} max; {shown}", flush=True)
        cell = f"{kind}, {here:.0f} bytes a token"
        note("hidden", f"{cell}, KL of exact to rounded", "nats", kl_N.tolist(), options.results)

    states: list[tuple[str, Callable[[int], float], Callable[[Tensor], Tensor]]] = [
        ("hidden bfloat16", lambda h: row_bytes(h, "bfloat16"), travelled("bfloat16")),
        (f"hidden int8, groups of {GROUP}", lambda h: row_bytes(h, "int8"), travelled("int8")),
        ("hidden int8, per row", lambda h: h + 2, per_row),
        ("hidden fp8 e4m3, per row", lambda h: h + 2, fp8),
    ]
    for kind, size, rounded in states:
        found_NV = head(rounded(rows.hidden_NH)).double().log_softmax(-1)
        difference_NV = exact_NV - found_NV
        weight_NV = exact_NV.exp()
        kl_N = (weight_NV * difference_NV).sum(-1)
        report(kind, size(width), size(WIDE), kl_N, (weight_NV * difference_NV.abs()).sum(-1))
    for top_k in options.top_k:
        blocks = teacher.score(rollout, top_k)
        back = [decode(encode(block, "float16")) for block in blocks]
        ids, lps = (torch.cat([getattr(b, n) for b in back]) for n in ("topk_ids", "topk_logprobs"))
        kl_N = forward_kl(exact_NV, ids.long(), lps.double()).clamp(min=0)
        listed_NK = exact_NV.gather(1, ids.long())
        error_N = (listed_NK.exp() * (listed_NK - lps).abs()).sum(-1)
        unlisted = 1 - listed_NK.exp().sum(-1)
        bits = lambda v: (v - 1).bit_length() / 8  # noqa: E731
        here, wide = (4 + 5 + 2 * (top_k - 1) + top_k * bits(v) for v in (vocab, VOCAB))
        more = f"; not listed: {unlisted.mean():.3f} of the mass, {unlisted.max():.3f} at most"
        report(f"top-{top_k}, 16 bits", here, wide, kl_N, error_N, more)


if __name__ == "__main__":
    parser: Any = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/quickstart/teacher")
    parser.add_argument("--tokens", type=int, default=64, help="written behind each of the six prompts")
    parser.add_argument("--top-k", type=int, nargs="+", default=[64, 256])
    add_results_option(parser)
    main(parser.parse_args())
