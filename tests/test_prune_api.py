"""``prune`` and ``score``: arguments, data, selection of weights, and what must not change."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

from fastprune.pruners import FORCE, GraSP, Network, Pruner, Scores, methods, prunable, prune, score
from fastprune.pruners.targets import PRUNABLE_TYPES

quiet = pytest.mark.filterwarnings("ignore:.*pruned every weight")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Flatten(),
        nn.Linear(4 * 4, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def batch(size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 4, 4, generator=g), torch.randint(0, 3, (size,), generator=g)


TASK = {"data": [batch()], "loss": F.cross_entropy}


# -- what must not change ------------------------------------------------------------------------


class Snapshot:
    """Everything about a model and torch's random state that scoring must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
        self.grads = {n: (p.grad, self._copy(p.grad)) for n, p in model.named_parameters()}
        self.flags = {n: (p.requires_grad, id(p)) for n, p in model.named_parameters()}
        self.modes = [m.training for m in model.modules()]
        self.hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        self.random = torch.get_rng_state()

    @staticmethod
    def _copy(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.clone()

    def check(self) -> None:
        model = self.model
        now = model.state_dict(keep_vars=True)
        assert list(now) == list(self.state)
        for n, (tensor, bits) in self.state.items():
            assert now[n] is tensor
            a, b = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (tensor, bits))
            assert torch.equal(a, b), n
        for n, p in model.named_parameters():
            grad, bits = self.grads[n]
            assert p.grad is grad, n
            assert grad is None or torch.equal(grad, bits)
        assert self.flags == {n: (p.requires_grad, id(p)) for n, p in model.named_parameters()}
        assert self.modes == [m.training for m in model.modules()]
        assert self.hooks == [
            (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ]
        assert torch.equal(self.random, torch.get_rng_state())


def unusual() -> nn.Sequential:
    """A model in a state that is easy to disturb."""
    model = network()
    model.train()
    model[1].eval()
    model[7].weight.requires_grad_(False)
    model[5].weight.grad = torch.randn(5, 16)
    model[0].register_forward_hook(lambda m, i, o: o * 1.5)
    model[5].register_forward_pre_hook(lambda m, i: None)
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[5].bias[0] = -0.0
    return model


@quiet
@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("call", [prune, score])
def test_model_and_random_state_are_left_alone(method, call):
    model = unusual()
    model[1].train()
    torch.rand(3)
    before = Snapshot(model)
    arguments = {"sparsity": 0.8, "steps": 3} if call is prune else {}
    loader = DataLoader(TensorDataset(*batch(10)), batch_size=4, shuffle=True)
    first = call(model, method, data=loader, loss=F.cross_entropy, **arguments)
    before.check()
    again = call(model, method, data=loader, loss=F.cross_entropy, **arguments)
    assert all(torch.equal(first[n], again[n]) for n in first)
    if call is prune and method not in ("random", "magnitude"):
        assert len(first) == 3


class Boom(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), Boom()])
@pytest.mark.parametrize(
    ("method", "place"),
    [
        *itertools.product(["snip", "grasp", "force"], ["loss", "forward", "progress", "data"]),
        *itertools.product(["synflow"], ["forward", "progress"]),
        ("magnitude", "progress"),
    ],
)
def test_model_is_left_alone_when_something_raises(method, place, error):
    model = unusual()
    calls = itertools.count()

    def fail(*_: object) -> None:
        if next(calls) >= 1:
            raise error

    def loss(output: Tensor, y: Tensor) -> Tensor:
        if place == "loss":
            fail()
        return F.cross_entropy(output, y)

    def data():
        for seed in range(6):
            if place == "data":
                fail()
            yield batch(seed=seed)

    if place == "forward":
        model[7].register_forward_pre_hook(fail)
    before = Snapshot(model)
    arguments = (
        {"example_input": batch()[0]}
        if method == "synflow"
        else {}
        if method == "magnitude"
        else {"data": data(), "loss": loss}
    )
    with pytest.raises(type(error)):
        prune(
            model, method, 0.5, steps=4, progress=fail if place == "progress" else None, **arguments
        )
    before.check()


