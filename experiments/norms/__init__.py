"""Norms and networks: is it batch normalization, or any normalization?"""

from experiments.norms import doubled, growth, robust

CLAIMS = (doubled.CLAIM, growth.CLAIM, robust.CLAIM)
