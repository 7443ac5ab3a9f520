"""The quick start's yardstick: what a plain on-policy distillation loop reaches on a CPU in four minutes.

    python data/quickstart_models.py --layers 24 --name student24 && python data/quickstart_questions.py
    python eval/perf/quickstart_baseline.py --seconds 240 --threads 2

The loop is the one most people would write: sample with transformers' `generate`, score the same tokens with teacher
and student, full-vocabulary reverse KL, one AdamW step; then again with the new weights. It is meant to be competent
(logits of the completion only, fused AdamW, generation from a bfloat16 copy of the weights) and to stay short;
llmdistill must do better in the same time, on the same folders, prompts and threads.

Held-out prompts are measured before and after, outside the time budget, on two kinds of text, 40 tokens at most and the
end token included: `own` is what the student samples at temperature 1, `teacher` what the teacher samples. Reverse and
forward KL (nats), top-1 agreement and overlap (1 - total variation) are means over tokens. Read both: on its own text
alone a student can look good by collapsing into babble that the teacher, shown it, continues just as readily (seen
with evenly spaced layers: own reverse KL 7.5 -> 1.4 while the text became two letters a line). Prints one JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill.pipeline.answers import compare_answers

NEW_TOKENS = 40
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def read_prompts(path: Path, tokenizer: Any) -> list[str]:
    """One templated string a row."""
    chats = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


def greedy_answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """What the model finds likeliest, for the share of prompts that it answers as its teacher does."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[no-any-return]


def sample(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids (B, T), attention mask (B, T), completion mask (B, C)): left-padded prompts and C sampled tokens."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    # top_k=0: the default of 50 would sample from another distribution than the one the loss is about.
    ids = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    completion = ids[:, inputs["input_ids"].shape[1] :]  # (B, C)
    ended = (completion == tokenizer.eos_token_id).cumsum(dim=1)
    mask = (ended == 0) | ((ended == 1) & (completion == tokenizer.eos_token_id))  # the first end token counts
    return ids, torch.cat([inputs["attention_mask"], mask.long()], dim=1), mask


def completion_logprobs(model: Any, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """(N, V) float32 log-probabilities for the N completion tokens: position t-1 predicts the token at t."""
    logits = model(ids, attention_mask=attention_mask, logits_to_keep=mask.shape[1] + 1).logits
    return logits[:, :-1][mask].float().log_softmax(dim=-1)


def train(student: Any, teacher: Any, tokenizer: Any, prompts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Trains in place until the time is up, and says where the time went."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    actor = (
        copy.deepcopy(student).to(DTYPES[args.dtype]).eval()
    )  # samples: autocast would cast all weights at each token
    spent: Counter[str] = Counter()
    losses, tokens, order = [], 0, []
    start = time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        if len(order) < args.batch:
            order = torch.randperm(len(prompts)).tolist()
        batch, order = [prompts[i] for i in order[: args.batch]], order[args.batch :]

        marks = [time.perf_counter()]
        with torch.no_grad():
            for mine, theirs in zip(actor.parameters(), student.parameters(), strict=True):
                mine.copy_(theirs)
            ids, attention_mask, mask = sample(actor, tokenizer, batch)
            marks.append(time.perf_counter())
            teacher_NV = completion_logprobs(teacher, ids, attention_mask, mask)
        marks.append(time.perf_counter())

        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            student_NV = completion_logprobs(student, ids, attention_mask, mask)
        loss = (student_NV.exp() * (student_NV - teacher_NV)).sum(dim=-1).mean()
        loss.backward()
        marks.append(time.perf_counter())

        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        for name, begin, end in zip(("rollout", "teacher", "student", "optimizer"), marks, marks[1:], strict=False):
            spent[name] += end - begin
        losses.append(loss.item())
        tokens += int(mask.sum())
        if args.verbose:
            print(
                f"step {len(losses)}  {time.perf_counter() - start:.0f} s  reverse KL {losses[-1]:.3f}",
                flush=True,
            )
    seconds = time.perf_counter() - start
    rates = {
        "steps": len(losses),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }
    return rates | {"time": dict(spent), "last_losses": losses[-5:]}


@torch.no_grad()
def rollouts(model: Any, tokenizer: Any, prompts: list[str], batch: int = 20) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What `model` answers to all prompts; the random state is the same at every call, and none of the training's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [sample(model, tokenizer, prompts[i : i + batch]) for i in range(0, len(prompts), batch)]


@torch.no_grad()
def compare(student: Any, teacher: Any, texts: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Student against teacher, means over the completion tokens of `texts`."""
    sums: Counter[str] = Counter()
    for text in texts:
        s, t = completion_logprobs(student, *text), completion_logprobs(teacher, *text)  # (N, V)
        sums["reverse_kl"] += (s.exp() * (s - t)).sum().item()
        sums["forward_kl"] += (t.exp() * (t - s)).sum().item()
        sums["top1_agreement"] += (s.argmax(-1) == t.argmax(-1)).sum().item()
        sums["overlap"] += torch.minimum(s.exp(), t.exp()).sum().item()
        sums["student_entropy"] -= (s.exp() * s).sum().item()
        sums["teacher_entropy"] -= (t.exp() * t).sum().item()
        sums["tokens"] += len(s)
    return {name: total / sums["tokens"] for name, total in sums.items() if name != "tokens"} | {
        "tokens": sums["tokens"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="teacher, student and prompts")
    parser.add_argument("--seconds", type=float, default=240, help="training time; evaluation is not counted")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--student", default="student24", help="its folder in --data")
    parser.add_argument("--prompts", default="questions", help="NAME.jsonl and NAME_heldout.jsonl in --data")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of teacher, sampling and autocast")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", type=int, default=64, help="how many held-out prompts to evaluate")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.data / args.student)
    student = AutoModelForCausalLM.from_pretrained(args.data / args.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(args.data / "teacher", dtype=DTYPES[args.dtype]).eval()
    prompts = read_prompts(args.data / f"{args.prompts}.jsonl", tokenizer)
    heldout = read_prompts(args.data / f"{args.prompts}_heldout.jsonl", tokenizer)[: args.heldout]

    settings = {"batch": args.batch, "lr": args.lr, "seed": args.seed, "threads": torch.get_num_threads()}
    result: dict[str, Any] = {"settings": settings}
    teacher_texts = rollouts(teacher, tokenizer, heldout)
    told = greedy_answers(teacher, tokenizer, heldout)

    def evaluate() -> dict[str, Any]:
        own = rollouts(student, tokenizer, heldout)
        answers = greedy_answers(student, tokenizer, heldout)
        texts = {"own": own, "teacher": teacher_texts}
        return {
            **{name: compare(student, teacher, text) for name, text in texts.items()},
            "answers": compare_answers(heldout, answers, told).flat(),
            "examples": answers[:3],
        }

    result["before"] = evaluate()
    result["train"] = train(student, teacher, tokenizer, prompts, args)
    result["after"] = evaluate()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
