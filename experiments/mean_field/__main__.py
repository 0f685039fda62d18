"""Mean-field theory against measurement in our own networks: growing gradients, and dying signals.

    python -m experiments.mean_field                    # all parts, some 90 seconds on 2 cores
    python -m experiments.mean_field --parts=growth
    python -m experiments.mean_field --seeds=2048:4096 --epsilon_seeds=64:128   # other networks

has three parts. growth: in networks with batch normalization at epsilon 0, the growth per layer of the squared gradient
norm, for every activation and batch size, extrapolated from two widths to infinite width, with a z-score per point.
epsilon: the init_scale below which epsilon makes the signal die, and signal and growth around it. chaos: the growth
without batch normalization, chi_1. Expect every |z| of growth and chaos below 4 (or the run fails), a growth that falls
with the batch size, for ReLU from 3.08 at 4 to 1.49 at 64, and the threshold within 2% of the predicted one (at a
standard error of 0.5%). `--full` has all activations, three widths and more seeds, and takes some 10 minutes.
"""

from absl import app

from experiments import claim, mean_field

main = claim.script("mean_field", mean_field.CLAIMS, flag="parts")

if __name__ == "__main__":
    app.run(main)
