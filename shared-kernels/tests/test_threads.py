"""one_torch_thread: sections that overlap, nest and fail leave the count as it was."""

import subprocess
import sys
import threading

import pytest
import torch

from shared_kernels.threads import one_torch_thread


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _counts(n: int = 3) -> tuple[list[int], list[int]]:
    """n sections that begin in turn and end in the same order: counts inside and afterwards."""
    begun, may_end = [[threading.Event() for _ in range(n)] for _ in range(2)]
    inside, after = [], []

    def run(i: int) -> None:
        with one_torch_thread() as before:
            assert before == 2
            begun[i].set()
            may_end[i].wait()
            inside.append(torch.get_num_threads())
        after.append(torch.get_num_threads())

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(n)]
    for i, thread in enumerate(threads):
        thread.start()
        begun[i].wait()
    for i, thread in enumerate(threads):
        may_end[i].set()
        thread.join()
    return inside, after


def test_sections_that_overlap_leave_the_count_everywhere():
    assert _counts() == ([1, 1, 1], [2, 2, 2])
    assert torch.get_num_threads() == 2
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2]


def test_nested_and_failing_sections():
    with one_torch_thread(), one_torch_thread() as before:
        assert before == 2 and torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with one_torch_thread():
        with one_torch_thread():
            pass
        assert torch.get_num_threads() == 1
    with pytest.raises(KeyError), one_torch_thread():
        raise KeyError
    assert torch.get_num_threads() == 2
    assert _counts() == ([1, 1, 1], [2, 2, 2])


@pytest.mark.system
def test_import_costs_nothing_and_changes_nothing():
    code = "import torch; n = torch.get_num_threads(); import shared_kernels.threads; "
    code += "assert torch.get_num_threads() == n"
    subprocess.run([sys.executable, "-c", code], check=True)
