"""One function of the parameters, exact, for any model and data; the user's objects are never touched."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from workbench.plan import Plan
from workbench.several import Pair, Runs
from workbench.subject import Subject

N = 70


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = double(N, 6), torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 7, (N, 5), generator=torch.Generator().manual_seed(2))


class Tied(nn.Module):
    """An embedding that is also the output layer, a layer used twice, a bare parameter and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.layer(torch.tanh(self.layer(self.embed(ids)))) * self.scale)


class Sequence(nn.Module):
    """A recurrent or attending body, a mean over time, three classes."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 8), body, nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.body(self.embed(ids))
        return self.head((found if isinstance(found, Tensor) else found[0]).mean(1))


def frozen() -> nn.Module:
    net = dense()
    net[0].requires_grad_(False)
    return net


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def normed() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3))
    net(torch.randn(32, 6))
    return net


def built(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().to(dtype)


LAYER: dict[str, Any] = {"dim_feedforward": 8, "batch_first": True, "dropout": 0.2}
NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "dense": (dense, (X, Y)),
    "frozen": (frozen, (X, Y)),
    "normed": (normed, (X, Y)),
    "tied": (Tied, (IDS, IDS)),
    "lstm": (lambda: Sequence(nn.LSTM(8, 4, 2, batch_first=True, dropout=0.3), 4), (IDS, Y)),
    "gru": (lambda: Sequence(nn.GRU(8, 4, batch_first=True), 4), (IDS, Y)),
    "attention": (lambda: Sequence(nn.TransformerEncoderLayer(8, 2, **LAYER), 8), (IDS, Y)),
}


def reference(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient by plain autograd on a copy, in eval mode."""
    made = copy.deepcopy(net).eval()
    with sdpa_kernel(SDPBackend.MATH):
        out = made(x)
        loss = F.cross_entropy(out.reshape(-1, out.shape[-1]), y.reshape(-1))
        named = {k: p for k, p in made.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True, allow_unused=True)
    return float(loss), dict(zip(named, found, strict=True))


