"""The runner over a real (tiny) model: what it writes, and that being killed changes nothing.

Over 500 lines: nearly every test runs the evaluation of one tiny model, which they share.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llmdistill.cli import main
from llmdistill.errors import UserError
from llmdistill.evals import EvalConfig, Evaluation, evaluate, runner
from llmdistill.evals.engines.base import Asked, sample_seed
from llmdistill.evals.engines.local import HFEngine
from llmdistill.evals.engines.make import open_source
from llmdistill.evals.jobs import begin, check, prepare
from llmdistill.evals.records import EvalFolder, Sample
from llmdistill.evals.runner import draw, launch, regrade
from llmdistill.evals.suite import load_suite
from llmdistill.texts.rollout import Sampling
from tests import tiny
from tests.evals import made

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(made.model(tmp_path_factory.mktemp("model")))


def scored(suite: Path, model: str, out: Path, **settings: object) -> Evaluation:
    found = evaluate(suite, model, engine="hf", output_dir=str(out), console=QUIET, **settings)
    assert isinstance(found, Evaluation)
    return found


def lines(folder: Path) -> list[str]:
    return (folder / "samples" / "rank-0.jsonl").read_text().splitlines()


def test_everything_is_written(tmp_path: Path, model: str) -> None:
    done = scored(made.suite(tmp_path), model, tmp_path / "out")
    assert done.folder == tmp_path / "out" / "sums"
    for name in (
        "config.json",
        "problems.jsonl",
        "prompts.jsonl",
        "samples/rank-0.jsonl",
        "grades.jsonl",
        "results.json",
        "report.html",
    ):
        assert (done.folder / name).stat().st_size > 0, name
    assert done.results == json.loads((done.folder / "results.json").read_text())
    assert (done.results["problems"], done.results["n"], len(lines(done.folder))) == (6, 2, 12)
    assert done.score == done.results["avg"]["value"] and set(done.results["groups"]["size"]) == {"even", "odd"}
    config = json.loads((done.folder / "config.json").read_text())
    assert config["template"]["hash"] and config["data"] and config["weights"] and config["versions"]["torch"]


def test_the_result_names_the_dtype_that_auto_came_to(tmp_path: Path, model: str) -> None:
    """As the config names it; where it names none, that of the weights. Two dtypes are two evaluations."""
    assert scored(made.suite(tmp_path), model, tmp_path / "out").results["dtype"] == "float32"
    half = tmp_path / "half"
    tiny.llama(3).to(torch.bfloat16).save_pretrained(half)
    tiny.tokenizer().save_pretrained(half)
    for dropped in ((), ("dtype", "torch_dtype")):
        settings = json.loads((half / "config.json").read_text())
        (half / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in dropped}))
        source = open_source(EvalConfig(model=str(half), engine="hf"))
        assert source.dtype == "bfloat16" == str(source.engine(64).model.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
    assert open_source(EvalConfig(model=str(half), engine="hf", dtype="float32")).dtype == "float32"


def test_half_a_run_goes_on_and_ends_the_same(tmp_path: Path, model: str) -> None:
    """Samples are drawn again from their own seeds, equal to those that were lost; none that is there is touched."""
    whole = scored(made.suite(tmp_path), model, tmp_path / "out", batch_size=3)
    before = lines(whole.folder)
    file = whole.folder / "samples" / "rank-0.jsonl"
    file.write_text("\n".join(before[:5]) + "\n" + before[5][:20])  # killed while a line was being written
    for name in ("grades.jsonl", "results.json"):
        (whole.folder / name).unlink()
    again = scored(made.suite(tmp_path), model, tmp_path / "out", batch_size=2)
    assert lines(again.folder)[:5] == before[:5]
    assert sorted(lines(again.folder)) == sorted(before)
    assert again.results == whole.results


def test_a_finished_run_draws_nothing(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scored(made.suite(tmp_path), model, tmp_path / "out")

    def never(*_: object) -> Iterator[Sample]:
        raise AssertionError("drew again")

    monkeypatch.setattr(HFEngine, "draw", never)
    assert scored(made.suite(tmp_path), model, tmp_path / "out").results == first.results
    with pytest.raises(AssertionError, match="drew again"):
        scored(made.suite(tmp_path), model, tmp_path / "out", n=3)


def test_more_samples_are_added_to_those_that_are_there(tmp_path: Path, model: str) -> None:
    suite = made.suite(tmp_path)
    few = scored(suite, model, tmp_path / "out")
    kept = lines(few.folder)
    many = scored(suite, model, tmp_path / "out", n=3)
    assert lines(many.folder)[:12] == kept and len(lines(many.folder)) == 18
    assert many.results["n"] == 3
    assert scored(suite, model, tmp_path / "out", n=2).results["avg"] == few.results["avg"]


def test_more_problems_are_added_to_those_that_are_there(tmp_path: Path, model: str) -> None:
    """A larger limit goes on with the same samples, up to the whole suite, and ends as if it had been asked at once."""
    suite = made.suite(tmp_path)
    few = scored(suite, model, tmp_path / "out", limit=2)
    kept = lines(few.folder)
    assert few.results["problems"] == 2
    for limit, problems in ((4, 4), (0, 6)):
        more = scored(suite, model, tmp_path / "out", limit=limit)
        assert lines(more.folder)[:4] == kept and len(lines(more.folder)) == 2 * problems
        assert more.results["problems"] == problems
    assert more.results == scored(suite, model, tmp_path / "whole").results
    with pytest.raises(UserError, match="another evaluation: limit is 0 there and 4 now"):
        scored(suite, model, tmp_path / "out", limit=4)


@pytest.mark.parametrize("named", ["data", "prompts"])
def test_more_problems_do_not_hide_other_ones(tmp_path: Path, model: str, named: str) -> None:
    """With a larger limit, what was asked before must still be asked, in the same words."""
    suite = made.suite(tmp_path)
    asked = EvalFolder(scored(suite, model, tmp_path / "out", limit=2).folder).problems()[0].id
    options: dict[str, Any] = {}
    if named == "data":
        rows = [made.sum_row(i) for i in range(6)]
        made.suite(tmp_path, [row | ({"answer": "0", "size": "no"} if row["id"] == asked else {}) for row in rows])
    else:
        other = tmp_path / "tokenizer"
        tiny.tokenizer(tiny.TEMPLATE.replace("<assistant>", "!")).save_pretrained(other)
        options["tokenizer"] = str(other)
    with pytest.raises(UserError, match=f"another evaluation: {named} is"):
        scored(suite, model, tmp_path / "out", limit=4, **options)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.5}, "sampling"),
        ({"seed": 1}, "seed"),
        ({"template": "boxed"}, "template"),
        ({"limit": 3}, "limit"),
    ],
)
def test_samples_of_another_evaluation_are_not_mixed_in(
    tmp_path: Path, model: str, change: dict[str, object], named: str
) -> None:
    scored(made.suite(tmp_path), model, tmp_path / "out")
    with pytest.raises(UserError, match=rf"samples of another evaluation: {named}[.\w]* is"):
        scored(made.suite(tmp_path), model, tmp_path / "out", **change)


def test_other_weights_in_the_same_folder_are_noticed(tmp_path: Path) -> None:
    model = made.model(tmp_path)
    scored(made.suite(tmp_path), str(model), tmp_path / "out")
    tiny.llama(4).save_pretrained(model)
    with pytest.raises(UserError, match="another evaluation: weights is"):
        scored(made.suite(tmp_path), str(model), tmp_path / "out")


def test_grading_needs_no_model(tmp_path: Path, model: str) -> None:
    done = scored(made.suite(tmp_path), model, tmp_path / "out")
    place = EvalFolder(done.folder)
    rows = [json.loads(line) for line in lines(done.folder)]
    answers = {p.id: p.gold for p in place.problems()}
    for row in rows:
        row["text"] = f"so it is \\boxed{{{answers[row['problem']]}}}"
    (done.folder / "samples" / "rank-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert regrade(done.folder, console=QUIET).score == 1.0
    assert main(["eval", "--grade", str(done.folder)]) == 0
    (done.folder / "samples" / "rank-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(UserError, match="lacks 1 of 12 samples"):
        regrade(done.folder, console=QUIET)
    with pytest.raises(UserError, match="is no evaluation"):
        regrade(tmp_path, console=QUIET)


def test_ranks_share_the_work(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks draw what one would have drawn; the first waits for the second and grades.

    The second begins when the first waits: in a launch they are processes, and threads of one process that load and
    draw at the same time share more than those do. ``test_under_accelerate_launch`` has real ones.
    """
    alone = scored(made.suite(tmp_path), model, tmp_path / "alone")
    options = {"engine": "hf", "output_dir": str(tmp_path / "both"), "console": QUIET, "world": 2, "timeout_s": 300.0}
    second, wait = list[Future[Any]](), runner._await_others
    with ThreadPoolExecutor(1) as other:

        def waiting(*args: Any) -> None:
            second.append(other.submit(evaluate, [made.suite(tmp_path)], model, rank=1, **options))
            wait(*args)

        monkeypatch.setattr(runner, "_await_others", waiting)
        (both,) = evaluate([made.suite(tmp_path)], model, rank=0, **options)
        assert second[0].result() == []
    assert both.results == alone.results
    assert [len((both.folder / "samples" / f"rank-{r}.jsonl").read_text().splitlines()) for r in (0, 1)] == [6, 6]


