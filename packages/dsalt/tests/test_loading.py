"""Loaders resumed exactly: every kind, at every moment, or refused with the reason."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from dsalt import _loading
from dsalt._checkpoint import rng_state, set_rng_state
from dsalt._distributed import World
from shared_kernels.testing import others_thorough

from .runs import data, loader, trainer

CPU = torch.device("cpu")
N, BATCH = 30, 4  # an epoch ends with a short batch
BASE = 10_000  # a sample is BASE * noise + its number


@pytest.fixture(autouse=True)
def _workers_are_forked():
    """As by default before Python 3.14, which sends workers a pickled dataset.

    PyTorch cannot send a torch.Generator in it (its issue 146828; at least up to torch 2.15), and
    Python no class that a test defines. test_checkpoints.py has workers by each Python's default.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        yield
        return
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def world() -> World:
    return World(False, CPU)


class Plain(Dataset):
    """Items and how many were read in this process; the noise is drawn by the subclasses."""

    def __init__(self, n: int = N) -> None:
        self.n, self.read = n, []

    def __len__(self):
        return self.n

    def noise(self) -> int:
        return 0

    def __getitem__(self, i):
        self.read.append(int(i))
        return torch.tensor(BASE * self.noise() + int(i))


class GlobalNoise(Plain):
    """Draws from every global generator."""

    def noise(self):
        return int(torch.randint(0, 9, ())) + random.randrange(9) + int(np.random.randint(9))


class TorchNoise(Plain):
    def __init__(self):
        super().__init__()
        self.tools = {"chance": torch.Generator().manual_seed(3)}

    def noise(self):
        return int(torch.randint(0, 99, (), generator=self.tools["chance"]))


class NumpyNoise(Plain):
    """Makes its generator where it is read."""

    chance = None

    def noise(self):
        if self.chance is None:
            self.chance = np.random.default_rng(5)
        return int(self.chance.integers(99))


class OldNumpyNoise(Plain):
    def __init__(self):
        super().__init__()
        self.chance = np.random.RandomState(2)

    def noise(self):
        return int(self.chance.randint(99))


class PythonNoise(Plain):
    """A generator inside a function's closure."""

    def __init__(self):
        super().__init__()
        chance = random.Random(4)
        self.draw = lambda: chance.randrange(99)

    def noise(self):
        return self.draw()


class Counted(Plain):
    """Noise from a counter."""

    count = 0

    def noise(self):
        self.count += 1
        return self.count


MODULE_CHANCE = np.random.default_rng(11)


class ModuleNoise(Plain):
    def noise(self):
        return int(MODULE_CHANCE.integers(99))


class EpochNoise(TorchNoise):
    """An epoch begins a generator anew and moves the samples."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.tools["chance"].manual_seed(epoch)

    def noise(self):
        return (super().noise() + 7 * self.epoch) % 99


class Stateful(Plain):
    """The protocol on the dataset; its state is in no attribute that is looked at."""

    def __init__(self):
        super().__init__()
        self.box = io.BytesIO(b"0" * 8)

    def noise(self):
        self.load_state_dict({"n": self.state_dict()["n"] + 1})
        return self.state_dict()["n"]

    def state_dict(self):
        return {"n": int(self.box.getvalue())}

    def load_state_dict(self, state):
        self.box = io.BytesIO(b"%08d" % state["n"])


class Epochs(Sampler):
    """An order from set_epoch."""

    epoch = 0

    def __init__(self, n: int = N) -> None:
        self.n = n

    def __len__(self):
        return self.n

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        g = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(self.n, generator=g).tolist())


class Counting(Epochs):
    """Counts its epochs by itself."""

    set_epoch = None

    def __iter__(self):
        self.epoch += 1
        return super().__iter__()


class Own(Epochs):
    """A generator in an object inside."""

    set_epoch = None

    def __init__(self, n: int = N) -> None:
        super().__init__(n)
        self.helper = type("Helper", (), {})()
        self.helper.rng = np.random.default_rng(1)

    def __iter__(self):
        return iter(self.helper.rng.permutation(self.n).tolist())


class Cumulative(Epochs):
    """Shuffles the same list again and again."""

    set_epoch = None

    def __init__(self, n: int = N) -> None:
        super().__init__(n)
        self.order = list(range(n))

    def __iter__(self):
        random.shuffle(self.order)
        return iter(list(self.order))


class Lazy(Epochs):
    """Draws one index at a time, with replacement, from torch's global generator."""

    set_epoch = None

    def __iter__(self):
        for _ in range(self.n):
            yield int(torch.randint(0, self.n, ()))


