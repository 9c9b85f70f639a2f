"""A program for test_processes.py: it trains in real processes and compares the results.

``python processes.py JOB FOLDER [N]``; it forks its workers after the imports, so that each costs
little. Exit code 0 and the last line "ok", or a traceback.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from dsalt import _checkpoint
from dsalt._files import load_weights
from dsalt.model import DSALTLMHeadModel
from dsalt.training import DSALTTrainer
from shared_kernels.testing.tolerances import tolerance

FLOAT32 = tolerance(torch.float32)
FLOAT64 = tolerance(torch.float64)  # training in float64: sums in another order

VOCAB = 20


def make(dropout: float = 0.0, **options) -> DSALTLMHeadModel:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_min": 2, "n_max": 8, "k_lmk": 2}
    return DSALTLMHeadModel(VOCAB, dropout=dropout, landmark_block=4, **{**sizes, **options})


def data(n: int, seed: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (n, 9), generator=g)


def run(
    folder: Path,
    batch_size: int,
    *,
    n: int = 16,
    dropout: float = 0.0,
    workers: int = 0,
    model: DSALTLMHeadModel | None = None,
    val: int = 7,
    precision: torch.dtype = torch.float64,
    **options,
) -> DSALTTrainer:
    x = data(n)
    y = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -100, x)
    # float64: rounding must not decide between two landmarks, so that equal means equal
    model = (make(dropout) if model is None else model).to(precision)
    torch.manual_seed(7)
    train = DataLoader(TensorDataset(x, y), batch_size, shuffle=True, num_workers=workers)
    options = {"total_steps": 9, "save_every": 3, "warmup_steps": 2, "grad_accum": 1, **options}
    trainer = DSALTTrainer(
        model,
        train,
        DataLoader(TensorDataset(data(val, 5)), batch_size=2),
        lr=1e-2,
        save_dir=folder,
        dtype=options.pop("dtype", torch.float32),
        log_every=1,
        val_every=3,
        shift_labels=True,
        device="cpu",
        progress=False,
        window_reg_coef=0.1,
        **options,
    )
    trainer.train()
    return trainer


def in_ranks(size: int, work, expected: tuple[int, ...] = (0, 0)) -> None:
    """Run ``work(rank)`` in ``size`` forked processes that see torchrun's environment.

    Rank r must end with the exit code ``expected[r]``; a negative one is a signal.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(size),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
                work(rank)
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in children]
    assert tuple(os.waitstatus_to_exitcode(code) for code in codes) == expected, codes


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / _checkpoint.step_name(step) / "model.safetensors")


def losses(folder: Path, key: str) -> list[float]:
    import json

    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def close(a: Path, b: Path, step: int, atol: float) -> None:
    for key in ("loss", "val_loss", "grad_norm", "window_reg"):
        torch.testing.assert_close(
            torch.tensor(losses(a, key), dtype=torch.float64),
            torch.tensor(losses(b, key), dtype=torch.float64),
            atol=atol,
            rtol=0,
            msg=f"{a.name}, {b.name}: {key}",
        )
    one, two = weights(a, step), weights(b, step)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=atol, rtol=0, msg=name)


def equal(a: Path, b: Path, step: int) -> None:
    one, two = weights(a, step), weights(b, step)
    assert all(torch.equal(one[n], two[n]) for n in one)
    states = [
        torch.load(f / _checkpoint.step_name(step) / "trainer.pt", weights_only=True)
        for f in (a, b)
    ]
    for state in states:
        state["last_logs"].pop("tokens_per_second")
        state.pop("run_id")  # what loggers call the run
    assert same(*states)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# --- jobs ----------------------------------------------------------------------------------------


