"""`prefpipe iterate`: rounds of the other commands, each a process over a saved config."""
