"""To and from other libraries: `interop.flax`, `interop.nnx`, `interop.torch`. Import the one you need."""
