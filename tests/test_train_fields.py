"""Every field of transformers' TrainingArguments is read or refused, the same from Python as from a recipe."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from llmdistill import OPDConfig, OPDTrainer, TAIDConfig, UserError
from llmdistill.diffusion.stages import SFTConfig
from llmdistill.methods.redi_config import REDIConfig
from llmdistill.recipe import train_fields
from llmdistill.recipe.command_line import parse
from llmdistill.recipe.train_fields import READ, REFUSED
from tests import tiny

DOCS = Path(__file__).parent.parent / "docs" / "settings.md"


def test_the_list_is_that_of_the_installed_transformers() -> None:
    """A field that a newer transformers adds, or one that is gone, fails here and is looked at."""
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert READ | set(REFUSED) == names
    assert not READ & set(REFUSED)


def test_defaults_are_accepted_and_the_docs_name_what_is_refused(tmp_path: Path) -> None:
    args = OPDConfig(output_dir=str(tmp_path))
    for name, refused in REFUSED.items():
        assert getattr(args, name) in refused.accepted
    text = DOCS.read_text()
    assert not [name for name in REFUSED if f"`{name}`" not in text]


OTHER: dict[str, Any] = {  # of fields whose values are no truth values
    "label_smoothing_factor": 0.1,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "len",
    "parallelism_config": {"tp_size": 2},
    "local_rank": 3,
    "hub_token": "hf_secret",
    "hub_strategy": "end",
    "hub_model_id": "me/mine",
    "hub_revision": "main",
    "hub_private_repo": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_reads_is_refused(tmp_path: Path, name: str) -> None:
    value = OTHER.get(name, not REFUSED[name].accepted[0])
    with pytest.raises(UserError) as error:
        OPDConfig(output_dir=str(tmp_path), **{name: value})
    said = str(error.value)
    assert said.startswith(f"train.{name} is ") and "Fix: " in said and "\n" not in said and "hf_secret" not in said


@pytest.mark.parametrize("config", [OPDConfig, TAIDConfig, REDIConfig, SFTConfig])
def test_every_front_door_refuses_it(tmp_path: Path, config: Any) -> None:
    with pytest.raises(UserError, match=r"train\.label_smoothing_factor is 0\.1"):
        config(output_dir=str(tmp_path), label_smoothing_factor=0.1)
    with pytest.raises(UserError, match=r"train\.push_to_hub is True"):
        parse(config, ["--push_to_hub", "true", "--output_dir", str(tmp_path)])


def test_a_field_that_nobody_knows_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a transformers that is newer than what was tried: here, one that is taken off the list."""
    monkeypatch.setattr(train_fields, "READ", READ - {"data_seed"})
    with pytest.warns(UserWarning, match=r"train\.data_seed is 3, .* was not tried with"):
        OPDConfig(output_dir=str(tmp_path), data_seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OPDConfig(output_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--report_to foo", "train.report_to is 'foo'; it must be none, or of "),
        ("--report_to wandb", "the package wandb is not installed. Fix: pip install wandb"),
        ("--report_to tensorboard", "the package tensorboard is not installed"),
        ("--optim adamw_8bit", "train.optim is adamw_8bit, whose memory is in blocks"),
        ("--optim galore_adamw --optim_target_modules q_proj", "the package galore-torch is not installed"),
        ("--optim lomo", "which moves weights within the backward pass"),
        ("--optim schedule_free_adamw", "trains at other weights than those to be used"),
        ("--optim sgd --optim_args momentum=x", "train.optim sgd cannot be made: could not convert"),
        ("--optim_args betas=1", "train.optim_args is betas=1, and train.optim adamw_torch_fused does not read it"),
        ("--optim_target_modules q_proj", "train.optim_target_modules is q_proj, and train.optim"),
        ("--adam_beta1 2", "cannot be made: Invalid beta parameter"),
        ("--optim paged_adamw_32bit", "train.optim is paged_adamw_32bit, whose memory is in blocks"),
        ("--use_liger_kernel", "train.use_liger_kernel is True, and nothing here reads it: Liger's layers were not"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr or min_lr_rate should be set"),
        ("--lr_scheduler_type warmup_stable_decay", "missing 1 required positional argument: 'num_decay_steps'"),
        ('--lr_scheduler_kwargs {"foo":1}', "unexpected keyword argument 'foo'"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "which goes by what evaluations measure"),
        ("--save_strategy best", "nothing would ever be the best, nor saved"),
        ("--load_best_model_at_end", "no checkpoint would be the best"),
        ("--eval_steps 5", "train.eval_steps is 5 and train.eval_strategy no"),
        ("--metric_for_best_model foo", "train.metric_for_best_model is 'foo'; it must be loss, or TEXT/METRIC"),
        ("--metric_for_best_model students/reverse_kl", "it must be loss, or TEXT/METRIC"),
        ('--accelerator_config {"dispatch_batches":true}', "accelerator_config dispatch_batches is True"),
        ('--accelerator_config {"split_batches":true}', "accelerator_config split_batches is True"),
        ('--accelerator_config {"even_batches":false}', "accelerator_config even_batches is False"),
        ('--accelerator_config {"gradient_accumulation_kwargs":{"num_steps":4}}', "Fix: gradient_accumulation_steps"),
        ('--accelerator_config {"foo":true}', "unexpected keyword argument 'foo'"),
        ('--gradient_checkpointing_kwargs {"foo":1}', "train.gradient_checkpointing_kwargs is 'foo'; it must be of"),
        ("--dataloader_persistent_workers", "there are none to be kept"),
        ("--dataloader_multiprocessing_context spawn", "there are none to be started"),
        ("--fsdp full_shard", "no launcher started several processes to share the student"),
        ('--fsdp_config {"min_num_params":1}', "train.fsdp is not: nothing is sharded"),
        ("--deepspeed nowhere.json", "train.deepspeed is set, and no launcher started this process"),
        ("--train.debug tpu_metrics_debug", "prints no metrics of a TPU"),
        ("--run_name mine", "no tracker would show it"),
        ("--project mine", "train.report_to has no trackio"),
        ("--log_level loud", "train.log_level is 'loud'; it must be one of passive"),
        ("--save_steps 0", "train.save_steps is 0.0; it must be above 0"),
        ("--logging_steps 0", "train.logging_steps is 0.0; it must be above 0"),
        ("--torch_empty_cache_steps 0", "train.torch_empty_cache_steps is 0"),
        ("--include_num_input_tokens_seen some", "it must be one of no, all, non_padding"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(tmp_path: Path, words: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(OPDConfig, [*words.split(), "--output_dir", str(tmp_path)])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_people_write_for_nothing_is_nothing(tmp_path: Path) -> None:
    for value in (None, "null", [], "none", ["none"]):
        assert OPDConfig(output_dir=str(tmp_path), report_to=value).report_to == []
    assert parse(OPDConfig, ["--include_num_input_tokens_seen", "non_padding"]).args is not None
    args = OPDConfig(output_dir=str(tmp_path), do_train=True, do_eval=True, resume_from_checkpoint="false")
    assert args.resume_from_checkpoint is None


def test_deepspeeds_launcher_may_say_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = OPDConfig(output_dir=str(tmp_path))
    args.local_rank = 0  # from the launcher's words; the variable is set before there are any
    with pytest.raises(UserError, match="train.local_rank is 0"):
        train_fields.prepare(args)
    monkeypatch.setenv("LOCAL_RANK", "0")
    train_fields.prepare(args)


def trained(folder: Path, **settings: Any) -> torch.Tensor:
    """Weights of the tiny student after two steps on its own data."""
    args = OPDConfig(
        **{
            **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
            **{"save_strategy": "no", "sequences": "dataset", **settings},
        }
    )
    trainer = OPDTrainer(
        tiny.llama(1), args, tiny.llama(2), train_dataset=tiny.rows(8), processing_class=tiny.tokenizer()
    )
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.slow
def test_what_is_read_changes_the_run(tmp_path: Path) -> None:
    """Fields of which one could doubt it; the same run twice is the same run."""
    plain = trained(tmp_path / "plain")
    assert torch.equal(plain, trained(tmp_path / "again", torch_empty_cache_steps=1))
    read: list[dict[str, Any]] = [
        {"train_sampling_strategy": "sequential"},
        {"data_seed": 7},
        {"neftune_noise_alpha": 5.0},
        {"optim": "adagrad", "optim_args": "lr_decay=0.5"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.9}},
    ]
    same = [settings for i, settings in enumerate(read) if torch.equal(plain, trained(tmp_path / str(i), **settings))]
    assert not same
