"""What is saved is what was trained, and what cannot be saved is said before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, UserError, opd, redi
from llmdistill.models import saving
from llmdistill.models.adapters import adapted
from llmdistill.models.loading import load_model
from llmdistill.models.weights import base_model
from tests import tiny
from tests.students.architectures import small
from tests.students.multimodal import wrapped
from tests.test_weights import lora

# Image-text classes whose checkpoints have other names than the model; experts that memory holds fused and a
# checkpoint one by one; layers of other kinds; factors behind the head.
DOZEN = ["gemma3", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoehybrid", "falcon_h1", "recurrent_gemma"]
DOZEN += ["llama4_text", "gpt2", "rwkv", "minicpm3"]


def model_of(architecture: str, seed: int = 0) -> Any:
    return wrapped(architecture, seed) if architecture == "gemma3" else small(architecture, seed)


def logits(model: Any) -> torch.Tensor:
    return saving.logits_on_few_tokens(model, model)


def reloaded(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.mark.parametrize("architecture", DOZEN)
def test_a_lora_student_of_all_linear_layers_comes_back_as_it_was(architecture: str, tmp_path: Path) -> None:
    student: Any = adapted(model_of(architecture), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = logits(student)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    trained = logits(student)
    assert saving.relative_distance(trained, before) > 0.1  # there is something to lose
    saving.check_savable(student, tiny.tokenizer())
    saving.save_student(student, tmp_path, tiny.tokenizer())
    torch.testing.assert_close(reloaded(tmp_path), trained, rtol=1e-4, atol=1e-5)
    assert saving.differs_from(trained, tmp_path, student) is None


def test_single_tokens_that_are_trained_come_back(tmp_path: Path) -> None:
    """peft's trainable_token_indices: rows of the embedding, kept apart from it."""
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[9, 16], task_type="CAUSAL_LM")
    student: Any = adapted(tiny.llama(1, tied=False), config)
    before = logits(student)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    saving.check_savable(student, tiny.tokenizer())
    saving.save_student(student, tmp_path, tiny.tokenizer())
    assert saving.relative_distance(logits(student), before) > 0.1
    torch.testing.assert_close(reloaded(tmp_path), logits(student))


@pytest.mark.parametrize("damage", ["another", "lost", "broken"])
def test_a_student_that_comes_back_otherwise_is_noticed(damage: str, tmp_path: Path) -> None:
    student = tiny.llama(0, tied=False)
    trained = logits(student)
    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if damage == "another":
        weights["model.layers.1.mlp.down_proj.weight"] *= -1
    elif damage == "lost":
        del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if damage == "broken":
        (tmp_path / "model.safetensors").write_bytes(b"0")
    problem = saving.differs_from(trained, tmp_path, student)
    said = {"another": "another model", "lost": "1 weights were not found, such as model.layers.1.mlp.down_proj"}
    assert problem is not None and said.get(damage, "cannot be loaded again") in problem
    assert "--skip-check saved-student" in problem


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving that loses something on its way to the disk."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def losing(self: Any, folder: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        state = dict(self.state_dict() if state_dict is None else state_dict)
        state = {name: 1.5 * tensor if "down_proj" in name else tensor for name, tensor in state.items()}
        save(self, folder, *args, state_dict=state, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", losing)


def test_a_run_ends_with_an_error_where_its_student_is_another(
    command: list[str], tmp_path: Path, spoiled: None
) -> None:
    with pytest.raises(UserError, match="student is another model than was trained"):
        opd.main(command)
    assert (tmp_path / "run" / "summary.json").is_file()  # what was measured is kept
    assert opd.main([*command, "--skip-check", "saved-student"]) == 0


# ---------------------------------------------------------------- a run with an adapter


def test_what_student_holds_is_a_choice(command: list[str], tiny_run: Path, tmp_path: Path) -> None:
    words = [*command, "--student.lora_r", "4", "--learning_rate", "0.01"]
    assert opd.main(words) == 0
    whole = reloaded(tmp_path / "run" / "student")
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert opd.main([*words, "--student.saved_as", "adapter", "--output_dir", str(tmp_path / "other")]) == 0
    assert not list((tmp_path / "other" / "student").glob("model*"))
    base = AutoModelForCausalLM.from_pretrained(tiny_run / "student", dtype=torch.float32)
    adapter = PeftModel.from_pretrained(base, str(tmp_path / "other" / "student")).eval()
    torch.testing.assert_close(logits(adapter), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="student.saved_as is 'adapter'"):
        opd.main([*command, "--student.saved_as", "adapter"])


@pytest.fixture
def adapter_folder(tiny_run: Path, tmp_path: Path) -> Path:
    """An adapter on the student, as fine-tuning leaves it."""
    adapter = lora(AutoModelForCausalLM.from_pretrained(tiny_run / "student", dtype=torch.float32))
    adapter.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_student_that_is_an_adapter_is_merged_and_trained_from_there(
    lora_r: int, adapter_folder: Path, tiny_run: Path, command: list[str], tmp_path: Path, caplog: Any
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_run / "student", dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, str(adapter_folder)).eval())
    words = [*command, "--student.model", str(adapter_folder), "--student.lora_r", str(lora_r)]
    # A learning rate at which no float32 weight moves: what is saved is what was given.
    assert opd.main([*words, "--learning_rate", "1e-30"]) == 0
    torch.testing.assert_close(reloaded(tmp_path / "run" / "student"), expected, rtol=1e-4, atol=1e-5)
    assert "is an adapter of" in caplog.text and "merged into it" in caplog.text


