"""Who answers: the base model and the policy that was trained from it, on the transformers engine.

A LoRA run is one loaded model, whose adapter is off for the base. A run that trained every weight is two.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from prefpipe.chat.settings import Settings
from prefpipe.config.train import TrainConfig
from prefpipe.engines.base import EngineSettings, Query
from prefpipe.engines.transformers import TransformersEngine
from prefpipe.ids import sample_seed
from prefpipe.inputs.tokenised import prompt_key
from prefpipe.models import policy
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import Rules, encode_prompt
from prefpipe.models.policy import Policy, context_length
from prefpipe.runs.settled import settled
from prefpipe.schemas import Message
from prefpipe.stages.train import results


@dataclass
class Voice:
    """One side of the conversation: its name and its engine, with the adapter or without, and what was said to it."""

    name: str
    engine: TransformersEngine
    chat: Chat
    config: TrainConfig
    longest: int
    is_base: bool = False
    messages: list[Message] = field(default_factory=list[Message])

    def answer(self, question: str, settings: Settings, show: Callable[[str], object]) -> None:
        """Answer; `show` takes the text as it grows. The answer is that of `prefpipe generate` with the same seed,
        temperature and most tokens, for a prompt with the messages so far. One that is interrupted counts as it is.

        Raises RowFault for a question that cannot be asked, which is then forgotten.
        """
        asked = [*self.messages, Message(role="user", content=question)]
        ids = encode_prompt(
            self.chat,
            asked,
            max_tokens=self.longest - settings.max_tokens - 1,
            rules=Rules(self.config.special_tokens_in_prompts, "allow"),
        )
        said: list[int] = []
        shown = 0

        def heard(token: int) -> None:
            nonlocal shown
            said.append(token)
            text = self.chat.decode(said)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the bytes of a character may be several tokens
                start, shown = shown, len(text)
                show(text[start:])

        seed = sample_seed(settings.seed, prompt_key(asked, None, None), 0)
        self.engine.listen(heard, settings.max_tokens)
        try:
            with self.engine.base() if self.is_base else nullcontext():
                list(self.engine.respond([Query("answer", ids, seed, settings.temperature, None)]))
        finally:
            text = self.chat.decode(said)
            show(text[shown:])
            self.messages = [*asked, Message(role="assistant", content=self.chat.said(said, text).text)]


@contextmanager
def voices(directory: Path, model: str = "") -> Generator[list[Voice]]:
    """Base and policy of a run, loaded; raises as `results.find` does."""
    found = results.find(directory, model)
    config = settled(found.config, found.run_dir)
    with ExitStack() as loaded:

        def voice(name: str, of: Policy) -> Voice:
            chat = load_chat(of.directory, config.chat_template, template_kwargs=config.chat_template_kwargs)
            longest = context_length(of.directory) or config.max_length
            settings = EngineSettings(of, chat, config.dtype, 1.0, 1, longest, 1, 64)
            return Voice(name, loaded.enter_context(TransformersEngine(settings)), chat, config, longest)

        ours = voice("policy", found.policy)
        if config.tuning == "lora":
            base = replace(ours, name="base", is_base=True, messages=[])
        else:
            base = voice("base", policy.resolve(config.model))
        yield [base, ours]
