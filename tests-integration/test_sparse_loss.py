"""dsalt's model with diffmax's loss in the place of cross-entropy: neither knows the other."""

import torch

from diffmax import DiffmaxLinearLoss, HillMap, diffmax_loss
from dsalt.model import DSALTLMHeadModel
from shared_kernels.testing import assert_close


def test_a_language_model_trains_on_a_loss_with_a_sparse_gradient():
    torch.manual_seed(0)
    criterion = DiffmaxLinearLoss(0.5, HillMap())
    model = DSALTLMHeadModel(
        50, 16, 1, 2, n_min=2, n_max=4, k_lmk=2, dropout=0.0, tie_embeddings=True, loss=criterion
    )
    ids = torch.randint(50, (4, 12))
    labels = ids.roll(-1, 1)  # the next tokens
    labels[:, -1] = -100
    plain = DSALTLMHeadModel(
        50, 16, 1, 2, n_min=2, n_max=4, k_lmk=2, dropout=0.0, tie_embeddings=True
    )
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "normalizer" not in k})
    logits = plain(ids)
    exact = diffmax_loss(logits.flatten(0, 1), labels.flatten(), criterion.alpha)
    parameters = {id(p): p for m in (model, criterion) for p in m.parameters()}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.01)
    losses = []
    for _ in range(10):
        found = model(ids, labels=labels)
        loss = found.loss
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(losses[0], exact.detach())
    assert losses[-1] < losses[0] and criterion.normalizer.log_beta.grad != 0