@pytest.mark.parametrize(("architecture", "lora_r"), [("qwen2_5_vl", 0), ("llava", 4), ("mllama", 4)])
def test_a_class_of_several_modalities_from_a_recipe(
    architecture: str, lora_r: int, command: list[str], tmp_path: Path
) -> None:
    """No causal language model to transformers: its checkpoint goes in, is trained on text and comes out whole."""
    model = wrapped(architecture)
    model.save_pretrained(tmp_path / "whole")
    tiny.tokenizer().save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "preprocessor_config.json").write_text("{}")
    words = [*command, "--student.model", str(tmp_path / "whole"), "--student.lora_r", str(lora_r)]
    assert opd.main([*words, "--learning_rate", "0.01"]) == 0  # which compares what it saved
    saved, _ = load_model(str(tmp_path / "run" / "student"), "float32", "student")
    assert type(saved) is type(model)
    assert saving.relative_distance(logits(saved.eval()), logits(model)) > 1e-2
    assert (tmp_path / "run" / "student" / "preprocessor_config.json").read_text() == "{}"


@pytest.mark.parametrize("saved_as", ["merged", "adapter"])
def test_an_adapter_is_trained_on(
    saved_as: str, adapter_folder: Path, tiny_run: Path, command: list[str], tmp_path: Path, caplog: Any
) -> None:
    """The adapter that was given goes on from where it was, on the same base; nothing else is trained."""
    base = AutoModelForCausalLM.from_pretrained(tiny_run / "student", dtype=torch.float32)
    given = logits(PeftModel.from_pretrained(base, str(adapter_folder)).eval())
    words = [*command, "--student.model", str(adapter_folder), "--student.adapter", "continue"]
    words += ["--student.saved_as", saved_as]
    assert opd.main([*words, "--learning_rate", "1e-30"]) == 0  # at which no float32 weight moves
    student = tmp_path / "run" / "student"
    torch.testing.assert_close(logits(load_model(str(student), "float32", "student")[0].eval()), given)
    assert opd.main([*words, "--learning_rate", "0.01"]) == 0
    kept = student if saved_as == "adapter" else tmp_path / "run" / "adapter"
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter_folder, kept))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    base = AutoModelForCausalLM.from_pretrained(tiny_run / "student", dtype=torch.float32)
    trained = logits(PeftModel.from_pretrained(base, str(kept)).eval())
    torch.testing.assert_close(logits(load_model(str(student), "float32", "student")[0].eval()), trained)
    assert "it is trained on" in caplog.text


