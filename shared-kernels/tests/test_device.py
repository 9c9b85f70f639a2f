"""device, dispatch, checks, configs: choices and the words that explain them."""

import json
import logging

import pytest
import torch

from shared_kernels import checks, configs, device, dispatch, offline, pairwise

H100 = device.Target("cuda", "sm_90", device.SHARED_MEMORY["sm_90"], 132)


def test_target_of_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert device.target(torch.zeros(1)).backend == "cpu"
    assert "need" in device.triton_why_not(torch.zeros(1))


@pytest.mark.skipif(not device.has_triton(), reason="needs triton")
def test_interpreter_and_pretended_targets_take_cpu_tensors(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device.target(torch.zeros(1)).arch == "interpret"
    assert device.triton_why_not(torch.zeros(1)) is None
    with device.pretend(H100):
        assert device.target(torch.zeros(1)) is H100
        assert device.target().is_gpu
    assert device.target().arch == "interpret"


@pytest.mark.skipif(not device.has_triton(), reason="the reason is then another")
@pytest.mark.parametrize(
    ("arch", "words"),
    [
        *((arch, "32 threads in a wave") for arch in ("gfx1030", "gfx1100", "gfx1201", "gfx1250")),
        *((arch, "nothing was compiled") for arch in ("gfx906", "gfx908", "gfx1300")),
        *((arch, "less shared memory") for arch in ("sm_70", "sm_75")),
        *((arch, None) for arch in ("gfx90a", "gfx942", "gfx950")),
        *((arch, None) for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "sm_121")),
    ],
)
def test_a_card_that_the_tiles_do_not_fit_gets_the_torch_path(arch, words):
    """And a sentence that names it, where the kernels are asked for."""
    x = torch.randn(30, 3)
    backend = "cuda" if arch.startswith("sm_") else "hip"
    with device.pretend(device.Target(backend, arch, 64 * 1024, 96)):
        reason = device.triton_why_not(x)
        if words is None:
            assert reason is None
            return
        assert arch in reason and words in reason and 'backend="torch"' in reason
        assert pairwise.knn(x, 2)[1][:, 0].tolist() == list(range(30))
        with pytest.raises(NotImplementedError, match=arch):
            pairwise.knn(x, 2, backend="triton")


@pytest.mark.parametrize("arch", [arch for arch in offline.ALL if arch.startswith("gfx")])
def test_what_is_compiled_for_runs_there(arch):
    """And nothing else of AMD's. A card without rows of its own takes those of one with rows."""
    assert set(device._AMD) == {name for name in offline.ALL if name.startswith("gfx")}
    assert arch in offline.TARGETS or configs.LIKE[arch] in offline.TARGETS


def test_auto_takes_the_first_that_can(caplog):
    with caplog.at_level(logging.DEBUG, "shared_kernels.dispatch"):
        assert dispatch.choose("toy", "auto", {"triton": "no GPU", "cpu": None}) == "cpu"
    assert "toy runs on cpu" in caplog.text
    assert dispatch.last("toy") == "cpu"


def test_an_explicit_backend_never_falls_back():
    reasons = {"triton": "no GPU", "cpu": None}
    with pytest.raises(NotImplementedError, match="'triton' cannot run toy: no GPU"):
        dispatch.choose("toy", "triton", reasons)
    with pytest.raises(ValueError, match="`backend` must be one of 'auto', 'triton', 'cpu', got"):
        dispatch.choose("toy", "cuda", reasons)
    with pytest.raises(NotImplementedError, match="no backend can run toy"):
        dispatch.choose("toy", "auto", {"triton": "no GPU"})


def test_explain_names_each_reason():
    text = dispatch.explain("toy", {"triton": "no GPU", "cpu": None, "slow": None})
    assert "triton: cannot run: no GPU" in text
    assert "cpu: chosen" in text and "slow: can run" in text


def test_error_grammar():
    with pytest.raises(ValueError, match=r"^`alpha` must be in \(0, 1\), got 1.3; try 0.9$"):
        checks.fail("alpha", "be in (0, 1)", 1.3, "try 0.9")
    with pytest.raises(TypeError, match="`x` must be a floating-point tensor, got dtype"):
        checks.floating("x", torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="`x` must be a torch.Tensor, got list"):
        checks.floating("x", [1.0])
    with pytest.raises(ValueError, match="`k` must have the dtype of `q`"):
        checks.same_dtype(q=torch.zeros(1), k=torch.zeros(1).double())


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 4, 8, 16), (2, 3, 8, 16), (2, 3, 8, 16)), "divisible"),
        (((2, 4, 8, 16), (2, 4, 8, 17), (2, 4, 8, 16)), "`k` must have shape"),
        (((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 9, 16)), "`v` must have shape"),
        (((2, 4, 8, 300),) * 3, "head dim"),
        (((4, 8, 16),) * 3, "four dimensions"),
    ],
)
def test_attention_shapes_refused(shapes, words):
    with pytest.raises(ValueError, match=words):
        checks.attention_shapes(*(torch.zeros(s) for s in shapes))


