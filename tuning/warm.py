"""To be imported before processes are forked: what the first launch in each would import and compute, 1.5 s of it.

Nothing here touches CUDA.
"""

import torch
import torch.fx.experimental.symbolic_shapes
from triton.runtime.cache import triton_key

triton_key()  # a hash of all of Triton, and kept
torch.empty_like(torch.empty(1, device="meta"))  # imports sympy, the first time
