"""The loss of a vocabulary that is spread over the ranks of a process group."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffmax import diffmax_linear_loss
from shared_kernels.testing import assert_close

OPTIONS = [
    {"alpha": 0.5},
    {"alpha": 0.85, "label_smoothing": 0.1},
    {"alpha": 0.3, "softcap": 3.0},
    {"alpha": 0.6, "softcap": 3.0, "label_smoothing": 0.1, "reduction": "sum"},
    {"alpha": 0.98, "scale": 0.1},  # a long support: rows are taken as a whole
    {"alpha": 0.5, "forbidden": 40},  # the first rank has nothing to give
]
SPLIT = (37, 63)  # shards need not be equal


def tensors(scale=1.0, forbidden=0):
    generator = torch.Generator().manual_seed(0)
    V = sum(SPLIT)
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    target = torch.randint(V, (9,), generator=generator)
    target[2] = -100
    bias[:forbidden] = -torch.inf
    target[target >= 0] = target[target >= 0].clamp(min=forbidden)
    return hidden, weight, bias, target


def result(hidden, weight, bias, target, alpha, group=None, **more):
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    alpha = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    loss = diffmax_linear_loss(inputs[0], inputs[1], target, alpha, inputs[2], group=group, **more)
    return loss.detach(), *torch.autograd.grad(loss, (*inputs, alpha))


def worker(rank, where, folder):
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
    part = slice(0, SPLIT[0]) if rank == 0 else slice(SPLIT[0], None)
    found = []
    for more in OPTIONS:
        more = dict(more)
        of_data = {k: more.pop(k) for k in ("scale", "forbidden") if k in more}
        hidden, weight, bias, target = tensors(**of_data)
        found.append(
            result(hidden, weight[part], bias[part], target, group=dist.group.WORLD, **more)
        )
    hidden, weight, bias, target = tensors()
    target[0] = 100
    try:
        result(hidden, weight[part], bias[part], target, 0.5, group=dist.group.WORLD)
        message = ""
    except ValueError as error:
        message = str(error)
    torch.save((found, message), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_loss_and_gradients_of_one(tmp_path):
    mp.spawn(worker, (tmp_path / "store", tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all("`target` must be in [0, 99], got 100 at" in message for _, message in ranks)
    for i, more in enumerate(OPTIONS):
        more = dict(more)
        of_data = {k: more.pop(k) for k in ("scale", "forbidden") if k in more}
        exact = result(*tensors(**of_data), **more)
        first, second = (found[i] for found, _ in ranks)
        for k in (0, 1, 4):  # loss, hidden, alpha: both ranks have the whole of it
            assert_close(first[k], exact[k], "gradient")
            assert torch.equal(first[k], second[k])
        for k in (2, 3):  # weight and bias: each rank has its shard
            assert_close(torch.cat((first[k], second[k])), exact[k], "gradient")


def test_the_reference_knows_no_group():
    class Group:
        group_name = "0"

    hidden, weight, _, target = tensors()
    with pytest.raises(NotImplementedError, match="no group"):
        diffmax_linear_loss(hidden, weight, target, group=Group(), backend="reference")
