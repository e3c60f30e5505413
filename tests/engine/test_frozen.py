"""A frozen network: the same numbers and gradients, and nothing of its weights in what autograd saves."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from laws import relative_error, seeded
from torch import nn

from modular_concepts.adapters.attach import attached
from modular_concepts.adapters.low_rank import block_rows, new_block, new_full, new_lora
from modular_concepts.training.frozen import frozen_forward, own_weights


class Net(nn.Module):
    """One layer of each kind, with an addition in place behind the norm as the host's text model does it."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.words = nn.Embedding(11, 8, dtype=dtype)
        self.first, self.second = nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 8, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)
        self.bare = nn.LayerNorm(8, elementwise_affine=False)
        self.groups = nn.GroupNorm(2, 4, dtype=dtype)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, dtype=dtype)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False, dtype=dtype)
        _drawn(self)

    def forward(self, x, ids):
        x = x + self.words(ids)
        x += self.second(torch.relu(self.first(self.norm(x))))
        x = self.bare(x)
        return self.down(torch.relu(self.conv(self.groups(x.unflatten(1, (4, -1))))))


def _drawn(net):
    """Weights that are the same each time."""
    generator = seeded(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def _input(dtype=torch.float32):
    return torch.randn(2, 20, 8, generator=seeded(1)).to(dtype).requires_grad_(), torch.arange(40).view(2, 20) % 11


def _plain(net, x, ids):
    """The same function without the addition in place, which plain autograd refuses."""
    x = x + net.words(ids)
    x = net.bare(x + net.second(torch.relu(net.first(net.norm(x)))))
    return net.down(torch.relu(net.conv(net.groups(x.unflatten(1, (4, -1))))))


def test_outputs_and_gradients_are_those_of_plain_autograd():
    net = Net()
    x, ids = _input()
    expected = _plain(net, x, ids)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    with frozen_forward([net]):
        found = net(x, ids)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.equal(found, expected) and slope.norm() > 1
    assert relative_error(gradient, slope) < 1e-6


def test_gradients_pass_gradcheck_in_double_precision():
    net = Net(torch.float64)
    x, ids = (
        torch.randn(1, 20, 8, generator=seeded(5), dtype=torch.float64).requires_grad_(),
        torch.arange(20)[None] % 11,
    )
    with frozen_forward([net]):
        assert torch.autograd.gradcheck(lambda x: net(x, ids), (x,))


def test_autograd_saves_no_weight_and_gives_none_a_gradient():
    net, saved = Net(), []
    x, ids = _input()

    def look(tensor):
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with frozen_forward([net]), torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        net(x, ids).sum().backward()
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    assert saved and not weights & set(saved)
    assert x.grad is not None and all(parameter.grad is None for parameter in net.parameters())


def test_inference_tensors_can_be_trained_on():
    """The host loads its weights within inference mode; plain autograd cannot save them."""
    with torch.inference_mode():
        net = Net().requires_grad_(False)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    x, ids = _input()
    with pytest.raises(RuntimeError, match="[Ii]nference tensor"):
        _plain(net, x, ids)
    with frozen_forward([net]):
        net(x, ids).square().sum().backward()
    assert x.grad.norm() > 1
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())


def test_adapters_attach_to_frozen_layers_and_learn():
    with torch.inference_mode():
        net = Net().requires_grad_(False)
    x, ids = _input()
    adapter = new_lora(8, 8, 2, None, seeded(2))
    adapter = adapter.replace(lora_up=nn.Parameter(torch.randn(8, 2, generator=seeded(4))))
    with torch.no_grad():
        bare = net(x.detach().clone(), ids)
    with frozen_forward([net]), attached({"first": net.first}, {"first": adapter}):
        found = net(x, ids)
        found.sum().backward()
    assert relative_error(found, bare) > 1e-2 and adapter.lora_up.grad.norm() > 0


