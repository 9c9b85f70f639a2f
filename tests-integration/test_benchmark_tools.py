"""The benchmarks' other tools: a GPU's clock, fits, peers in a folder, other commits, pictures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.tools

DENSITY = 0.02  # of the weights of a few rows
TIMED = 0.05  # of the one row that a benchmark reports

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    against,
    clock,
    gate,
    headlines,
    machine,
    pictures,
    published,
    registry,
    report,
    roofline,
    runner,
    structured,
)

from diffmax import diffmax_bisect  # noqa: E402
from shared_kernels import native  # noqa: E402
from shared_kernels.testing import assert_close  # noqa: E402

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 64)


def _row(ours, **options):
    return registry.Row("toy/exp", "[64]", ours, lambda: X.double().exp(), **options)


# ------------------------------------------------------------------------------- a GPU's clock


class Card:
    """torch.cuda as the clock sees it: remembers what was asked, in order."""

    def __init__(self, monkeypatch):
        self.output, self.milliseconds, self.held, self.peak = [], 0.0, 100, 100
        card = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                card.output.append("record")
                self.at = card.milliseconds

            def elapsed_time(self, stop):
                assert card.output[-1] == "synchronize"
                return stop.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(
            torch.cuda, "synchronize", lambda device=None: self.output.append("synchronize")
        )
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
        monkeypatch.setattr(clock, "FLUSH", 16)

    def reset(self, device=None):
        self.peak = self.held

    def kernel(self, name, milliseconds, size=0):
        def call():
            self.output.append(name)
            self.milliseconds += milliseconds
            self.peak = max(self.peak, self.held + size)
            return X.exp()

        return call


def test_a_gpu_is_timed_by_events_behind_an_emptied_cache(monkeypatch):
    card = Card(monkeypatch)
    timer = clock.GpuClock(CPU)
    timer.flush = type("Flush", (), {"zero_": lambda self: card.output.append("flush")})()
    call = card.kernel("kernel", 2.0, size=7)
    assert timer(call) == 2e-3
    assert card.output == ["flush", "record", "kernel", "record", "synchronize"]
    assert timer.memory(call) == 7
    card.output.clear()
    assert timer.first(call) >= 0
    assert card.output == ["synchronize", "kernel", "synchronize"]


def test_a_row_on_a_gpu_has_memory_first_calls_and_noise(monkeypatch):
    card = Card(monkeypatch)
    monkeypatch.setattr(clock, "clock", lambda device: clock.GpuClock(CPU))
    peers = {"slow": card.kernel("slow", 9.0, size=20), "absent": "not for this card"}
    row = _row(card.kernel("ours", 3.0, size=5), peers=peers, floor=card.kernel("floor", 1.0))
    measured = runner.measure(row, torch.device("cuda"))
    assert measured["seconds"] == pytest.approx({"ours": 3e-3, "slow": 9e-3, "floor": 1e-3})
    assert measured["memory"] == {"ours": 5, "slow": 20}
    assert set(measured["first"]) == {"ours", "slow"} and measured["noise"] == pytest.approx(1.0)
    assert measured["device"] == "a card" and measured["refused"] == {"absent": "not for this card"}


def test_a_cpu_row_counts_memory_when_it_is_asked_to():
    measured = runner.measure(_row(lambda: X.exp(), memory=True, once=True), CPU)
    assert measured["memory"]["ours"] >= X.nbytes and measured["repeats"] == 1
    assert runner.measure(_row(lambda: X.exp(), once=True), CPU)["memory"] == {}


def test_long_rounds_are_repeated_less(monkeypatch):
    seconds = {"very long": 11.0, "long": 0.2, "short": 0.001}
    full = {"very long": 3, "long": 6, "short": 24}
    for name, (quick, repeats) in {
        "very long": (True, 3),
        "long": (True, 3),
        "short": (True, 24),
    }.items():
        monkeypatch.setattr(clock.CpuClock, "__call__", lambda s, c, t=seconds[name]: c() and t)
        row = _row(lambda: True, peers={"peer": lambda: True})
        monkeypatch.setattr(gate, "check", lambda row: None)
        assert runner.measure(row, CPU, quick)["repeats"] == repeats
        assert runner.measure(row, CPU)["repeats"] == full[name]


# --------------------------------------------------------------------------------------- fits


def _grown(time, memory, claims=(1, 1)):
    return [
        {
            "case": "scaling/toy",
            "size": f"N={N}",
            "N": N,
            "seconds": {"ours": 1e-6 * N**time},
            "memory": {"ours": 8 * N**memory},
            "grows": claims,
            "noise": 1.0,
            "refused": {},
            "density": None,
            "bars": {},
        }
        for N in (256, 512, 1024, 2048)
    ]


def test_exponents_are_fitted_and_held_against_the_claim():
    (fit,) = report.fits(_grown(1.0, 2.0))
    assert fit["fitted"] == pytest.approx({"time": 1.0, "memory": 2.0})
    assert fit["last"] == pytest.approx(fit["fitted"])
    assert "| 2.00 (2.00) | 1 | **no** |" in report.fit_table(_grown(1.0, 2.0))
    assert report.fit_table(_grown(1.0, 1.0)).endswith("| yes |")
    assert report.fit_table(_grown(1.3, 1.0)).endswith("| **no** |")
    assert report.fit_table(_grown(1.3, 1.0, (2, None))).endswith("| yes |")
    one = _grown(1.0, 1.0)[:1]
    assert report.fits(one) == [] and "| scaling/toy |" in report.whole(one)
    assert "| toy | 256 … 2048 |" in report.whole(_grown(1.0, 1.0))


def test_every_claim_and_every_density_has_a_committed_row():
    from benchmarks.cases import scaling

    rows = report.read(ROOT / "benchmarks" / "results" / "scaling.jsonl")
    sizes = {fit["case"]: tuple(fit["sizes"]) for fit in report.fits(rows)}
    assert sizes == {f"scaling/{claim.name}": claim.sizes for claim in scaling.CLAIMS}
    rows = report.read(ROOT / "benchmarks" / "results" / "density.jsonl")
    for case in ("attention forward", "attention forward+backward", "diffmax"):
        of_case = [row for row in rows if row["case"] == f"density/{case}"]
        assert len(of_case) == 2 * len(structured.DENSITIES)
        for row in of_case:
            asked = float(row["size"].split("share ")[1].split(",")[0])
            assert row["density"] == pytest.approx(asked, rel=TIMED)


@pytest.mark.parametrize("density", structured.DENSITIES)
def test_structured_inputs_have_the_density_that_was_asked_for(density):
    N = 2000
    for scattered in (False, True):
        weights = diffmax_bisect(structured.rows(8, N, density, scattered), 0.5)
        assert (weights > 0).float().mean().item() == pytest.approx(density, rel=DENSITY)
    ordered = structured.rows(8, N, density, False)
    assert torch.equal(ordered[:, structured.shuffle(N)], structured.rows(8, N, density, True))
    wide = ordered.double()
    assert_close(structured.entmax15(wide), diffmax_bisect(wide, 0.5, backend="reference"))
    first = (diffmax_bisect(ordered, 0.5)[4] > 0).int().diff().abs().sum()
    assert first <= 2  # one run of keys


# -------------------------------------------------------------------------------------- peers


def test_a_peer_with_one_of_our_names_is_loaded_beside_ours(tmp_path, monkeypatch):
    for place in ("_places", "_keep"):
        monkeypatch.setattr(published, place, [])
    monkeypatch.setattr(published, "_theirs", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(FileNotFoundError, match="must be a folder"):
        published.use(tmp_path / "nothing")
    with zipfile.ZipFile(tmp_path / "diffmax-9.9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("diffmax/__init__.py", "def f():\n    from .parts import g\n    return g()")
        wheel.writestr("diffmax/parts.py", "def g():\n    return 'theirs'")
        wheel.writestr("diffmax-9.9.dist-info/METADATA", "")
    assert published.use(tmp_path) == ["diffmax-9.9"]
    ours = {name: module for name, module in sys.modules.items() if name.startswith("diffmax")}
    call = published.peer("diffmax", lambda m: m.f)  # its part is imported by the call
    assert call() == "theirs" == call()
    now = {name: module for name, module in sys.modules.items() if name.startswith("diffmax")}
    assert now == ours and diffmax_bisect(X, 0.5).sum() > 0.99
    assert published.peer("diffmax", lambda m: m.g, "parts")() == "theirs"
    assert "no attribute 'h'" in published.peer("diffmax", lambda m: m.h)
    assert "No module named 'diffmax.api'" in published.peer("diffmax", lambda m: m, "api")
    nowhere = published.peer("dsalt", lambda m: m.f)
    assert nowhere == "dsalt is not among the peers (--peers FOLDER)"


def test_why_a_peer_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "peer_without_driver.py").write_text("raise RuntimeError('no active drivers')")
    (tmp_path / "peer_with_needs.py").write_text("import something_else")
    assert registry.peer("no_such.part", lambda m: m.f) == "no_such is not installed"
    assert "no active drivers" in registry.peer("peer_without_driver", lambda m: m.f)
    assert "something_else" in registry.peer("peer_with_needs", lambda m: m.f)
    assert registry.peer("math", lambda m: m.f).startswith("AttributeError")


# ----------------------------------------------------------------------------- another commit


@pytest.mark.slow
def test_a_checkout_is_timed_against_a_commit(monkeypatch):
    """Both sides run the same case with their own sources; here the other side is this one."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    with against.tree("HEAD") as other:
        assert (other / "packages" / "diffmax" / "src" / "diffmax" / "api.py").exists()
        assert str(other) in against.sources(other)
    assert not other.exists()
    with pytest.raises(ValueError, match="`--against` must name a commit.*no-such-ref"):
        list(against.compare("no-such-ref", True, "diffmax/attention", "cpu"))
    records = list(against.compare("HEAD", True, "diffmax/attention", "cpu", turns=2))
    (record,) = records
    assert record["refused"] == {} and record["turns"] >= 5 and 0.2 < record["ratio"] < 5
    text = against.table(records, "HEAD")
    assert "| diffmax/attention | B1 H4 D64 N=256" in text and "| HEAD / now |" in text


