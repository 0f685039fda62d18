"""The speed of batch normalization's layer and of whole training sweeps, beside others."""
