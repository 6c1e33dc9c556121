"""One torch operator per kernel: schema, reference, fake kernel, gradient and the hooks of the backends.

`Op(reference, ...)` defines torch.ops.sfd.NAME from the reference's annotations. The dispatcher then picks the kernel
by device: C++ for CPU tensors (cpu/NAME.cpp), Triton for CUDA tensors (triton/NAME.py), and for everything else, or
where a kernel lacks a dtype, the reference. The reference is reachable by itself as torch.ops.sfd_reference.NAME, so
that C++ can hand a call back to it.

Host time: an eager call skips torch's generated autograd wrapper (3 of 9 us on a CPU) for an autograd.Function of ours
and enters the dispatcher below autograd; under torch.compile the call is the registered operator itself. See
benchmarks/registration.py.
"""

import contextlib
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from sfd_kernels import recompute

OPS: dict[str, "Op"] = {}
"""every operator by name, in the order of definition"""

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads it when a kernel is decorated; with it the Triton kernels run in the interpreter on CPU tensors"""

REFERENCE_RAISED = "raised an error for these arguments"
"""in the text of an error: the words of cpu/operator.h"""

_library = torch.library.Library("sfd", "FRAGMENT")
_reference_library = torch.library.Library("sfd_reference", "FRAGMENT")
_only_reference = False


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Inside, every operator is its reference in plain PyTorch, differentiated by autograd: no kernel of ours runs."""
    global _only_reference
    before, _only_reference = _only_reference, True
    try:
        yield
    finally:
        _only_reference = before


def is_reference_only() -> bool:
    """Whether `reference_only` is in force."""
    return _only_reference


