"""One launch of the distribution test: trains tiny students and writes what it saw as JSON, for the test to compare.

    accelerate launch --config_file recipes/accelerate/zero3.yaml -m tests.distributed.worker OUT.json FOLDER [ONE]

The same four runs (tied or untied embeddings; the dataset's completions, or the student's own greedy ones) at the same
global batch, however many processes share it. Everything is drawn from seeds; nothing is read from disk. ONE is the
folder of the launch of one process, which one run also goes on from.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from llmdistill import Ask, DistillationConfig, DistillationTrainer, Method, RolloutConfig, Term
from llmdistill.compat import fsdp
from llmdistill.models.weights import named_weights
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.recipe.launches import leave_group, whole_models
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts.sources import Only
from tests.alive import counted

RUNS = ("tied/dataset", "tied/student", "untied/dataset", "untied/student")  # of them FSDP2 has the first and the last
VOCAB, PROMPTS, STEPS, GLOBAL_BATCH, ACCUMULATION = 120, 16, 4, 8, 2


def main(out: Path, folder: Path, one: Path | None = None) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # Its shared-memory all-reduce would be compiled first, for a minute; gloo's sums are the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results: dict[str, Any] = {}
    for run in RUNS[:1] + RUNS[3:] if os.environ.get("ACCELERATE_USE_FSDP") == "true" else RUNS:
        tied, on_policy = run.startswith("tied/"), run.endswith("/student")
        results[run] = one_run(folder, tied, on_policy)
    if one is not None:
        results["from one process"] = gone_on(folder / "from-one", one / "tied-dataset", one / "tied-dataset")
    if int(os.environ.get("RANK", 0)) == 0:
        out.write_text(json.dumps(results))


def one_run(folder: Path, tied: bool, on_policy: bool) -> dict[str, Any]:
    """Losses of an undisturbed run and of one resumed in the middle, metrics, and whether the saved model is it."""
    folder = folder / f"{'tied' if tied else 'untied'}-{'student' if on_policy else 'dataset'}"
    trainer = make_trainer(folder, tied, on_policy)
    before = trainer.evaluate()
    trainer.train()
    fsdp.shard_again(trainer.model)
    parts = [p.to_local() if fsdp.is_shard(p) else getattr(p, "ds_tensor", p) for p in trainer.model.parameters()]
    numel = [part.numel() for part in parts]
    evaluated = trainer.evaluate()
    with counted() as alive:
        trainer.save_model(str(folder / "final"))
    difference = saved_difference(trainer, folder / "final")
    logged = [line for line in trainer.state.log_history if "loss" in line]
    resumed, start = make_trainer(folder, tied, on_policy), Start()
    resumed.add_callback(start)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plugin = trainer.accelerator.state.deepspeed_plugin
    return {
        "processes": trainer.accelerator.num_processes,
        "zero_stage": None if plugin is None else plugin.zero_stage,
        "losses": [line["loss"] for line in logged],
        "resumed_at": start.step,
        "resumed": [line["loss"] for line in resumed.state.log_history if "loss" in line],
        "logged": logged,
        "evaluated": [before, evaluated],
        "local_parameters": sum(numel),
        "saved_difference": difference,
        "saved_alive": [alive.most, alive.all, alive.largest],
        "saved_files": len(list((folder / "final").glob("*.safetensors"))),
        "steps_in_file": [line["step"] for line in lines if "loss" in line],
    }


def gone_on(folder: Path, run: Path, one: Path) -> dict[str, Any]:
    """The run ``tied/dataset``, resumed in the middle of what may have been another launch's. In the end that is taken
    for its best checkpoint: how far it then is from the same one of ``one``, which one process wrote."""
    resumed, start = make_trainer(folder, True, False), Start()
    resumed.add_callback(start)
    resumed.train(resume_from_checkpoint=str(run / f"checkpoint-{STEPS // 2}"))
    logged = [line for line in resumed.state.log_history if "loss" in line and line["step"] > start.step]
    resumed.evaluate()
    resumed.state.best_model_checkpoint = str(run / f"checkpoint-{STEPS // 2}")
    resumed._load_best_model()
    best = saved_difference(resumed, one / f"checkpoint-{STEPS // 2}")
    return {"resumed_at": start.step, "logged": logged, "best": best}


class Start(TrainerCallback):
    """Notes the step at which training began."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def make_trainer(folder: Path, tied: bool, on_policy: bool) -> DistillationTrainer:
    world = int(os.environ.get("WORLD_SIZE", 1))
    args = DistillationConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        learning_rate=1e-2,
        # Passes of so many sequences, or of so many tokens: then another number of them in each process and step.
        per_device_train_batch_size=GLOBAL_BATCH // (ACCUMULATION if tied else 1) // world,
        gradient_accumulation_steps=ACCUMULATION if tied else 1,
        batch_tokens=0 if tied else 48,
        packing=world > 1 and not tied,  # padded or packed is the same
        per_device_eval_batch_size=2,
        heldout_sequences=5,  # not a multiple of the processes: one of them repeats a sequence that must not count
        rollouts=RolloutConfig(max_new_tokens=12, temperature=0),
        chunk_tokens=16,  # several chunks a micro-batch
        seed=3,
    )
    tokenizer = make_tokenizer()
    teacher = LocalTeacher(make_model(1, hidden=48, tied=False), tokenizer)
    student = make_model(0, hidden=32, tied=tied)
    if (
        not on_policy
    ):  # by way of the disk, where ZeRO-3 shards while loading; the other way it shards when training begins
        with args.main_process_first(local=False):
            if args.process_index == 0:
                student.save_pretrained(folder / "start")
        student = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    trainer = DistillationTrainer(
        student,
        args,
        teacher,
        method=Method(Term("divergence", reverse_kl, (Ask(),)), {"main": Only("student" if on_policy else "dataset")}),
        train_dataset=make_rows(PROMPTS, 5),
        eval_dataset=make_rows(5, 6),
        processing_class=tokenizer,
    )
    # evaluate() samples at temperature 1 from a stream per process; greedy, it does not depend on their number.
    for sampler in (trainer.rollout_engine, teacher):
        sampler.generate = greedily(sampler.generate)  # type: ignore[method-assign]
    return trainer