def test_scores_respect_the_mode_of_the_model():
    model = network()
    model[3] = nn.Identity()
    with torch.no_grad():
        model[1].running_var.fill_(4.0)
    train = score(model.train(), "snip", **TASK)["0.weight"]
    evaluation = score(model.eval(), "snip", **TASK)["0.weight"]
    assert not torch.allclose(train, evaluation)
    assert torch.equal(
        score(model.train(), "synflow", example_input=batch()[0])["0.weight"],
        score(model.eval(), "synflow", example_input=batch()[0])["0.weight"],
    )


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", methods())
def test_callers_without_gradients(method, context):
    model = network().eval()
    expected = score(model, method, **TASK)
    with context():
        inside = [batch()]
        got = score(model, method, data=inside, loss=F.cross_entropy)
        masks = prune(model, method, 0.5, steps=2, data=inside, loss=F.cross_entropy)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    assert not any(m.is_inference() for m in masks.values())


def test_frozen_weights_are_scored_and_the_model_may_modify_its_weights():
    class Clamping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-0.01, 0.01)
            return super().forward(x)

    model = nn.Sequential(nn.Flatten(), Clamping(16, 3)).requires_grad_(False)
    before = Snapshot(model)
    assert score(model, "snip", **TASK)["1.weight"].any()
    before.check()


# -- which weights -------------------------------------------------------------------------------


def test_prunable_by_default():
    model = nn.ModuleDict(
        {
            "z": nn.Linear(2, 2),
            "a": nn.ModuleList([k(2, 2, 1) for k in PRUNABLE_TYPES[1:]]),
            "norm": nn.LayerNorm(2),
            "table": nn.Embedding(3, 2),
            "rnn": nn.LSTM(2, 2),
            "attention": nn.MultiheadAttention(2, 1),
        }
    )
    assert list(prunable(model)) == [
        "z.weight",
        *(f"a.{i}.weight" for i in range(6)),
        "attention.out_proj.weight",
    ]
    assert prunable(model)["z.weight"] is model["z"].weight


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ("5", None, "5"),
        ("5.weight", None, "5"),
        (["7", nn.Conv2d], None, "07"),
        (None, "7", "05"),
        (None, ["0.weight", "7.bias"], "57"),
        (nn.Linear, "7", "5"),
        ("*", [nn.Linear, nn.BatchNorm2d], "0"),
        ("[57]", None, "57"),
        ("*.weight", "0*", "57"),
        (nn.Sequential, None, "057"),
        (None, (), "057"),
    ],
)
def test_include_and_exclude(include, exclude, names):
    model = network()
    wanted = [f"{n}.weight" for n in names]
    assert list(prunable(model, include, exclude)) == wanted
    masks = prune(model, "magnitude", 0.5, include=include, exclude=exclude)
    assert list(masks) == wanted
    assert masks.nnz() == math.floor(0.5 * masks.numel() + 0.5)
    assert list(score(model, "magnitude", include=include, exclude=exclude)) == wanted


def test_containers_and_own_parameters_can_be_named():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            self.matrix = nn.Parameter(torch.randn(3, 2))
            self.table = nn.Embedding(3, 2)

    model = Own()
    assert list(prunable(model)) == ["block.0.weight", "block.1.weight"]
    assert list(prunable(model, include="block")) == ["block.0.weight", "block.1.weight"]
    assert list(prunable(model, exclude="block.0")) == ["block.1.weight"]
    assert list(prunable(model, include=["matrix", "block.1", "table.weight"])) == [
        "matrix",
        "block.1.weight",
        "table.weight",
    ]


@pytest.mark.parametrize(
    ("include", "exclude", "error", "text"),
    [
        ("nowhere", None, ValueError, "include: 'nowhere' matches nothing"),
        (["5", "no*"], None, ValueError, r"include: 'no\*' matches nothing"),
        (nn.Conv1d, None, ValueError, "include: Conv1d matches nothing"),
        ("1", None, ValueError, "include: '1' matches no linear or convolution"),
        (nn.BatchNorm2d, None, ValueError, "include: BatchNorm2d matches no linear"),
        ("1.weight", None, ValueError, "'1.weight'.*normalization"),
        ("5.bias", None, ValueError, "'5.bias'.*bias"),
        ("rnn.weight_hh_l0", None, ValueError, "rnn.weight_hh_l0.*LSTM"),
        ("attention.in_proj_weight", None, ValueError, "in_proj_weight.*MultiheadAttention"),
        ([], None, ValueError, "include.*empty"),
        (None, "nowhere", ValueError, "exclude: 'nowhere' matches nothing"),
        (None, nn.Conv3d, ValueError, "exclude: Conv3d matches nothing"),
        (None, "*", ValueError, "no prunable weights"),
        (3, None, TypeError, "include"),
        ([3], None, TypeError, "include.*3"),
        (None, nn.Linear(2, 2), TypeError, "exclude"),
        (None, [int], TypeError, "exclude.*int"),
    ],
)
def test_selection_errors(include, exclude, error, text):
    model = network()
    model.add_module("rnn", nn.LSTM(2, 2))
    model.add_module("attention", nn.MultiheadAttention(4, 2))
    with pytest.raises(error, match=text):
        prune(model, "magnitude", 0.5, include=include, exclude=exclude)


