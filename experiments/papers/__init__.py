"""Published claims about batch normalization and initialization, one file each."""

from experiments.papers import b6

CLAIMS = (b6.CLAIM,)
