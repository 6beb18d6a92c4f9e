"""The recorder inside Lightning's and Hugging Face's own trainers: same weights, one record a step, resumed runs."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import workbench as wb
from workbench.dynamics import gauges

pytestmark = pytest.mark.filterwarnings("ignore")
X, Y = torch.linspace(-1, 1, 48).reshape(24, 2), torch.arange(24) % 3


@pytest.fixture(autouse=True)
def no_torchvision_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's metrics look for torchvision by its files, also where tests/conftest.py hides one."""
    cache = pytest.importorskip("lightning_utilities.core.imports").RequirementCache
    if sys.modules.get("torchvision", sys) is None:
        found = cache.__bool__
        monkeypatch.setattr(cache, "__bool__", lambda self: "torchvision" not in self.requirement and found(self))


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def given() -> dict:
    each = [*gauges.defaults(1), gauges.NoiseScale(1, examples=4), gauges.Sharpness(every=2, examples=None)]
    return {"every": 2, "data": (X, Y), "loss": "cross_entropy", "gauges": each, "keep_optimizer": True}


# ------------------------------------------------------------------------------------------------------- Lightning


def lightning_module():
    lightning = pytest.importorskip("lightning.pytorch", reason="the extra [lightning] is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 6, "folder": "here"})
            self.net, self.seen = net(), nn.Parameter(torch.zeros(()), requires_grad=False)

        def training_step(self, batch, index):
            loss = functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, index) -> None:
            self.log("val/accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    return lightning, Module


def fit(folder: Path, callbacks: list, epochs: int = 2, start: Path | None = None, rows: int = 24):
    """Twelve steps of two micro-batches each, with a validation after every epoch."""
    lightning, module = lightning_module()
    torch.manual_seed(0)
    model, loader = module(), DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=2, callbacks=callbacks, default_root_dir=folder, accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(model, loader, DataLoader(TensorDataset(X, Y), batch_size=rows), ckpt_path=start)
    return trainer, model


def test_lightning_trains_the_same_and_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the extra [lightning] is not installed")
    from workbench.interop.lightning import RecorderCallback

    _, plain = fit(tmp_path, [])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the gauge")
        trainer, seen = fit(tmp_path, [RecorderCallback(tmp_path / "r", "net", **given())])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), seen.parameters(), strict=True))
    opened = wb.Trajectory.open(tmp_path / "r")
    assert opened.steps == (0, 2, 4, 6)
    table = opened.scalars
    assert table.index.tolist() == list(range(7))
    assert table["val/accuracy"].notna().tolist() == [True, False, False, False, True, False, False], (
        "as it was logged; first by the sanity check, which goes over all of its one batch"
    )
    first = (net().eval()(X).argmax(1) == Y).float().mean()
    assert table["val/accuracy"].loc[0] == first
    assert table[["train_loss", "gradient_norm", "noise_scale", "update_norm"]].iloc[1:].notna().to_numpy().all()
    assert table["stability_threshold"].dropna().iloc[1] > table["stability_threshold"].dropna().iloc[0]
    assert all(torch.equal(opened.weights(6)[name], value) for name, value in seen.net.state_dict().items())
    assert opened.subject(6, model=net()).loss() == pytest.approx(
        functional.cross_entropy(seen.net.eval()(X), Y).item()
    )
    trainer.save_checkpoint(tmp_path / "epoch=1-step=6.ckpt")
    _resumed(tmp_path, RecorderCallback)


