"""Token trees and their forward pass: tensors in, per-token log-probs out. No config; files only in load.py."""
