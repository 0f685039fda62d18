"""`W -> a W` in layers that batch normalization follows: exact laws, rounding, and what a fixed epsilon does.

    python -m experiments.scale_laws                     # all claims
    python -m experiments.scale_laws --claims=laws       # some

In a deep network, for each hidden layer alone and for all of them at once, at epsilon 0:

    outputs                 unchanged               gradient to the layer's input   unchanged
    gradient to W           divided by a            <W, dL/dW>                      0

The same holds for (W -> a W, epsilon -> a^2 epsilon) at any epsilon. And under SGD with momentum on these kernels
alone, without weight decay or with weight_decay / a^2, (W -> a W, learning rate -> a^2 learning rate) multiplies the
whole trajectory of W by a. Expect 0, bit for bit, for every a = 2^k; for other a rounding in one step, which
training then amplifies, how fast depending on the seed and the processor; and nothing of the kind without batch
normalization. At a fixed epsilon, W -> a W is epsilon -> epsilon / a^2, which predicts what becomes of outputs and
gradients. Takes one to two minutes on 2 cores.
"""

from absl import app, flags

from experiments import claim, common, scale_laws

_run = claim.script("scale_laws", scale_laws.CLAIMS)
flags.DEFINE_integer("seed", None, "Only this one: --seed=3 is --seeds=3:4.", lower_bound=0)


def main(argv: list[str]) -> None:
    """Runs the claims; `--seed` stands for `--seeds`."""
    values = flags.FLAGS
    if values.seed is not None:
        if values.seeds is not None:
            raise common.fail("--seed and --seeds exclude each other")
        values.seeds = f"{values.seed}:{values.seed + 1}"
    _run(argv)


if __name__ == "__main__":
    app.run(main)