def test_a_sanity_check_over_some_batches_is_no_measurement(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the extra [lightning] is not installed")
    from workbench.interop.lightning import RecorderCallback

    fit(tmp_path, [RecorderCallback(tmp_path / "r", "net")], rows=8)
    assert wb.Trajectory.open(tmp_path / "r").scalars["val/accuracy"].notna().tolist()[:2] == [False, False]


def _resumed(folder: Path, callback) -> None:
    """Lightning goes on from its checkpoint, and the record with it; its files are adopted as they are."""
    before = wb.Trajectory.open(folder / "r").scalars["val/accuracy"].loc[0]
    fit(folder, [callback(folder / "r", "net", **given())], 3, folder / "epoch=1-step=6.ckpt")
    opened = wb.Trajectory.open(folder / "r")
    assert opened.scalars.index.tolist() == list(range(10))
    assert opened.scalars["val/accuracy"].loc[0] == before
    assert opened.steps == (0, 2, 4, 6, 8, 9)
    adopted = wb.Trajectory.adopt(folder / "*.ckpt")
    assert adopted.steps == (6,)
    subject = adopted.using(net(), (X, Y), "cross_entropy").subject(6)
    assert subject.loss() == wb.Trajectory.open(folder / "r").subject(6, model=net()).loss()


def test_lightning_closes_the_record_when_training_fails(tmp_path: Path) -> None:
    lightning, _ = lightning_module()
    from workbench.interop.lightning import RecorderCallback

    class Fails(lightning.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            if trainer.global_step == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, [RecorderCallback(tmp_path / "r", "net", every=100), Fails()])
    assert wb.Trajectory.open(tmp_path / "r").steps == (0, 3)


# ----------------------------------------------------------------------------------------------------- Transformers


def train(folder: Path, callbacks: list, steps: int = 6, resume: bool = False):
    """A small GPT-2 on made-up tokens: accumulation of two, logs every second step, checkpoints every third."""
    transformers = pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
    pytest.importorskip("accelerate", reason="the extra [transformers] is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": (torch.arange(8) + i) % 11, "labels": (torch.arange(8) + i) % 11} for i in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        logging_steps=2, save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, seed=1,
        dataloader_pin_memory=False, eval_strategy="steps", eval_steps=3, eval_on_start=True, save_total_limit=4,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return model, rows


def test_transformers_trains_the_same_and_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the extra [transformers] is not installed")
    from workbench.interop.transformers import RecorderCallback

    plain, rows = train(tmp_path / "plain", [])
    each = [
        *gauges.defaults(1),
        gauges.NoiseScale(1, examples=4),
        gauges.AttentionLogits(every=3),
        gauges.LogZ(every=3),
    ]
    words = {"every": 2, "data": _together(rows[:4]), "loss": "cross_entropy", "gauges": each}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the gauge")
        seen, _ = train(tmp_path / "hf", [RecorderCallback(tmp_path / "r", **words)])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), seen.parameters(), strict=True))
    opened = wb.Trajectory.open(tmp_path / "r")
    table = opened.scalars
    assert opened.steps == (0, 2, 4, 6)
    assert table["loss"].notna().tolist() == [False, False, True, False, True, False, True]
    assert table["eval_loss"].dropna().index.tolist() == [0, 3, 6]
    assert table["attention_logit_max"].dropna().index.tolist() == [3, 6]
    assert table[["gradient_norm", "noise_scale", "update_norm"]].iloc[1:].notna().to_numpy().all()
    held = copy.deepcopy(opened.weights(6))
    assert all(torch.equal(held[name], value) for name, value in seen.state_dict().items() if name in held)
    again, _ = train(tmp_path / "hf", [RecorderCallback(tmp_path / "r", **words)], 8, resume=True)
    longer = wb.Trajectory.open(tmp_path / "r").scalars
    assert longer.index.tolist() == list(range(9))
    assert longer["eval_loss"].loc[0] == table["eval_loss"].loc[0], "an evaluation on resuming is none of step 0"
    _adopted(tmp_path / "hf", again, rows)


def _together(rows: list) -> dict:
    """Encodings as one batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _adopted(folder: Path, model: nn.Module, rows: list) -> None:
    """Folders of checkpoints as the trainer leaves them: weights, and the curves that it logged."""
    adopted = wb.Trajectory.adopt(folder / "checkpoint-*")
    assert adopted.steps == (3, 6, 8)
    assert adopted.scalars["loss"].dropna().index.tolist() == [2, 4, 6, 8]
    assert adopted.scalars["eval_loss"].dropna().index.tolist() == [0, 3, 6, 8]
    subject = adopted.using(model, _together(rows[:4]), "cross_entropy").subject(8)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in subject.params.items())