class Batches(Sampler):
    """A batch sampler whose generator is reachable only through its sampler."""

    def __init__(self, n: int = N, size: int = BATCH) -> None:
        g = torch.Generator().manual_seed(6)
        self.sampler = torch.utils.data.RandomSampler(range(n), generator=g)
        self.inner = BatchSampler(self.sampler, size, False)

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        yield from self.inner


def shuffled(dataset, **options):
    return DataLoader(dataset, batch_size=BATCH, shuffle=True, **options)


def seeded(dataset, **options):
    return shuffled(dataset, generator=torch.Generator().manual_seed(8), **options)


ORDERS = {
    "shuffle": shuffled,
    "generator": seeded,
    "drop_last": lambda d, **o: shuffled(d, drop_last=True, **o),
    "batches": lambda d, **o: DataLoader(d, batch_sampler=Batches(), **o),
    "no batches": lambda d, **o: DataLoader(d, batch_size=None, sampler=Epochs(), **o),
    **{
        cls.__name__: lambda d, cls=cls, **o: DataLoader(d, BATCH, sampler=cls(), **o)
        for cls in (Epochs, Counting, Own, Cumulative, Lazy)
    },
}
DATASETS = (
    Plain,
    GlobalNoise,
    TorchNoise,
    NumpyNoise,
    OldNumpyNoise,
    PythonNoise,
    Counted,
    ModuleNoise,
    EpochNoise,
    Stateful,
)
WORKERS = {
    "0": {},
    "1": {"num_workers": 1},
    "2": {"num_workers": 2},
    "1 persistent": {"num_workers": 1, "persistent_workers": True},
    "2 persistent": {"num_workers": 2, "persistent_workers": True},
}


def written(state):
    """A state as a checkpoint gives it back."""
    box = io.BytesIO()
    torch.save(state, box)
    box.seek(0)
    return torch.load(box, weights_only=True)


def draw(stream, count):
    """Batches as lists, with what a model draws in between."""
    out = []
    for _ in range(count):
        out.append(torch.atleast_1d(torch.as_tensor(next(stream))).tolist())
        torch.rand(3), random.random(), np.random.rand()
    return out


def compare(make, moments, total, seed=0):
    """The batches after each moment are those of the uninterrupted run."""
    at_start = MODULE_CHANCE.bit_generator.state
    torch.manual_seed(seed)
    stream, states, whole = _loading.BatchStream(make(), world()), {}, []
    for i in range(total):
        if i in moments:
            states[i] = written(stream.state_dict()), rng_state(CPU)
        whole += draw(stream, 1)
    stream.close()
    for i, (state, numbers) in states.items():
        torch.manual_seed(999 + i)
        MODULE_CHANCE.bit_generator.state = at_start
        again = _loading.BatchStream(make(), world())
        again.load_state_dict(state)
        set_rng_state(numbers, CPU)  # as the trainer does
        found = draw(again, total - i)
        again.close()
        assert found == whole[i:], i
    return whole


