"""The part `accuracy`: every operator and gradient against fp64 on the GPU at XL, batch 32; two runs bit-equal.

Several processes share the operators, since most of the time goes into compiling kernels.
"""

import functools
import importlib
import sys
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from gpu_part import Part
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

NUM_PROCESSES = 8
BATCH = 32


def interpreter_problem() -> str:
    """Why Triton's interpreter cannot run here; empty where it can."""
    try:
        triton, numpy = importlib.import_module("triton"), importlib.import_module("numpy")
    except ImportError as error:
        return f"{error.name} is not installed"
    version = [tuple(int(n) for n in m.__version__.split(".")[:2]) for m in (triton, numpy)]
    if version[0] < (3, 7) and version[1] >= (2, 4):
        return f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__} (2.4 and later)"
    return ""


def cases(rehearse: bool) -> list[tuple[str, str, str, int | None]]:
    """(operator, mode, size, batch); a mode that gives an operator the dtypes of an earlier one is left out.

    Operators for CPUs alone have no kernel here. The optimizer is elementwise and its state at XL is 27 GB in fp64: it
    is checked at the size of B.
    """
    from harness.kernel_cases import flatten
    from sfd_kernels.registry import OPS

    found, seen = [], set()
    for op in (op for op in OPS.values() if not op.on_cuda):
        for mode in ("mix",) if rehearse else ("bf16", "mix"):
            tiny = next(op.examples(mode))[1]
            key = (op.name, *[tensor.dtype for tensor in flatten(tiny)])
            if key in seen:
                continue
            seen.add(key)
            size = "tiny" if rehearse else ("B" if op.name == "adamw_ema_step" else "XL")
            found.append((op.name, mode, size, None if rehearse else BATCH))
    return found


def gradients(op: Any, args: tuple, upstream: list[Tensor]) -> list[Tensor]:
    """Gradients of sum(output * upstream) with respect to every argument that has one."""
    from harness.kernel_cases import flatten

    trained = op.wanting_gradients(args)
    leaves = [tensor for tensor in flatten(trained) if tensor.requires_grad]
    outputs = [output for output in flatten(op(*trained)) if output.requires_grad]
    grads = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(upstream, outputs)], allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)]


def errors(ours: list[Tensor], reference: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Largest |ours - exact| and |reference - exact|, each over the largest |exact| of its tensor."""
    largest = [0.0, 0.0]
    for *pair, right in zip(ours, reference, exact):
        if right.is_floating_point() and right.numel():
            scale = right.abs().max().item() or 1.0
            for index, got in enumerate(pair):
                largest[index] = max(largest[index], (got.double() - right).abs().max().item() / scale)
    return largest[0], largest[1]


def check(case: tuple[str, str, str, int | None], device: str) -> dict[str, Any]:
    """One operator in one mode: accurate, and equal in two runs."""
    from harness.kernel_cases import DIFFERENTIABLE, assert_accurate, flatten, run, to_double
    from sfd_kernels import reference_only
    from sfd_kernels.registry import OPS

    name, mode, size, batch = case
    op, sizes = OPS[name], {} if batch is None else {"batch": batch}
    args = next(op.examples(mode, size, device=device, **sizes))[1]
    ways = {"outputs": functools.partial(run, op, op)}
    if op in DIFFERENTIABLE and not op.is_backward:
        generator = torch.Generator(device).manual_seed(1)
        outputs = [output for output in flatten(op(*args)) if output.is_floating_point()]
        # in the outputs' dtype: fp64 then starts from the same numbers
        upstream = [torch.randn(o.shape, generator=generator, device=device).to(o.dtype) for o in outputs]
        ways["gradients"] = lambda values: gradients(op, values, upstream)
    worst, problem, equal = [0.0, 0.0], "", True
    for what, way in ways.items():
        ours, again = way(args), way(args)
        equal &= all(torch.equal(a, b) for a, b in zip(ours, again))
        with reference_only():
            reference, exact = way(args), way(to_double(args))
        worst = [max(a, b) for a, b in zip(worst, errors(ours, reference, exact))]
        try:
            assert_accurate(ours, reference, exact, what)
        except AssertionError as error:
            problem = problem or str(error).splitlines()[0]
    return {"name": f"{name} {mode} {size}", "value": worst[0], "unit": "error", "reference_error": worst[1],
            "bit_equal": bool(equal), "holds": bool(equal and not problem), "note": problem}  # fmt: skip


def run_part(part: Part) -> None:
    """Rows of every operator as the processes finish them."""
    if part.rehearse and (problem := interpreter_problem()):
        part.skipped("kernels in Triton's interpreter", problem)
    workers = 1 if part.rehearse else NUM_PROCESSES
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        collect(part, pool)


def collect(part: Part, pool: Executor) -> None:
    waiting = {pool.submit(check, case, part.device): case for case in cases(part.rehearse)}
    for done in as_completed(waiting):
        name = " ".join(map(str, waiting[done][:3]))
        part.attempt(name, lambda: part.add(done.result()))  # noqa: B023
