"""To and from other libraries: `interop.flax`, `.nnx`, `.equinox`, `.torch`. Import the one you need."""