def test_the_weight_is_asked_for_at_each_pass_and_let_go():
    net, asked, held = Net(), [], set()

    class Weights:
        def __init__(self, module, like):
            self.module, self.like = module, like

        def __enter__(self):
            asked.append(self.module)
            held.add(self.module)
            return own_weights(self.module, self.like).__enter__()

        def __exit__(self, *_):
            held.discard(self.module)

    x, ids = _input()
    with frozen_forward([net], Weights):
        out = net(x, ids)
        assert asked.count(net.first) == 1 and not held
        out.sum().backward()
    assert asked.count(net.first) == asked.count(net.conv) == 2 and not held


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_serve_a_float32_training(dtype):
    net = Net().to(dtype)
    x, ids = _input()
    with frozen_forward([net]):
        found = net(x, ids)
        found.sum().backward()
    wide = net.float()
    (expected,) = torch.autograd.grad(_plain(wide, x, ids).sum(), x)
    assert found.dtype == torch.float32 and relative_error(x.grad, expected) < 1e-5


def test_autocast_computes_in_bfloat16():
    net = Net()
    x, ids = _input()
    with frozen_forward([net]), torch.autocast("cpu", torch.bfloat16):
        found = net(x, ids)
    found.float().square().sum().backward()
    reference, _ = _input()
    (expected,) = torch.autograd.grad(_plain(net, reference, ids).square().sum(), reference)
    assert found.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert 1e-4 < relative_error(x.grad, expected) < 0.1


def test_autocast_asks_for_weights_as_they_are_computed_in():
    """A half precision weight is cast once, not to float32 on the way."""
    net, asked = Net().half(), {}

    def weights(module, like):
        asked.setdefault(module, []).append(like.dtype)
        return own_weights(module, like)

    x, ids = _input()
    with frozen_forward([net], weights), torch.autocast("cpu", torch.bfloat16):
        found = net(x, ids)
    found.float().sum().backward()
    assert asked[net.first] == asked[net.second] == asked[net.conv] == asked[net.down] == [torch.bfloat16] * 2
    x, ids = _input()
    with torch.autocast("cpu", torch.bfloat16):
        expected = _plain(net.float(), x, ids)
    assert relative_error(found, expected) < 2e-2


def test_forwards_come_back_also_after_an_exception_and_others_replacements_stay():
    net, x_ids = Net(), _input()
    net.second.forward = own = lambda x: x
    with pytest.raises(ZeroDivisionError), frozen_forward([net, net.first]):
        assert "forward" in vars(net.first)
        raise ZeroDivisionError
    assert [name for name, part in net.named_modules() if "forward" in vars(part)] == ["second"]
    assert net.second.forward is own and net(*x_ids).isfinite().all()


def _trained(adapter):
    factors = {"lora_up": adapter.lora_up, "lora_down": adapter.lora_down}
    made = {name: torch.randn(factor.shape, generator=seeded(6)).double() for name, factor in factors.items()}
    made = {name: made[name] if name in adapter.trainable() else factors[name].double() for name in made}
    return adapter.replace(**{n: nn.Parameter(v) if n in adapter.trainable() else v for n, v in made.items()})


ADAPTERS = {
    "lora": lambda: new_lora(10, 8, 3, 6.0, seeded(2)),
    "frozen lora_down": lambda: new_lora(10, 8, 3, 6.0, seeded(2)).replace(kind="orthogonal"),
    "block": lambda: new_block(10, 8, 2, None, block_rows(10, 3, 1, "strided"), seeded(2)),
    "full": lambda: new_full(10, 8),
}


