"""Linear layers with oneDNN's products: the same numbers as the ordinary ones, and the ordinary ones where they must be."""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from finetune_trainer.train.linear import speed_up
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

Results = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def onednn():
    """What these tests are about also runs on CPUs where it is not the faster way."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        yield


class Layer(torch.nn.Module):
    """A model of one linear layer."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs)


def plain(width: int = 12, out: int = 9, bias: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    return Layer(torch.nn.Linear(width, out, bias))


def adapted(width: int = 12, out: int = 9, bias: bool = True, inner: Any = None, **config: Any) -> PeftModel:
    torch.manual_seed(0)
    base = Layer(torch.nn.Linear(width, out, bias) if inner is None else inner(width, out))
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["inner"], **config}
    return get_peft_model(base, LoraConfig(**settings))


def fast(model: torch.nn.Module) -> torch.nn.Module:
    quick = copy.deepcopy(model)
    speed_up(quick)
    return quick


def is_fast(output: torch.Tensor, product: str = "Product") -> bool:
    """Whether it came from oneDNN's products."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if product in node.name():
            return True
        seen.add(node)
        nodes += [next_node for next_node, _ in node.next_functions]
    return False


def results(model: torch.nn.Module, inputs: torch.Tensor, gradient: torch.Tensor) -> Results:
    """Output and all gradients; dropout is that of a seed."""
    inputs = inputs.detach().requires_grad_()  # keeps the layout in memory
    model.zero_grad()
    torch.manual_seed(1)
    output = model(inputs)
    output.backward(gradient)
    after = torch.get_rng_state()
    weights = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"output": output.detach(), "inputs": inputs.grad, "rng": after.float(), **weights}


def assert_same(model: torch.nn.Module, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
    """To 1e-6 of what the sums are made of: where these cancel, no order of adding is the right one."""
    expected, found = results(model, inputs, gradient), results(fast(model), inputs, gradient)
    sizes = copy.deepcopy(model)
    with torch.no_grad():
        for weight in sizes.parameters():
            weight.abs_()
    terms = results(sizes, _keeping_layout(inputs), _keeping_layout(gradient))
    assert found.keys() == expected.keys() == terms.keys()
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape
        assert (found[name] - wanted).norm() <= 1e-6 * terms[name].norm(), name


def _keeping_layout(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(values.shape, values.stride()).copy_(values.abs())


@st.composite
def tensors(
    draw: st.DrawFn, model_of: Callable[..., torch.nn.Module]
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A model, inputs and a gradient of its output, contiguous or not."""
    leading = draw(
        st.one_of(
            st.just(()),
            st.tuples(st.integers(1, 300)),
            st.tuples(st.integers(1, 9), st.integers(1, 33)),
            st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7)),
        )
    )
    width, out = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    model = model_of(width, out, draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 1000)))
    make = [draw(st.sampled_from([torch.Tensor.contiguous, transposed, every_other])) for _ in range(2)]
    return model, make[0](torch.randn(*leading, width)), make[1](torch.randn(*leading, out))


def transposed(values: torch.Tensor) -> torch.Tensor:
    """The same values, the first dimension innermost in memory."""
    return values.movedim(0, -1).contiguous().movedim(-1, 0)


def every_other(values: torch.Tensor) -> torch.Tensor:
    return values.repeat_interleave(2, dim=-1)[..., ::2]


@settings(max_examples=150, deadline=None)
@given(tensors(plain))
def test_a_linear_layer_gives_the_same_numbers(case: tuple[torch.nn.Module, torch.Tensor, torch.Tensor]) -> None:
    assert_same(*case)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([0.0, 0.3]), st.booleans(), st.integers(1, 9))
def test_an_adapted_layer_gives_the_same_numbers(data: st.DataObject, dropout: float, rs: bool, rank: int) -> None:
    model_of = partial(adapted, lora_dropout=dropout, use_rslora=rs, r=rank)
    assert_same(*data.draw(tensors(model_of)))


@pytest.mark.parametrize("model", [plain(), adapted(lora_dropout=0.3)], ids=["plain", "adapted"])
def test_the_products_are_used_and_give_the_same_bits_again(model: torch.nn.Module) -> None:
    quick, inputs, gradient = fast(model), torch.randn(37, 12), torch.randn(37, 9)
    assert is_fast(quick(inputs))
    assert not is_fast(model(inputs))
    first, second = results(quick, inputs, gradient), results(quick, inputs, gradient)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("model", [plain(), adapted()], ids=["plain", "adapted"])
def test_only_the_gradients_that_are_needed_are_computed(model: torch.nn.Module) -> None:
    quick, inputs = fast(model), torch.randn(5, 12)
    quick(inputs).sum().backward()  # inputs need none, as those of a first layer
    model(inputs).sum().backward()
    for (name, found), wanted in zip(quick.named_parameters(), model.parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None), name
    with torch.no_grad():
        assert quick(inputs).grad_fn is None


def unfrozen() -> PeftModel:
    model = adapted()
    model.base_model.model.inner.base_layer.weight.requires_grad_(True)
    return model


def two_adapters() -> PeftModel:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model


def merged() -> PeftModel:
    model = adapted()
    model.merge_adapter()
    return model


def disabled() -> PeftModel:
    model = adapted()
    model.base_model.disable_adapter_layers()
    return model


