"""Trajectories: what a record gives back, what plain checkpoints give, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import workbench as wb
from workbench import record
from workbench.rebuild import Untrusted, load_into
from workbench.zoo import digits, nets, training

WIDTHS = (64, 5, 10)
FEW = tuple(t[:40] for t in digits.digits().train)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A recorded training of nine steps, whose record can be opened without any help."""
    folder, model = tmp_path_factory.mktemp("runs") / "first", nets.dense(WIDTHS)
    arguments = {"data": FEW, "loss": "cross_entropy", "build": nets.dense, "build_args": {"widths": WIDTHS}}
    with wb.Recorder(folder, model, every=3, **arguments) as rec:
        training.train(model, FEW, steps=8, recorder=rec)
    return folder, model


def test_a_step_opens_as_the_model_that_was_trained(run: tuple[Path, nn.Module]) -> None:
    folder, model = run
    trajectory = wb.Trajectory.open(folder)
    assert trajectory.steps == (0, 3, 6, 8)
    assert len(trajectory) == 4
    assert trajectory.label == "first"
    last = trajectory.subject(8)
    with torch.no_grad():
        wanted = nn.functional.cross_entropy(model(FEW[0]), FEW[1]).item()
    assert last.loss() == pytest.approx(wanted, rel=1e-6)
    assert last.path is not None
    assert last.path.steps == trajectory.steps
    for name, p in model.named_parameters():
        assert torch.equal(last.params[name], p)
    for name, p in nets.dense(WIDTHS).named_parameters():
        assert torch.equal(trajectory.subject(0).params[name], p)


def test_an_unknown_step_is_answered_with_its_neighbours(run: tuple[Path, nn.Module]) -> None:
    trajectory = wb.Trajectory.open(run[0])
    with pytest.raises(ValueError, match=r"no checkpoint at step 4; nearest: 3 and 6\. .* all 4"):
        trajectory.subject(4)
    with pytest.raises(ValueError, match=r"nearest: 8\."):
        trajectory.weights(99)


def test_a_model_that_is_passed_is_copied_and_never_changed(run: tuple[Path, nn.Module]) -> None:
    trajectory, given = wb.Trajectory.open(run[0]), nets.dense(WIDTHS, seed=9)
    before = {name: (t, t.clone(), t._version) for name, t in given.state_dict(keep_vars=True).items()}
    own = trajectory.using(model=given, data=(FEW[0][:7], FEW[1][:7]))
    assert own.subject(6).loss() == trajectory.subject(6, data=(FEW[0][:7], FEW[1][:7])).loss()
    assert own.subject(6).examples == 7
    for name, tensor in given.state_dict(keep_vars=True).items():
        held, value, version = before[name]
        assert tensor is held
        assert tensor._version == version
        assert torch.equal(tensor, value)


def test_shapes_that_do_not_fit_name_the_tensors_and_both_shapes(run: tuple[Path, nn.Module]) -> None:
    trajectory = wb.Trajectory.open(run[0])
    with pytest.raises(
        ValueError, match=r"step 3 of first .* linear1.weight has shape \(5, 64\) in the record and \(6, 64\)"
    ):
        trajectory.subject(3, model=nets.dense((64, 6, 10)))
    with pytest.raises(ValueError, match=r"linear3.weight is not in the record"):
        trajectory.subject(3, model=nets.dense((64, 5, 10, 10)))
    with pytest.raises(ValueError, match=r"is not in the model.*and 1 more"):
        trajectory.subject(3, model=nn.Sequential(nn.Flatten()))


def test_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    with wb.Recorder(tmp_path, nets.dense(WIDTHS)):
        pass
    trajectory = wb.Trajectory.open(tmp_path)
    for given_, wanted in (({}, "model="), ({"model": nets.dense(WIDTHS)}, "data=")):
        with pytest.raises(ValueError, match=wanted):
            trajectory.subject(0, **given_)
    with pytest.raises(ValueError, match="loss="):
        trajectory.subject(0, model=nets.dense(WIDTHS), data=FEW)
    assert trajectory.subject(0, nets.dense(WIDTHS), FEW, "cross_entropy").loss() > 0