def test_shared_weights_appear_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.mix = nn.Linear(4, 4)
            self.again = self.mix
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(torch.tanh(self.mix(self.table(x)))))

    torch.manual_seed(0)
    model = Tied()
    task = {"data": [(torch.tensor([1, 2, 6]), torch.tensor([0, 3, 5]))], "loss": F.cross_entropy}
    assert list(prunable(model)) == ["table.weight", "mix.weight"]
    assert list(prunable(model, exclude="head")) == ["mix.weight"]
    assert list(prunable(model, exclude="again")) == ["table.weight"]
    assert list(prunable(model, include="again")) == ["mix.weight"]
    masks = prune(model, "snip", 0.5, **task)
    assert masks.numel() == 28 + 16
    got = score(model, "iter-snip", masks=masks, **task)
    masks.apply_(model)
    F.cross_entropy(model(task["data"][0][0]), task["data"][0][1]).backward()
    for name, p in model.named_parameters():
        if name in got:  # both uses are pruned, and both count in the gradient
            assert torch.equal(got[name], (p.detach() * p.grad).abs())
    alias = {"head.weight": masks["table.weight"]}
    a = score(model, "force", masks=alias, **task)
    b = score(model, "force", masks={"table.weight": masks["table.weight"]}, **task)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_unusable_layers_are_named():
    model = network()
    parametrizations.weight_norm(model[5])
    with pytest.raises(ValueError, match=r"5\.weight.*parametriz"):
        prune(model, "magnitude", 0.5)
    assert list(prune(model, "magnitude", 0.5, exclude="5")) == ["0.weight", "7.weight"]
    model = network()
    torch_prune.random_unstructured(model[7], "weight", 0.5)
    with pytest.raises(ValueError, match=r"7\.weight.*weight_orig"):
        prune(model, "magnitude", 0.5)
    with pytest.raises(ValueError, match=r"1\.weight.*not initialized"):
        prune(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), "magnitude", 0.5)
    with pytest.raises(ValueError, match=r"1\.weight.*not initialized"):
        prune(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d()), "magnitude", 0.5)
    with pytest.raises(ValueError, match=r"0\.weight.*meta"):
        prune(nn.Sequential(nn.Linear(2, 2, device="meta")), "magnitude", 0.5)
    with pytest.raises(ValueError, match=r"0\.weight.*complex64"):
        prune(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)), "magnitude", 0.5)
    for scope in ("neuron", "filter"):
        with pytest.raises(ValueError, match=r"0\.weight.*transposed"):
            prune(nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), "magnitude", 0.5, scope=scope)
    with pytest.raises(ValueError, match="no prunable weights"):
        prune(nn.Sequential(nn.ReLU()), "magnitude", 0.5)
    with pytest.raises(TypeError, match="model"):
        prune("model", "magnitude", 0.5)


@quiet
@pytest.mark.parametrize("method", methods())
def test_attention_and_recurrent_models(method):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 4, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.rnn(x[:, 0])[0]).mean(1))

    model = Mixed().eval()
    before = Snapshot(model)
    masks = prune(model, method, 0.5, steps=2, **TASK)
    assert list(masks) == [
        "encoder.self_attn.out_proj.weight",
        "encoder.linear1.weight",
        "encoder.linear2.weight",
        "head.weight",
    ]
    before.check()


# -- data ----------------------------------------------------------------------------------------


def test_every_form_of_data_gives_the_same_scores():
    model = network().eval()
    x, y = batch(8)
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    forms = {
        "list": halves,
        "tuple": tuple(halves),
        "lists": [list(h) for h in halves],
        "loader": loader,
        "iterator": iter(halves),
        "generator": (h for h in halves),
    }
    expected = score(model, "snip", data=halves, loss=F.cross_entropy)
    for name, form in forms.items():
        got = score(model, "snip", data=form, loss=F.cross_entropy)
        assert all(torch.equal(got[n], expected[n]) for n in expected), name
    one = score(model, "snip", data=[(x, y)], loss=F.cross_entropy)
    for form in ((x, y), [x, y], iter([(x, y)])):
        got = score(model, "snip", data=form, loss=F.cross_entropy)
        assert all(torch.equal(got[n], one[n]) for n in one)