class Answers:
    """A side that answers from a list."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def ask(self, what):
        return next(self.rows) if what == "next" else 0.001 * self.speed

    def close(self):
        pass


def test_a_side_that_fails_says_so_and_ratios_are_theirs_over_ours(monkeypatch, tmp_path):
    row = {"case": "toy", "size": "[1]", "error": "", "repeats": 5}
    sides = []

    def side(root, arguments):
        is_old = len(sides) % 2 == 1  # "now" is made first, for each module
        error, end = ("WrongAnswerError", "ImportError: x") if is_old else ("", "")
        sides.append(Answers([row, {**row, "error": error}, {"ended": end}]))
        sides[-1].speed = 3 if is_old else 1
        return sides[-1]

    monkeypatch.setattr(against, "Side", side)
    monkeypatch.setattr(against, "tree", lambda ref: __import__("contextlib").nullcontext(tmp_path))
    monkeypatch.setattr(registry, "modules", lambda *chosen: iter(["toys", "more"]))
    first, second, rest, *others = against.compare("old", True, "", "cpu")
    assert [record["size"] for record in others] == ["[1]", "[1]", "the rest"]
    assert first["ratio"] == pytest.approx(3) and first["turns"] == 6
    assert second["refused"] == {"old": "WrongAnswerError"}
    assert rest["case"] == "toys"
    assert rest["refused"] == {"now": "has no more rows", "old": "ImportError: x"}
    assert "| 3.00× |" in against.line(first, "old")
    assert "old: WrongAnswerError" in against.line(second, "old")


def test_one_wrong_row_does_not_end_a_sweep(monkeypatch, capsys):
    rows = [_row(lambda: X.exp() * 1.1), _row(lambda: X.exp())]
    monkeypatch.setattr(registry, "rows", lambda *a: iter(rows))
    assert command.main(["--quick"]) == 1
    output = capsys.readouterr().out
    assert "NOT TIMED - toy/exp [64]" in output and output.count("| toy/exp |") == 2
    assert command.main(["--list"]) == 0
    assert capsys.readouterr().out.count("toy/exp [64]: no peer") == 2


def test_what_is_asked_for_and_is_not_there_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(registry, "rows", lambda *a: iter(()))
    with pytest.raises(SystemExit, match="`--only` must be part of .* on cpu, got 'nosuch'"):
        command.main(["--only", "nosuch"])
    for arguments, output in (
        (["--only", "nosuch", "--list", "--quick"], "of a quick sweep on cpu, got 'nosuch'"),
        (["--table", str(tmp_path)], "`--table` must be a file of rows"),
        (["--peers", str(tmp_path / "x")], "`--peers` must be a folder"),
        (["--against", "no-such-ref"], "`--against` must name a commit"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert output in capsys.readouterr().err


# ------------------------------------------------------------------------------- the GPU's rows


def test_the_gpu_s_rows_are_for_gpus_and_have_a_toy_form(monkeypatch):
    monkeypatch.setattr(registry, "names", lambda: ["gpu", "scaling", "peers"])
    assert list(registry.rows("cpu", True)) == []  # scaling and peers are not quick
    rows = list(registry.rows("cpu", True, "gpu"))
    assert {row.case.split("/")[1].split()[0] for row in rows} == {
        "adasplash",
        "dsalt",
        "diffmax",
        "FlashDiffusion",
        "nearest",
    }


def script(name, *arguments):
    if shutil.which("bash") is None or os.name == "nt":
        pytest.skip("needs bash")
    command = ["bash", str(ROOT / "benchmarks" / name), "--python", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_the_sweep_s_dry_run():
    ran = script("gpu_sweep.sh", "--dry-run", "--budget", "60")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "| gpu/adasplash forward+backward | bf16" in ran.stdout
    assert "adasplash is not among the peers" in ran.stdout
    assert "dry run, 9 rows; on a GPU: --device cuda" in ran.stdout
    assert script("gpu_sweep.sh", "--fast").returncode == 2


@pytest.mark.slow
def test_the_check_s_dry_run():
    ran = script("gpu_check.sh", "--dry-run")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "packages/adasplash/tests/test_triton.py: " in ran.stdout
    assert "shared-kernels/tests/test_triton.py: " in ran.stdout
    assert " passed, " in ran.stdout and "dry run, all steps passed" in ran.stdout


def test_without_a_gpu_the_scripts_say_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert machine.main(dry=False) == 1
    assert "no GPU here; --dry-run" in capsys.readouterr().out
    assert script("gpu_check.sh", "--fast").returncode == 2


# ----------------------------------------------------------------------------------- pictures


def test_the_committed_pictures_are_drawn_from_the_committed_rows(tmp_path, capsys):
    assert command.main(["--pictures", "--out", str(tmp_path)]) == 0
    drawn = sorted(path.name for path in tmp_path.iterdir())
    committed = sorted(path.name for path in (ROOT / "benchmarks" / "pictures").glob("*.png"))
    assert drawn == committed and len(drawn) == 5
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert all(f"](pictures/{name})" in page for name in drawn)


def test_the_page_shows_the_committed_rows():
    """`python -m benchmarks --page` renews it."""
    results = ROOT / "benchmarks" / "results"
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert report.page(text, results) == text
    with pytest.raises(ValueError, match="no place for density"):
        report.page("", results, ("density",))
    with pytest.raises(ValueError, match="no place for offline"):
        report.page("", results, ("offline",))


@pytest.mark.parametrize("page", headlines.PAGES)
def test_a_figure_on_several_pages_comes_from_one_row(page):
    """`python -m benchmarks --page` renews them."""
    results, path = ROOT / "benchmarks" / "results", ROOT / page
    text = path.read_text(encoding="utf-8")
    assert headlines.renewed(text, page, results) == text
    with pytest.raises(ValueError, match="has no place for"):
        headlines.renewed("", page, results)


def test_a_changed_row_changes_every_page_that_shows_it(tmp_path):
    results = ROOT / "benchmarks" / "results"
    for name in report.SECTIONS:
        rows = report.read(results / f"{name}.jsonl")
        for row in rows:
            row["seconds"] = {
                who: t * (3 if who == "ours" else 1) for who, t in row["seconds"].items()
            }
        report.write(tmp_path / f"{name}.jsonl", rows)
    for name in ("peaks", *roofline.MODULES):
        shutil.copy(results / f"{name}.jsonl", tmp_path)
    native = report.read(results / "native_attention.jsonl")
    tripled = [{**row, "ratio": 3 * row["ratio"]} for row in native]
    report.write(tmp_path / "native_attention.jsonl", tripled)
    for page in headlines.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert headlines.renewed(text, page, tmp_path) != text


@pytest.mark.parametrize("name", roofline.MODULES)
def test_native_rows_have_their_shares_of_the_limits(name):
    """`python -m benchmarks.roofline --columns` renews them."""
    rows = report.read(ROOT / "benchmarks" / "results" / f"{name}.jsonl")
    assert roofline.renewed(name) == rows
    assert sum(roofline.FMA in row for row in rows) >= 4
    for row in rows:
        assert row.get(roofline.FMA, {}).keys() == roofline.MODULES[name].work(row).keys()


def test_shares_of_a_row_by_hand():
    limits = {"fma GFLOP/s": 100.0, "copy GB/s": {"1": 80.0, "1024": 10.0}}
    size = {"B": 2, "L": 10, "S": 30, "d": 20, "H": 4}
    row = {"size": size, "update_steps_max": 1, "ms": {"native": 1.0, "native, both ways": 4.0}}
    row |= {"set": "avx2", "matrix_set": "AVX2"}
    # two associations of two products each, and four projections
    operations = 2 * 2 * 2 * 2 * 10 * 30 * 20 + 2 * 2 * 80 * 20 * 20
    numbers = 2 * 80 * 20 + 4 * 400
    found = roofline.shares("native_association", row, limits)
    of_loop, of_copy = operations / (100e9 * row["ms"]["native"] / 1e3), 4 * numbers / 80e6
    assert found[roofline.FMA]["forward"] == round(of_loop, 3)
    assert found[roofline.MEMORY]["forward"] == round(of_copy, 3)
    assert roofline.copy_seconds(limits, 1e6) == 1e6 / 80e9
    assert roofline.copy_seconds(limits, 2e6) == 2e6 / 10e9
    assert roofline.copy_seconds(limits, 4e9) == 4e9 / 10e9
    assert roofline.shares("native_rows", {"set": "avx2", "two threads": {}}, limits) == {}
    # the same calls again, beside products in AVX2
    assert roofline.shares("native_association", {**row, "set": "avx512"}, limits) == {}


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_the_peak_is_that_of_multiply_adds(instructions):
    """More than matrix products reach; wider vectors do more."""
    rate = roofline.fma_rate(instructions, 300_000)
    assert 1e9 < rate < 1e12
    assert instructions == "base" or rate > 1.3 * roofline.fma_rate("base", 300_000)


@pytest.mark.parametrize(("ratio", "shown"), [(84.73, "85×"), (12.54, "12.5×"), (1.417, "1.42×")])
def test_a_ratio_has_two_or_three_figures(ratio, shown):
    assert headlines.times(ratio) == shown


def test_the_page_says_when_on_what_and_with_which_versions():
    row = {"date": "2026-02-03", "device": "a card", "torch": "2.9.1+cpu", "python": "3.12.1"}
    rows = [{**row, "commit": "abc"}, {**row, "commit": "def", "date": "2026-02-01"}]
    output = (
        "Measured 2026-02-01 to 2026-02-03 on a card; torch 2.9.1, Python 3.12.1; commit abc, def."
    )
    assert report.measured(rows) == output
    many = [{**row, "commit": str(i)} for i in range(4)]
    assert report.measured(many).endswith("commit 4 different ones, row by row.")
    text = report.compiled(ROOT / "benchmarks" / "results" / "offline.json")
    assert "for gfx942, sm_120, sm_80, sm_90; Triton " in text
    assert "| package | kernel | launches | sm_80 | sm_90 | sm_120 | gfx942 |" in text


def test_a_folder_keeps_the_newest_row_of_each_case(tmp_path, monkeypatch, capsys):
    def row(case, size, value=X.exp):
        return registry.Row(f"{case}/exp", size, value, lambda: X.double().exp(), once=True)

    old = [row("toy", "[1]"), row("toy", "[2]"), row("scaling", "[3]"), row("gone", "[4]")]
    for made in old:
        report.keep(tmp_path, {"case": made.case, "size": made.size, "old": True})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cpu.jsonl", "scaling.jsonl"]
    now = [row("toy", "[2]"), row("toy", "[1]", lambda: X.exp() * 1.1), row("scaling", "[3]")]
    monkeypatch.setattr(registry, "rows", lambda *a: iter(now[:1]))
    assert command.main(["--only", "toy", "--out", str(tmp_path)]) == 0
    rows = report.read(tmp_path / "cpu.jsonl")  # in its place, the others as they were
    assert [(r["size"], r.get("old", False)) for r in rows] == [
        ("[1]", True),
        ("[2]", False),
        ("[4]", True),
    ]
    monkeypatch.setattr(registry, "rows", lambda *a: iter(now))
    assert command.main(["--budget", "-1", "--out", str(tmp_path)]) == 0  # cut short: nothing goes
    assert len(report.read(tmp_path / "cpu.jsonl")) == 3
    assert command.main(["--out", str(tmp_path)]) == 1  # whole; the wrong row keeps no old time
    assert [r["size"] for r in report.read(tmp_path / "cpu.jsonl")] == ["[2]"]
    assert [r["size"] for r in report.read(tmp_path / "scaling.jsonl")] == ["[3]"]
    assert "2 rows in " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--quick", "--out", str(tmp_path)])
    assert "must be a file with --quick" in capsys.readouterr().err


def test_a_picture_shows_what_there_is(tmp_path):
    rows = _grown(1.0, 1.0)
    for row in rows:
        row["case"] = f"scaling/{pictures.PANELS['rows and sequences'][0][0]}"
    assert pictures.growth(rows, "memory", tmp_path / "x.png").stat().st_size > 1000
