"""transformers and peft while they load."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

_one = threading.RLock()


@contextmanager
def silent() -> Generator[None]:
    """They say nothing and draw no bars (what matters of it is an error of ours); the settings of the user come back.

    One thread loads at a time: transformers replaces methods of its classes meanwhile, and where two threads do so, one
    of them gives back what the other has put there. No model could be loaded in that process any more.
    """
    from transformers.utils import logging  # noqa: PLC0415  (tokenizers need no torch, and text needs neither)

    with _one:
        level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        if has_bars:
            logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if has_bars:
                logging.enable_progress_bar()
