"""Run by test_base_environment.py in a process of its own, where the packages beyond the training core are not there.

`python tests/base_environment.py FOLDER`: OPD from Python lists without rich and pyarrow as well; then the front door
with both, from a file of JSON lines. Two steps each, with transformers' generate.
"""

import builtins
import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path

# What our pyproject.toml names, beyond torch, transformers, accelerate, safetensors, numpy and pyyaml.
EXTRAS = {
    *("trl", "peft", "datasets", "vllm", "deepspeed", "fastapi", "starlette", "uvicorn", "pydantic"),
    *("prometheus_client", "gguf", "reasoning_gym", "evaluate", "rapidfuzz", "py3langid", "math_verify", "ninja"),
    *("triton", "pandas"),
}
hidden = EXTRAS | {"rich", "pyarrow"}
real_import = builtins.__import__


class Finder(PathFinder):
    """As if what is hidden had not been installed."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in hidden else super().find_spec(fullname, path, target)


def importing(name, globals=None, *rest, **more):
    """transformers' hub client needs httpx, so it is always there; the training core does not import it."""
    if name.partition(".")[0] == "httpx" and str((globals or {}).get("__name__", "")).startswith("llmdistill"):
        raise ModuleNotFoundError("No module named 'httpx'")
    return real_import(name, globals, *rest, **more)


sys.meta_path[:] = [
    Finder if finder is PathFinder else finder for finder in sys.meta_path if "editable" not in str(finder)
]
sys.path.insert(0, str(Path(__file__).parents[1]))
builtins.__import__ = importing
assert not hidden & sys.modules.keys(), hidden & sys.modules.keys()


def lines_of(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def main(folder: Path) -> None:
    from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, opd
    from tests import tiny

    assert "transformers.hf_argparser" not in sys.modules
    common = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    args = OPDConfig(output_dir=str(folder / "lists"), rollouts=RolloutConfig(max_new_tokens=4), **common)
    trainer = OPDTrainer(
        tiny.llama(1), args, tiny.llama(2), train_dataset=tiny.rows(8), processing_class=tiny.tokenizer()
    )
    trainer.train()
    assert lines_of(folder / "lists") == [1, 2]
    assert list((folder / "lists" / "completions").glob("step-*.jsonl"))

    hidden.difference_update({"rich", "pyarrow"})
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny.llama(seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(8)))
    words = ["--student.model", str(folder / "student"), "--teacher.model", str(folder / "teacher")]
    words += ["--teacher.dtype", "float32", "--data.train", str(folder / "rows.jsonl"), "--max_new_tokens", "4"]
    words += [word for key, value in common.items() for word in (f"--{key}", str(value))]
    assert opd.main([*words, "--output_dir", str(folder / "file")]) == 0
    assert lines_of(folder / "file") == [1, 2] and (folder / "file" / "report.html").is_file()
    there = {name.partition(".")[0] for name in sys.modules} & EXTRAS
    assert not there, there


if __name__ == "__main__":
    main(Path(sys.argv[1]))