def test_training_on_an_adapter_needs_one_and_no_other(
    adapter_folder: Path, command: list[str], tiny_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="student.adapter is continue, and student.model .* is no adapter. Fix"):
        opd.main([*command, "--student.adapter", "continue"])
    words = ["--student.model", str(adapter_folder), "--student.adapter", "continue"]
    with pytest.raises(UserError, match="student.lora_r is 4; it must be 0 where student.adapter is continue"):
        opd.main([*command, *words, "--student.lora_r", "4"])
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1+1", "chosen": "2", "rejected": "3"}\n')
    with pytest.raises(UserError, match="student.adapter is continue, and stage 2 starts from the whole weights"):
        redi.main([*words, "--data.train", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "run")])


def test_an_adapter_is_not_kept_apart_from_another(adapter_folder: Path, command: list[str]) -> None:
    words = ["--student.model", str(adapter_folder), "--student.lora_r", "4", "--student.saved_as", "adapter"]
    with pytest.raises(UserError, match="an adapter of .* itself"):
        opd.main([*command, *words])


def test_a_model_from_an_adapter_is_wholly_trained(adapter_folder: Path) -> None:
    model, _ = load_model(str(adapter_folder), "float32", "student")
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    """transformers would make them up, and say so in a log."""
    tiny.llama(1).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights of LlamaForCausalLM, such as model.layers.1.mlp.down_proj"):
        load_model(str(tmp_path), "float32", "student")


def test_an_adapter_without_its_base_is_refused(adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no model as its base_model_name_or_path"):
        load_model(str(adapter_folder), "float32", "student")
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "/no/such/folder"}))
    with pytest.raises(UserError, match="an adapter of '/no/such/folder', cannot be loaded: there is no such folder"):
        load_model(str(adapter_folder), "float32", "student")


def test_a_tokenizer_apart_from_the_models(command: list[str], tiny_run: Path, tmp_path: Path) -> None:
    for name in ("student", "teacher"):
        AutoModelForCausalLM.from_pretrained(tiny_run / name).save_pretrained(tmp_path / name)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    bare = ["--student.model", str(tmp_path / "student"), "--teacher.model", str(tmp_path / "teacher")]
    with pytest.raises(UserError, match="student.model"):
        opd.main([*command, *bare])
    tokenizers = [
        word for side in ("student", "teacher") for word in (f"--{side}.tokenizer", str(tmp_path / "tokenizer"))
    ]
    assert opd.main([*command, *bare, *tokenizers]) == 0


def test_a_revision_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmdistill.models import loading

    asked = []

    def refused(path: str, **options: Any) -> Any:
        asked.append(options.get("revision"))
        raise OSError("no hub here")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", refused)
    with pytest.raises(UserError, match="no hub here"):
        load_model("owner/model", "float32", "student", revision="v1.2")
    assert asked == ["v1.2"]


# ---------------------------------------------------------------- refused before the first step