def test_code_from_outside_is_not_imported_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_nets.py").write_text("import torch\nran = True\ndef build(): return torch.nn.Linear(2, 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    with wb.Recorder(tmp_path / "r", nn.Linear(2, 2), build="outside_nets:build", data=data, loss="cross_entropy"):
        pass
    import sys

    with pytest.raises(Untrusted, match=r"import and call outside_nets:build.*trust=True"):
        wb.Trajectory.open(tmp_path / "r").subject(0)
    assert "outside_nets" not in sys.modules
    assert wb.Trajectory.open(tmp_path / "r", trust=True).subject(0).size == 6
    with wb.Recorder(
        tmp_path / "d", nets.dense(WIDTHS), build=nets.dense, build_args={"widths": WIDTHS}, data="os:getcwd"
    ):
        pass
    with pytest.raises(Untrusted, match="os:getcwd"):
        wb.Trajectory.open(tmp_path / "d").subject(0, loss="cross_entropy")


def test_rebuilding_leaves_the_random_state_alone_in_every_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noisy_nets.py").write_text(
        "import torch\ndef build():\n    torch.rand(5), torch.randperm(4), torch.randn(3).bernoulli_(0.5)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.MultiheadAttention(4, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import noisy_nets  # type: ignore[import-not-found]

    with wb.Recorder(tmp_path / "r", noisy_nets.build(), build="noisy_nets:build"):
        pass
    trajectory = wb.Trajectory.open(tmp_path / "r", trust=True)
    state = torch.get_rng_state()
    trajectory._model(0)
    worker = threading.Thread(target=trajectory._model, args=(0,))
    worker.start()
    worker.join()
    assert torch.equal(state, torch.get_rng_state())


class Tied(nn.Module):
    """An embedding whose weights are its decoder's, with a buffer and a frozen bias."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed, self.decode = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.register_buffer("scale", torch.tensor(3, dtype=torch.int32))
        self.decode.bias.requires_grad_(False)
        if tie:
            self.decode.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.embed(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_ties_dtypes_buffers_and_frozen_weights_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Tied().to(dtype)
    with wb.Recorder(tmp_path, model):
        pass
    trajectory = wb.Trajectory.open(tmp_path)
    stored = record.load_tensors(record.checkpoint_path(tmp_path, 0))
    assert set(stored) == {"embed.weight", "decode.bias", "scale"}
    assert stored["embed.weight"].dtype == dtype
    weights = trajectory.weights(0)
    assert weights["decode.weight"] is weights["embed.weight"]
    for tie in (True, False):
        made = Tied(tie)
        load_into(made, trajectory.weights(0), "a record")
        assert made.decode.weight is made.embed.weight
        assert made.decode.weight.dtype == dtype
        assert torch.equal(made.decode.weight, model.decode.weight)
        assert not made.decode.bias.requires_grad
        assert made.scale.dtype == torch.int32
        assert made.scale == 3


def test_two_recorded_tensors_do_not_fit_into_one(tmp_path: Path) -> None:
    with wb.Recorder(tmp_path, Tied(tie=False)):
        pass
    with pytest.raises(
        ValueError, match=r"decode.weight and embed.weight are one tensor in the model and two in the record"
    ):
        load_into(Tied(), wb.Trajectory.open(tmp_path).weights(0), "a record")


def test_the_fingerprint_follows_weights_scalars_and_data_but_not_the_place(
    run: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    trajectory = wb.Trajectory.open(run[0])
    shutil.copytree(run[0], tmp_path / "elsewhere")
    copied = wb.Trajectory.open(tmp_path / "elsewhere")
    assert copied.fingerprint() == trajectory.fingerprint()
    assert trajectory.using(data=(FEW[0] + 1, FEW[1])).fingerprint() != trajectory.fingerprint()
    assert trajectory.using(loss="half_mse").fingerprint() != trajectory.fingerprint()
    assert trajectory.using(model=nets.dense(WIDTHS, "relu")).fingerprint() != trajectory.fingerprint()
    with (tmp_path / "elsewhere" / record.SCALARS).open("ab") as opened:
        opened.write(record.Line(9, 0.0, 0.0, {"a": 1.0}).to_bytes())
    assert copied.fingerprint() != trajectory.fingerprint()
    model, seen, version = nets.dense(WIDTHS), copied.refresh(), copied.version()
    model.load_state_dict(copied.weights(6))
    with wb.Recorder(tmp_path / "elsewhere", model) as rec:
        rec.step()
    assert seen.refresh().fingerprint() != trajectory.fingerprint()
    assert seen.version() != version
    words = str(trajectory.describe())
    assert str(run[0].parent) not in words
    assert "4 checkpoints, steps 0 to 8" in words


@pytest.mark.parametrize("nest", ["", "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_plain_checkpoints_are_adopted(tmp_path: Path, nest: str, prefix: str) -> None:
    states = {step: nets.dense(WIDTHS, seed=step).state_dict() for step in (0, 20, 100)}
    for step, state in states.items():
        held = {prefix + name: tensor for name, tensor in state.items()}
        torch.save(
            {nest: held, "epoch": 3, "optimizer": {"state": {}}} if nest else held, tmp_path / f"v2_step{step}.pt"
        )
    trajectory = wb.Trajectory.adopt(tmp_path / "*.pt", step=r"step(\d+)")
    assert trajectory.steps == (0, 20, 100)
    assert trajectory.scalars.empty
    subject = trajectory.using(nets.dense(WIDTHS), FEW, "cross_entropy").subject(20)
    assert all(torch.equal(subject.params[name], states[20][name]) for name in states[20])


def test_safetensors_in_step_folders_are_adopted(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        tied = {name: t for name, t in Tied().state_dict().items() if name != "decode.weight"}
        save_file(tied, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    trajectory = wb.Trajectory.adopt(f"{tmp_path}/checkpoint-*/model.safetensors")
    assert trajectory.steps == (500, 1000)
    made = trajectory.using(Tied())._model(500)
    assert made.decode.weight is made.embed.weight


def test_adoption_asks_for_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file matches"):
        wb.Trajectory.adopt(tmp_path / "*.pt")
    for name in ("a1_2.pt", "a1_3.pt"):
        torch.save(nn.Linear(1, 1).state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=r"a1_2.pt and a1_3.pt both stand for step 1"):
        wb.Trajectory.adopt(tmp_path / "*.pt")
    with pytest.raises(ValueError, match="reads no number off"):
        wb.Trajectory.adopt(tmp_path / "*.pt", step=r"epoch(\d+)")
    torch.save({"lr": 0.1}, tmp_path / "b7.pt")
    (tmp_path / "b8.pt").write_bytes((tmp_path / "a1_2.pt").read_bytes()[:300])
    for name, words in (("b7.pt", "holds no state dict: among lr"), ("b8.pt", "damaged or no torch.save file")):
        trajectory = wb.Trajectory.adopt(tmp_path / name)
        with pytest.raises(ValueError, match=words):
            trajectory.weights(trajectory.steps[0])


class _Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2), "x": _Exploit(tmp_path / "owned")}, tmp_path / "s1.pt")
    (tmp_path / "s2.pt").write_bytes(pickle.dumps(_Exploit(tmp_path / "owned"), protocol=2))
    trajectory = wb.Trajectory.adopt(tmp_path / "*.pt")
    for step in trajectory.steps:
        with pytest.raises(ValueError, match=r"would run code|damaged"):
            trajectory.weights(step)
    assert not (tmp_path / "owned").exists()


def test_damaged_records_say_what_is_wrong(run: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder = tmp_path / "r"
    shutil.copytree(run[0], folder)
    path = record.checkpoint_path(folder, 3)
    path.write_bytes(path.read_bytes()[:-10])
    (folder / "checkpoints" / ".step-000000004.safetensors.77.tmp").write_bytes(b"half")
    trajectory = wb.Trajectory.open(folder)
    assert trajectory.steps == (0, 3, 6, 8)
    with pytest.raises(ValueError, match=r"step-000000003.safetensors is damaged or cut short"):
        trajectory.subject(3)
    (folder / record.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        wb.Trajectory.open(folder)
    (folder / record.MANIFEST).write_text('{"format": "workbench-record", "version": 99}')
    with pytest.raises(ValueError, match="newer Workbench"):
        wb.Trajectory.open(folder)
    with pytest.raises(FileNotFoundError, match="holds no record"):
        wb.Trajectory.open(tmp_path)


trees = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 5),
        st.text(max_size=3),
        st.integers(0, 3).map(lambda n: torch.arange(n)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=6,
)


@given(trees)
def test_examples_of_any_form_are_packed_and_unpacked(tree) -> None:
    tensors, place = record.pack(tree)
    assert repr(record.unpack(tensors, place)) == repr(tree)


def test_recorded_examples_of_any_kind_come_back_as_they_were(tmp_path: Path) -> None:
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    model, arguments = nn.Linear(3, 3), {"loss": "cross_entropy"}
    pairs = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)
    wanted = wb.Subject(model, (x, y)).loss()
    for label, data in enumerate([(x, y), pairs, loader, [(x[:2], y[:2]), (x[2:], y[2:])], {"input": x, "labels": y}]):
        with wb.Recorder(tmp_path / str(label), model, data=data, **arguments):
            pass
        subject = wb.Trajectory.open(tmp_path / str(label)).subject(0, model=model)
        assert subject.loss() == pytest.approx(wanted, rel=1e-6)
        assert subject.examples == subject.available == 6


def test_folders_of_checkpoints_whole_or_in_shards_are_adopted(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    states = {step: nets.dense(WIDTHS, seed=step).state_dict() for step in (3, 20)}
    for step, state in states.items():
        folder = tmp_path / "step2" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        names = sorted(state)
        if step == 3:
            torch.save(state, folder / "pytorch_model.bin")
            continue
        shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, part in shards.items():
            save_file({name: state[name] for name in part}, folder / file)
        places = {name: file for file, part in shards.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    trajectory = wb.Trajectory.adopt(tmp_path / "step2" / "*")
    assert trajectory.steps == (3, 20)
    for step, state in states.items():
        held = trajectory.weights(step)
        assert set(held) == set(state)
        assert all(torch.equal(held[name], state[name]) for name in state)
    (tmp_path / "step2" / "checkpoint-30").mkdir()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-30 holds none of model.safetensors"):
        wb.Trajectory.adopt(tmp_path / "step2" / "*")


def test_the_number_after_the_word_step_is_the_step() -> None:
    from workbench.adopted import _USUAL, _step

    usual = [re.compile(words) for words in _USUAL]
    names = {"epoch=3-step=400.ckpt": 400, "e2_step_7.pt": 7, "run5-Steps12.pt": 5, "resnet18.pt": 18, "step9.pt": 9}
    assert {name: _step(Path("ckpts") / name, usual) for name in names} == names
