"""The tuner: finds the fastest configurations of the generated kernels on the GPU at hand, and writes them as rules."""
