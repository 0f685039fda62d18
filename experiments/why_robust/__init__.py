"""Why a network with batch normalization is robust to its initialization: seven controls."""

from experiments.why_robust import depth, detached, dip, evaluation, frozen, norms, rates

CLAIMS = (frozen.CLAIM, detached.CLAIM, evaluation.CLAIM, norms.CLAIM, dip.CLAIM, rates.CLAIM, depth.CLAIM)
