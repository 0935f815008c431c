"""Effective sparsity of models: what is traced, what is refused, what stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from effective_models import Residual, mlp, random_masks


def test_units_without_input_or_output() -> None:
    """21 edges, as in Figure 1 of the paper: 9 kept, 2 of them cut off."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    first = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    second = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 1]]).bool()
    last = torch.tensor([[0, 1, 1]]).bool()
    masks = {"0.weight": first, "2.weight": second, "4.weight": last}
    # Unit 1 of the first layer has no input: its two edges onwards are cut off.
    assert sum(int(m.sum()) for m in masks.values()) == 9
    found = fp.effective_masks(model, masks, example_input=torch.zeros(1, 3))
    assert found["0.weight"].tolist() == first.tolist()
    assert found["2.weight"].int().tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert found["4.weight"].int().tolist() == [[0, 1, 1]]
    assert fp.effective_compression(model, masks, example_input=torch.zeros(1, 3)) == 21 / 7


def test_batches_names_and_modes_do_not_matter() -> None:
    model, x = mlp()
    model.train()
    state = copy.deepcopy(model.state_dict())
    masks = random_masks(model, 0.1, 1)
    expected = fp.effective_sparsity(model, masks, example_input=x)
    assert fp.effective_sparsity(model, fp.Masks(masks), example_input=x[:1]) == expected
    assert fp.effective_sparsity(model, masks, example_input=torch.zeros(7, 1, 4, 5)) == expected
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    some = {"1.weight": masks["1.weight"]}
    assert 0.8 < fp.effective_sparsity(model, some, example_input=x) < 1


def test_a_changed_model_is_traced_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    masks = random_masks(model, 0.5, 0)
    before = fp.effective_sparsity(model, masks, example_input=torch.zeros(1, 4))
    model[2] = nn.Linear(4, 9)
    masks["2.weight"] = torch.zeros(9, 4, dtype=torch.bool)
    assert fp.effective_sparsity(model, masks, example_input=torch.zeros(1, 4)) == 1.0 > before


def test_residual_blocks_with_normalization() -> None:
    model = nn.Sequential(Residual(2, 4), Residual(4, 4), nn.Flatten(), nn.Linear(4 * 25, 3))
    x = torch.zeros(1, 2, 5, 5)
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    assert fp.effective_sparsity(model, masks, example_input=x) == 0.0
    masks["1.conv2.weight"] = torch.zeros(4, 4, 3, 3, dtype=torch.bool)  # the shortcut stays
    found = fp.effective_masks(model, masks, example_input=x)
    assert not found["1.conv1.weight"].any()
    assert found["0.conv2.weight"].all()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.gate(x)) * self.body(x))


def test_gating_hands_on_what_either_factor_gets() -> None:
    masks = {n: torch.ones_like(p).bool() for n, p in Gated().named_parameters() if p.dim() > 1}
    masks["gate.weight"][:] = False
    assert fp.effective_masks(Gated(), masks, example_input=torch.zeros(1, 4))["body.weight"].all()
    masks["out.weight"][:, 0] = False
    found = fp.effective_masks(Gated(), masks, example_input=torch.zeros(1, 4))
    assert not found["body.weight"][0].any()
    assert found["body.weight"][1:].all()


def test_attention_is_all_to_all_over_tokens() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3))
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    x = torch.zeros(1, 5, 8)
    assert fp.effective_sparsity(model, masks, example_input=x) == 0.0
    # Only token 4 is read: the others still matter to it, through attention alone.
    masks["2.weight"][:, :32] = False
    found = fp.effective_masks(model, masks, example_input=x)
    assert found["0.self_attn.in_proj_weight"].all()
    masks["0.self_attn.out_proj.weight"][:] = False
    found = fp.effective_masks(model, masks, example_input=x)
    assert not found["0.self_attn.in_proj_weight"].any()
    assert found["0.linear1.weight"].all()


def test_embeddings_and_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 6)
            self.a = nn.Linear(6, 4)
            self.b = nn.Linear(3, 4)

        def forward(self, tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(self.words(tokens)), self.b(x)

    model = Two()
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    arguments = (torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 3))
    assert fp.effective_sparsity(model, masks, example_input=arguments) == 0.0
    masks["a.weight"][:, 2] = False
    found = fp.effective_masks(model, masks, example_input=arguments)
    assert not found["words.weight"][:, 2].any()
    assert found["words.weight"][:, [0, 1, 3, 4, 5]].all()


