"""Run by test_estimate.py in a process of its own: what three runs take, beside what the estimate says of them.

Prints a JSON line for each: estimated and measured MiB. Measured is the peak of the resident set less what it was
before, after a first tiny run that loads all code.
"""

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.preflight.estimate import Shape, of_shapes
from llmdistill.teachers.local import LocalTeacher
from tests import tiny

MIB = 2**20


def memory(what: str) -> int:
    """VmRSS, or VmHWM: the peak since it was last set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def config(cls, hidden, mlp, layers, heads, columns):
    return cls(
        vocab_size=columns,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )


def run(student, teacher, batch, prompt, new, accumulation) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        args = OPDConfig(
            output_dir=folder,
            max_steps=2,
            logging_steps=100,
            save_strategy="no",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            rollouts=RolloutConfig(max_new_tokens=new, ignore_eos=True),
        )
        rows = [{"prompt": "x" * prompt} for _ in range(4 * batch * accumulation)]
        shapes = Shape.of_config(student), (Shape.of_config(teacher), 4, 16384)
        estimate = of_shapes(args, shapes[0], [shapes[1]], longest_prompt=prompt)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        torch.manual_seed(0)
        models = [(LlamaForCausalLM if type(c) is LlamaConfig else Qwen3ForCausalLM)(c) for c in (student, teacher)]
        judge = LocalTeacher(models[1], tiny.tokenizer(None))
        trainer = OPDTrainer(
            models[0], args, judge, train_dataset=rows, processing_class=tiny.tokenizer(None), preflight=False
        )
        trainer.train()
        measured = memory("VmHWM") - before
    items = {name: round(size / MIB) for name, size in estimate.items.items()}
    return {"estimated": estimate.peak / MIB, "measured": measured / MIB, "at": estimate.at, "items": items}


if __name__ == "__main__":
    torch.set_num_threads(1)
    small = config(LlamaConfig, 32, 64, 2, 2, 264)
    run(small, small, 2, 8, 4, 1)
    SHAPES = {
        "weights": (
            config(LlamaConfig, 768, 2048, 7, 12, 264),
            config(LlamaConfig, 1024, 2048, 5, 8, 264),
            1,
            16,
            4,
            2,
        ),
        "activations": (
            config(Qwen3Config, 192, 512, 6, 4, 264),
            config(LlamaConfig, 64, 128, 2, 2, 264),
            8,
            400,
            4,
            1,
        ),
        "logits": (
            config(LlamaConfig, 64, 128, 2, 2, 150_000),
            config(LlamaConfig, 64, 128, 2, 2, 150_000),
            8,
            8,
            24,
            1,
        ),
    }
    for name in sys.argv[1:] or SHAPES:
        print(json.dumps({"shape": name, **run(*SHAPES[name])}), flush=True)