@pytest.mark.parametrize("erased", [False, True], ids=["whole", "erased"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_inside_a_frozen_layer_is_the_one_hooked_on_it(kind, erased):
    layer, adapter = _drawn(nn.Linear(8, 10).double()).requires_grad_(False), _trained(ADAPTERS[kind]())
    start = torch.randn(2, 5, 8, generator=seeded(1)).double()
    mask = {"layer": (torch.arange(len(adapter.lora_up)) % 3 != 1).double()} if erased else None
    found = {}
    for way, block in (("hooked", contextlib.nullcontext()), ("inside", frozen_forward([layer]))):
        x, factors = start.clone().requires_grad_(), list(adapter.trainable().values())
        with block, attached({"layer": layer}, {"layer": adapter}, -0.7, mask):
            assert bool(layer._forward_hooks) == (way == "hooked" or kind == "full")
            out = layer(x)
            found[way] = out, *torch.autograd.grad(out.square().sum(), [x, *factors])
            assert way == "hooked" or torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *factors))  # noqa: B023
        assert not layer._forward_hooks and "forward" not in vars(layer)
    for inside, hooked in zip(found["inside"], found["hooked"], strict=True):
        assert relative_error(inside, hooked) < 1e-14 and hooked.norm() > 0.1
    assert relative_error(found["inside"][0], layer(start)) > 1e-2


def test_two_adapters_on_a_frozen_layer_add_up_and_end_with_their_blocks():
    layer, x = _drawn(nn.Linear(8, 10).double()), torch.randn(3, 8, generator=seeded(1)).double()
    first, second = _trained(ADAPTERS["lora"]()), _trained(ADAPTERS["block"]())
    with frozen_forward([layer]), attached({"layer": layer}, {"layer": first}):
        with attached({"layer": layer}, {"layer": second}, 0.5):
            both = layer(x)
        one = layer(x)
    assert relative_error(both - one, 0.5 * second.residual(x)) < 1e-12
    assert relative_error(one - layer(x), first.residual(x)) < 1e-12


def test_autocast_reaches_an_adapter_inside_a_frozen_layer():
    layer, adapter = _drawn(nn.Linear(8, 10)).requires_grad_(False), ADAPTERS["lora"]()
    adapter = adapter.replace(lora_up=nn.Parameter(torch.randn(10, 3, generator=seeded(4))))
    x = torch.randn(2, 5, 8, generator=seeded(1)).requires_grad_()
    expected = layer(x) + adapter.residual(x)
    slope, up = torch.autograd.grad(expected.square().sum(), [x, adapter.lora_up])
    with frozen_forward([layer]), attached({"layer": layer}, {"layer": adapter}):
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
        found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16 and x.grad.dtype == adapter.lora_up.grad.dtype == torch.float32
    assert 1e-4 < relative_error(x.grad, slope) < 0.05 and 1e-4 < relative_error(adapter.lora_up.grad, up) < 0.05


def test_a_layer_that_is_frozen_already_keeps_where_its_weights_come_from():
    net, asked = Net(), []

    def weights(module, like):
        asked.append(module)
        return own_weights(module, like)

    with frozen_forward([net], weights):
        with frozen_forward([net]):
            net(*_input())
        assert asked.count(net.first) == asked.count(net.conv) == asked.count(net.norm) == 1
        net(*_input())
    assert asked.count(net.first) == 2 and not any("forward" in vars(part) for part in net.modules())


