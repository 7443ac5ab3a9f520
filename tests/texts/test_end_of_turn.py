"""A student that was trained on chats ends its turn, with the template's token, and generation stops there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from llmdistill import DataConfig, OPDConfig, OPDTrainer, redi
from llmdistill.redi import REDIConfig, REDITrainer
from llmdistill.texts.pairs import collate_pairs, pair_encoder
from llmdistill.texts.prompts import PromptEncoder
from tests import tiny
from tests.redi_runs import student
from tests.texts import quirks

ROWS = [{"prompt": [{"role": "user", "content": f"{i}+0"}], "chosen": str(i), "rejected": "no"} for i in range(8)]
END = "<|im_end|>"


def place(folder: Path, tokenizer: Any) -> Path:
    tiny.llama(1, vocab=288).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def end_of_turn(folder: Path) -> float:
    """Smallest probability of the end of turn behind the prompts and their answers."""
    model, tokenizer = student(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in ROWS:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + row["chosen"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            p = model(ids).logits[0, -1].softmax(-1)
        found.append(float(p[tokenizer.convert_tokens_to_ids(END)]))
    return min(found)


def words(folder: Path, run: Path, **settings: Any) -> list[str]:
    given = {
        **{"student.model": folder / "student", "data.train": folder / "rows.jsonl", "output_dir": run},
        **{"stage1_steps": 16, "stage1_batch_size": 8, "stage1_learning_rate": 1e-2, **settings},
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("as_eos", [False, True], ids=["base", "end_is_eos_and_pad"])
def test_redi_sft_teaches_the_end_of_turn_and_the_saved_student_stops_there(as_eos: bool, tmp_path: Path) -> None:
    """The tokenizer's eos of a base model ends documents; as eos and pad at once, the end of turn still counts."""
    tokenizer = quirks.byte_level(quirks.CHATML)
    if as_eos:
        tokenizer.eos_token = tokenizer.pad_token = END
    folder, end = place(tmp_path, tokenizer), tokenizer.convert_tokens_to_ids(END)
    before = end_of_turn(folder / "student")
    redi.main(words(folder, tmp_path / "run", method="sft"))
    saved = tmp_path / "run" / "student"
    assert before < 0.1 and end_of_turn(saved) > 0.5
    eos = student(saved).generation_config.eos_token_id
    assert end in (eos if isinstance(eos, list) else [eos])


def test_a_preference_stage_keeps_the_end_of_turn(tmp_path: Path) -> None:
    folder = place(tmp_path, quirks.byte_level(quirks.CHATML))
    redi.main(words(folder, tmp_path / "run", max_steps=2, per_device_train_batch_size=4, learning_rate=1e-4))
    assert end_of_turn(tmp_path / "run" / "student") > 0.3
    assert student(tmp_path / "run" / "student").generation_config.eos_token_id == [1, 4]


def test_trainers_end_where_the_template_does(tmp_path: Path) -> None:
    """From Python too; where no completion of a template is trained on, nothing is changed."""
    tokenizer = quirks.byte_level(quirks.CHATML)
    end = tokenizer.convert_tokens_to_ids(END)
    rows = [{**row, "completion": row["chosen"]} for row in ROWS]
    for kind, expected in (("dataset", (1, end)), ("student", (1,))):
        args = OPDConfig(output_dir=str(tmp_path), sequences=kind, max_steps=1)
        model = tiny.llama(1, vocab=288)
        opd = OPDTrainer(model, args, tiny.llama(2, vocab=288), train_dataset=rows, processing_class=tokenizer)
        assert opd.eos_ids == expected
        assert model.generation_config.eos_token_id == (1 if kind == "student" else [1, end])
    pairs = REDITrainer(
        tiny.llama(1, vocab=288), REDIConfig(output_dir=str(tmp_path)), train_dataset=ROWS, processing_class=tokenizer
    )
    assert pairs.eos_ids == (1, end)


def test_a_template_without_an_end_of_turn_changes_no_ids() -> None:
    tokenizer = tiny.tokenizer()
    encoder = PromptEncoder(tokenizer, DataConfig())
    (p,) = encoder.encode_all(tiny.rows(1), completions=True)
    assert p.completion[-1] == tokenizer.eos_token_id and not encoder.ends


def test_the_stages_of_trl_train_what_the_generation_tags_mark() -> None:
    """Of the fine-tuning stage and of DPO: the header that the template writes before an answer is read only."""
    from llmdistill.pipeline import redi_trl

    tokenizer = quirks.byte_level(quirks.TAGGED)
    pairs = pair_encoder(tokenizer, DataConfig()).encode_all(ROWS, "rows")
    row, pair = redi_trl._chosen_sides(pairs)[3], pairs[3]
    counted = [i for i, c in zip(row["input_ids"], row["completion_mask"], strict=True) if c]
    assert tokenizer.decode(counted) == "3<|im_end|>" and len(row["input_ids"]) == len(row["completion_mask"])
    again = redi_trl._pair(redi_trl._as_dataset(pairs)[3])
    assert (again.chosen, again.chosen_counts) == (pair.chosen, pair.chosen_counts)
    assert tokenizer.decode(collate_pairs([again], 0).token_rows().tolist()) == "3<|im_end|>no<|im_end|>"
