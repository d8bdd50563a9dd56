"""Models, adapters, tokenizers and chat templates: local files with an identity, and text to token ids."""
