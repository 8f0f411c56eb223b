"""The tuner: finds the fastest configurations of the generated kernels on the GPU at hand, and writes them as rules."""

import os

# Of NumPy's matrices none is large; and its threads would wait for each other where all cores are busy compiling.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
