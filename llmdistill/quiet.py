"""What libraries say of their own accord, where a command of ours says what it is at."""

from __future__ import annotations

import importlib.util
import warnings

import transformers
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars


def quiet() -> None:
    """One progress bar is ours; those of the libraries (loading, writing, tokenising) would bury it. A download keeps
    its own: of gigabytes nothing else would be seen for minutes."""
    if importlib.util.find_spec("datasets"):
        import datasets

        datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # the hub's with it
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # else somebody has said what they want
        enable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    # DeepSpeed calls what torch renamed: a line for every collective.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