def test_a_launch_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}.items():
        monkeypatch.setenv(name, value)
    assert launch() == (5, 8)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6" and "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    assert launch() == (0, 1)


def test_what_cannot_be_drawn_is_said_before_anything_is(tmp_path: Path, model: str) -> None:
    suite, out = made.suite(tmp_path), tmp_path / "out"
    with pytest.raises(UserError, match="n is 2 and temperature 0"):
        scored(suite, model, out, temperature=0.0)
    long = made.suite(tmp_path, rows=[made.sum_row(0), made.sum_row(1) | {"question": "9" * 400}])
    with pytest.raises(UserError, match="prompt of 'sum/1' has 4.. tokens, the model's context holds 256"):
        scored(long, model, out)
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(UserError, match="no chat template"):
        scored(made.suite(tmp_path), str(made.model(bare, template=None)), out)
    with pytest.raises(UserError) as nowhere:
        scored(suite, str(tmp_path / "nowhere"), out)
    gone = str(tmp_path / "nowhere")
    assert str(nowhere.value) == (
        f"the tokenizer of model {gone!r} cannot be loaded: there is no such folder. Fix: a folder that holds it."
    )
    assert not out.exists()


def test_a_prompt_that_leaves_less_room_gets_what_is_left(tmp_path: Path, model: str) -> None:
    rows = [made.sum_row(0), made.sum_row(1) | {"question": "9" * 240}]
    config = EvalConfig(model=model, engine="hf", output_dir=str(tmp_path / "out"), max_new_tokens=20)
    job = prepare(load_suite(made.suite(tmp_path, rows=rows)), config, open_source(config))
    prompt = next(a for a in job.asked if a.problem == "sum/1")
    assert len(prompt.ids) + prompt.room == 256 and prompt.room < 20
    assert job.settings["room"]["shorter"] == 1
    told = io.StringIO()
    begin(job, Console(file=told, width=200))
    assert "leaves 1 of 2 problems less than max_new_tokens 20" in told.getvalue()


