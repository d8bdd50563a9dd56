"""`prefpipe generate`: prompts to completions, reference log-probs and rewards."""