SLOW: dict[str, tuple[Callable[[], torch.nn.Module], torch.dtype]] = {
    "DoRA": (lambda: adapted(use_dora=True), torch.float32),
    "LoRA with a bias": (lambda: adapted(lora_bias=True), torch.float32),
    "a base layer that is trained": (unfrozen, torch.float32),
    "two adapters at a time": (two_adapters, torch.float32),
    "a merged adapter": (merged, torch.float32),
    "a disabled adapter": (disabled, torch.float32),
    "an adapted Conv1D": (
        lambda: adapted(inner=lambda width, out: Conv1D(out, width), fan_in_fan_out=True),
        torch.float32,
    ),
    "Conv1D": (lambda: Layer(Conv1D(9, 12)), torch.float32),
    "float64": (lambda: plain().double(), torch.float64),
    "bf16": (lambda: plain().bfloat16(), torch.bfloat16),
    "adapted float64": (lambda: adapted().double(), torch.float64),
}


@pytest.mark.parametrize("case", SLOW)
def test_what_the_products_are_not_for_runs_as_before(case: str) -> None:
    make, dtype = SLOW[case]
    model, inputs, gradient = make(), torch.randn(3, 12, dtype=dtype), torch.randn(3, 9, dtype=dtype)
    quick = fast(model)
    expected, found = results(model, inputs, gradient), results(quick, inputs, gradient)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the linear layers inside of it may be fast
    assert not is_fast(quick(inputs), "_LoraProduct" if isinstance(model, PeftModel) else "Product")


@pytest.mark.parametrize("model", [plain(), adapted()], ids=["plain", "adapted"])
def test_autocast_rounds_as_before(model: torch.nn.Module) -> None:
    quick, inputs = fast(model), torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = quick(inputs), model(inputs)
    assert found.dtype is expected.dtype is torch.bfloat16
    assert torch.equal(found, expected)
    assert not is_fast(found)
    assert is_fast(quick(inputs))


@pytest.mark.parametrize("model", [plain(), adapted()], ids=["plain", "adapted"])
def test_no_rows_are_no_error(model: torch.nn.Module) -> None:
    assert fast(model)(torch.randn(2, 0, 12)).shape == (2, 0, 9)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model", [plain(), adapted(lora_dropout=0.3)], ids=["plain", "adapted"])
def test_activation_checkpointing_computes_the_same(model: torch.nn.Module, use_reentrant: bool) -> None:
    inputs, gradient, quick = torch.randn(11, 12), torch.randn(11, 9), fast(model)
    again = Layer(quick)
    again.forward = lambda values: checkpoint(quick, values, use_reentrant=use_reentrant)
    expected, found = results(quick, inputs, gradient), results(again, inputs, gradient)
    assert all(torch.equal(found[f"inner.{name}" if "." in name else name], expected[name]) for name in expected)


@pytest.mark.parametrize("model", [plain(), adapted()], ids=["plain", "adapted"])
def test_a_second_derivative_is_an_error_and_not_wrong(model: torch.nn.Module) -> None:
    inputs = torch.randn(4, 12, requires_grad=True)
    (first,) = torch.autograd.grad(fast(model)(inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("model", [plain(), adapted()], ids=["plain", "adapted"])
@pytest.mark.parametrize("twin", ["deepcopy", "pickle"])
def test_a_copy_has_weights_of_its_own(model: torch.nn.Module, twin: str) -> None:
    quick, inputs = fast(model), torch.randn(3, 12)
    expected = quick(inputs)
    if twin == "pickle":
        file = io.BytesIO()
        torch.save(quick, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(quick)
    with torch.no_grad():
        for weight in quick.parameters():
            weight.zero_()
    assert is_fast(other(inputs))
    assert torch.equal(other(inputs), expected)
    assert quick(inputs).count_nonzero() == 0


@pytest.mark.parametrize("model", [plain(), adapted()], ids=["plain", "adapted"])
def test_weights_keep_their_names_and_can_be_exchanged(model: torch.nn.Module) -> None:
    quick, inputs = fast(model), torch.randn(3, 12)
    names = list(model.state_dict())
    assert list(quick.state_dict()) == names
    quick.load_state_dict({name: weight + 1 for name, weight in model.state_dict().items()})
    model.load_state_dict(quick.state_dict())
    torch.testing.assert_close(quick(inputs), model(inputs))


def test_adapters_can_be_switched_off_merged_and_taken_out() -> None:
    model, inputs = adapted(), torch.randn(3, 12)
    quick, base = fast(model), model.get_base_model().inner.base_layer
    expected = model(inputs)
    with quick.disable_adapter():
        torch.testing.assert_close(quick(inputs), base(inputs))
    torch.testing.assert_close(quick(inputs), expected)
    quick.merge_adapter()
    torch.testing.assert_close(quick(inputs), expected)
    quick.unmerge_adapter()
    torch.testing.assert_close(quick(inputs), expected)
    whole = quick.merge_and_unload()
    assert type(whole.inner) is torch.nn.Linear
    torch.testing.assert_close(whole(inputs), expected)
    torch.testing.assert_close(fast(model).unload()(inputs), base(inputs))


PARTS = ("inner", "inner.base_layer", "inner.lora_A.default", "inner.lora_B.default", "inner.lora_dropout.default")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_are_called(register: str, part: str) -> None:
    quick = fast(adapted(lora_dropout=0.3))
    called = []
    getattr(quick.get_base_model().get_submodule(part), register)(lambda *_: called.append(part))
    results(quick, torch.randn(3, 12), torch.randn(3, 9))
    assert called == [part]


def test_a_cpu_that_gains_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not is_fast(fast(plain())(torch.randn(3, 12)))