class Dying:
    """An engine whose endpoint goes away after three samples."""

    def draw(self, asked: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        for one in asked[:3]:
            yield one.sample("\\boxed{1}", 4, "stop")
        raise UserError("the endpoint is gone")

    def close(self) -> None: ...


def test_what_was_drawn_before_an_engine_died_is_kept(tmp_path: Path, model: str) -> None:
    config = EvalConfig(model=model, engine="hf", output_dir=str(tmp_path / "out"))
    job = prepare(load_suite(made.suite(tmp_path)), config, open_source(config))
    begin(job, QUIET)
    with pytest.raises(UserError, match="gone"):
        draw(job, job.asked, Dying(), QUIET)
    assert len(job.folder.samples()) == 3
    assert scored(made.suite(tmp_path), model, tmp_path / "out").results["samples"] == 12


def test_stop_strings_end_a_sample() -> None:
    asked = Asked("p", 0, 1, ())
    assert asked.sample("4\nQuestion: next", 9, "length", ("Question:",)) == Sample("p", 0, "4\n", 9, "stop", 1)
    assert asked.sample("4", 9, "length", ("Question:",)).finish == "length"


def test_seeds_differ_and_stay() -> None:
    seeds = {sample_seed(s, p, i) for s in (0, 1) for p in ("a", "b", "a:0") for i in range(4)}
    assert len(seeds) == 24 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert sample_seed(0, "a", 0) == 3627697809258241319  # a changed derivation would make old runs unrepeatable


def test_the_command(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    suite, out = str(made.suite(tmp_path)), str(tmp_path / "a")
    assert main(["eval", suite, "--model", model, "--engine", "hf", "--output_dir", out, "--n", "3"]) == 0
    printed = capsys.readouterr().out
    assert (
        "avg@3 (temperature 1, " in printed
        and " tokens)" in printed
        and "maj@2" in printed
        and "template plain v1" in printed
    )
    assert (
        main(["eval", suite, "--model", model, "--engine", "hf", "--output_dir", str(tmp_path / "b"), "--n", "3"]) == 0
    )
    assert main(["eval", "--compare", f"{out}/sums", str(tmp_path / "b" / "sums")]) == 0
    assert "problems" in capsys.readouterr().out
    # options and suites in any order, and grading takes options too
    words = ["eval", "--allow_unsafe_exec", "--model", model, suite, "--engine", "hf", "--output_dir", out, "--n", "3"]
    assert main(words) == 0
    assert main(["eval", "--workers", "1", "--grade", f"{out}/sums"]) == 0
    assert main(["eval", "--grade", f"{out}/sums", "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "given no suite"),
        (["gsm9k", "--model", "x"], "Fix: gsm8k."),
        (["gsm8k"], "model is ''"),
        (["gsm8k", "--model", "x", "--engine", "openai"], "url is ''"),
        (["gsm8k", "--model", "x", "--tempratur", "1"], "did you mean --temperature"),
        (["gsm8k", "--model", "x", "--top_p", "0"], "top_p is 0.0"),
        (["gsm8k", "--mod", "x"], "did you mean --model?"),
        (["gsm8k", "--model", "x", "--workers", "-3"], "workers is -3"),
        (["gsm8k", "--model", "x", "--n", "four"], "--n is 'four'; it must be a whole number"),
        (["--grade", "nowhere"], "nowhere is no evaluation"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_killed_in_the_middle(tmp_path: Path, model: str, engine: str) -> None:
    """kill -9 while samples are being drawn, by a real process over a real engine: the same final results."""
    if engine == "vllm":
        pytest.importorskip("vllm", reason="the vllm extra is not installed")
    rows = [made.sum_row(i) for i in range(60)]
    suite = made.suite(tmp_path, rows=rows, sampling={"n": 2, "temperature": 1.0, "max_new_tokens": 60})
    words = ["--model", model, "--engine", engine, "--batch_size", "8", "--kv_cache_gib", "0.1"]

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "llmdistill.cli", "eval", str(suite), *words, "--output_dir", str(tmp_path / out)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    file = tmp_path / "killed" / "sums" / "samples" / "rank-0.jsonl"
    process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not file.is_file() or file.read_bytes().count(b"\n") < 10:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survived = file.read_text().splitlines()[:-1]
    assert 9 <= len(survived) < 119
    subprocess.run(command("killed"), check=True, capture_output=True)
    assert file.read_text().splitlines()[: len(survived)] == survived
    results = [json.loads((tmp_path / out / "sums" / "results.json").read_text()) for out in ("whole", "killed")]
    assert results[0] == results[1]


@pytest.mark.slow
def test_under_accelerate_launch(tmp_path: Path, model: str) -> None:
    """Two real processes; vLLM in each, where it is."""
    suite, out = made.suite(tmp_path), tmp_path / "out"
    run = Path(__file__).resolve().parents[2] / "eval" / "run.py"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words = [str(suite), "--model", model, "--output_dir", str(out), "--kv_cache_gib", "0.1", "--dtype", "float32"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launcher, str(run), *words], check=True, env=environment, capture_output=True, timeout=300)
    assert json.loads((out / "sums" / "results.json").read_text())["samples"] == 12
    counts = [len((out / "sums" / "samples" / f"rank-{r}.jsonl").read_text().splitlines()) for r in (0, 1)]
    assert counts == [6, 6]


def test_half_a_character_is_stored(tmp_path: Path) -> None:
    writer = EvalFolder(tmp_path).appender(0)
    samples = [Sample("p", i, text, 1, "stop", 0) for i, text in enumerate(("\ud83d", "\u2028 \x85 é\r\n", "𝔸"))]
    for sample in samples:
        writer.add(sample)
    writer.close()
    assert list(EvalFolder(tmp_path).samples()) == samples


def test_a_prompt_with_little_room_takes_nothing_from_its_neighbours(tmp_path: Path, model: str) -> None:
    """In one batch with others or alone: the same text."""
    rows = [made.sum_row(0), made.sum_row(1) | {"question": "9" * 240}, made.sum_row(2)]
    suite = made.suite(tmp_path, rows=rows)
    texts = []
    for batch_size in (1, 8):
        done = scored(suite, model, tmp_path / str(batch_size), max_new_tokens=30, batch_size=batch_size)
        texts.append({(s.problem, s.index): s.text for s in EvalFolder(done.folder).samples()})
    assert texts[0] == texts[1]
    lengths = {s.problem: s.tokens for s in EvalFolder(done.folder).samples()}
    assert lengths["sum/1"] < 20 < lengths["sum/0"]


def test_another_tokenizer_makes_another_evaluation(tmp_path: Path, model: str) -> None:
    """Same weights, same template, another chat template: other prompts."""
    scored(made.suite(tmp_path), model, tmp_path / "out")
    other = tmp_path / "tokenizer"
    tiny.tokenizer(tiny.TEMPLATE.replace("<assistant>", "!")).save_pretrained(other)
    with pytest.raises(UserError, match="another evaluation: prompts is"):
        scored(made.suite(tmp_path), model, tmp_path / "out", tokenizer=str(other))


def test_less_room_for_the_same_prompts_is_called_that(tmp_path: Path, model: str) -> None:
    config = EvalConfig(model=model, engine="hf", output_dir=str(tmp_path / "out"))
    source, suite = open_source(config), load_suite(made.suite(tmp_path))
    begin(prepare(suite, config, source), QUIET)
    longest = max(len(a.ids) for a in prepare(suite, config, source).asked)
    shorter = prepare(suite, config, replace(source, context=longest + 4))
    with pytest.raises(UserError, match="another evaluation: room.hash is null there"):
        check(shorter)


def test_samples_of_nobody_are_not_adopted(tmp_path: Path, model: str) -> None:
    done = scored(made.suite(tmp_path), model, tmp_path / "out")
    (done.folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json says whose"):
        scored(made.suite(tmp_path), model, tmp_path / "out")


def test_one_suite_once(tmp_path: Path, model: str) -> None:
    suite = made.suite(tmp_path)
    with pytest.raises(UserError, match="suite 'sums' is there twice"):
        evaluate([suite, suite], model, engine="hf", output_dir=str(tmp_path / "out"), console=QUIET)


def test_two_processes_cannot_write_one_file(tmp_path: Path) -> None:
    writer = EvalFolder(tmp_path).appender(0)
    with pytest.raises(UserError, match="is being written by another process"):
        EvalFolder(tmp_path).appender(0)
    writer.close()
    EvalFolder(tmp_path).appender(0).close()


def test_a_second_command_changes_nothing_of_the_first(tmp_path: Path, model: str) -> None:
    """Refused before it says what is asked: with another n it would remove results, and grade the other's samples."""
    done = scored(made.suite(tmp_path), model, tmp_path / "out")
    before = {file: file.read_bytes() for file in done.folder.iterdir() if file.is_file()}
    with (
        EvalFolder(done.folder).claimed(0),
        pytest.raises(UserError, match="sums is being written by another process"),
    ):
        scored(made.suite(tmp_path), model, tmp_path / "out", n=4)
    assert {file: file.read_bytes() for file in done.folder.iterdir() if file.is_file()} == before
    assert scored(made.suite(tmp_path), model, tmp_path / "out", n=4).results["samples"] == 24


def test_a_character_that_is_half_written_is_not_read_yet(tmp_path: Path) -> None:
    """Killed there, or read by the first rank while another one writes: the lines before it count."""
    folder = EvalFolder(tmp_path)
    writer = folder.appender(0)
    writer.add(Sample("p", 0, "é", 1, "stop", 0))
    writer.close()
    file = tmp_path / "samples" / "rank-0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: whole.index("é".encode()) + 1])
    assert [(s.problem, s.index) for s in folder.samples()] == [("p", 0)]


def started_at_once(barrier: Any, seen: Any, rank: int, *given: Any, **settings: Any) -> None:
    barrier.wait()
    try:
        seen.put((rank, len(evaluate(*given, rank=rank, world=2, console=QUIET, **settings))))
    except BaseException as error:
        seen.put((rank, repr(error)))
        raise


@pytest.mark.slow
def test_two_ranks_started_at_the_same_moment(tmp_path: Path, model: str) -> None:
    """Real processes, in a folder that is not there yet, and again in one that has another n."""
    context, suite = multiprocessing.get_context("fork"), made.suite(tmp_path)
    for round_ in range(6):
        barrier, seen = context.Barrier(2), context.Queue()
        settings = {"engine": "hf", "output_dir": str(tmp_path / str(round_ // 2)), "n": 2 + round_ % 2}
        ranks = [
            context.Process(target=started_at_once, args=(barrier, seen, rank, [suite], model), kwargs=settings)
            for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        assert sorted(seen.get(timeout=120) for _ in ranks) == [(0, 1), (1, 0)]
        for rank in ranks:
            rank.join()


def test_a_line_that_was_damaged_is_left_out(tmp_path: Path) -> None:
    folder = EvalFolder(tmp_path)
    writer = folder.appender(0)
    for i in range(3):
        writer.add(Sample("p", i, "x", 1, "stop", 0))
    writer.close()
    file = tmp_path / "samples" / "rank-0.jsonl"
    good = file.read_text().splitlines()
    file.write_text("\n".join([good[0], good[1][:9], good[2]]) + "\n")
    with pytest.warns(UserWarning, match="rank-0.jsonl line 2 cannot be read"):
        assert [(s.problem, s.index) for s in folder.samples()] == [("p", 0), ("p", 2)]


def test_numbers_of_another_n_do_not_stay_behind(tmp_path: Path, model: str) -> None:
    done = scored(made.suite(tmp_path), model, tmp_path / "out")
    config = EvalConfig(model=model, engine="hf", output_dir=str(tmp_path / "out"), n=4)
    begin(prepare(load_suite(made.suite(tmp_path)), config, open_source(config)), QUIET)
    assert not (done.folder / "results.json").exists() and len(lines(done.folder)) == 12


def test_thoughts_that_the_template_opened_are_thoughts(tmp_path: Path) -> None:
    """R1's template writes "<think>" itself. What never got beyond it is no answer, whatever it boxes on the way."""
    model = made.model(tmp_path, tiny.TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}")
    config = EvalConfig(model=str(model), engine="hf", output_dir=str(tmp_path / "out"))
    job = prepare(load_suite(made.suite(tmp_path)), config, open_source(config))
    assert {a.opened for a in job.asked} == {"<think>\n"}
    begin(job, QUIET)
    writer = job.folder.appender(0)
    for one in job.asked:
        gold = next(p.gold for p in job.problems if p.id == one.problem)
        done = one.index == 0
        writer.add(one.sample(f"try \\boxed{{{gold}}}" + (f"</think>It is {gold}." if done else ""), 9, "stop"))
    writer.close()
    results = regrade(job.folder.path, console=QUIET).results
    assert results["verdicts"] == {"right": 6, "no_answer": 6}


def test_the_checkpoints_own_sampling_settings_are_not_used(tmp_path: Path) -> None:
    """vLLM is told to leave them out, so transformers is too: else a score would depend on the engine."""
    texts = []
    model = made.model(tmp_path)
    for penalty in (None, 5.0):
        if penalty is not None:
            settings = json.loads((model / "generation_config.json").read_text())
            (model / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": penalty}))
        done = scored(
            made.suite(tmp_path), str(model), tmp_path / str(penalty), n=1, temperature=0.0, max_new_tokens=30
        )
        texts.append([s.text for s in EvalFolder(done.folder).samples()])
    assert texts[0] == texts[1]
