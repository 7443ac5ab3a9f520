"""A checkpoint of whole weights where only an adapter is stored, for engines that load a folder themselves."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmdistill.models.loading import adapter_base, load_model
from llmdistill.models.saving import mend_generation_config
from llmdistill.recipe.config import DType

logger = logging.getLogger(__name__)


@contextmanager
def whole_checkpoint(path: str, dtype: DType, section: str, trust_remote_code: bool = False) -> Iterator[str]:
    """``path``, or while this is open a folder of its own in which the adapter there is merged into its base.

    Raises:
        UserError: the adapter cannot be merged.
    """
    if not adapter_base(path, section):
        yield path
        return
    model, tokenizer = load_model(path, dtype, section, trust_remote_code)
    mend_generation_config(model)
    with tempfile.TemporaryDirectory(prefix="merged-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model  # the engine has room for one
        logger.warning("the engine loads the merged model from %s, which is removed again", Path(folder))
        yield folder