def pieces(x: Tensor, y: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


SPLITS: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {
    "whole": lambda d: (d, {}),
    "64 + 6": lambda d: (d, {"batch_size": 64}),
    "1 + 69": lambda d: (pieces(*d, [1, 69]), {}),
    "7 x 10": lambda d: (d, {"batch_size": 10}),
    "shuffled": lambda d: (DataLoader(TensorDataset(*d), batch_size=64, shuffle=True, drop_last=True), {}),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NETS)
def test_loss_and_gradient_equal_plain_autograd_however_the_data_are_split(name: str, split: str) -> None:
    make, data = NETS[name]
    net = built(make).train()
    wanted, slope = reference(net, *data)
    given, words = SPLITS[split](data)
    subject = Subject(net, given, **words)
    assert subject.loss() == pytest.approx(wanted, rel=1e-12)
    found = subject.gradient()
    assert list(found) == list(slope) == list(subject.params)
    for key, g in slope.items():
        torch.testing.assert_close(found[key], g, rtol=1e-10, atol=1e-13)
    total = sum(subject.batch_loss(subject.params, b) for b in subject.batches(11))
    assert float(total) / subject.total_weight == pytest.approx(wanted, rel=1e-12)
    assert sum(b.weight for b in subject.batches(11)) == pytest.approx(subject.total_weight)


def test_the_vector_counts_each_chosen_scalar_once() -> None:
    subject = Subject(built(Tied), (IDS, IDS))
    assert list(subject.params) == [
        "scale",
        "embed.weight",
        "layer.weight",
        "layer.bias",
        "unused.weight",
        "unused.bias",
    ]
    assert subject.size == 1 + 28 + 16 + 4 + 10
    vector = subject.flatten(subject.params)
    assert torch.equal(vector[:1], subject.params["scale"].reshape(1))
    back = subject.unflatten(vector)
    assert all(torch.equal(back[k], p) for k, p in subject.params.items())
    assert not subject.gradient()["unused.weight"].any()
    assert "frozen parameters are excluded: 0.weight, 0.bias (84 scalars)" in Subject(built(frozen), (X, Y)).notes[0]


CHOICES: dict[str, tuple[Any, list[str]]] = {
    "a name": ("2.weight", ["2.weight"]),
    "names in any order": (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
    "a module": ("0", ["0.weight", "0.bias"]),
    "a glob": ("*.bias", ["0.bias", "2.bias"]),
    "a predicate": (lambda name, p: p.ndim == 2, ["0.weight", "2.weight"]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_parameters_are_chosen_by_name_glob_or_predicate(name: str) -> None:
    choice, wanted = CHOICES[name]
    subject = Subject(built(dense), (X, Y), parameters=choice)
    assert list(subject.params) == list(subject.gradient()) == wanted
    assert f"only {len(wanted)} of 4 parameters vary" in subject.notes[0]


# --- the user's objects ---------------------------------------------------------------------------------------------


def everything(net: nn.Module) -> list[Any]:
    """All that a user could find changed, bit for bit."""
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    tensors = [(k, t.detach().numpy().tobytes(), t.data_ptr(), t._version, t.requires_grad) for k, t in state.items()]
    grads = [None if p.grad is None else p.grad.numpy().tobytes() for p in net.parameters()]
    modules = [(m.training, sorted(m.__dict__), list(m._forward_hooks), list(m._backward_hooks)) for m in net.modules()]
    switches = (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.get_num_threads(),
    )
    return [
        tensors,
        grads,
        modules,
        switches,
        torch.get_rng_state().tolist(),
        str(np.random.get_state()),  # noqa: NPY002
        random.getstate(),
    ]


def use(subject: Subject) -> None:
    subject.evaluate(), subject.gradient(), subject.outputs(), subject.losses(), subject.recomputed(), subject.memory()
    subject.fingerprint(), subject.snapshot().loss(), subject.describe(), subject.version()
    leaves = {k: p.detach().requires_grad_() for k, p in subject.params.items()}
    for batch in subject.batches(9):
        slope = torch.autograd.grad(
            subject.batch_loss(leaves, batch),
            list(leaves.values()),
            create_graph=True,
            materialize_grads=True,
            allow_unused=True,
        )
        torch.autograd.grad(sum(g.pow(2).sum() for g in slope), list(leaves.values()), allow_unused=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["eval", "batch", "recompute"])
@pytest.mark.parametrize("name", NETS)
def test_the_users_model_is_bit_for_bit_as_before(name: str, norm: Any, training: bool) -> None:
    make, data = NETS[name]
    net = built(make).train(training)
    net.register_forward_hook(lambda *_: pytest.fail("the user's hook ran"))
    next(net.parameters()).grad = torch.ones_like(next(net.parameters()))
    before = everything(net)
    use(Subject(net, data, norm=norm, batch_size=32, held_out=data))
    assert everything(net) == before


def test_the_users_model_is_as_before_when_the_loss_fails_half_way() -> None:
    net = built(normed).train()
    calls = [0]

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > 12:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets, reduction="none")

    subject = Subject(net, (X, Y), fails, norm="batch", batch_size=8)
    before = everything(net)
    with pytest.raises(KeyboardInterrupt):
        use(subject)
    assert everything(net) == before
    assert subject.module.training is False
    calls[0] = 0
    assert subject.loss() == Subject(net, (X, Y), norm="batch", batch_size=8).loss()


def train(net: nn.Module, steps: int, beside: Callable[[], None] | None = None) -> Iterator[Tensor]:
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net.train()(X), Y).backward()
        optimizer.step()
        yield from (p.detach().clone() for p in net.parameters())


def test_training_in_another_thread_is_bitwise_as_without_a_subject() -> None:
    """Dropout makes training depend on the global random state, BatchNorm on the buffers, both on every flag."""
    state = torch.get_rng_state()
    alone = list(train(built(normed), 60))
    torch.set_rng_state(state)
    net = built(normed)
    subject, stop = Subject(net, (X, Y), batch_size=16), threading.Event()

    def probe() -> None:
        while not stop.is_set():
            subject.evaluate(), subject.snapshot().gradient(), subject.version()

    thread = threading.Thread(target=probe)
    thread.start()
    beside = list(train(net, 60))
    stop.set()
    thread.join()
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_two_threads_may_evaluate_one_subject_at_different_points() -> None:
    subject = Subject(built(normed), (X, Y), batch_size=16)
    points = [{k: p + 0.1 * i for k, p in subject.params.items()} for i in range(4)]
    wanted = [subject.loss(p) for p in points]
    found: dict[int, list[float]] = {}

    def evaluate(i: int) -> None:
        found[i] = [subject.loss(points[i]) for _ in range(20)]

    threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [set(found[i]) for i in range(4)] == [{w} for w in wanted]


# --- norms, precision, time -----------------------------------------------------------------------------------------


def test_batch_statistics_are_those_of_each_micro_batch() -> None:
    net = built(normed)
    subject = Subject(net, (X, Y), norm="batch", batch_size=23)
    made = copy.deepcopy(net).eval()
    made[1].train()
    with torch.no_grad():
        wanted = sum(float(F.cross_entropy(made(x), y, reduction="sum")) for x, y in pieces(X, Y, [23, 23, 23 + 1])) / N
    assert subject.loss() == pytest.approx(wanted, rel=1e-12)
    assert subject.with_plan(Plan(chunk=7)).loss() == subject.loss()
    assert "micro-batches of 23" in subject.notes[-1]
    assert subject.describe()["batch_size"] == 23


def test_recomputed_statistics_are_cumulative_averages_at_the_point() -> None:
    subject = Subject(built(normed), (X, Y), norm="recompute", batch_size=35)
    moved = {k: 1.3 * p for k, p in subject.params.items()}
    parts = F.linear(X, moved["0.weight"], moved["0.bias"]).split(35)
    found = subject.recomputed(moved)
    torch.testing.assert_close(found["1.running_mean"], torch.cat(parts).mean(0))
    torch.testing.assert_close(found["1.running_var"], torch.stack([p.var(0) for p in parts]).mean(0))
    assert int(found["1.num_batches_tracked"]) == 2
    plain = Subject(built(normed), (X, Y), batch_size=35)
    with torch.no_grad():
        wanted = sum(float(plain.batch_loss(moved, b, found)) for b in plain.batches()) / N
    assert subject.loss(moved) == pytest.approx(wanted, rel=1e-12)
    assert subject.loss(moved) != pytest.approx(plain.loss(moved), rel=1e-3)
    assert subject.loss() == subject.loss(subject.params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_computed_in_a_float32_copy(dtype: torch.dtype) -> None:
    net = built(normed, dtype)
    exact = copy.deepcopy(net).double().eval()
    subject = Subject(net, (X.float(), Y))
    assert subject.dtype == torch.float32
    assert f"float32 copy of the {str(dtype)[6:]} weights" in subject.notes[0]
    wanted, slope = reference(exact, X, Y)
    assert subject.loss() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(subject.gradient()["0.weight"].double(), slope["0.weight"], rtol=1e-3, atol=1e-5)
    assert subject.recomputed()["1.num_batches_tracked"].dtype == torch.int64
    assert net[0].weight.dtype == dtype


def test_a_copy_in_another_precision_follows_the_model_and_a_live_subject_shares_it() -> None:
    net = built(normed, torch.float32)
    copied, live = Subject(net, (X, Y), dtype=torch.float64), Subject(net, (X, Y))
    assert live.params["0.weight"].data_ptr() == net[0].weight.data_ptr()
    assert live.params["0.weight"]._version == net[0].weight._version
    still, before = copied.snapshot(), copied.loss()
    with torch.no_grad():
        net[0].weight.add_(0.1)
    assert copied.loss() != before
    assert copied.loss() == pytest.approx(reference(copy.deepcopy(net).double(), X, Y)[0], rel=1e-12)
    assert live.loss() == pytest.approx(copied.loss(), rel=1e-5)
    assert still.loss() == before


# --- data and models as users have them -----------------------------------------------------------------------------


class ByName(nn.Module):
    """Takes two inputs by name and returns a dictionary with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Any]:
        return {"hidden": x, "logits": self.layer(x) + shift}


SHIFT = double(N, 3, seed=7)
ITEMS: Any = [{"x": x, "shift": s, "y": y, "n": 1} for x, s, y in zip(X, SHIFT, Y, strict=True)]
FORMS: dict[str, Any] = {
    "three": (X, SHIFT, Y),
    "names": {"x": X, "shift": SHIFT, "labels": Y, "index": list(range(N))},
    "loader of names": DataLoader(ITEMS, batch_size=9, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_several_inputs(form: str) -> None:
    net = built(ByName)
    wanted = float(F.cross_entropy(net.layer(X) + SHIFT, Y))
    assert Subject(net, FORMS[form]).loss() == pytest.approx(wanted, rel=1e-12)


def test_hugging_face_models_in_their_own_batches() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 11,
    }
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)).double()
    mask = torch.ones(N, 5).long()
    mask[:30, 3:] = 0
    encoding = transformers.BatchEncoding({"input_ids": IDS, "attention_mask": mask, "labels": Y})
    with torch.no_grad():
        found = bert.eval()(**encoding)
    subject = Subject(bert.train(), encoding, batch_size=32)
    assert subject.loss() == pytest.approx(float(found.loss), rel=1e-10)
    own = Subject(bert, encoding, objective=lambda model, batch: model(**batch).loss, batch_size=32)
    assert own.loss() == pytest.approx(float(found.loss), rel=1e-10)
    use(subject)

    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8)
    gpt = transformers.GPT2LMHeadModel(config).double()
    labels = IDS.masked_fill(mask == 0, -100)
    with torch.no_grad():
        wanted = float(gpt.eval()(input_ids=IDS, labels=labels).loss)
    language = Subject(gpt, {"input_ids": IDS, "labels": labels}, batch_size=32)
    assert language.loss() == pytest.approx(wanted, rel=1e-6)  # theirs is taken in float32
    assert "one token to the left" in " ".join(language.notes)


def test_objectives_of_model_and_batch() -> None:
    net = built(dense)
    wanted, slope = reference(net, X, Y)
    for reduction in ("mean", "sum", "none"):
        subject = Subject(
            net, (X, Y), objective=lambda m, b, r=reduction: F.cross_entropy(m(b[0]), b[1], reduction=r), batch_size=32
        )
        assert subject.describe()["reduction"] == reduction
        assert subject.loss() == pytest.approx(wanted, rel=1e-12)
        torch.testing.assert_close(subject.gradient()["0.weight"], slope["0.weight"])
        assert np.isnan(subject.evaluate()["loss_error"]) == (reduction != "none")
    with pytest.raises(ValueError, match="no outputs"):
        subject.outputs()


def test_wrappers_are_looked_through() -> None:
    net = built(dense)
    wanted = Subject(net, (X, Y))
    for wrapped in (torch.compile(net), nn.DataParallel(net)):
        subject = Subject(wrapped, (X, Y))
        assert list(subject.params) == list(wanted.params)
        assert subject.loss() == wanted.loss()


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example against all others of its batch."""
    near = outputs @ outputs.T
    return F.cross_entropy(near, torch.arange(len(near)), reduction="sum")


@pytest.mark.parametrize("way", ["loss", "objective"])
def test_a_loss_that_couples_examples_keeps_its_batches_and_says_so(way: str) -> None:
    net = built(dense)
    words: dict[str, Any] = {"loss": contrastive}
    if way == "objective":
        words = {"objective": lambda model, batch: contrastive(model(batch[0]), batch[1])}
    subject = Subject(net, (X, Y), **words, reduction="sum", batch_size=35)
    with torch.no_grad():
        wanted = sum(float(contrastive(net(x), x)) for x in X.split(35)) / N
    assert subject.loss() == pytest.approx(wanted, rel=1e-12)
    assert subject.with_plan(Plan(chunk=5)).loss() == subject.loss()
    assert "batches of 35 are part of what it is" in subject.notes[0]
    assert np.isnan(subject.evaluate()["loss_error"])
    assert not any("couples" in note for note in Subject(net, (X, Y), f).notes)


def test_batchnorm_without_running_statistics_keeps_its_batches() -> None:
    net = built(lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)))
    subject = Subject(net, (X, Y), batch_size=35)
    with torch.no_grad():
        wanted = sum(float(F.cross_entropy(net(x), y, reduction="sum")) for x, y in pieces(X, Y, [35, 35])) / N
    assert (subject.norm, subject.with_plan(Plan(chunk=5)).loss()) == ("batch", pytest.approx(wanted, rel=1e-12))


# --- numbers --------------------------------------------------------------------------------------------------------


def test_the_standard_error_is_that_of_a_mean_and_of_a_ratio() -> None:
    subject = Subject(built(dense), (X, Y), batch_size=16)
    found, losses = subject.evaluate(), subject.losses()
    each = F.cross_entropy(built(dense)(X), Y, reduction="none").detach()
    torch.testing.assert_close(losses, each)
    assert found["loss_error"] == pytest.approx(float(each.std()) / N**0.5)
    rate, wrong = found["error_rate"], built(dense)(X).argmax(1) != Y
    assert found["error_rate_error"] == pytest.approx(float(wrong.double().std()) / len(X) ** 0.5)
    assert rate == float(wrong.double().mean())
    assert set(subject.evaluate(metrics=("error_rate",))) == {"error_rate", "error_rate_error"}

    targets = IDS.masked_fill(double(N, 5, seed=9) > 0.3, -100)
    tokens = Subject(built(Tied), (IDS, targets), batch_size=16)
    values = F.cross_entropy(built(Tied)(IDS).movedim(-1, 1), targets, reduction="none").sum(1).detach()
    counts = (targets != -100).sum(1)
    left = [float((values.sum() - values[i]) / (counts.sum() - counts[i])) for i in range(N)]
    jackknife = ((N - 1) / N * sum((x - sum(left) / N) ** 2 for x in left)) ** 0.5
    assert tokens.evaluate()["loss_error"] == pytest.approx(jackknife, rel=0.05)
    assert float(tokens.losses().mean()) == pytest.approx(tokens.loss())


def test_examples_are_subsampled_stated_and_held_out() -> None:
    subject = Subject(built(dense), (X, Y), max_examples=20, held_out=(X[:9], Y[:9]), seed=4)
    assert (subject.examples, subject.available, subject.describe()["on"]) == (20, 70, "on 20 of 70 examples")
    assert subject.held_out is not None
    assert subject.held_out.loss() == Subject(built(dense), (X[:9], Y[:9])).loss()
    assert subject.snapshot().held_out.loss() == subject.held_out.loss()


def test_memory_is_what_autograd_saves() -> None:
    """tanh saves its output, linear its input and weight: N x 12 floats, N x 3 scores twice at most, no more."""
    subject = Subject(built(dense), (X, Y))
    assert 12 * 8 * N <= subject.memory() <= (12 + 6 + 2 * 3 + 2) * 8 * N
    assert subject.plan == Plan(chunk=N, threads=torch.get_num_threads())
    assert subject.with_plan(Plan(chunk=10)).memory() == pytest.approx(subject.memory() / 7, rel=0.01)
    assert [b.size for b in subject.with_plan(Plan(chunk=32)).batches()] == [32, 32, 6]
    assert subject.available_memory() > 0


# --- identity -------------------------------------------------------------------------------------------------------


def f(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def with_closure(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: scale * F.cross_entropy(outputs, targets)


def other_weights() -> nn.Module:
    net = built(dense)
    net[2].bias.data[1] += 1e-9
    return net


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "plain": lambda: Subject(built(dense), (X, Y)),
    "other weights": lambda: Subject(other_weights(), (X, Y)),
    "other function": lambda: Subject(nn.Sequential(built(dense)[0], nn.ReLU(), built(dense)[2]), (X, Y)),
    "other data": lambda: Subject(built(dense), (X + 1e-9, Y)),
    "other labels": lambda: Subject(built(dense), (X, (Y + 1) % 3)),
    "fewer": lambda: Subject(built(dense), (X, Y), max_examples=50),
    "other fewer": lambda: Subject(built(dense), (X, Y), max_examples=50, seed=1),
    "other loss": lambda: Subject(built(dense), (X, Y), "half_mse"),
    "module": lambda: Subject(built(dense), (X, Y), nn.CrossEntropyLoss()),
    "smoothed": lambda: Subject(built(dense), (X, Y), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "weighted": lambda: Subject(built(dense), (X, Y), nn.CrossEntropyLoss(torch.ones(3).double())),
    "function": lambda: Subject(built(dense), (X, Y), f),
    "closure 1": lambda: Subject(built(dense), (X, Y), with_closure(1.0)),
    "closure 2": lambda: Subject(built(dense), (X, Y), with_closure(2.0)),
    "batch": lambda: Subject(built(normed), (X, Y), norm="batch", batch_size=35),
    "other batch": lambda: Subject(built(normed), (X, Y), norm="batch", batch_size=20),
    "eval": lambda: Subject(built(normed), (X, Y)),
    "part": lambda: Subject(built(dense), (X, Y), parameters="2"),
    "float32": lambda: Subject(built(dense), (X, Y), dtype=torch.float32),
    "held out": lambda: Subject(built(dense), (X, Y), held_out=(X[:5], Y[:5])),
}


def test_fingerprints_are_equal_exactly_when_the_numbers_are_the_same() -> None:
    prints = {name: make().fingerprint() for name, make in SUBJECTS.items()}
    assert prints == {name: make().fingerprint() for name, make in SUBJECTS.items()}
    assert len(set(prints.values())) == len(prints)
    assert prints["plain"] == Subject(built(dense), (X, Y), batch_size=16).fingerprint()
    assert prints["plain"] == Subject(built(dense).eval(), DataLoader(TensorDataset(X, Y), shuffle=True)).fingerprint()


def test_fingerprints_and_versions_follow_training_but_not_for_a_snapshot() -> None:
    net = built(normed)
    subject = Subject(net, (X, Y))
    still = subject.snapshot()
    seen = [(subject.fingerprint(), subject.version())]
    assert still.fingerprint() == seen[0][0]
    kept = (still.fingerprint(), still.version(), still.loss())
    for _ in range(3):
        list(train(net, 1))
        seen.append((subject.fingerprint(), subject.version()))
    assert len(set(seen)) == 4
    assert (still.fingerprint(), still.version(), still.loss()) == kept
    assert still.params["0.weight"].data_ptr() != net[0].weight.data_ptr() == subject.params["0.weight"].data_ptr()


def test_a_subject_travels_to_another_process() -> None:
    subject = Subject(built(normed), (X, Y), norm="batch", batch_size=35)
    there = pickle.loads(pickle.dumps(subject))
    assert (there.fingerprint(), there.loss()) == (subject.fingerprint(), subject.loss())


def test_pairs_and_runs() -> None:
    one, two = Subject(built(dense), (X, Y)), Subject(other_weights(), (X, Y))
    assert Pair(one, two).fingerprint() != Pair(two, one).fingerprint()
    runs = Runs({"a": one, "b": two})
    assert repr(runs) == "<Runs: 2 by label: a, b>"
    assert repr(Runs({str(k): one for k in range(8)})).endswith("4, 5, and 2 more>")
    assert (list(runs), runs["b"], len(runs), Pair.kind, Runs.kind) == (["a", "b"], two, 2, "pair", "runs")
    assert runs.snapshot().fingerprint() == runs.fingerprint()
    with pytest.raises(TypeError, match="two Subjects"):
        Pair(one, built(dense))
    with pytest.raises(ValueError, match="at least one"):
        Runs({})
    with pytest.raises(TypeError, match="one kind"):
        Runs({"a": one, "b": 3})


# --- bad input ------------------------------------------------------------------------------------------------------


def nan_weights() -> nn.Module:
    net = built(dense)
    net[0].weight.data[0, 0] = float("nan")
    return net


def split_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3, device="meta"))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.complex64))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: Subject(lambda x: x, (X, Y)), TypeError, "torch.nn.Module"),  # type: ignore[arg-type]
    "no weights": (lambda: Subject(nn.Tanh(), (X, Y)), ValueError, "nothing to look at"),
    "lazy": (lambda: Subject(nn.LazyLinear(3), (X, Y)), TypeError, "run the model once"),
    "meta": (lambda: Subject(split_model(), (X, Y)), ValueError, "meta device"),
    "complex": (lambda: Subject(Complex(), (X, Y)), ValueError, "complex"),
    "all frozen": (lambda: Subject(built(dense).requires_grad_(False), (X, Y)), ValueError, "frozen"),
    "unknown parameter": (lambda: Subject(built(dense), (X, Y), parameters="0.wieght"), ValueError, "mean 0.weight"),
    "nothing chosen": (
        lambda: Subject(built(dense), (X, Y), parameters=lambda n, p: False),
        ValueError,
        "none of the 4",
    ),
    "half precision": (
        lambda: Subject(built(dense), (X, Y), dtype=torch.float16),
        ValueError,
        "float32 or torch.float64",
    ),
    "norm": (lambda: Subject(built(dense), (X, Y), norm="train"), ValueError, "'recompute'"),  # type: ignore[arg-type]
    "batch size": (lambda: Subject(built(dense), (X, Y), batch_size=0), ValueError, "at least 1"),
    "device": (lambda: Subject(built(dense), (X, Y), device="meta"), ValueError, "device='auto'"),
    "inputs": (lambda: Subject(built(dense), (X[:, :5], Y)), ValueError, r"first batch \(\(32, 5\) float64\)"),
    "no targets": (lambda: Subject(built(dense), TensorDataset(X)), ValueError, "no targets"),
    "labels": (
        lambda: Subject(built(dense), (X, torch.cat([Y[:-1], torch.tensor([3])]))),
        ValueError,
        "label 3 is out of",
    ),
    "all ignored": (lambda: Subject(built(dense), (X, torch.full((N,), -100))), ValueError, "weigh nothing"),
    "nan weights": (lambda: Subject(nan_weights(), (X, Y)), ValueError, "own point is nan: check"),
    "nan in the last input": (lambda: Subject(built(dense), (_nan_last(), Y)).loss(), ValueError, "inputs, targets"),
    "metric": (lambda: Subject(built(dense), (X, Y)).evaluate(metrics=("accuracy",)), ValueError, "'error_rate'"),
    "outputs": (lambda: Subject(_Strange(), (X, Y)), TypeError, "objective=f"),
    "objective": (lambda: Subject(built(dense), (X, Y), objective=lambda m, b: 1.0), TypeError, "got float"),  # type: ignore[arg-type,return-value]
    "vector": (lambda: Subject(built(dense), (X, Y)).unflatten(torch.ones(3)), ValueError, "123 entries"),
    "plan": (lambda: Plan(chunk=0), ValueError, "at least 1"),
}