@quiet
def test_batches_per_step():
    model = network().eval()
    batches = [batch(seed=s) for s in range(3)]
    common = {"sparsity": 0.7, "loss": F.cross_entropy, "steps": 4}
    seen: list[int] = []

    class Counting:
        def __iter__(self):
            for i, b in enumerate(batches):
                seen.append(i)
                yield b

    two = prune(model, "grasp-it", data=Counting(), batches_per_step=2, **common)
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]
    seen.clear()
    prune(model, "grasp-it", data=Counting(), **common)
    assert seen == [0, 1, 2] * 4
    endless = itertools.cycle(batches)
    assert prune(model, "grasp-it", data=endless, batches_per_step=2, **common) == two
    with pytest.raises(ValueError, match="ran out of batches"):
        prune(model, "grasp-it", data=iter(batches), batches_per_step=2, **common)


def test_models_with_several_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(4, 3)

        def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
            return {"logits": self.a(first) + self.b(second)}

    model = Two()
    first, second, y = torch.randn(5, 2), torch.randn(5, 4), torch.randint(0, 3, (5,))

    def loss(output: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(output["logits"], y)

    expected = score(model, "snip", data=[((first, second), y)], loss=loss)
    for x in ([first, second], {"second": second, "first": first}):
        got = score(model, "snip", data=[(x, y)], loss=loss)
        assert all(torch.equal(got[n], expected[n]) for n in expected)
    flow = score(model, "synflow", example_input={"first": first, "second": second})
    assert torch.equal(flow["b.weight"], model.b.weight.detach().double().abs())
    with pytest.raises(ValueError, match=r"temperature.*dict"):
        score(model, "grasp", data=[((first, second), y)], loss=loss)
    score(model, "grasp", data=[((first, second), y)], loss=loss, temperature=1)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (3, TypeError, "data: .*int"),
        (torch.ones(3, 2), TypeError, "data: .*Tensor"),
        ("text", TypeError, "data: .*str"),
        ({"x": 1}, TypeError, "data: .*dict"),
        (TensorDataset(*batch()), TypeError, "DataLoader"),
        ([], ValueError, "data: no batches"),
        (iter(()), ValueError, "data: no batches"),
        ([batch()[0]], ValueError, "batch 0 must be a pair.*Tensor"),
        ([batch(), (*batch(), 3)], ValueError, "batch 1 must be a pair.*3 entries"),
        ([(batch()[0][:0], batch()[1][:0])], ValueError, "empty"),
        ([(torch.tensor(3.0), 2)], ValueError, "batch dimension"),
        ([(3, 2)], ValueError, "batch dimension"),
    ],
)
def test_data_errors(data, error, text):
    with pytest.raises(error, match=text):
        prune(network(), "snip", 0.5, data=data, loss=F.cross_entropy)


# -- arguments -----------------------------------------------------------------------------------


def test_names_are_forgiving_and_one_call_serves_every_method():
    model = network().eval()
    for method in ("SNIP", "iter_snip", "IterSNIP", "iter-snip", "GraSP-It", "Syn_Flow"):
        assert prune(model, method, 0.5, steps=1, **TASK).nnz() > 0
    with pytest.raises(ValueError, match=r"'wanda'.*random, magnitude, snip, grasp, synflow"):
        prune(model, "wanda", 0.5)
    for method in (3, None, int, nn.Linear):
        with pytest.raises(TypeError, match="method"):
            prune(model, method, 0.5)


@pytest.mark.parametrize(
    "sparsity", [-0.1, 1.1, float("nan"), float("inf"), True, False, "0.5", torch.tensor(0.5)]
)
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        prune(network(), "magnitude", sparsity)


