"""Draws the package's pictures: `python packages/diffmax/docs/figures.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from diffmax import ExpMap, HillMap, TanhMap, diffmax_bisect, diffmax_calibrate
from shared_kernels import qexp

plt.style.use("shared_kernels.pictures")
HERE = Path(__file__).parent
torch.manual_seed(3)


def weights() -> None:
    x = (0.55 * torch.randn(16)).sort(descending=True).values
    rows = {"softmax": x.softmax(-1)}
    rows |= {f"diffmax, α = {a}": diffmax_bisect(x, a) for a in (0.85, 0.5, 0.2)}
    rows["sparsemax"] = qexp.sparsemax(x)
    colours = plt.cm.viridis(torch.linspace(0, 0.85, 5).numpy())
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.0), width_ratios=(3, 2))
    for i, ((name, y), colour) in enumerate(zip(rows.items(), colours, strict=True)):
        left.bar(torch.arange(16) + (i - 2) * 0.16, y, width=0.16, label=name, color=colour)
        zeros = (y == 0).nonzero().view(-1)
        left.plot(zeros + (i - 2) * 0.16, [-0.012] * len(zeros), "o", ms=2, color=colour)
    left.set(
        xlabel="entry, largest score first", ylabel="weight", title="One row (dots: exact zeros)"
    )
    left.legend()
    alphas = torch.linspace(0.02, 0.99, 60)
    for N, style in ((64, "-"), (1024, "--")):
        X = torch.randn(256, N)
        zeros = [(diffmax_bisect(X, a.item()) == 0).float().mean() for a in alphas]
        right.plot(alphas, zeros, style, color="C0", label=f"{N} normal scores")
    right.set(xlabel="α", ylabel="share of exact zeros", title="Zeros against α", ylim=(0, 1))
    right.legend()
    figure.savefig(HERE / "weights.png")


def maps() -> None:
    log_beta = torch.linspace(-6, 6, 200)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True)
    for axis, c in zip(axes, (1.0, 0.3), strict=True):
        for kind, colour in ((HillMap, "C0"), (TanhMap, "C1"), (ExpMap, "C2")):
            axis.plot(
                log_beta, kind(c=c).from_log_beta(log_beta), label=kind.__name__, color=colour
            )
        axis.set(xlabel="log β", title=f"c = {c}", ylim=(0, 1))
    axes[0].set_ylabel("α")
    axes[0].legend()
    figure.savefig(HERE / "maps.png")


def calibration() -> None:
    """Labels drawn from softmax(z), and logits 3 z of a model that is too sure of itself."""

    def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        z = 4 * torch.randn(n, 10)
        return 3 * z, torch.multinomial(z.softmax(-1), 1).squeeze(1)

    held_out, fresh = data(1000), data(1000)
    alphas = torch.linspace(0.02, 0.98, 33).tolist()
    fits = [diffmax_calibrate(*held_out, alpha) for alpha in alphas]
    sets = [diffmax_bisect(fresh[0] / fit.temperature, fit.alpha) > 0 for fit in fits]
    covered = [s.gather(1, fresh[1][:, None]).float().mean() for s in sets]
    chosen = diffmax_calibrate(*held_out, coverage=0.98)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    left.plot(alphas, [fit.coverage for fit in fits], label="held-out data")
    left.plot(alphas, covered, "--", label="fresh data")
    left.plot(chosen.alpha, chosen.coverage, "o", color="C3", label="coverage=0.98")
    left.set(xlabel="α", ylabel="share of targets in the set", ylim=(0.9, 1.005))
    left.legend()
    right.plot(alphas, [s.float().sum(-1).mean() for s in sets])
    right.plot(chosen.alpha, chosen.size, "o", color="C3")
    right.set(xlabel="α", ylabel="classes in a set, mean of fresh data", ylim=(0, 10.2))
    figure.savefig(HERE / "calibration.png")


if __name__ == "__main__":
    weights()
    maps()
    calibration()
