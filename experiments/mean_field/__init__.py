"""Mean-field theory against measurement in wide networks."""

from experiments.mean_field import chaos, epsilon, growth

CLAIMS = (growth.CLAIM, epsilon.CLAIM, chaos.CLAIM)
