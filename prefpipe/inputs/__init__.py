"""What comes from outside: files of prompts and preferences, as rows of ours, tokenised once."""