class GEGLU(nn.Module):
    """As diffusers and hosts have it."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 24)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


def test_activations_that_follow_from_what_is_kept_are_not_kept():
    """The norm's output and gelu(gate) are computed again: same bits, and half as much to keep."""
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(2), nn.Linear(36, 8), GEGLU())
    net = _drawn(net).requires_grad_(False)
    start, kept, found = torch.randn(3, 4, 6, 6, generator=seeded(1)), {}, {}
    for way in ("plain", "frozen"):
        x, tensors = start.clone().requires_grad_(), {}

        def keep(tensor, tensors=tensors):
            tensors[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        block = frozen_forward([net]) if way == "frozen" else contextlib.nullcontext()
        with block, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = net(x)
            (slope,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
        kept[way] = sorted(tensor.numel() for where, tensor in tensors.items() if where not in weights)
        found[way] = out, slope
    assert all(map(torch.equal, found["frozen"], found["plain"])) and found["plain"][1].norm() > 0.1
    norm_in, both = 3 * 8 * 36, 3 * 8 * 24
    assert kept["frozen"].count(norm_in) == 1 and kept["plain"].count(norm_in) == 2
    assert sum(kept["plain"]) - sum(kept["frozen"]) >= norm_in + both // 2


class Behind(nn.Module):
    """Adapted layers behind a SiLU, a LayerNorm and a GEGLU; `between` may write into what they get."""

    def __init__(self, between=lambda x: None):
        super().__init__()
        self.groups, self.act, self.conv = nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.gate, self.out = nn.LayerNorm(8), GEGLU(), nn.Linear(12, 6)
        self.between = between
        _drawn(self.double()).requires_grad_(False)

    def forward(self, x):
        x = self.act(self.groups(x * 2))
        self.between(x)
        x = self.norm(self.conv(x).flatten(2).mT)
        self.between(x)
        x = self.gate(x)
        self.between(x)
        return self.out(x)


def _gradients_behind(net, frozen):
    """(output, gradients of x and all factors), numbers kept beside weights and factors, largest first."""
    layers = {"conv": net.conv, "proj": net.gate.proj, "out": net.out}
    adapters = {
        "conv": new_lora(8, 8, 2, 2.0, seeded(2), kernel=(3, 3)),
        "proj": new_lora(24, 8, 2, 2.0, seeded(3)),
        "out": new_lora(6, 12, 2, 2.0, seeded(4)),
    }
    adapters = {name: _trained(adapter) for name, adapter in adapters.items()}
    factors = [factor for adapter in adapters.values() for factor in adapter.trainable().values()]
    x = torch.randn(2, 8, 5, 5, generator=seeded(1)).double().requires_grad_()
    own = {value.untyped_storage().data_ptr() for value in (*net.parameters(), *factors)}
    tensors = {}

    def keep(tensor):
        tensors[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with frozen_forward([net]) if frozen else contextlib.nullcontext(), attached(layers, adapters):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = net(x)
        found = out, *torch.autograd.grad(out.square().sum(), [x, *factors])
    return found, sorted((count for where, count in tensors.items() if where not in own), reverse=True)


def test_an_adapter_keeps_no_input_that_follows_from_what_is_kept():
    (frozen, kept), (plain, _) = (_gradients_behind(Behind(), frozen) for frozen in (True, False))
    for ours, theirs in zip(frozen, plain, strict=True):
        assert relative_error(ours, theirs) < 1e-13 and theirs.norm() > 0.1
    # Inputs of the GroupNorm and the LayerNorm, both halves of the GEGLU; the rest is rank-wide.
    assert kept[:3] == [2 * 25 * 24, 2 * 8 * 25, 2 * 8 * 25] and kept[3] <= 2 * 25 * 2


def test_what_was_written_into_is_kept_itself():
    (frozen, kept), (plain, _) = (
        _gradients_behind(Behind(lambda x: x.detach().mul_(1.5)), frozen) for frozen in (True, False)
    )
    for ours, theirs in zip(frozen, plain, strict=True):
        assert relative_error(ours, theirs) < 1e-13
    assert kept.count(2 * 8 * 25) == 4 and kept.count(2 * 25 * 12) == 1


class RMSNorm(nn.Module):
    """One of a program's own, known by its name."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), 1e-6

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@pytest.mark.parametrize("kind", [nn.RMSNorm, RMSNorm])
def test_a_norm_by_the_root_mean_square_lets_gradients_through_inference_weights(kind):
    with torch.inference_mode():
        norm = _drawn(kind(8)).requires_grad_(False)
    x = torch.randn(3, 8, generator=seeded(4)).requires_grad_()
    expected = F.rms_norm(x, (8,), norm.weight.clone().detach(), norm.eps)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        norm(x)
    with frozen_forward([norm]):
        found = norm(x)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.equal(found, expected) and torch.equal(gradient, slope) and slope.norm() > 1
