"""Work through an engine: prompts to completions, completions to log-probs, shard by shard."""
