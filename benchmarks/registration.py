"""Compares the ways to register an operator: what a call costs the host and what autograd and torch.compile see.

    python benchmarks/registration.py [--out DIR]

The operator does nothing but allocate its output, so all of the time is registration. Styles: `autograd.Function` (no
operator at all), torch.library.Library with register_autograd, torch.library.custom_op, torch.library.triton_op (its
body is inlined by the compiler), and `Op` of sfd_kernels.registry. Prints a table, writes registration.json and puts
the table into kernels/README.md.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

sys.path.insert(0, str(Path(__file__).resolve().parent))

from readme import KERNELS_README, insert  # noqa: E402
from sfd_kernels.registry import Op  # noqa: E402
from timing import host_us, machine  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
LIBRARY = torch.library.Library("registration", "FRAGMENT")


def allocate(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


class Function(torch.autograd.Function):
    """No operator: the compiler traces the body, and no other device or language can attach a kernel."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return allocate(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return allocate(*ctx.saved_tensors)


def library_style(name: str) -> Callable[[Tensor], Tensor]:
    LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    LIBRARY.impl(name, allocate, "CPU")
    torch.library.register_fake(f"registration::{name}", allocate, lib=LIBRARY)
    return getattr(torch.ops.registration, name).default


def with_gradient(make: Callable[[str], Callable]) -> Callable[[Tensor], Tensor]:
    """forward and backward operators of one style, tied by register_autograd."""
    style = make.__name__
    forward, backward = make(f"{style}_forward"), make(f"{style}_backward")

    def gradient(ctx, dy: Tensor) -> Tensor:
        return backward(*ctx.saved_tensors)

    torch.library.register_autograd(f"registration::{style}_forward", gradient, setup_context=save)
    return forward


def custom_op_style(name: str) -> Callable[[Tensor], Tensor]:
    operator = torch.library.custom_op(f"registration::{name}", allocate, mutates_args=())
    operator.register_fake(allocate)
    return operator


def triton_op_style(name: str) -> Callable[[Tensor], Tensor]:
    return torch.library.triton_op(f"registration::{name}", allocate, mutates_args=())


def op_style() -> Callable[[Tensor], Tensor]:
    """Op of the registry, with the same allocation as CPU kernel of both operators."""

    def registration_op_backward(dy: Tensor, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def registration_op(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def none(make, size):
        return iter(())

    backward = Op(registration_op_backward, examples=none, flops=lambda *args: 0)
    forward = Op(registration_op, examples=none, flops=lambda *args: 0, backward=backward)
    forward.register_autograd(lambda ctx, dy: backward(dy, *ctx.saved_tensors), setup_context=save)
    kernels = torch.library.Library("sfd", "IMPL")
    kernels.impl("registration_op", registration_op, "CPU")
    kernels.impl("registration_op_backward", registration_op_backward, "CPU")
    op_style.keep = kernels
    return forward


def seen_by_compiler(function: Callable) -> tuple[bool, list[str]]:
    """Whether fullgraph=True works with gradients, and the calls in the graph that the compiler then gets."""
    calls: list[str] = []

    def inner(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: function(x), fullgraph=True, backend=aot_autograd(fw_compiler=inner))
    try:
        compiled(torch.ones(4, requires_grad=True)).sum().backward()
    except Exception as error:  # noqa: BLE001  what the compiler refuses is the result
        return False, [type(error).__name__]
    return True, calls


def bumps_versions() -> dict[str, bool]:
    """Whether an operator that writes its input bumps the version counter, by style."""

    def write(x: Tensor) -> None:
        # as a C++ or Triton kernel does: by address, where autograd notices nothing
        x.untyped_storage().fill_(0)

    LIBRARY.define("library_write(Tensor(a!) x) -> ()")
    LIBRARY.impl("library_write", write, "CPU")
    custom = torch.library.custom_op("registration::custom_op_write", write, mutates_args=("x",))
    found = {}
    for name, function in (("Library", torch.ops.registration.library_write.default), ("custom_op", custom)):
        x = torch.ones(4)
        before = x._version
        function(x)
        found[name] = x._version > before
    return found


def markdown(rows: list[dict]) -> str:
    """The table for README.md."""
    titles = ["style", "no gradient", "forward", "forward + backward", "compiled call", "compiler sees", "by device"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        times = [row[key] for key in ("no_grad_us", "forward_us", "forward_backward_us", "compiled_us")]
        cells = [row["style"], *[f"{value:.1f}" for value in times]]
        cells.append("one node" if row["one_node_for_the_compiler"] else "its body")
        cells.append("yes" if row["kernels_by_device"] else "no")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    styles = {
        "autograd.Function": Function.apply,
        "Library": with_gradient(library_style),
        "custom_op": with_gradient(custom_op_style),
        "triton_op": with_gradient(triton_op_style),
        "Op (ours)": op_style(),
    }
    versions = bumps_versions()
    x, leaf, grad = torch.ones(64), torch.ones(64, requires_grad=True), torch.ones(64)
    rows = []
    print(f"{'style':18} {'no grad us':>10} {'forward us':>10} {'fwd+bwd us':>10} {'compiled us':>11}  compiler sees")
    for name, function in styles.items():
        complete, calls = seen_by_compiler(function)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, f=function: f(x), fullgraph=True)
        with torch.no_grad():
            inference, compiled_us = host_us(lambda f=function: f(x), "cpu"), host_us(lambda c=compiled: c(x), "cpu")
        forward = host_us(lambda f=function: f(leaf), "cpu")
        both = host_us(lambda f=function: torch.autograd.grad(f(leaf), leaf, grad), "cpu")
        opaque = any("registration" in call for call in calls)
        rows.append(
            {
                "style": name,
                "no_grad_us": inference,
                "forward_us": forward,
                "forward_backward_us": both,
                "compiled_us": compiled_us,
                "fullgraph": complete,
                "one_node_for_the_compiler": opaque,
                "kernels_by_device": name not in ("autograd.Function", "triton_op"),
                "bumps_version_counters": versions.get("custom_op" if name == "Op (ours)" else name),
                **machine("cpu"),
            }
        )
        print(
            f"{name:18} {inference:10.1f} {forward:10.1f} {both:10.1f} {compiled_us:11.1f}  "
            f"{'one node' if opaque else 'body inlined'}{'' if complete else ', fullgraph fails'}"
        )
    empty = host_us(lambda: torch.empty_like(x), "cpu")
    print(f"the allocation itself takes {empty:.1f} us")
    print(*[f"writing through {name} bumps version counters: {bumps}" for name, bumps in versions.items()], sep="\n")
    if options.out == RESULTS:
        insert(KERNELS_README, "registration", markdown(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "registration.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
