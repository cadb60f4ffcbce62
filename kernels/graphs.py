"""Functions of many small operations, launched as one on NVIDIA GPUs."""

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraphs:
    """A function of tensors that returns tensors, replayed as one CUDA graph for each set of input shapes.

    The first call with new shapes captures; later ones cost the host one launch instead of hundreds. The function must
    neither wait for the device nor depend on values; what it reads besides its arguments, such as weights, must stay
    where it is."""

    def __init__(self, function: Callable):
        self.function, self.captured, self.pool = function, {}, torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.captured:
            self.captured[shapes] = torch.cuda.make_graphed_callables(self.function, inputs, pool=self.pool)
        return [x.clone() for x in self.captured[shapes](*inputs)]  # the next replay writes there