def test_masked_layers_are_seen_through() -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    masks = random_masks(plain, 0.3, 2)
    expected = fp.effective_masks(plain, masks, example_input=torch.zeros(1, 6))
    layers = [fp.nn.MaskedLinear(plain[0], masks["0.weight"]), nn.ReLU()]
    last = fp.nn.MaskedLinear(plain[2], masks["2.weight"], sparse=False)
    found = fp.effective_masks(nn.Sequential(*layers, last), masks, example_input=torch.zeros(1, 6))
    assert found == expected


def test_unknown_operations_are_named_and_can_be_taught() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0e(self.lin(x))

    masks = {"lin.weight": torch.eye(4, dtype=torch.bool)}
    with pytest.raises(
        fp.effective.UnknownOperationError, match=r"aten::special_i0e.*register_rule"
    ):
        fp.effective_sparsity(Odd(), masks, example_input=torch.zeros(1, 4))

    @fp.effective.register_rule("aten::special_i0e")
    def rule(trace: fp.effective.Trace, node: torch.fx.Node, x: object) -> object:
        return trace.elementwise(node, x)

    assert fp.effective_sparsity(Odd(), masks, example_input=torch.zeros(1, 4)) == 0.75


def test_functional_reshapes_between_convolution_and_linear() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.lin = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(F.adaptive_avg_pool2d(F.relu(self.conv(x)), 2).view(1, -1))

    model = Net()
    masks = {"conv.weight": torch.ones(2, 1, 3, 3).bool(), "lin.weight": torch.zeros(2, 8).bool()}
    masks["lin.weight"][0, 4:] = True  # the second channel only
    found = fp.effective_masks(model, masks, example_input=torch.zeros(1, 1, 7, 7))
    assert not found["conv.weight"][0].any()
    assert found["conv.weight"][1].all()


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"nothing": torch.ones(3, 3).bool()}, ValueError, "no parameter of this name"),
        ({"1.weight": torch.ones(3, 3).bool()}, ValueError, "does not match"),
        ({"1.weight": torch.ones(30, 20)}, ValueError, "expected dtype torch.bool"),
        ([1], TypeError, "masks: expected a mapping"),
    ],
)
def test_masks_that_do_not_fit(masks: object, error: type[Exception], message: str) -> None:
    model, x = mlp()
    with pytest.raises(error, match=message):
        fp.effective_sparsity(model, masks, example_input=x)  # type: ignore[arg-type]


def test_bad_models_and_inputs() -> None:
    with pytest.raises(TypeError, match="model: expected"):
        fp.effective_sparsity(3, {}, example_input=torch.zeros(1))  # type: ignore[arg-type]
    model, _ = mlp()
    with pytest.raises(TypeError, match="example_input: expected a tensor"):
        fp.effective_sparsity(model, {}, example_input="x")
    with pytest.raises(ValueError, match=r"torch\.export cannot trace it"):
        fp.effective_sparsity(model, {}, example_input=torch.zeros(1, 3))
    assert fp.effective_sparsity(model, {}, example_input=torch.zeros(1, 1, 4, 5)) == 0.0


def test_parameters_that_depend_on_the_input_are_refused() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Linear(4, 3)
            self.weight = nn.Parameter(torch.ones(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.make(x)[0])

    masks = {"make.weight": torch.ones(3, 4).bool()}
    with pytest.raises(ValueError, match="computed from the input, which reach does not follow"):
        fp.effective_sparsity(Hyper(), masks, example_input=torch.zeros(1, 4))


def test_a_choice_made_by_the_input_is_an_unknown_operation() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Linear(4, 3)
            self.which = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.value(x)[:, self.which(x).argmax(dim=1)]

    masks = {n: torch.ones(3, 4).bool() for n in ("value.weight", "which.weight")}
    model = Picks()
    with pytest.raises(fp.effective.UnknownOperationError, match="aten::argmax"):
        fp.effective_sparsity(model, masks, example_input=torch.zeros(1, 4))