def kill(folder: Path, times: int) -> None:
    """kill -9 at random moments, resuming each time: the end is that of the uninterrupted run."""
    options = {
        "n": 40,
        "dropout": 0.2,
        "workers": 2,
        "total_steps": 24,
        "save_every": 1,
        "keep_last": 2,
        "seed": 5,
    }
    run(folder / "warm", 4, total_steps=3)  # what the first step imports
    started = time.monotonic()
    whole = run(folder / "whole", 4, **options)
    expected = [next(whole._stream) for _ in range(10)]
    lasted = time.monotonic() - started
    chance = random.Random(0)
    killed = finished = 0
    status: int | None = None
    while killed < times or status is None:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                sys.stderr = open(os.devnull, "w")
                torch.manual_seed(os.getpid())
                resumed = run(folder / "killed", 4, resume_from="auto", **options)
                after = [next(resumed._stream) for _ in range(10)]
                code = 0 if same(after, expected) else 3
            finally:
                os._exit(code)
        wait = 1e9 if killed >= times else chance.uniform(0.0, 0.7 * lasted)
        deadline, status = time.monotonic() + wait, None
        while status is None and time.monotonic() < deadline:
            done, code = os.waitpid(pid, os.WNOHANG)
            status = code if done else None
            time.sleep(0.002)
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
            found = _checkpoint.latest(folder / "killed")
            if found is not None:  # whole: it loads as it lies there
                DSALTLMHeadModel.from_pretrained(found)
                torch.load(found / "trainer.pt", weights_only=True)
        else:
            assert status == 0, f"a resumed run failed or saw other batches: {status}"
            equal(folder / "whole", folder / "killed", 24)
            finished += 1
            if killed < times:
                import shutil

                shutil.rmtree(folder / "killed")
    names = {p.name for p in (folder / "killed").iterdir()}
    assert names == {"latest", "log.jsonl", "step-00000023", "step-00000024"}, names
    print(f"{killed} kills, {finished} complete runs")


def distributed(folder: Path, times: int) -> None:
    """DDP and FSDP2 on two ranks are one process with the joint batch; checkpoints interchange."""
    del times
    run(folder / "one", 8)
    run(folder / "one-accum", 4, grad_accum=2, n=16)
    run(folder / "one-float32", 8, precision=torch.float32)
    modes = {"ddp": {"ddp": True}, "fsdp": {"fsdp": True}}
    modes["offload"] = {"fsdp": True, "fsdp_cpu_offload": True}

    def work(rank: int) -> None:
        for name, how in modes.items():
            trainer = run(folder / name, 4, **how)
            ids = trainer.model.generate(data(2)[:, :4], 6, temperature=0.0)
            assert ids.shape == (2, 10)
            if name == "offload":  # both directions, in place of the many runs of the others
                start = {"resume_from": folder / "one" / "step-00000006"}
                run(folder / "offload-from-one", 4, **how, **start)
                continue
            run(folder / f"{name}-accum", 2, grad_accum=2, **how)
            # goes on from its own checkpoint, from one process's, bit for bit and closely
            start = {"resume_from": folder / name / "step-00000003"}
            run(folder / f"{name}-again", 4, **how, **start)
            start = {"resume_from": folder / "one" / "step-00000003"}
            run(folder / f"{name}-from-one", 4, **how, **start)
        run(folder / "ddp-float32", 4, ddp=True, precision=torch.float32)
        tied = run(folder / "tied", 4, fsdp=True, model=make(tie_embeddings=True), total_steps=3)
        assert tied.model.lm_head.weight is tied.model.embedding.weight
        for name, how in (("shared", {"fsdp": True}), ("shared-ddp", {"ddp": True})):
            run(folder / name, 4, model=shared(), total_steps=3, **how)
        run(folder / "ema", 4, fsdp=True, ema=0.9, keep_best=True, total_steps=3)
        run(folder / "dropout", 4, ddp=True, dropout=0.3)
        run(
            folder / "dropout-again",
            4,
            ddp=True,
            dropout=0.3,
            resume_from=folder / "dropout/step-00000003",
        )
        bare = make(k_lmk=0)
        run(folder / "bare", 4, ddp=True, model=bare, total_steps=3)
        run(folder / "half", 4, fsdp=True, dtype=torch.float16)
        run(folder / "bf16", 4, ddp=True, dtype=torch.bfloat16)

    in_ranks(2, work)
    # rank 0 hears of a rank that raised and of one that was killed: no hang
    in_ranks(2, lambda rank: die(folder / "die", 0), expected=(1, 1))
    in_ranks(2, lambda rank: die(folder / "killed", 9), expected=(1, -9))
    for name in modes:
        close(folder / "one", folder / name, 9, FLOAT64)
    for name in ("ddp", "fsdp"):
        close(folder / "one-accum", folder / f"{name}-accum", 9, FLOAT64)
        equal(folder / name, folder / f"{name}-again", 9)
        for key, value in weights(folder / "one", 9).items():
            torch.testing.assert_close(
                weights(folder / f"{name}-from-one", 9)[key], value, atol=FLOAT64, rtol=0
            )
    run(folder / "shared-one", 8, model=shared(), total_steps=3)
    run(folder / "ema-one", 8, ema=0.9, keep_best=True, total_steps=3)
    close(folder / "shared-one", folder / "shared", 3, FLOAT64)
    close(folder / "shared-one", folder / "shared-ddp", 3, FLOAT64)
    close(folder / "ema-one", folder / "ema", 3, FLOAT64)
    averages = [
        load_file(folder / f / "step-00000003/ema/model.safetensors") for f in ("ema", "ema-one")
    ]
    for key, value in averages[1].items():
        torch.testing.assert_close(averages[0][key], value, atol=FLOAT64, rtol=0, msg=key)
    close(folder / "one-float32", folder / "ddp-float32", 9, FLOAT32 / 2)
    equal(folder / "dropout", folder / "dropout-again", 9)
    # a checkpoint of shards goes on in one process and loads as a plain model
    for name in ("fsdp", "offload"):
        start = {"resume_from": folder / name / "step-00000006"}
        run(folder / f"back-{name}", 8, **start)
    for name in ("back-fsdp", "back-offload", "offload-from-one"):
        found = weights(folder / name, 9)
        for key, value in weights(folder / "one", 9).items():
            torch.testing.assert_close(
                found[key], value, atol=FLOAT64, rtol=0, msg=f"{name}: {key}"
            )
        plain = DSALTLMHeadModel.from_pretrained(folder / name / "step-00000009").state_dict()
        assert all(torch.equal(plain[key], value.float()) for key, value in found.items())
    assert losses(folder / "half", "loss")[-1] < losses(folder / "half", "loss")[0]
    assert abs(losses(folder / "bf16", "loss")[-1] - losses(folder / "one", "loss")[-1]) < 0.05


