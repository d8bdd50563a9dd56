"""`prefpipe gather`: the runs of all parts as one run."""
