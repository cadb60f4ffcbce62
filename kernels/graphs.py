"""Functions of many small operations, launched as one on NVIDIA GPUs."""

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraphs:
    """A function from tensors to a tuple of tensors, replayed as one CUDA graph for each set of input shapes and types.

    For use under no_grad. The first call with new shapes runs the function some times and captures it; later ones cost
    the host one launch instead of hundreds. The function must neither wait for the device nor depend on values; what it
    reads besides its arguments, such as weights, must stay where it is."""

    def __init__(self, function: Callable):
        self.function, self.captured, self.pool = function, {}, torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        kinds = tuple((x.shape, x.dtype) for x in inputs)
        if kinds not in self.captured:
            buffers = tuple(x.clone() for x in inputs)  # a replay copies its inputs there
            self.captured[kinds] = torch.cuda.make_graphed_callables(self.function, buffers, pool=self.pool)
        return [x.clone() for x in self.captured[kinds](*inputs)]  # the next replay writes there