def shared() -> DSALTLMHeadModel:
    """One block three times, and two blocks that share a matrix, inside the ModuleList."""
    model = make()
    first, second = model.transformer.blocks
    second.attention.q_proj.weight = first.attention.q_proj.weight
    third = make().transformer.blocks[0]
    model.transformer.blocks = torch.nn.ModuleList([first, second, third, first])
    return model


def generate(folder: Path, times: int) -> None:
    """Sharded ranks whose rows end at different steps: each continues as the whole model does."""
    del times
    import torch.distributed.fsdp

    run(folder / "warm", 4, total_steps=3)  # what the first step imports

    def work(rank: int) -> None:
        signal.alarm(200)  # a rank that waits for ever ends here
        model = run(folder / "fsdp", 4, fsdp=True, total_steps=3).model
        whole = make().double()
        load_weights(whole, folder / "fsdp/step-00000003/model.safetensors")
        prompts = data(2, seed=rank)[: 1 + rank, : 4 + rank]
        first = int(whole.eval().generate(prompts, 1, temperature=0.0)[0, -1])
        for options in (
            {"max_new_tokens": 3 + 5 * rank, "temperature": 0.0},
            {"max_new_tokens": 7 - 7 * rank, "use_cache": False},
            {"max_new_tokens": 9, "temperature": 0.0, "eos_token_id": None if rank else first},
        ):
            chances = [torch.Generator().manual_seed(2) for _ in range(2)]
            sharded = model.generate(prompts, generator=chances[0], **options)
            assert torch.equal(sharded, whole.generate(prompts, generator=chances[1], **options))
            assert torch.equal(*(chance.get_state() for chance in chances))

    in_ranks(2, work)


def die(folder: Path, sign: int) -> None:
    """A rank that fails in the middle, or gets that signal; to be started by torchrun."""

    class Fail:
        def on_step_end(self, trainer: DSALTTrainer) -> None:
            if trainer.world.rank == 1 and trainer.step == 2:
                if sign:
                    os.kill(os.getpid(), sign)
                raise RuntimeError("rank 1 has had enough")

    run(folder, 4, ddp=True, callbacks=[Fail()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, where = sys.argv[1], Path(sys.argv[2])
    jobs = {"kill": kill, "distributed": distributed, "generate": generate, "die": die}
    jobs[job](where, int((sys.argv[3:] or [0])[0]))
    print("ok")
