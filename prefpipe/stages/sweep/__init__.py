"""`prefpipe sweep`: variants of a training run on the same rows, one reference and one base model."""
