"""Training in real processes: killed at random moments, on several ranks, from the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks its workers"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


def call(*command: object, timeout: float = 300.0) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def job(name: str, folder: Path, n: int = 0) -> None:
    done = call(HERE / "processes.py", name, folder, n)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "ok"


@pytest.mark.parametrize("times", [3, pytest.param(24, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_resumes_bit_for_bit(tmp_path, times):
    job("kill", tmp_path, times)


def test_two_ranks_are_one_process_with_the_joint_batch(tmp_path):
    job("distributed", tmp_path)


def test_sharded_ranks_generate_until_the_last_one_ends(tmp_path):
    job("generate", tmp_path)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_with_its_error(tmp_path):
    done = call(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
        "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
        HERE / "processes.py", "die", tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "rank 1 has had enough" in done.stderr
