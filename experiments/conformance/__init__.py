"""What `experiments.bn_conformance` measures: the implementations, the exact reference, the cases."""
