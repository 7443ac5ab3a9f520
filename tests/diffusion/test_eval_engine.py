"""A diffusion checkpoint as an engine of evaluations, from its folder."""

from __future__ import annotations

import pytest

from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.errors import UserError
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.engines.base import Asked
from llmdistill.evals.engines.make import open_source
from llmdistill.texts.rollout import Sampling

from .. import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("diffusion")
    tokenizer = tiny.tokenizer()
    tiny.llama(0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer = MaskedDiffusionLM.from_pretrained(folder, block_size=4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def asked(*lengths: int, room: int = 10) -> list[Asked]:
    return [Asked(f"p{n}", 0, n, (), ids=tuple(range(5, 5 + n)), room=room) for n in lengths]


def test_samples_are_drawn_in_blocks_and_do_not_depend_on_their_company(checkpoint: str) -> None:
    settings = {"select": "threshold", "threshold": 0.2, "cache": "block"}
    config = EvalConfig(model=checkpoint, engine="diffusion", dtype="float32", diffusion=settings)
    engine = open_source(config).engine(64)
    together = {s.problem: s for s in engine.draw(asked(3, 5, 7), Sampling(10), ())}
    (alone,) = engine.draw(asked(5), Sampling(10), ())
    assert together["p5"].text == alone.text and {s.finish for s in together.values()} <= {"stop", "length"}
    assert all(0 < s.tokens <= 10 for s in together.values())
    greedy = [next(iter(engine.draw(asked(5), Sampling(10, temperature=0.0), ()))).text for _ in range(2)]
    assert greedy[0] == greedy[1]


def test_settings_it_does_not_have_are_refused_before_anything_is_loaded(checkpoint: str) -> None:
    for settings, message in (
        ({"steps": 4}, "diffusion has 'steps'"),
        ({"temperature": 1}, "diffusion has 'temperature'"),
    ):
        config = EvalConfig(model=checkpoint, engine="diffusion", diffusion=settings)
        with pytest.raises(UserError, match=message):
            open_source(config).engine(64)
    with pytest.raises(UserError, match="empty for other engines"):
        EvalConfig(model=checkpoint, engine="hf", diffusion={"order": "random"})
