import pytest
import torch

from trl_credit import linear_recurrence


def loop(x, decay, reverse=False):
    """The definition, in float64."""
    x = x.detach().double()
    decay = torch.as_tensor(decay, dtype=torch.float64).expand(x.shape)
    y, carry = torch.zeros_like(x), torch.zeros(x.shape[0], dtype=torch.float64)
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        carry = decay[:, t] * carry + x[:, t]
        y[:, t] = carry
    return y


def decays(batch, length):
    generator = torch.Generator().manual_seed(1)
    per_token = torch.rand(batch, length, generator=generator)
    return {
        "scalar": 0.9,
        "one": 1.0,
        "zero": 0.0,
        "per row": torch.rand(batch, 1, generator=generator),
        "per token": per_token,
        "resets": per_token * (torch.rand(batch, length, generator=generator) > 0.2),
    }


def test_literal_values():
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    # 1;  .5·1+2;  .5·2.5+4;  .5·5.25+8
    assert linear_recurrence(x, 0.5).tolist() == [[1.0, 2.5, 5.25, 10.625]]
    # .5·6+1;  .5·8+2;  .5·8+4;  8
    assert linear_recurrence(x, 0.5, reverse=True).tolist() == [[4.0, 6.0, 8.0, 8.0]]
    # A zero resets before its token is added; the first decay multiplies nothing.
    decay = torch.tensor([[9.0, 0.5, 0.0, 0.5]])
    assert linear_recurrence(x, decay).tolist() == [[1.0, 2.5, 4.0, 10.0]]
    # In reverse the last decay multiplies nothing: y_2 = 0·8 + 4, y_1 = .5·4 + 2, y_0 = 9·4 + 1.
    assert linear_recurrence(x, decay, reverse=True).tolist() == [[37.0, 4.0, 4.0, 8.0]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 33, 100])
@pytest.mark.parametrize("kind", decays(1, 1))
def test_value_and_gradient_match_the_loop(kind, length, reverse):
    x = torch.randn(3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    decay = decays(3, length)[kind]
    y = linear_recurrence(x, decay, reverse=reverse)
    torch.testing.assert_close(y, loop(x, decay, reverse), rtol=1e-12, atol=1e-12)
    if length:
        # The gradient of Σ g·y is the column of the dense matrix that the loop builds out of unit vectors.
        g = torch.randn(3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        (grad,) = torch.autograd.grad(y, x, g)
        columns = [loop(torch.eye(length)[j].expand(3, -1), decay, reverse) for j in range(length)]
        torch.testing.assert_close(grad, torch.stack([(c * g).sum(1) for c in columns], 1), rtol=1e-10, atol=1e-10)


def test_gradient_can_be_differentiated_again():
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: linear_recurrence(x**2, 0.7), x)


@pytest.mark.parametrize("kind", decays(1, 1))
@pytest.mark.parametrize("shape", [(16, 1024), (4, 32768)])
def test_float32_error_is_below_one_in_a_million(shape, kind):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    decay = decays(*shape)[kind]
    if kind in ("per row", "per token", "resets"):
        decay = 1 - 0.05 * decay  # near 1, where errors add up
    reference = loop(x, decay)
    error = (linear_recurrence(x, decay) - reference).abs().max() / reference.abs().max()
    assert error < 1e-6


def test_large_numbers_of_steps_do_not_overflow():
    # A scan that divides by a^t breaks near t = 900 for a = 0.9.
    y = linear_recurrence(torch.ones(1, 100_000), 0.9)
    assert y[0, -1] == pytest.approx(10.0, rel=1e-6)


def test_bfloat16_is_summed_and_returned_in_float32_also_under_autocast():
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_recurrence(x, 1.0)
    assert y.dtype == torch.float32
    assert y[0, -1] == 4096  # bfloat16 would stay at 256


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches_pass_through(shape):
    x = torch.zeros(shape, requires_grad=True)
    y = linear_recurrence(x, 0.9)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_input_is_not_changed():
    x = torch.arange(8.0).view(1, 8)
    linear_recurrence(x, 0.5)
    assert x.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("x", "decay", "message"),
    [
        (torch.zeros(3), 0.9, r"shape \(B, T\), got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(3), r"\(2, 1\) or \(2, 3\).*got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 2), r"got \(2, 2\)"),
        (torch.zeros(2, 3), torch.ones(2, 1, requires_grad=True), "differentiable in `x` only"),
    ],
)
def test_wrong_shapes_are_named(x, decay, message):
    with pytest.raises(ValueError, match=message):
        linear_recurrence(x, decay)