def trainer(student: Any, tmp_path: Path, **kwargs: Any) -> OPDTrainer:
    args = OPDConfig(output_dir=str(tmp_path / "run"), max_steps=1, rollouts=RolloutConfig(max_new_tokens=4))
    rows = tiny.rows(4, completion=False)
    tokenizer = tiny.tokenizer()
    return OPDTrainer(student, args, tiny.llama(2), train_dataset=rows, processing_class=tokenizer, **kwargs)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is adapted"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is adapted"),
    "saved head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head is adapted"),
    "saved embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "embed_tokens is adapted"),
    "nothing": ({"target_modules": ["no_such_layer"]}, "peft cannot adapt LlamaForCausalLM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_no_checkpoint_can_hold(case: str, tmp_path: Path) -> None:
    settings, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        trainer(tiny.llama(1), tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM", **settings))


def test_an_adapted_head_of_its_own(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="distillation needs a plain linear head"):
        trainer(tiny.llama(1, tied=False), tmp_path, peft_config=config)


def test_trained_prompts(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UserError, match="PROMPT_TUNING, which trains no weights"):
        trainer(tiny.llama(1), tmp_path, peft_config=config)
    with pytest.raises(UserError, match="PROMPT_TUNING, which trains no weights"):
        trainer(get_peft_model(tiny.llama(1), config), tmp_path)


def test_an_adapter_upon_an_adapter(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(UserError, match="has the adapter default already"):
        trainer(get_peft_model(tiny.llama(1), config), tmp_path, peft_config=config)


def test_a_model_that_from_pretrained_put_an_adapter_into(adapter_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was loaded from an adapter's folder"):
        trainer(AutoModelForCausalLM.from_pretrained(adapter_folder), tmp_path)


def test_redi_refuses_them_before_stage_1(tiny_run: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i}+{i}", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    words = ["--student.model", str(tiny_run / "student"), "--data.train", str(tmp_path / "pairs.jsonl")]
    adapter = ["--student.lora_r", "4", "--student.lora_target_modules", "embed_tokens"]
    with pytest.raises(UserError, match="embed_tokens is adapted"):
        redi.main([*words, *adapter, "--stage1_steps", "1", "--max_steps", "1", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "stage1" / "student").exists()


# ---------------------------------------------------------------- generation settings


@pytest.mark.parametrize(
    ("settings", "sampled"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, True),  # Llama-2's
        ({"top_k": 20}, True),
        ({"do_sample": True, "temperature": 0.7}, True),  # nothing to mend
        ({"temperature": 0.7, "num_return_sequences": 3}, True),
        ({"early_stopping": True}, False),
    ],
)
def test_generation_settings_are_mended(settings: dict[str, Any], sampled: bool, tmp_path: Path) -> None:
    student = tiny.llama(1)
    for name, value in settings.items():
        setattr(student.generation_config, name, value)
    saving.check_savable(student, tiny.tokenizer())
    student.save_pretrained(tmp_path)
    assert bool(student.generation_config.do_sample) == sampled
    if sampled:
        assert all(getattr(student.generation_config, name) == value for name, value in settings.items())


def test_generation_settings_in_old_places_are_moved(tmp_path: Path) -> None:
    """In the model's config, and a pad id that means none."""
    student = tiny.llama(1)
    student.config.temperature, student.config.top_p = 0.7, 0.5
    student.generation_config.pad_token_id = -1
    saving.check_savable(student, tiny.tokenizer())
    student.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (saved.generation_config.temperature, saved.generation_config.top_p) == (0.7, 0.5)
    assert saved.generation_config.do_sample and saved.generation_config.pad_token_id is None
    assert not hasattr(saved.config, "temperature") and torch.equal(logits(saved.eval()), logits(student))


def test_a_run_with_generation_settings_of_the_llama_2_era(command: list[str], tiny_run: Path, tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_run / "student")
    student.save_pretrained(tmp_path / "old")
    tiny.tokenizer().save_pretrained(tmp_path / "old")
    old = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1, "pad_token_id": 0}
    (tmp_path / "old" / "generation_config.json").write_text(json.dumps(old))
    words = [*command, "--student.model", str(tmp_path / "old"), "--save_strategy", "steps", "--save_steps", "1"]
    assert opd.main(words) == 0
    saved = json.loads((tmp_path / "run" / "student" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.9 and saved["do_sample"] is True


def test_what_cannot_be_saved_is_said_before_training(tmp_path: Path) -> None:
    student = tiny.llama(1)
    student.config.strange = object()
    with pytest.raises(UserError, match="cannot be saved: TypeError"):
        trainer(student, tmp_path)


def test_saving_into_nothing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    student = tiny.llama(1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    saving.check_savable(student, tiny.tokenizer())
    assert not list(tmp_path.rglob("*"))
    assert all(torch.equal(before[name], tensor) for name, tensor in base_model(student).state_dict().items())
