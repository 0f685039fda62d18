"""`W -> a W` in layers that batch normalization follows: exact laws, rounding, and a fixed epsilon."""

from experiments.scale_laws import contrast, epsilon, laws, rounding

CLAIMS = (laws.CLAIM, rounding.CLAIM, epsilon.CLAIM, contrast.CLAIM)