def needs_reference() -> bool:
    """Whether torch.func transforms or forward-mode derivatives are at work: they take the reference, not a kernel."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _fresh(outputs: Any) -> Any:
    """Outputs made contiguous, as every kernel returns them and the fake kernel promises them."""
    if isinstance(outputs, Tensor):
        return outputs.contiguous()
    return None if outputs is None else tuple(output.contiguous() for output in outputs)


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in value, which may be nested in tuples and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(num_bytes, value)) if isinstance(value, (tuple, list)) else 0


def elements(position: int, per_element: int) -> Callable[..., int]:
    """A flops formula: per_element operations for every element of the argument at that position."""
    return lambda *args: per_element * args[position].numel()


class Op:
    """An operator: call it, ask what it costs, attach kernels and a gradient to it.

    reference: plain PyTorch; its annotations are the schema, its name the operator's name.
    examples: function (make, size) -> iterator of (label, args), the one worth measuring first; make and size are Make
    and Size of offline/examples.py.
    mutates: names of the arguments that are written; such an operator has no gradient and refuses to need one.
    constants: names of the arguments that never get a gradient, such as data and tables.
    backward: the fused backward operator, if there is one. least_bytes, flops: functions of the arguments;
    least_bytes defaults to every tensor argument once and every output once.
    on_cuda: of an operator for CPU tensors alone, what serves CUDA tensors instead; it has no Triton kernel, and called
    with CUDA tensors it is its reference.
    """

    def __init__(
        self,
        reference: Callable,
        *,
        examples: Callable[[Any, Any], Iterator[tuple[str, tuple]]],
        flops: Callable[..., int],
        least_bytes: Callable[..., int] | None = None,
        mutates: tuple[str, ...] = (),
        constants: tuple[str, ...] = (),
        backward: "Op | None" = None,
        on_cuda: str = "",
    ) -> None:
        self.reference = reference
        self.name = reference.__name__
        self.module = reference.__module__.rsplit(".", 1)[-1]
        self.mutates = mutates
        self.constants = constants
        self.backward = backward
        self.flops = flops
        self.on_cuda = on_cuda
        self.triton_kernel: Callable | None = None
        self._examples = examples
        self._least_bytes = least_bytes
        self._triton_loaded = False
        self._function: Any = None
        self._names = tuple(inspect.signature(reference).parameters)
        self._written = [index for index, name in enumerate(self._names) if name in mutates]
        self.__doc__ = reference.__doc__
        self.__name__ = self.name
        self.__signature__ = inspect.signature(reference)
        self._define()
        OPS[self.name] = self

    def __repr__(self) -> str:
        return f"<operator sfd::{self.name}{self.__signature__}>"

    @property
    def is_backward(self) -> bool:
        return self.name.endswith("_backward")

    # Definition ------------------------------------------------------------------------------------------------------

    def _define(self) -> None:
        name, qualified = self.name, f"sfd::{self.name}"
        schema = torch.library.infer_schema(self.reference, mutates_args=self.mutates)
        _reference_library.define(name + schema)
        _reference_library.impl(name, self._run_reference, "CompositeImplicitAutograd")
        if self.mutates:
            # custom_op bumps the version counters of what is written; a kernel registered through Library does not, and
            # autograd would then use overwritten saved tensors without an error.
            operator = torch.library.custom_op(qualified, self.reference, mutates_args=self.mutates, schema=schema)
            operator.register_fake(lambda *args: None)
            self.overload = getattr(torch.ops.sfd, name).default
            # The same rules without custom_op's generality, which takes 30 us a call.
            for key, kernel in (("Autograd", self._autograd_of_writing), ("ADInplaceOrView", self._bump_versions)):
                _library.impl(name, kernel, key, with_keyset=True, allow_override=True)
        else:
            _library.define(name + schema)
            _library.impl(name, self._run_reference, "CompositeExplicitAutograd")
            torch.library.register_fake(qualified, self._run_reference, lib=_library)
            self.overload = getattr(torch.ops.sfd, name).default
            self.register_autograd(recompute.backward_of(self.reference), setup_context=recompute.save_inputs)
            # torch 2.11 takes one registration for an operator: it looks the present functions up.
            torch.library.register_autograd(
                qualified,
                lambda ctx, *grads: self._backward(ctx, *grads),
                setup_context=lambda ctx, inputs, output: self._setup_context(ctx, inputs, output),
                lib=_library,
            )
        _library.impl(name, self._run_triton, "CUDA")
        if INTERPRET:
            _library.impl(name, self._run_triton, "CPU")

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Sets the gradient: backward(ctx, *grads), setup_context(ctx, inputs, output) as of torch.autograd.Function.

        Without it the gradient is that of the reference, recomputed in the backward pass.
        """
        self._backward, self._setup_context = backward, setup_context

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._run(args)
            setup_context(ctx, args, output)
            return output

        # A separate setup_context would make every apply() bind a signature, which takes longer than the rest of it.
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.name, (torch.autograd.Function,), members)

    # Calls -----------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args = self._positional(args, kwargs)
        if _only_reference:
            return self.reference(*args)
        if torch.compiler.is_dynamo_compiling():
            return self.overload(*args)
        if self.mutates:
            return self._write(args)
        if needs_reference():
            return self.reference(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._function.apply(*args)
        return self._run(args)

    def _run(self, args: tuple) -> Any:
        """The operator below autograd. C++ cannot pass on what the reference raised for it: then it is asked again."""
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*args)
        except RuntimeError as error:
            if REFERENCE_RAISED not in str(error):
                raise
            raised = error
        self.reference(*args)
        raise raised

    def _positional(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        rest = self._names[len(args) :]
        if len(rest) != len(kwargs) or any(name not in kwargs for name in rest):
            raise TypeError(
                f"{self.name} takes {', '.join(self._names)}; "
                f"given {len(args)} by position and {', '.join(kwargs)} by name"
            )
        return args + tuple([kwargs[name] for name in rest])

    def _run_reference(self, *args: Any) -> Any:
        return _fresh(self.reference(*args))

    def _write(self, args: tuple) -> None:
        self._refuse_gradients(args)
        self._run(args)

    def _autograd_of_writing(self, keyset: Any, *args: Any) -> None:
        self._refuse_gradients(args)
        with torch._C._AutoDispatchBelowAutograd():
            self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def _bump_versions(self, keyset: Any, *args: Any) -> None:
        for index in self._written:
            if args[index] is not None:
                torch.autograd.graph.increment_version(args[index])
        self.overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    def _refuse_gradients(self, args: tuple) -> None:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            wrong, remedy = "an input requires grad", "call it under torch.no_grad() or detach the inputs"
        elif forward_ad._current_level >= 0 and any(map(_has_tangent, tree_leaves(args))):
            wrong, remedy = "an input carries a tangent", "unpack the dual tensors first"
        else:
            return
        written = ", ".join(self.mutates)
        raise ValueError(f"{self.name} writes {written} in place and has no gradient, but {wrong}; {remedy}")

    # Kernels ---------------------------------------------------------------------------------------------------------

    def triton(self, kernel: Callable) -> Callable:
        """Decorator: kernel(*args) serves CUDA tensors. What it lacks it hands to the reference by NotImplemented."""
        self.triton_kernel = kernel
        return kernel

    def load_triton(self) -> Callable | None:
        """The function given to `triton`, after importing triton/NAME.py; None without such a file or Triton."""
        if not self._triton_loaded:
            self._triton_loaded = True
            path = Path(__file__).parent / "triton" / f"{self.module}.py"
            if path.exists() and importlib.util.find_spec("triton") is not None:
                importlib.import_module(f"sfd_kernels.triton.{self.module}")
        return self.triton_kernel

    def _run_triton(self, *args: Any) -> Any:
        kernel = self.triton_kernel or self.load_triton()
        outputs = NotImplemented if kernel is None else kernel(*args)
        return self._run_reference(*args) if outputs is NotImplemented else outputs

    def wanting_gradients(self, args: tuple) -> tuple:
        """args with fresh leaves that require grad in place of every tensor that the operator differentiates."""
        wanted = [
            isinstance(arg, Tensor) and arg.is_floating_point() and name not in self.constants
            for name, arg in zip(self._names, args)
        ]
        return tuple(arg.detach().requires_grad_() if want else arg for arg, want in zip(args, wanted))

    # What it costs ---------------------------------------------------------------------------------------------------

    def examples(
        self, mode: str = "fp32", size: str = "tiny", batch: int | None = None, device: str = "cpu", seed: int = 0
    ) -> Iterator[tuple[str, tuple]]:
        """Yields (label, args), the one to measure first; see `make_and_size` of offline/examples.py."""
        from sfd_kernels.offline.examples import make_and_size

        yield from self._examples(*make_and_size(mode, size, batch, device, seed))

    def bytes(self, *args: Any) -> int:
        """Least bytes moved: every input once, every output once."""
        if self._least_bytes is not None:
            return self._least_bytes(*args)
        meta = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args]
        return num_bytes(args) + num_bytes(self._run_reference(*meta))
