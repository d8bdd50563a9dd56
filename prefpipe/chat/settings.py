"""What a user may change while the chat goes on: a line that begins with /."""

from dataclasses import dataclass

HELP = """/seed N         the random numbers of the next answers: the same seed, the same answer
/base           let the base model answer too, or no longer
/temperature X  0 is greedy, the most is 2
/max N          the most tokens of an answer
/reset          forget the conversation
/help           these lines
/quit           end; so does Ctrl-D. Ctrl-C ends an answer"""


@dataclass
class Settings:
    """How the next answers are sampled, and whether the base answers."""

    seed: int = 0
    temperature: float = 0.7
    max_tokens: int = 256
    with_base: bool = True

    def change(self, line: str) -> str:
        """What to say about a line `/NAME VALUE`; a setting is changed where it can be."""
        name, _, value = line.removeprefix("/").partition(" ")
        if name == "help":
            return HELP
        if name == "base":
            self.with_base = not self.with_base
            return "the base answers too" if self.with_base else "the base is silent"
        if name not in ("seed", "temperature", "max"):
            return f"no command /{name}: /help lists them"
        try:
            return self._set(name, value.strip())
        except ValueError:
            return f"/{name} wants a number: /{name} {'0.7' if name == 'temperature' else '7'}"

    def _set(self, name: str, value: str) -> str:
        if name == "temperature":
            temperature = float(value)
            if not 0 <= temperature <= 2:
                return "temperature goes from 0 to 2"
            self.temperature = temperature
            return f"temperature = {temperature:g}"
        number = int(value)
        if number < (1 if name == "max" else 0):
            return f"{name} = {number} is too small"
        if name == "seed":
            self.seed = number
        else:
            self.max_tokens = number
        return f"{name} = {number}"
