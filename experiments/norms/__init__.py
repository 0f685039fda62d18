"""Norms and networks: is it batch normalization, or any normalization?"""

from experiments.norms import robust

CLAIMS = (robust.CLAIM,)
