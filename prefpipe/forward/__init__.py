"""Token trees and their forward pass: token ids in, per-token log-probs out. No settings; files in load.py alone."""