def moments(loader):
    """The middle and the border of epochs 1, 2 and 3, and how many batches to draw in all."""
    per = -(-N // BATCH) if loader.batch_size or loader.batch_sampler else N
    per -= bool(loader.drop_last)
    return {0, 1, per // 2, per - 1, per, per + 3, 2 * per - 1, 2 * per, 2 * per + 3}, 3 * per + 2


def covered(whole, loader):
    """Every sample once in each whole epoch."""
    per = moments(loader)[1] // 3
    epochs = [sorted(x % BASE for b in whole[k : k + per] for x in b) for k in (0, per, 2 * per)]
    return all(epoch == list(range(N)) for epoch in epochs)


def in_workers(names, kept):
    """(name, workers) of every kind of workers; without --thorough only in this process and kept.

    Every name in this process and every kind of workers once stay in the short run.
    """
    return [
        pytest.param(
            name,
            workers,
            marks=() if workers == "0" or (name, workers) == kept else pytest.mark.thorough,
        )
        for name in names
        for workers in WORKERS
    ]


@pytest.mark.parametrize(("order", "workers"), in_workers(ORDERS, ("generator", "2 persistent")))
def test_every_order_goes_on(order, workers):
    make = lambda: ORDERS[order](Plain(), **WORKERS[workers])  # noqa: E731
    if workers.startswith("2"):
        when, total = {3, moments(make())[1] // 3 * 2 + 1}, moments(make())[1]
    else:
        when, total = moments(make())
    whole = compare(make, when, total)
    assert order in ("Lazy", "drop_last") or covered(whole, make())
    orders = [[x for b in whole[k : k + total // 3] for x in b] for k in (0, total // 3)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("dataset", "workers"), in_workers(DATASETS, (TorchNoise, "1")))
def test_every_dataset_goes_on(dataset, workers):
    make = lambda: seeded(dataset(), **WORKERS[workers])  # noqa: E731
    when, total = moments(make())
    compare(make, when if workers == "0" else sorted(when)[2::3], total)


def test_a_generator_that_order_and_dataset_share():
    def make():
        dataset = TorchNoise()
        g = dataset.tools["chance"]
        sampler = torch.utils.data.RandomSampler(dataset, replacement=True, generator=g)
        return DataLoader(dataset, BATCH, sampler=sampler)

    compare(make, {0, 3, 8, 11}, 20)


def test_noise_does_not_depend_on_the_number_of_workers():
    batches = []
    for options in WORKERS.values():
        torch.manual_seed(1)
        stream = _loading.BatchStream(seeded(GlobalNoise(), **options), world())
        batches.append(draw(stream, 3))
        stream.close()
    assert all(found == batches[0] for found in batches)


@pytest.mark.parametrize("order", ["shuffle", "batches", "no batches", "Counting"])
def test_what_was_seen_is_not_read(order):
    stream = _loading.BatchStream(ORDERS[order](Plain()), world())
    draw(stream, 5)
    state = written(stream.state_dict())
    dataset = Plain()
    again = _loading.BatchStream(ORDERS[order](dataset), world())
    again.load_state_dict(state)
    assert dataset.read == []
    (batch,) = draw(again, 1)
    assert dataset.read == batch


@pytest.mark.parametrize("order", ["plain", "batches"])
@pytest.mark.parametrize(("size", "after"), [(5, 2), (4, 6), (6, 4), (3, 7), (30, 1)])
def test_another_batch_size_neither_repeats_nor_skips(order, size, after):
    def make(size):
        if order == "batches":
            return DataLoader(Plain(), batch_sampler=Batches(size=size))
        g = torch.Generator().manual_seed(8)
        return DataLoader(Plain(), size, shuffle=True, generator=g)

    stream = _loading.BatchStream(make(size), world())
    seen = sum(draw(stream, after if size < 30 else 1), [])
    again = _loading.BatchStream(make(7), world())
    again.load_state_dict(written(stream.state_dict()))
    while len(seen) < N:
        seen += draw(again, 1)[0]
    assert sorted(seen) == list(range(N))
    assert sorted(sum(draw(again, 5), [])) == list(range(N))


def test_a_resumed_run_is_resumed_again():
    make = lambda: seeded(TorchNoise(), num_workers=2, persistent_workers=True)  # noqa: E731
    torch.manual_seed(2)
    stream = _loading.BatchStream(make(), world())
    whole = draw(stream, 27)
    torch.manual_seed(2)
    state, found = None, []
    for count in (3, 4, 1, 6, 2, 11):
        stream = _loading.BatchStream(make(), world())
        if state is not None:
            stream.load_state_dict(state)
            state = written(stream.state_dict())  # before anything was drawn
            stream.load_state_dict(state)
        found += draw(stream, count)
        state = written(stream.state_dict())
    assert found == whole


# --- iterables -----------------------------------------------------------------------------------


class Shuffled(IterableDataset):
    """A shuffle buffer; with ``own`` on a generator that it keeps."""

    def __init__(self, own=False):
        self.chance = random.Random(9) if own else None
        self.read = 0

    def draw(self, n):
        if self.chance is not None:
            return self.chance.randrange(n)
        return int(torch.randint(0, n, ()))

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        buffer = []
        for i in range(first, N, step):
            buffer.append(i)
            if len(buffer) == 6:
                yield buffer.pop(self.draw(6))
        while buffer:
            yield buffer.pop(self.draw(len(buffer)))


class EpochStream(IterableDataset):
    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        g = torch.Generator().manual_seed(self.epoch)
        yield from torch.randperm(N, generator=g)[first::step].tolist()


class StatefulStream(IterableDataset):
    def __init__(self):
        self.i, self.read = 0, 0

    def __iter__(self):
        while self.i < N:
            self.i += 1
            self.read += 1
            yield self.i - 1
        self.i = 0

    def state_dict(self):
        return {"i": self.i}

    def load_state_dict(self, state):
        self.i = state["i"]


@pytest.mark.parametrize(
    ("kind", "workers"),
    in_workers(["global", "own", "epochs"], [("own", "1 persistent"), ("epochs", "1 persistent")]),
)
def test_iterable_datasets_go_on_or_are_refused(kind, workers):
    kinds = {"global": Shuffled, "own": lambda: Shuffled(True), "epochs": EpochStream}
    make = lambda: DataLoader(kinds[kind](), BATCH, **WORKERS[workers])  # noqa: E731
    if kind == "own" and "persistent" in workers:
        compare(make, {0, 3}, 6)
        stream = _loading.BatchStream(make(), world())
        draw(stream, 10)
        state = written(stream.state_dict())
        stream.close()
        with pytest.raises(ValueError, match="cannot resume exactly: the dataset has a state"):
            _loading.BatchStream(make(), world()).load_state_dict(state)
        return
    compare(make, {0, 3, 8, 9, 11, 16, 19}, 26)


def test_a_stateful_iterable_dataset_is_not_read_again():
    make = lambda: DataLoader(StatefulStream(), BATCH)  # noqa: E731
    compare(make, {0, 3, 7, 8, 11, 16}, 20)
    stream = _loading.BatchStream(make(), world())
    draw(stream, 5)
    loader = make()
    again = _loading.BatchStream(loader, world())
    again.load_state_dict(written(stream.state_dict()))
    draw(again, 1)
    assert loader.dataset.read == BATCH


class Restarting:
    """An iterator that begins anew with each iter()."""

    def __iter__(self):
        self.i = 0
        return self

    def __next__(self):
        if self.i == 7:
            raise StopIteration
        self.i += 1
        return [self.i, random.randrange(99)]


class Subclass(DataLoader):
    """A loader that iterates in its own way."""

    def __iter__(self):
        for batch in super().__iter__():
            yield batch + 1


class Protocol:
    """The protocol on a loader."""

    def __init__(self):
        self.g, self.i, self.epoch = torch.Generator().manual_seed(1), 0, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def state_dict(self):
        return {"g": self.g.get_state(), "i": self.i}

    def load_state_dict(self, state):
        self.g.set_state(state["g"])
        self.i = state["i"]

    def __iter__(self):
        while self.i < 7:
            self.i += 1
            yield [self.epoch, self.i, int(torch.randint(0, 99, (), generator=self.g))]
        self.i = 0


OTHERS = {
    "list": lambda: [[i] for i in range(7)],
    "restarting": Restarting,
    "subclass": lambda: Subclass(GlobalNoise(28), BATCH, shuffle=True),
    "subclass in workers": lambda: Subclass(Plain(28), BATCH, shuffle=True, num_workers=1),
    "protocol": Protocol,
}


@pytest.mark.parametrize("kind", others_thorough(OTHERS, plain=3))
def test_other_loaders_go_on(kind):
    compare(OTHERS[kind], {0, 2, 6, 7, 9, 14, 16}, 23)


def endless():
    while True:
        yield [random.randrange(99), int(torch.randint(0, 99, ()))]


def test_a_generator_is_a_stream_without_epochs():
    compare(endless, {0, 1, 9}, 14)
    used = endless()
    next(used)
    stream = _loading.BatchStream(endless(), world())
    draw(stream, 3)
    with pytest.raises(ValueError, match="a generator that has been used already"):
        _loading.BatchStream(used, world()).load_state_dict(stream.state_dict())
    stream = _loading.BatchStream(iter([1, 2]), world())
    draw(stream, 2)
    with pytest.raises(ValueError, match="an iterator that ended after 2; an iterator cannot"):
        next(stream)
    with pytest.raises(TypeError, match="`train_loader` must be iterable, got int"):
        _loading.BatchStream(3, world())


# --- refused -------------------------------------------------------------------------------------


class Iterating(Plain):
    def __init__(self):
        super().__init__()
        self.items = itertools.count()

    def noise(self):
        return next(self.items)


class Persistent(Subclass):
    pass


REFUSED = {
    "iterator": (lambda: seeded(Iterating()), None, "`dataset.items` was an iterator"),
    "longer": (
        lambda: seeded(Plain(30)),
        lambda: seeded(Plain(31)),
        "items of the dataset: was 30 and",
    ),
    "sampler": (
        lambda: seeded(Plain()),
        lambda: DataLoader(Plain(), BATCH),
        "sampler: was RandomSampler",
    ),
    "workers": (
        lambda: seeded(TorchNoise(), num_workers=2),
        lambda: seeded(TorchNoise(), num_workers=1),
        "dataset.tools.*num_workers was 2",
    ),
    "kind": (
        lambda: seeded(Plain()),
        lambda: DataLoader(Shuffled(), BATCH),
        "was a map-style DataLoader",
    ),
    "iterable workers": (
        lambda: DataLoader(EpochStream(), BATCH, num_workers=2),
        lambda: DataLoader(EpochStream(), BATCH),
        "2 workers read an iterable dataset in turns",
    ),
    "iterable batch size": (
        lambda: DataLoader(EpochStream(), BATCH),
        lambda: DataLoader(EpochStream(), 5),
        "batches of 5 do not end there",
    ),
    "missing": (
        lambda: DataLoader(Plain(), BATCH, sampler=Own()),
        lambda: DataLoader(Plain(), BATCH, sampler=type("Own", (Epochs,), {})()),
        "had `sampler.helper.rng`, which is not there now",
    ),
    "persistent subclass": (
        lambda: Persistent(Plain(8), BATCH, num_workers=1, persistent_workers=True),
        None,
        "persistent workers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused(case):
    make, other, message = REFUSED[case]
    stream = _loading.BatchStream(make(), world())
    draw(stream, 3)
    state = written(stream.state_dict())
    stream.close()
    with pytest.raises(ValueError, match=message):
        _loading.BatchStream((other or make)(), world()).load_state_dict(state)


def test_a_state_that_a_checkpoint_cannot_hold():
    loader = Protocol()
    loader.state_dict = lambda: {"i": object()}
    stream = _loading.BatchStream(loader, world())
    draw(stream, 1)
    with pytest.raises(ValueError, match="must hold numbers, texts, tensors, lists and dicts"):
        stream.state_dict()


@pytest.mark.thorough
def test_the_loader_keeps_its_own_order():
    """What a plain loop over the loader gives, for the first epochs of every order."""
    for workers in ("0", "1"):
        for order in ("shuffle", "generator", "batches", "Own", "Cumulative", "Lazy"):
            torch.manual_seed(5), random.seed(5)
            loader = ORDERS[order](Plain(), **WORKERS[workers])
            plain = [batch.tolist() for _ in range(2) for batch in loader]
            torch.manual_seed(5), random.seed(5)
            stream = _loading.BatchStream(ORDERS[order](Plain(), **WORKERS[workers]), world())
            assert draw(stream, len(plain)) == plain, order
            stream.close()


def test_worker_init_fn_sees_the_users_dataset():
    def init(worker_id):
        torch.utils.data.get_worker_info().dataset.noise = lambda: worker_id + 1

    stream = _loading.BatchStream(
        DataLoader(Plain(), BATCH, num_workers=2, worker_init_fn=init), world()
    )
    assert [b[0] // BASE for b in draw(stream, 4)] == [1, 2, 1, 2]
    stream.close()


# --- through the trainer -------------------------------------------------------------------------


class Told:
    """Whatever has set_epoch is told the epoch: what it was told, in order."""

    def set_epoch(self, epoch):
        self.__dict__.setdefault("told", []).append(epoch)


class ToldDataset(Told, Plain):
    def __getitem__(self, i):
        return torch.full((5,), self.told[-1] if self.told else 9)


class ToldSampler(Told, Sampler):
    def __len__(self):
        return 8

    def __iter__(self):
        return iter(range(8))


class ToldBatches(Told, BatchSampler):
    pass


class ToldLoader(Told, DataLoader):
    pass


@pytest.mark.parametrize("workers", WORKERS)
def test_set_epoch_reaches_everything_that_has_it(workers):
    sampler = ToldSampler()
    batches = ToldBatches(sampler, 4, False)
    dataset = ToldDataset(8)
    dataset.set_epoch(7)
    loader = ToldLoader(
        torch.utils.data.Subset(dataset, range(8)), batch_sampler=batches, **WORKERS[workers]
    )
    stream = _loading.BatchStream(loader, world())
    seen = [int(next(stream)[0, 0]) for _ in range(6)]
    assert seen == [0, 0, 1, 1, 2, 2]  # also in workers that live on
    assert sampler.told == batches.told == loader.told == [0, 1, 2]
    stream.close()


def test_the_stream_of_an_earlier_version_goes_on():
    """Its state held the global numbers and the generators at the begin of the epoch."""
    torch.manual_seed(4)
    loader = seeded(Plain())
    whole, state = [], None
    start = {"rng": rng_state(CPU), "generators": [loader.generator.get_state()]}
    for epoch in range(3):
        for i, batch in enumerate(loader):
            if (epoch, i) == (1, 3):
                state = {"epoch": 1, "seen": 3 * BATCH, "start": start}
                done = len(whole)
            whole.append(batch.tolist())
        start = {"rng": rng_state(CPU), "generators": [loader.generator.get_state()]}
    stream = _loading.BatchStream(seeded(Plain()), world())
    stream.load_state_dict(written(state))
    assert draw(stream, len(whole) - done) == whole[done:]
    custom = _loading.BatchStream(ORDERS["batches"](Plain()), world())
    with pytest.raises(ValueError, match="of an earlier version, which did not count"):
        custom.load_state_dict(state)


def test_validation_data_is_looked_at_when_the_trainer_is_made(tmp_path):
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    x = data(8)
    empty = (
        [],
        loader(x[:0]),
        loader(x[:3], batch_size=4, drop_last=True),
        DataLoader(Nothing()),
        DataLoader(Nothing(), batch_size=None, num_workers=1),
    )
    for val in empty:
        with pytest.raises(ValueError, match="`val_loader` must yield at least one batch"):
            trainer(tmp_path, val_loader=val)
    for val in (iter([x]), (b for b in [x])):
        with pytest.raises(TypeError, match="`val_loader` must be iterable many times"):
            trainer(tmp_path, val_loader=val)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_every_validation_sees_the_same_batches(tmp_path, workers):
    x = data(12)
    g = torch.Generator().manual_seed(2)
    val = loader(x, shuffle=True, generator=g, batch_size=3, **workers)
    run = trainer(tmp_path, val_loader=val, max_val_batches=1)
    losses = [run.validate()["val_loss"] for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int16])
def test_small_ids_train(tmp_path, dtype):
    x = data(8).to(dtype)
    runs = [
        trainer(tmp_path / str(i), train=list(ids.split(4)), total_steps=3).train()["loss"]
        for i, ids in enumerate((x, data(8)))
    ]
    pairs = [(b[:, :-1], b[:, 1:].to(torch.int32)) for b in x.split(4)]
    runs.append(trainer(tmp_path / "2", train=pairs, total_steps=3).train()["loss"])
    assert runs[0] == runs[1] == runs[2]
