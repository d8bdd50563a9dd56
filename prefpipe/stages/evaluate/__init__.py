"""`prefpipe evaluate`: pass rates of a policy on held-out prompts."""