def greedily(generate: Any) -> Any:
    return lambda prompts, sampling: generate(prompts, replace(sampling, temperature=0.0))


def make_model(seed: int, *, hidden: int, tied: bool, head_dim: int | None = None) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim or hidden // 4,
        tie_word_embeddings=tied,
        # Wide enough that rounding flips no greedy choice between two ways of adding up the same sum.
        initializer_range=0.2,
        eos_token_id=list(range(2, 22)),  # a sixth of the ids, so that greedy completions differ in length
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0", unk_token="t1", eos_token="t2")
    fast.chat_template = "{% for m in messages %}t3 {{ m['content'] }} {% endfor %}t4"
    return fast


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts of 3 to 8 tokens and completions of 1 to 15: the processes' counts of tokens differ."""
    g = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        n = int(torch.randint(low, high, (), generator=g))
        return " ".join(f"t{i}" for i in torch.randint(22, VOCAB, (n,), generator=g).tolist())

    return [{"prompt": text(3, 9), "completion": text(1, 16)} for _ in range(count)]


def saved_difference(trainer: DistillationTrainer, folder: Path) -> float:
    """Largest difference between the trained weights and those ``from_pretrained`` reads back."""
    trained = {name: tensor.clone() for name, tensor in named_weights(trainer.model)}
    trainer.accelerator.wait_for_everyone()
    with whole_models():
        saved = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    assert saved.keys() == trained.keys(), saved.keys() ^ trained.keys()
    return max(float((saved[name] - trained[name]).abs().max()) for name in trained)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    leave_group()