def test_attention_shapes_read():
    q, k, v = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 7, 16), torch.zeros(2, 2, 7, 8)
    assert tuple(checks.attention_shapes(q, k, v)) == (2, 4, 2, 5, 7, 16, 8)


def test_values_are_not_read_under_transforms():
    seen = []

    def f(x):
        seen.append(checks.reads_values(x))
        return x

    torch.func.vmap(f)(torch.zeros(3))
    torch.compile(f, fullgraph=True, backend="eager")(torch.zeros(3))
    f(torch.zeros(3))
    assert seen[0] is False and seen[-1] is True


BIG = configs.Config(BLOCK_Q=128, num_warps=8, why="fits")
SMALL = configs.Config(BLOCK_Q=64, num_warps=4, why="fits everywhere")
TABLE = configs.Table(
    "toy", {("sm_90", 64): (BIG, SMALL), ("sm_90", 128): (SMALL,), (configs.ANY, 64): (SMALL,)}
)


def test_first_entry_is_the_default_and_sizes_round_up():
    assert TABLE.pick(H100, 32) is BIG
    assert TABLE.pick(H100, 65) is SMALL
    other = device.Target("hip", "gfx942", 65536, 304)
    assert TABLE.pick(other, 64) is SMALL
    with pytest.raises(NotImplementedError, match="no entry for gfx942 and head dim 65"):
        TABLE.pick(other, 65)
    assert [c for _, c in TABLE.served(H100.arch)] == [BIG, SMALL, SMALL]
    assert [c for _, c in TABLE.served(other.arch)] == [SMALL]


def test_a_card_without_rows_takes_those_of_the_card_it_resembles():
    own = {("sm_120", 64): (SMALL,), (configs.ANY, configs.ANY): (BIG,)}
    table = configs.Table("toy", own)
    rtx3090 = device.Target("cuda", "sm_86", device.SHARED_MEMORY["sm_86"], 84)
    assert table.pick(rtx3090, 64) is SMALL
    assert table.pick(rtx3090, 65) is BIG
    assert table.pick(H100, 64) is BIG
    assert list(table.served("sm_86")) == [(64, SMALL), (configs.ANY, BIG)]


@pytest.mark.parametrize("arch, like", configs.LIKE.items())
def test_the_resembled_card_has_no_more_shared_memory(arch, like):
    assert device.SHARED_MEMORY.get(arch, 1 << 30) >= device.SHARED_MEMORY[like]
    assert like not in configs.LIKE


def test_an_exact_size_comes_before_a_larger_one_of_the_architecture():
    own = {
        ("sm_90", 128): (BIG,),
        (configs.ANY, 64): (SMALL,),
        (configs.ANY, configs.ANY): (SMALL,),
    }
    table = configs.Table("toy", own)
    assert table.pick(H100, 64) is SMALL
    assert table.pick(H100, 65) is BIG
    assert table.pick(H100, 129) is SMALL
    assert list(table.served("sm_90")) == [(128, BIG), (64, SMALL), (configs.ANY, SMALL)]
    general = configs.Table("toy", {("sm_90", configs.ANY): (BIG,), (configs.ANY, 64): (SMALL,)})
    assert general.pick(H100, 64) is SMALL
    assert general.pick(H100, 65) is BIG


def test_configs_are_frozen_and_can_be_forced_or_measured(tmp_path, monkeypatch):
    with pytest.raises(AttributeError, match="frozen"):
        BIG.num_warps = 2
    with configs.forcing(TABLE, SMALL):
        assert TABLE.pick(H100, 32) is SMALL
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"toy": {"sm_90/64": {"BLOCK_Q": 32, "num_warps": 2}}}))
    monkeypatch.setenv("SHARED_KERNELS_CONFIGS", str(path))
    assert TABLE.pick(H100, 32).meta() == {"BLOCK_Q": 32, "num_warps": 2, "num_stages": 2}
    assert TABLE.pick(H100, 128) is SMALL


@pytest.mark.parametrize("word", ["1", "true", "True", "on", "yes", "y"])
def test_every_word_of_triton_s_counts(word, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert device.interpreting()
    for other in ("0", "off", "false", ""):
        monkeypatch.setenv("TRITON_INTERPRET", other)
        assert not device.interpreting()


@pytest.mark.parametrize("text", [None, "not json", "[1]", '{"toy": {"sm_90/64": {"warps": "x"}}}'])
def test_a_wrong_file_of_measured_configs_names_its_variable(text, tmp_path, monkeypatch):
    path = tmp_path / "wrong.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("SHARED_KERNELS_CONFIGS", str(path))
    with pytest.raises(ValueError, match="SHARED_KERNELS_CONFIGS"):
        TABLE.pick(H100, 32)
