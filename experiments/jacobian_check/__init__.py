"""The Jacobian of batch normalization in closed form, against automatic derivatives of the formula."""

from experiments.jacobian_check import jacobian

CLAIMS = (jacobian.CLAIM,)
