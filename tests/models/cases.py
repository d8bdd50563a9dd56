"""Conversations of every shape."""

from prefpipe.schemas import Message

USER = Message(role="user", content="Name a bird.")
SHAPES = {
    "one turn": [USER],
    "system first": [Message(role="system", content="Be brief."), USER],
    "multi-turn": [USER, Message(role="assistant", content="The owl."), Message(role="user", content="Another?")],
    "white space": [Message(role="user", content="  two\n\nlines\t ")],
    "not ASCII": [Message(role="user", content="Où est l'été? 日本 🦉 e\u0301")],
    "ends with the answer": [USER, Message(role="assistant", content="The owl.")],
}