@pytest.mark.parametrize(
    ("method", "arguments", "error", "text"),
    [
        ("magnitude", {"sparsity": None}, ValueError, "sparsity: it is required"),
        ("magnitude", {"steps": 0}, ValueError, "steps"),
        ("magnitude", {"steps": 2.0}, ValueError, "steps"),
        ("magnitude", {"schedule": "square"}, ValueError, "schedule"),
        ("magnitude", {"schedule": [100, 50]}, ValueError, "schedule: the last"),
        ("magnitude", {"schedule": [50, 100], "sparsity": None}, ValueError, r"schedule\[1\]"),
        ("magnitude", {"schedule": [10], "steps": 2}, ValueError, "steps=2"),
        ("magnitude", {"schedule": [10], "scope": "layer"}, ValueError, "one sequence of 3"),
        ("magnitude", {"scope": "row"}, ValueError, "scope.*global, layer"),
        ("grasp", {"scope": "filter", **TASK}, ValueError, "scope.*signed"),
        ("magnitude", {"dtype": torch.bfloat16}, ValueError, "dtype"),
        ("magnitude", {"dtype": torch.int64}, ValueError, "dtype"),
        ("magnitude", {"progress": 3}, TypeError, "progress"),
        ("snip", {"loss": F.cross_entropy}, ValueError, "data: the method snip needs it"),
        ("snip", {"data": [batch()]}, ValueError, "loss: the method snip needs it"),
        ("snip", {"data": [batch()], "loss": "ce"}, TypeError, "loss"),
        ("synflow", {}, ValueError, "example_input: synflow needs it"),
        ("synflow", {"example_input": (1, 28, 28)}, ValueError, "example_input"),
        ("snip", {"batches_per_step": 0, **TASK}, ValueError, "batches_per_step"),
        ("snip", {"batches_per_step": True, **TASK}, ValueError, "batches_per_step"),
        ("synflow", {"batches_per_step": 1, **TASK}, ValueError, "batches_per_step.*not use"),
        ("snip", {"temperature": 200.0, **TASK}, ValueError, "temperature.*snip does not use"),
        ("snip", {"revive": True, **TASK}, ValueError, "revive.*snip does not use"),
        ("iter-snip", {"revive": False, **TASK}, ValueError, "revive.*iter-snip does not"),
        ("snip", {"example_input": batch()[0], **TASK}, ValueError, "example_input.*not use"),
        ("magnitude", {"generator": torch.Generator()}, ValueError, "generator.*not use"),
        ("random", {"generator": 3}, TypeError, "generator"),
        ("force", {"revive": 1, **TASK}, TypeError, "revive"),
        ("grasp", {"temperature": 0, **TASK}, ValueError, "temperature"),
        ("grasp", {"temperature": float("nan"), **TASK}, ValueError, "temperature"),
        (GraSP(3.0), {"temperature": 3.0, **TASK}, ValueError, "temperature.*instance"),
    ],
)
def test_argument_errors(method, arguments, error, text):
    model = network()
    before = Snapshot(model)
    with pytest.raises(error, match=text):
        prune(model, method, **{"sparsity": 0.5, **arguments})
    before.check()


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (lambda o, y: o.sum() * float("nan"), ValueError, "loss: it is nan on batch 0"),
        (lambda o, y: o.sum() / 0, ValueError, "loss: it is -?inf on batch 0"),
        (lambda o, y: o, ValueError, r"loss: expected a scalar tensor, got \(6, 3\)"),
        (lambda o, y: 3.0, ValueError, "loss: expected a scalar tensor, got float"),
        (lambda o, y: torch.tensor(1.0), ValueError, "does not depend"),
    ],
)
def test_bad_losses(loss, error, text):
    with pytest.raises(error, match=text):
        prune(network(), "snip", 0.5, data=[batch()], loss=loss)


@pytest.mark.parametrize("method", ["magnitude", "synflow", "snip"])
def test_a_nan_weight_is_an_error_that_names_it(method):
    model = network().eval()
    with torch.no_grad():
        model[5].weight[2, 3] = float("nan")
    arguments = {"magnitude": {}, "synflow": {"example_input": batch()[0]}, "snip": TASK}[method]
    with pytest.raises(ValueError, match=r"5\.weight"):
        prune(model, method, 0.5, **arguments)


@pytest.mark.parametrize("method", ["snip", "force", "iter-snip", "grasp-it"])
def test_a_nan_gradient_is_an_error_that_names_the_layer(method):
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output * 0).square().sum().sqrt()  # 0, with a gradient of 0 / 0

    with pytest.raises(ValueError, match=r"0\.weight"):
        prune(network(), method, 0.5, data=[batch()], loss=loss)


def test_nan_under_a_mask_does_not_matter():
    model = network().eval()
    masks = prune(model, "magnitude", 0.5)
    clean = score(model, "iter-snip", masks=masks, **TASK)
    place = tuple((~masks["5.weight"]).nonzero()[0])
    with torch.no_grad():
        model[5].weight[place] = float("nan")
    got = score(model, "iter-snip", masks=masks, **TASK)
    assert all(torch.equal(got[n], clean[n]) for n in got)


