"""A conversation in the terminal with a trained policy and its base, side by side.

commands.py        the options of `chat`, and what reads and answers
talk.py            the conversation: lines in, answers of every voice out
settings.py        what a line that begins with / changes
voices.py          base and policy on the transformers engine, token by token
screen.py          answers as they come: below each other in a pipe, in columns on a terminal
"""