def _nan_last() -> Tensor:
    x = X.clone()
    x[-1, 0] = float("nan")
    return x


class _Strange(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return {"a": super().forward(x), "b": 1}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_what_to_do(name: str) -> None:
    make, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        make()


def test_selected_examples_and_restricted_parameters_are_parts_of_the_same_function() -> None:
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 2).double(), torch.randn(11, 3, dtype=torch.float64), torch.arange(11) % 2
    subject = Subject(net, (x, y))
    part = subject.selected([7, 2, 5])
    assert part.examples == 3
    assert part.available == 11
    assert part.loss() == pytest.approx(float(nn.functional.cross_entropy(net(x[[2, 5, 7]]), y[[2, 5, 7]])))
    assert part.fingerprint() != subject.fingerprint() != subject.selected(range(10)).fingerprint()
    bias = subject.restricted("bias")
    assert list(bias.params) == ["bias"]
    assert bias.size == 2
    assert torch.equal(bias.gradient()["bias"], subject.gradient()["bias"])
    assert bias.fingerprint() != subject.fingerprint()
    with pytest.raises(ValueError, match="from 0 to 10"):
        subject.selected([11])
    with pytest.raises(ValueError, match="names none of the subject's parameters"):
        bias.restricted("weight")


def test_at_other_weights_and_under_another_policy_it_is_the_same_function() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 2
    subject, step = Subject(net, (x, y)), torch.randn(4, 3, dtype=torch.float64)
    there = {"0.weight": net[0].weight.detach() + step}
    moved = subject.at(there)
    assert moved.loss() == subject.loss(there) != subject.loss()
    assert torch.equal(moved.gradient()["2.bias"], subject.gradient({**subject.params, **there})["2.bias"])
    before = moved.fingerprint()
    there["0.weight"].zero_()
    net[2].bias.data.add_(1)
    assert moved.fingerprint() == before, "it stands on copies"
    with pytest.raises(KeyError, match="no parameter or buffer called 'nope'"):
        subject.at({"nope": step})
    anew = subject.under("recompute")
    assert (subject.norm, anew.norm) == ("eval", "recompute")
    assert anew.fingerprint() != subject.fingerprint()
    batch = copy.deepcopy(net).train()
    hidden = batch[0](x)
    mean, variance = hidden.mean(0), hidden.var(0)
    z = (hidden - mean) / (variance + batch[1].eps).sqrt() * batch[1].weight + batch[1].bias
    assert anew.loss() == pytest.approx(float(nn.functional.cross_entropy(batch[2](z), y)))
    assert any("estimated anew" in note for note in anew.notes)