def test_layers_that_are_emptied_are_named():
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"^magnitude pruned every weight of: 0\.weight$") as seen:
        prune(model, "magnitude", 0.5, steps=4)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match=r"0\.weight, 5\.weight, 7\.weight"):
        prune(model, "magnitude", 1.0)


def test_explicit_schedules():
    model = network().eval()
    assert prune(model, "force", schedule=[90, 60, 70], **TASK).nnz() == 70
    assert prune(model, "snip", 0.5, schedule=[100, 66], **TASK).nnz() == 66
    layers = prune(model, "snip", schedule=[(30, 60, 15), (9, 40, 3)], scope="layer", **TASK)
    assert [int(m.sum()) for m in layers.values()] == [9, 40, 3]
    rows = prune(model, "snip", schedule=[(9, 8, 5), (1, 4, 2)], scope="neuron", **TASK)
    assert all((rows[f"{n}.weight"].flatten(1).sum(1) == k).all() for n, k in ((0, 1), (5, 4)))


def test_progress():
    seen: list[tuple[int, int]] = []
    prune(network(), "magnitude", 0.5, steps=3, progress=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    prune(network(), "synflow", 0.5, example_input=batch()[0], progress=lambda *a: seen.append(a))
    assert seen[-1] == (100, 100)


def test_masks_given_to_score_are_checked():
    model = network()
    for masks, error, text in (
        ({"nowhere": torch.ones(2).bool()}, ValueError, "nowhere"),
        ({"5.weight": torch.ones(2).bool()}, ValueError, r"5\.weight.*shape"),
        ({"5.weight": torch.ones(5, 16)}, ValueError, r"5\.weight.*bool"),
        (3, TypeError, "masks"),
    ):
        with pytest.raises(error, match=text):
            score(model, "magnitude", masks=masks)


# -- methods of one's own ------------------------------------------------------------------------


class Smallest(Pruner):
    name = "smallest"

    def score(self, network: Network) -> dict[str, Tensor]:
        return {name: -w.abs() for name, w in network.weights().items()}


def test_a_subclass_only_scores():
    model = network()
    for method in (Smallest, Smallest()):
        masks = prune(model, method, 0.25, steps=3, schedule="linear")
        sizes = torch.cat([p.detach().abs().flatten() for p in prunable(model).values()])
        kept = torch.cat([m.flatten() for m in masks.values()])
        assert sizes[kept].max() <= sizes[~kept].min()
    with pytest.raises(ValueError, match="revive: the method smallest does not use it"):
        prune(model, Smallest, 0.5, revive=True)
    instance = prune(network().eval(), FORCE(revive=False), 0.5, steps=4, **TASK)
    assert instance == prune(network().eval(), "force", 0.5, steps=4, revive=False, **TASK)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({}, "one tensor for each"),
        (Scores({"other": torch.ones(2)}), "one tensor for each"),
        (
            {
                "0.weight": torch.ones(4),
                "5.weight": torch.ones(5, 16),
                "7.weight": torch.ones(3, 5),
            },
            r"'0\.weight' has shape \(4,\)",
        ),
    ],
)
def test_a_subclass_with_wrong_scores(result, text):
    class Wrong(Pruner):
        def score(self, network: Network):
            return result

    with pytest.raises(ValueError, match=text):
        prune(network(), Wrong, 0.5)


def test_a_pruner_without_score_cannot_be_made():
    class Nothing(Pruner):
        pass

    with pytest.raises(TypeError, match="score"):
        prune(network(), Nothing, 0.5)


def test_float32_and_float64_layers_compete_in_float64():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())
    masks = prune(model, "magnitude", 0.5)
    flat = torch.cat([p.detach().double().abs().flatten() for p in prunable(model).values()])
    kept = torch.cat([m.flatten() for m in masks.values()])
    assert kept.sum() == 9
    assert flat[kept].min() >= flat[~kept].max()


def test_a_compiled_model_keeps_its_own_names():
    model = network().eval()
    compiled = torch.compile(model, backend="eager")
    masks = prune(compiled, "snip", 0.5, **TASK)
    assert list(masks) == [n for n, _ in compiled.named_parameters() if n in masks]
    plain = prune(model, "snip", 0.5, **TASK)
    assert all(torch.equal(masks[f"_orig_mod.{n}"], plain[n]) for n in plain)
