"""What a model read stands in the folder and on the page, to the letter: the template's own system text too."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from llmdistill.evals.config import EvalConfig
from llmdistill.evals.engines.make import open_source
from llmdistill.evals.jobs import Job, begin, prepare
from llmdistill.evals.page import write_page
from llmdistill.evals.records import EvalFolder, Prompt
from llmdistill.evals.suite import load_suite
from tests import tiny
from tests.evals import made
from tests.evals.chromium import Chromium

OWN = "{% if messages[0].role != 'system' %}<system>Be <b>good</b>.\n{% endif %}"  # as Qwen2.5's, where none is given


def begun(folder: Path, template: str | None, suite: Path, **settings: Any) -> Job:
    config = EvalConfig(
        model=str(made.model(folder, template)), engine="hf", output_dir=str(folder / "out"), n=1, **settings
    )
    job = prepare(load_suite(suite), config, open_source(config))
    begin(job, Console(file=io.StringIO()))
    return job


def on_the_page(folder: EvalFolder, place: int) -> Any:
    block = re.search(rf'id="data-{place}">([^<]*)</script>', write_page(folder.path).read_text())
    assert block
    return json.loads(gzip.decompress(base64.b64decode(block[1])))["prompt"]


def test_the_templates_own_system_text_is_seen(tmp_path: Path) -> None:
    job = begun(tmp_path, OWN + tiny.TEMPLATE, made.suite(tmp_path))
    (prompt,) = job.folder.prompts().of("sum/1")
    assert prompt.text == job.asked[1].text and prompt.tokens == len(job.asked[1].ids)
    assert prompt.text.startswith("<system>Be <b>good</b>.\n") and "1 + 1 =" in prompt.text
    assert on_the_page(job.folder, 1) == {"text": prompt.text, "tokens": prompt.tokens, "messages": False}


def test_the_token_before_plain_text_is_seen(tmp_path: Path) -> None:
    """It is no part of the text that is tokenized; without it some models lose nats a token."""
    config = EvalConfig(model=str(made.model(tmp_path, None)), engine="hf", output_dir=str(tmp_path / "out"))
    source = open_source(config)
    tokenizer: Any = source.tokenizer
    bos = tokenizer.convert_ids_to_tokens(5)
    tokenizer.bos_token = bos

    class Adding:
        """The tokenizer with a BOS of its own, as Llama's."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": [tokenizer.bos_token_id, *tokenizer(text, **options)["input_ids"]]}

    suite = load_suite(made.suite(tmp_path, template="question-answer"))
    job = prepare(suite, config, replace(source, tokenizer=Adding()))  # type: ignore[arg-type]
    assert job.prompts[0].text == f"{bos}Question: 0 + 0 =\nAnswer:"


def test_an_endpoint_with_its_own_template_is_sent_messages(tmp_path: Path) -> None:
    config = EvalConfig(model="m", engine="hf", output_dir=str(tmp_path / "out"), system_prompt="Be kind.")
    template = {"user": "{question}", "prefill": "So"}
    source = open_source(replace(config, model=str(made.model(tmp_path))))
    job = prepare(load_suite(made.suite(tmp_path, template=template)), config, replace(source, tokenizer=None))
    begin(job, Console(file=io.StringIO()))
    messages = [("system", "Be kind."), ("user", "0 + 0 ="), ("assistant", "So")]
    said = [{"role": role, "content": content} for role, content in messages]
    assert job.folder.prompts().of("sum/0") == [Prompt("sum/0", "", said)]
    shown = {"text": "system:\nBe kind.\n\nuser:\n0 + 0 =\n\nassistant:\nSo", "tokens": 0, "messages": True}
    assert on_the_page(job.folder, 0) == shown


def test_a_folder_without_prompts_has_a_page(tmp_path: Path) -> None:
    job = begun(tmp_path, tiny.TEMPLATE, made.suite(tmp_path))
    (job.folder.path / "prompts.jsonl").unlink()
    assert on_the_page(job.folder, 0) is None


def test_the_page_shows_it_when_it_is_opened(tmp_path: Path, browser: Chromium) -> None:
    job = begun(tmp_path, OWN + tiny.TEMPLATE, made.suite(tmp_path))
    browser.open(write_page(job.folder.path), "#problem=sum%2F2")
    browser.wait("document.querySelector('#problem-detail details.prompt')")
    label = browser.value("document.querySelector('details.prompt summary').textContent")
    assert label == f"Prompt as the model read it, {len(job.asked[2].ids)} tokens"
    browser.value("document.querySelector('details.prompt summary').click()")
    browser.wait("document.querySelector('details.prompt pre')")
    assert browser.value("document.querySelector('details.prompt pre').textContent") == job.asked[2].text
    assert browser.complaints() == []
