"""Run by `test_several_devices.py`: an `ELBOModule` under `DistributedDataParallel`, one process of two."""

from __future__ import annotations

import json
import pickle
import sys
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from ppl_estimators import RELAX, Enumerate, MovingAverage, Reinforce
from ppl_estimators.pyro import EstimatorELBO, with_estimators

SIZE = 8


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean = torch.nn.Linear(3, 1), torch.nn.Parameter(torch.tensor([0.5, -0.3, 0.2]))

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z[:, None] * self.mean, 1.0).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)[:, 0]))


class Loss(torch.nn.Module):
    """Holds the parameters for torch, which `ELBOModule` does not see behind methods."""

    def __init__(self, spec: Any, compile: bool) -> None:
        super().__init__()
        self.net = Net()
        self.guide = with_estimators(self.net.guide, {"z": spec})
        self.loss = EstimatorELBO(compile=compile, verify=False, average_model=isinstance(spec, Enumerate))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss.differentiable_loss(self.net.model, self.guide, x)


def trained(spec: Any, compile: bool, x: torch.Tensor, several: bool) -> dict[str, Any]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    loss = Loss(spec, compile)
    step: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(loss) if several else loss
    optim = torch.optim.SGD(loss.parameters(), lr=0.01)
    for _ in range(5):
        optim.zero_grad()
        step(x).backward()
        optim.step()
        for name, value in pyro.get_param_store().named_parameters():
            if "$state." in name and several:  # averages of what each process saw
                torch.distributed.all_reduce(value.data)
                value.data /= torch.distributed.get_world_size()
    state = {n: v.tolist() for n, v in pyro.get_param_store().named_parameters() if "$state." in n}
    gradient = torch.cat([p.grad.reshape(-1) for p in loss.net.parameters()]).tolist()
    return {"gradient": gradient, "state": state}


def kept(compile: bool, x: torch.Tensor, rank: int) -> dict[str, Any]:
    """Networks and temperatures, which begin differently in each process; a checkpoint goes on in one."""
    pyro.clear_param_store()
    torch.manual_seed(rank)
    loss = Loss(RELAX(), compile)
    loss(x)  # makes them
    step, optim = torch.nn.parallel.DistributedDataParallel(loss), torch.optim.SGD(loss.parameters(), lr=0.01)
    for _ in range(5):
        optim.zero_grad()
        step(x).backward()
        optim.step()
    found = {n: p.tolist() for n, p in pyro.get_param_store().named_parameters() if "$state." not in n}
    saved = pickle.dumps((loss.state_dict(), pyro.get_param_store().get_state()))
    torch.manual_seed(5)
    goes_on = loss(x).item()
    pyro.clear_param_store()
    alone = Loss(RELAX(), compile)
    alone(x)
    modules, store = pickle.loads(saved)
    pyro.get_param_store().set_state(store)
    alone.load_state_dict(modules)
    torch.manual_seed(5)
    return {"kept": found, "goes on": [goes_on, alone(x).item()]}


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(1))
    found = {}
    for compile in (False, True):
        exact = Enumerate()  # so that what each process draws does not matter
        found[f"exact {compile}"] = trained(exact, compile, x.chunk(2)[rank], True)
        found[f"whole {compile}"] = trained(exact, compile, x, False)
        found[f"state {compile}"] = trained(Reinforce(MovingAverage()), compile, x.chunk(2)[rank], True)
        found[f"kept {compile}"] = kept(compile, x.chunk(2)[rank], rank)
    torch.distributed.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
