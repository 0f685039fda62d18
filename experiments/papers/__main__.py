"""Published claims about batch normalization and initialization, each checked by number.

    python -m experiments.papers                 # all of them
    python -m experiments.papers --claims=B6     # some

Each states a claim, where it was made, and the numbers that decide it, with the bound that was set before the run. The
table at the end has the verdicts; `papers.json` in --out has all the numbers.
"""

from absl import app

from experiments import claim, papers

main = claim.script("papers", papers.CLAIMS)

if __name__ == "__main__":
    app.run(main)
