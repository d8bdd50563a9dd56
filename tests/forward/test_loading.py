"""What transformers changes while it loads comes back, whoever loads beside it."""

import threading
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from prefpipe.forward import loading, weights


def test_the_settings_of_the_user_come_back() -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        with loading.silent():
            assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity(before[0])
        None if before[1] else logging.disable_progress_bar()


def test_a_second_thread_loads_when_the_first_has_ended(tiny_model: Path) -> None:
    """Two at once leave `tie_weights` replaced for good: after that every model lacked its head."""
    method, inside, go = PreTrainedModel.tie_weights, threading.Event(), threading.Event()

    class Slow(AutoModelForCausalLM):
        @classmethod
        def from_pretrained(cls, *words: object, **options: object) -> object:
            inside.set()
            go.wait()
            return super().from_pretrained(*words, **options)

    first = threading.Thread(target=weights.read_model, args=(Slow, tiny_model, "float32"), daemon=True)
    first.start()
    inside.wait()
    second = threading.Thread(
        target=weights.read_model, args=(AutoModelForCausalLM, tiny_model, "float32"), daemon=True
    )
    second.start()
    assert not loading._one.acquire(blocking=False)
    go.set()
    first.join()
    second.join()
    assert PreTrainedModel.tie_weights is method
