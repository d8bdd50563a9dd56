"""Ways out of a run: to the hub, and into files that other programs read. Nothing here runs unless a user asks for it.

commands.py        the options of `push` and `export`
upload.py          the files of a run that go to a repository, checked
cards.py           the card of a dataset; the name of a base model in a card; what a card must not show
rows.py            pairs and labels as JSON lines for another trainer
shapes.py          the shapes of those rows
gguf_model.py      a policy as one file for llama.cpp
gguf_tokens.py     its tokenizer
hub.py             the only sender: a repository and one commit
"""
