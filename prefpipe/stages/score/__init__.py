"""`prefpipe score`: reference log-probs and rewards for completions that exist already."""
