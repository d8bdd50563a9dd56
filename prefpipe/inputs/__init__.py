"""Files that the user brings: prompts and preferences, read as rows of ours and tokenised once."""
