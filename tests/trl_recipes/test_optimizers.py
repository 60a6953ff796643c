"""Muon and AdamW as one optimizer."""

import copy

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from trl_recipes.optimizers import muon_and_adamw


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "layers": layers, "trunk": nn.Linear(4, 4)})
    return nn.ModuleDict({"tower": model})


def step(model, optimizer) -> None:
    tower = model["tower"]
    hidden = tower["trunk"](tower["embed"](torch.arange(5)))
    for layer in tower["layers"]:
        hidden = layer(hidden)
    hidden.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_matrices_of_layers_go_to_muon_and_the_trunk_is_slow():
    model = network()
    optimizer = muon_and_adamw(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [({names[id(p)] for p in group["params"]}, group["lr"]) for group in optimizer.param_groups]
    rest = {"tower.embed.weight", "tower.layers.0.bias", "tower.layers.1.weight", "tower.layers.1.bias"}
    trunk = {"tower.trunk.weight", "tower.trunk.bias"}
    assert groups == [(rest, 1e-2), (trunk, 1e-3), ({"tower.layers.0.weight"}, 1e-2)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_scheduler_reaches_both_and_a_saved_state_goes_on_exactly():
    model, other = network(), network()
    one, two = (muon_and_adamw(m.named_parameters(), lr=1e-2, weight_decay=0.1) for m in (model, other))
    schedule = LambdaLR(one, lambda count: 1 / (1 + count))
    step(model, one)
    schedule.step()
    assert [group["lr"] for group in one.param_groups] == [5e-3, 5e-4, 5e-3]
    other.load_state_dict(model.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert [group["lr"] for group in two.param_groups] == [5e-3, 5e-4, 5e-3]
    for _ in range(2):
        step(model, one)
        step(other, two)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
