"""What counts as running out of memory, whatever the device calls it."""

from __future__ import annotations

import errno

import pytest
import torch

from retrace.core.errors import InvalidImage, Remedy, is_out_of_memory


class Paging(OSError):
    winerror = 1455


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough memory: ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.97 GB, other allocations: 1.2 GB)"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        Paging("The paging file is too small for this operation to complete."),
    ],
)
def test_out_of_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_a_real_allocation_that_is_too_large() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        InvalidImage("out of range"),
        OSError(errno.ENOENT, "No such file"),
        ValueError("out of memory"),  # a message that only speaks of it
    ],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("remedy", list(Remedy))
def test_a_remedy_follows_what_arrived_and_can_be_told_apart(remedy: Remedy) -> None:
    error = InvalidImage("It is grey.", remedy)
    assert str(error) == f"It is grey. {remedy.value}"
    assert (error.what, error.remedy) == ("It is grey.", remedy)
    assert remedy.value.endswith(".") and "'" not in remedy.value, "a sentence that names no node"


def test_an_error_without_a_remedy() -> None:
    error = InvalidImage("It is grey.")
    assert str(error) == error.what == "It is grey." and error.remedy is None
