"""Training in real processes: killed at random moments, on several ranks, from the shell."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsalt import training

HERE = Path(__file__).parent
TORCHRUN = (
    "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0",
    "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
)  # fmt: skip
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
@pytest.mark.parametrize("how", ["--ddp", "--fsdp true"])
def test_the_command_line_under_torchrun_is_that_of_one_process(tmp_path, how):
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=2000)))
    flags = (
        f"--text {tmp_path / 'text.txt'} --seq-len 16 --d-model 16 --n-layers 2 --n-heads 2 "
        "--n-min 2 --n-max 6 --k-lmk 2 --dropout 0 --lr 1e-2 --total-steps 4 --log-every 1 "
        "--val-every 2 --device cpu --quiet"
    )
    assert training.main(f"{flags} --batch-size 8 --save-dir {tmp_path / 'one'}".split()) == 0
    more = f"--batch-size 4 --save-dir {tmp_path / 'two'} {how}"
    done = call(*TORCHRUN, "-m", "dsalt.training", *f"{flags} {more}".split(), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 4: loss ") == 1  # of rank 0 alone
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "val_loss", "grad_norm", "tokens"):
            assert abs(one.get(key, 0) - two.get(key, 0)) <= 1e-5, (key, one, two)
    weights = [
        load_file(tmp_path / name / "step-00000004/model.safetensors") for name in ("one", "two")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] - weights[1][key]).abs().max() <= 1e-5 for key in weights[0])


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_with_its_error(tmp_path):
    done = call(*TORCHRUN, HERE / "processes.py", "die", tmp_path, timeout=120)
    assert done.returncode != 0
    assert "rank 1 has had enough" in done.stderr
