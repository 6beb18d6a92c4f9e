"""Width transfer: scaled sharpness by dense matrices, and what each parametrisation promises across widths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from workbench.dynamics.recorder import Recorder
from workbench.dynamics.width_transfer import WidthTransfer
from workbench.probe import Reading
from workbench.several import Runs
from workbench.trajectory import Trajectory
from workbench.zoo.nets import dense
from workbench.zoo.parametrisation import parametrised

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 5, generator=GENERATOR), torch.randn(24, 1, generator=GENERATOR)


def record(folder: Path, word: str, width: int, steps: int = 8, lr: float = 0.1) -> Trajectory:
    made = parametrised(lambda w: dense([5, w, w, 1], "tanh", seed=1), width, 8, word)  # type: ignore[arg-type]
    path, model = folder / f"{word} {width}", made.model.double()
    optimizer = torch.optim.SGD(made.groups(lr))
    x, y = X.double(), Y.double()
    with Recorder(path, model, optimizer, every=4) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            recorder.step(train_loss=loss.item())
    return Trajectory.open(path).using(model, (x, y), "mse")


def transfer(folder: Path, word: str, widths: tuple[int, ...], **settings: object) -> Reading:
    runs = Runs({f"width {w}": record(folder, word, w) for w in widths})
    return WidthTransfer(**settings).run(runs)  # type: ignore[arg-type]


def test_sharpness_is_the_largest_eigenvalue_of_the_scaled_hessian(tmp_path: Path) -> None:
    run = record(tmp_path, "mup", 16)
    found = WidthTransfer(kernel=False, moments=2).run(Runs({"width 16": run}))
    subject = run.subject(run.steps[-1])
    names, tensors = list(subject.params), subject.params
    sizes = [t.numel() for t in tensors.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = {n: part.view(tensors[n].shape) for n, part in zip(names, flat.split(sizes), strict=True)}
        return nn.functional.mse_loss(functional_call(subject.module, parts, (X.double(),)), Y.double())

    matrix = hessian(loss)(torch.cat([t.reshape(-1) for t in tensors.values()]))
    made = parametrised(lambda w: dense([5, w, w, 1], "tanh", seed=1), 16, 8, "mup")
    root = torch.cat(
        [torch.full((n,), (0.1 * made.rates()[name]) ** 0.5).double() for name, n in zip(names, sizes, strict=True)]
    )
    wanted = float(torch.linalg.eigvalsh(root[:, None] * matrix * root)[-1])
    assert float(found.data.sharpness[0, -1]) == pytest.approx(wanted, rel=0.03)
    assert abs(float(found.data.sharpness[0, -1]) - wanted) <= float(found.data.sharpness_error[0, -1]) + 1e-9
    assert list(found.data.width.values) == [16]


def test_what_each_parametrisation_promises(tmp_path: Path) -> None:
    """Sharpness at the start grows under PyTorch's own; kernels turn less with width under ntk, alike under mup."""
    widths = (16, 64, 256)
    found = {word: transfer(tmp_path, word, widths, moments=2).data for word in ("standard", "ntk", "mup")}
    start = {word: data.sharpness.values[:, 0] for word, data in found.items()}
    assert start["standard"][2] > 3 * start["standard"][0]
    for word in ("ntk", "mup"):
        assert start[word][2] == pytest.approx(start[word][1], rel=0.35)
    turned = {word: data.kernel_distance.values[:, -1] for word, data in found.items()}
    assert turned["ntk"][2] < 0.4 * turned["ntk"][0]
    assert turned["mup"][2] > 0.4 * turned["mup"][0]
    assert found["mup"].kernel_distance.values[:, 0] == pytest.approx(0, abs=1e-9)


def test_gaps_are_those_to_the_widest(tmp_path: Path) -> None:
    found = transfer(tmp_path, "standard", (16, 32), moments=3, kernel=False)
    values = found.data.sharpness.values
    assert float(found.data.gap[0]) == pytest.approx(np.max(np.abs(values[0] - values[1]) / values[1]))
    assert float(found.data.gap[1]) == 0
    assert found.summary["widest"] == 32
    assert np.isnan(found.data.kernel_gap.values).all()


def test_runs_without_a_shared_step_are_refused(tmp_path: Path) -> None:
    from workbench.dynamics import width_transfer as module

    runs = {"a": record(tmp_path, "mup", 16), "b": record(tmp_path, "ntk", 16)}
    for run, steps in zip(runs.values(), ((0, 4), (8, 12)), strict=True):
        object.__setattr__(run, "source", type("Other", (), {"steps": steps, "label": "x"})())
    with pytest.raises(ValueError, match="share no recorded step"):
        module._Run(WidthTransfer(), runs, 0)


def test_a_run_that_diverged_leaves_the_others(tmp_path: Path) -> None:
    runs = {f"width {w}": record(tmp_path, "standard", w, lr=0.1 if w > 4 else 1e60) for w in (4, 8, 16)}
    reading = WidthTransfer(moments=2).run(Runs(runs))
    assert np.isnan(reading.data.sharpness.values).tolist() == [[False, True], [False, False], [False, False]]
    assert np.isfinite(reading.data.gap.values).all()
    assert not reading.converged
    assert any(note.startswith("width 4 could not be measured at step 8") for note in reading.notes)
    assert reading.figure().panels
