"""A sigmoid belief network of digits as a Lightning module, trained on one device or on several, in Pyro.

Sixteen bits z explain a picture of 8 × 8 pixels. The loss is an `ELBOModule`, called in `training_step`; Lightning does
the rest: devices, gradients between them, checkpoints. `Reinforce(MovingAverage())` keeps an average in Pyro's
parameter store, which the three hooks below average over devices, put into the checkpoint and take from it. The script
trains on `--devices` processes, saves, goes on from the checkpoint on one, and prints a bound on the log-likelihood of
held-out digits after each.

    python examples/digits_lightning.py --devices 2
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from ppl_estimators import MovingAverage, Reinforce
from ppl_estimators.pyro import EstimatorELBO, with_estimators

BITS, PIXELS = 16, 64


class Program(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = torch.nn.Linear(PIXELS, BITS), torch.nn.Linear(BITS, PIXELS)
        estimators = {"z": Reinforce(MovingAverage())}
        self.elbo = EstimatorELBO()(self.model, with_estimators(self.guide, estimators))

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(BITS)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decode(z)).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encode(x)).to_event(1))

    def training_step(self, batch: Any) -> torch.Tensor:
        return self.elbo(batch[0]) / len(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def on_train_batch_end(self, *_: Any) -> None:
        for name, value in pyro.get_param_store().named_parameters():
            if "$state." in name:
                value.data = self.trainer.strategy.reduce(value.data, reduce_op="mean")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        store = pyro.get_param_store()
        checkpoint["averages"] = {n: v.detach().clone() for n, v in store.named_parameters() if "$state." in n}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["averages"].items():
            pyro.param(name, value)

    def bound(self, x: torch.Tensor) -> float:
        """In nats for each image."""
        with torch.no_grad():
            found = EstimatorELBO().evaluate(self.model, self.guide, x, num_particles=50)
        return float(found.value) / len(x)


def trainer(epochs: int, out: Path, devices: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        default_root_dir=out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1, help="processes of the first training; default: 1")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("example-results"), help="folder for the checkpoint")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*num_workers.*")
    pl.seed_everything(0, verbose=False)
    epochs = 1 if args.smoke else 15

    x = torch.from_numpy(load_digits().data > 7).float()
    train, held_out = x[:1500], x[1500:]
    loader = DataLoader(TensorDataset(train[:200] if args.smoke else train), batch_size=50, shuffle=True)
    program = Program()
    print(f"at the start                                  {program.bound(held_out):8.2f} nats per held-out digit")
    first = trainer(epochs, args.out, args.devices)
    first.fit(program, loader)
    checkpoint = args.out / "digits_lightning.ckpt"
    first.save_checkpoint(checkpoint)
    print(f"after {epochs:2} epochs on {args.devices} device{'s' if args.devices > 1 else ' '}                 "
          f"   {program.bound(held_out):8.2f}")  # fmt: skip

    pyro.clear_param_store()
    program = Program()
    trainer(2 * epochs, args.out).fit(program, loader, ckpt_path=checkpoint, weights_only=False)
    averages = [n for n in pyro.get_param_store().keys() if "$state." in n]
    print(f"after as many more on one, from its checkpoint {program.bound(held_out):7.2f}; kept: {', '.join(averages)}")


if __name__ == "__main__":
    main()
