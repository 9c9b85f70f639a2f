"""The loss of a vocabulary that is spread over the ranks of a process group."""

import pytest
import torch
import torch.distributed as dist

from diffmax import DiffmaxLinearLoss, HillMap, diffmax_linear_loss
from shared_kernels.testing import assert_close
from shared_kernels.testing.ranks import needs_ranks, on_ranks

pytestmark = [*needs_ranks, pytest.mark.system]

OPTIONS = [
    {"alpha": 0.5},
    {"alpha": 0.85, "label_smoothing": 0.1},
    {"alpha": 0.3, "softcap": 3.0},
    {"alpha": 0.6, "softcap": 3.0, "label_smoothing": 0.1, "reduction": "sum"},
    {"alpha": 0.98, "scale": 0.1},  # a long support: rows are taken as a whole
    {"alpha": 0.5, "forbidden": 40},  # the first rank has nothing to give
]
SPLIT = (37, 63)  # shards need not be equal
# class, its logit, alpha, label_smoothing
BAD = [
    (where, bad, alpha, label_smoothing)
    for where in (3, 80)
    for bad in (torch.nan, torch.inf)
    for alpha in (0.3, 0.5, 0.98)
    for label_smoothing in (0.0, 0.1)
]


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


def of_dtensors(rank):
    """Loss and gradients of DTensors, and the words of every layout that is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, bias, target = tensors()

    def placed(x, placement):
        return distribute_tensor(x, mesh, [placement]).requires_grad_()

    inputs = placed(hidden, Replicate()), placed(weight, Shard(0)), placed(bias, Shard(0))
    loss = diffmax_linear_loss(inputs[0], inputs[1], target, 0.5, inputs[2])
    gradients = torch.autograd.grad(loss, inputs)
    words = []
    for wrong in (
        {"hidden": hidden},
        {"hidden": placed(hidden, Shard(0))},
        {"weight": weight},
        {"weight": placed(weight, Replicate())},
        {"bias": bias},
        {"weight": placed(weight[:1], Shard(0)), "bias": None, "target": target.clamp(max=0)},
        {"group": dist.group.WORLD},
    ):
        names = {"hidden": inputs[0], "weight": inputs[1], "bias": inputs[2], "target": target}
        with pytest.raises(ValueError, match="must") as refused:
            diffmax_linear_loss(alpha=0.5, **{**names, **wrong})
        words.append(str(refused.value))
    return [x.full_tensor().detach() for x in (loss, *gradients)], words


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        hidden, weight, bias, _ = tensors()
        self.body = torch.nn.Linear(5, 5, dtype=torch.float64)
        torch.nn.init.eye_(self.body.weight)
        torch.nn.init.zeros_(self.body.bias)
        self.head = torch.nn.Parameter(weight)
        self.bias = torch.nn.Parameter(bias)
        self.loss = DiffmaxLinearLoss(0.5, HillMap(), dtype=torch.float64)

    def forward(self, hidden, target):
        return self.loss(self.body(hidden), self.head, target, self.bias)


def under_fsdp(rank):
    """The gradients of a model that FSDP2 shards, each rank with its own rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hidden, _, _, target = tensors()
    model = fully_shard(Model(), mesh=init_device_mesh("cpu", (2,)))
    model(hidden[3:][rank::2], target[3:][rank::2]).backward()
    return {name: x.grad.full_tensor() for name, x in model.named_parameters()}


def without_a_number(part):
    """Loss and gradient in hidden of each row, for a class of either rank that is NaN or inf."""
    found = []
    for where, bad, alpha, label_smoothing in BAD:
        hidden, weight, bias, target = tensors()
        bias[where] = bad
        hidden = hidden.requires_grad_()
        loss = diffmax_linear_loss(
            hidden,
            weight[part],
            target,
            alpha,
            bias[part],
            label_smoothing=label_smoothing,
            reduction="none",
            group=None if part == slice(None) else dist.group.WORLD,
        )
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), hidden)))
    return found


def work(rank):
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
    return found, message, without_a_number(part), of_dtensors(rank), under_fsdp(rank)


@pytest.fixture(scope="module")
def ranks():
    """What each of two processes found."""
    return on_ranks(2, work)


def test_two_ranks_give_the_loss_and_gradients_of_one(ranks):
    assert all("`target` must be in [0, 99], got 100 at" in message for _, message, *_ in ranks)
    for i, more in enumerate(OPTIONS):
        more = dict(more)
        of_data = {k: more.pop(k) for k in ("scale", "forbidden") if k in more}
        exact = result(*tensors(**of_data), **more)
        first, second = (found[i] for found, *_ in ranks)
        for k in (0, 1, 4):  # loss, hidden, alpha: both ranks have the whole of it
            assert_close(first[k], exact[k], "gradient")
            assert torch.equal(first[k], second[k])
        for k in (2, 3):  # weight and bias: each rank has its shard
            assert_close(torch.cat((first[k], second[k])), exact[k], "gradient")


def test_a_logit_of_any_rank_that_is_no_number_is_seen_on_every_rank(ranks):
    """With gloo the largest of a NaN and a number depends on which rank has the NaN."""
    exact = without_a_number(slice(None))
    for _, _, found, *_ in ranks:
        for case, both, wanted in zip(BAD, found, exact, strict=True):
            for x, y in zip(both, wanted, strict=True):
                assert torch.equal(x.isnan(), y.isnan()), case


def test_dtensors_say_how_the_vocabulary_is_sharded(ranks):
    exact = result(*tensors(), alpha=0.5)[:4]
    for *_, (found, words), _ in ranks:
        for x, wanted in zip(found, exact, strict=True):
            assert_close(x, wanted, "gradient")
        names = ["hidden", "hidden", "weight", "weight", "bias", "weight", "group"]
        assert [each.split("`")[1] for each in words] == names


def test_fsdp_shards_the_model_around_the_loss(ranks):
    """The mean over ranks of equal numbers of rows is the mean over all rows."""
    hidden, _, _, target = tensors()
    model = Model()
    model(hidden[3:], target[3:]).backward()
    for *_, gradients in ranks:
        for name, x in model.named_parameters():
            assert_close(gradients[name], x.grad, "gradient")


def test_the_reference_knows_no_group():
    class Group:
        group_name = "0"

    hidden, weight, _, target = tensors()
    with pytest.raises(NotImplementedError, match="no group"):
        diffmax_linear_loss(hidden, weight, target, group=Group(), backend="reference")
