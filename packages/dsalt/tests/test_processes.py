"""Training in real processes: killed at random moments, on several ranks, from the shell."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsalt import _checkpoint, training
from shared_kernels.testing.tolerances import tolerance

FLOAT32 = tolerance(torch.float32)

HERE = Path(__file__).parent
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--master-port=0",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
)
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="forks its workers"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


def call(*command: object, timeout: float = 300.0) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def job(name: str, folder: Path, n: int = 0) -> None:
    done = call(HERE / "processes.py", name, folder, n)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "ok"


@pytest.mark.parametrize(
    "times",
    [pytest.param(2, marks=pytest.mark.thorough), pytest.param(24, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_it_resumes_bit_for_bit(tmp_path, times):
    job("kill", tmp_path, times)


@pytest.mark.thorough
def test_two_ranks_are_one_process_with_the_joint_batch(tmp_path):
    job("distributed", tmp_path)


@pytest.mark.thorough
def test_sharded_ranks_generate_until_the_last_one_ends(tmp_path):
    job("generate", tmp_path)


def _flags(folder: Path, steps: int, more: str = "") -> list[str]:
    path = folder / "text.txt"
    if not path.exists():
        path.write_text("".join(random.Random(0).choices("abcdefgh ", k=4000)))
    return (
        f"--text {path} --seq-len 16 --d-model 16 --n-layers 1 --n-heads 2 --n-min 2 --n-max 6 "
        f"--k-lmk 2 --dropout 0.1 --total-steps {steps} --log-every 1 --val-every 0 --device cpu "
        f"--save-every 0 --schedule constant --warmup-steps 1 --quiet {more}"
    ).split()


def signalled(folder: Path, number: int, launcher: tuple, flags: list[str], group: bool):
    """Start it, send the signal once it has logged a few steps, and wait: (code, stderr)."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "dsalt.training", *flags],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log, deadline = folder / "log.jsonl", time.monotonic() + 90
    try:
        while not (log.exists() and log.read_text().count("\n") > 4):
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (os.killpg if group else os.kill)(process.pid, number)
        _, error = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, error


@pytest.mark.parametrize(
    ("name", "group", "workers"),
    [
        ("SIGTERM", False, 0),
        pytest.param("SIGINT", True, 2, marks=pytest.mark.thorough),
        pytest.param("SIGTERM", True, 2, marks=pytest.mark.thorough),
        pytest.param("SIGUSR1", True, 2, marks=pytest.mark.thorough),
        pytest.param("SIGUSR1", False, 2, marks=pytest.mark.slow),
        pytest.param("SIGINT", False, 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends_and_the_run_goes_on(tmp_path, name, group, workers):
    number = getattr(signal, name)
    more = f"--num-workers {workers} --save-dir {tmp_path / 'run'}"
    flags = _flags(tmp_path, 100_000, more)
    code, error = signalled(tmp_path / "run", number, (), flags, group)
    assert code == (130 if name == "SIGINT" else 128 + number), error
    assert f"{name}: saving a checkpoint" in error and "Traceback" not in error, error
    assert not (tmp_path / "run/.lock").exists()
    ((step, _),) = _checkpoint.steps(tmp_path / "run")
    more = f"--num-workers {workers} --save-dir "
    for where in ("run --resume", "whole"):
        assert training.main(_flags(tmp_path, step + 3, more + f"{tmp_path}/{where}")) == 0
    whole, broken = (
        load_file(tmp_path / run / _checkpoint.step_name(step + 3) / "model.safetensors")
        for run in ("whole", "run")
    )
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_to_torchrun_saves_once_on_all_ranks(tmp_path, name, workers):
    number = getattr(signal, name)
    more = f"--ddp --batch-size 4 --num-workers {workers} --save-dir {tmp_path / 'run'}"
    flags = _flags(tmp_path, 100_000, more)
    code, error = signalled(tmp_path / "run", number, TORCHRUN, flags, name == "SIGINT")
    assert code != 0
    assert error.count(f"{name}: saving a checkpoint") == 1, error
    ((step, _),) = _checkpoint.steps(tmp_path / "run")
    assert step > 3


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
            assert abs(one.get(key, 0) - two.get(key, 0)) <= FLOAT32 / 2, (key, one, two)
    weights = [
        load_file(tmp_path / name / "step-00000004/model.safetensors") for name in ("one", "two")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] - weights[1][key]).abs().max() <= FLOAT32 / 2 for key in weights[0])


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_with_its_error(tmp_path):
    done = call(*TORCHRUN, HERE / "processes.py", "die", tmp_path, timeout=120)
    assert done.returncode != 0
    assert "rank 1 has had enough" in done.stderr
