"""The gradient of a function by running it again: the default of operators without a fused backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def save_inputs(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*[value for value in inputs if isinstance(value, Tensor)])


def backward_of(reference: Callable) -> Callable:
    """Gradient of the reference by recomputation: the default of operators without a fused backward."""

    def backward(ctx: Any, *grads: Tensor) -> tuple:
        tensors = iter(ctx.saved_tensors)
        values = [next(tensors) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others)]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            for index, needed in enumerate(ctx.needs_input_grad):
                if needed:
                    # A view, so that nothing upstream is differentiated; with create_graph it leads back to the input.
                    value = values[index]
                    values[index] = value.view_as(value) if create_graph else value.detach().requires_grad_()
            outputs = reference(*values)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            pairs = [(output, grad) for output, grad in zip(outputs, grads) if output.requires_grad]
            wanted = [value for value, needed in zip(values, ctx.needs_input_grad) if needed]
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                allow_unused=True,
                create_graph=create_graph,
            )
        remaining = iter(found)
        return tuple(next(remaining) if needed else None for needed in ctx.needs_input_grad)

    return backward
