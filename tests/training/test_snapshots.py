"""The start and the average: views of one model that leave it as it was, whatever happens."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flowgrpo_fast.models.adapters import adapters_off, has_adapter
from flowgrpo_fast.training.snapshots import Snapshot, WithoutAdapter, trained_parameters
from flowgrpo_fast.types import FlowModel


class Linear(FlowModel):
    """A model of one frozen and one trained layer."""

    latent_shape = (3,)

    def __init__(self, adapted: bool = False) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        self.module[0].requires_grad_(False)
        if adapted:
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1"]), self.module)
            for parameter in trained_parameters(self.module):
                parameter.data = torch.randn_like(parameter)
        self.fails = False

    def encode(self, prompts, images=()):
        return list(prompts)

    def velocity(self, latents, sigma, conditioning):
        out = self.module(latents)
        if self.fails:
            raise RuntimeError("out of memory")
        return out

    def decode(self, latents):
        return latents + 1


def move(model) -> None:
    for parameter in trained_parameters(model.module):
        parameter.data += 1.0


def test_a_snapshot_holds_the_trained_weights_alone_and_answers_as_the_model_was() -> None:
    model, latents = Linear(), torch.randn(5, 3)
    before = model.velocity(latents, None, None).detach()
    snapshot = Snapshot(model)
    assert [value.shape for value in snapshot.values] == [(3, 4), (3,)]
    move(model)
    pointers = [p.data_ptr() for p in model.module.parameters()]
    after = model.velocity(latents, None, None)
    assert torch.equal(snapshot.velocity(latents, None, None), before)
    assert not snapshot.velocity(latents, None, None).requires_grad
    assert torch.equal(model.velocity(latents, None, None), after)
    assert [p.data_ptr() for p in model.module.parameters()] == pointers
    assert torch.equal(snapshot.decode(latents), latents + 1)
    assert snapshot.encode(["a"]) == ["a"]


@pytest.mark.parametrize("view", [Snapshot, WithoutAdapter])
def test_an_exception_leaves_the_model_as_it_was(view) -> None:
    model, latents = Linear(adapted=True), torch.randn(5, 3)
    other = view(model)
    move(model)
    before = model.velocity(latents, None, None).detach()
    model.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        other.velocity(latents, None, None)
    model.fails = False
    assert torch.equal(model.velocity(latents, None, None), before)
    assert len(trained_parameters(model.module)) == 4


def test_a_backward_through_a_forward_that_the_reference_came_between() -> None:
    """The replay's order: policy, reference, backward. The gradient is that of the policy alone."""
    latents = torch.randn(5, 3)
    gradients = []
    for between in (False, True):
        for view in (Snapshot, WithoutAdapter):
            model = Linear(adapted=True)
            other = view(model)
            move(model)
            out = model.velocity(latents, None, None)
            if between:
                assert not torch.equal(other.velocity(latents, None, None), out)
            out.square().sum().backward()
            gradients.append([p.grad for p in trained_parameters(model.module)])
    for other_gradients in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other_gradients, strict=True))


def test_adapters_off_is_the_base_as_peft_switches_it_off() -> None:
    model, latents = Linear(adapted=True), torch.randn(5, 3)
    assert has_adapter(model.module)
    assert not has_adapter(Linear().module)
    base = nn.functional.linear
    first, second = (layer.get_base_layer() for layer in model.module)
    expected = base(base(latents, first.weight, first.bias), second.weight, second.bias)
    assert torch.equal(WithoutAdapter(model).velocity(latents, None, None), expected)
    with adapters_off(model.module), adapters_off(model.module):
        assert torch.equal(model.module(latents), expected)
        assert all(parameter.requires_grad for parameter in trained_parameters(model.module))
        assert len(trained_parameters(model.module)) == 4
    assert not torch.equal(model.module(latents), expected)


def test_the_average_moves_in_place() -> None:
    model = Linear()
    snapshot = Snapshot(model)
    start = [value.clone() for value in snapshot.values]
    pointers = [value.data_ptr() for value in snapshot.values]
    move(model)
    snapshot.average(0.75)
    for old, new in zip(start, snapshot.values, strict=True):
        torch.testing.assert_close(new, old + 0.25)
    snapshot.load(start)
    assert all(torch.equal(a, b) for a, b in zip(start, snapshot.values, strict=True))
    assert [value.data_ptr() for value in snapshot.values] == pointers
    with pytest.raises(ValueError, match="not those of the trained parameters"):
        snapshot.load(start[:1])
