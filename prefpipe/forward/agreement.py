"""How far the log-probs of two scorers of one model may differ: limits of the audit before step 0 and of parity.json.

Limits are in nats per token, of differences averaged over tokens. The signed mean catches a slightly trained model: its
differences drown in 16-bit noise once their sign is dropped. The absolute mean catches another model, chat template or
mask. Differences and margins are reported in the same buckets of lengths. No torch.
"""

import math
from itertools import pairwise

KERNEL_NOISE = 0.055  # standard deviation of the log-prob of a token between 16-bit kernels, measured
LENGTH_BUCKETS = tuple(pairwise((0, 64, 256, 1024, math.inf)))  # in tokens: above the first number, up to the second
_SIGNED = 0.01
_STANDARD_ERRORS = 4  # of the mean of few tokens, whose noise alone is above _SIGNED


def signed_limit(num_tokens: int) -> float:
    """Largest signed mean difference over so many tokens."""
    return max(_SIGNED, _STANDARD_ERRORS * KERNEL_NOISE / math.sqrt(max(1, num_tokens)))


def absolute_limit(*, full_precision: bool) -> float:
    """Largest mean absolute difference, where both sides are float32 and where one has 16 or 4 bits."""
    return 0.001 if full_precision else 0.1
