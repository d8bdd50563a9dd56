"""The reference model of a training run: which one it is, its log-probs, and the audit of them."""
