import itertools

import pytest
import torch

from trl_credit import adjoint_trace, eligibility_trace, trace_weights, value_gap_bound


def dense_trace(length, decay, style="recent", floor=0.0):
    """Eqs. 1 and 2 as a T × T matrix in float64: row t holds the weights of tokens j ≤ t in the ratio of token t."""
    matrix = torch.zeros(length, length, dtype=torch.float64)
    for t in range(length):
        for j in range(t):
            weight = decay ** (t - j) if style == "recent" else max(decay ** (t - j), decay**j)
            matrix[t, j] = max(floor, weight)
        matrix[t, t] = 1
    return matrix


def masks(length):
    gaps = torch.ones(length)
    gaps[length // 3 : length // 2] = 0
    return torch.stack(
        [
            torch.ones(length),  # truncated: no padding
            (torch.arange(length) < length // 2).float(),  # ended early
            gaps,  # a tool call in the middle
            torch.zeros(length),  # masked out as a whole
            torch.rand(length, generator=torch.Generator().manual_seed(0)).round(),
        ]
    )


def test_recent_literal_values():
    x, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3)
    # 1;  2 + .5·1;  4 + .5·2 + .25·1
    assert eligibility_trace(x, mask, 0.5).tolist() == [[1.0, 2.5, 5.25]]
    # columns: 1 + .5 + .25;  1 + .5;  1
    assert adjoint_trace(torch.ones(1, 3), mask, 0.5).tolist() == [[1.75, 1.5, 1.0]]
    # rows: 1;  1 + .5;  1 + .5 + .25
    assert trace_weights(mask, 0.5).tolist() == [[1.0, 1.5, 1.75]]


def test_both_literal_values():
    x, mask = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.ones(1, 4)
    # weights a^min(j, t-j): row 1: 1, 1;  row 2: 1, .5, 1;  row 3: 1, .5, .5, 1
    assert eligibility_trace(x, mask, 0.5, "both").tolist() == [[1.0, 3.0, 6.0, 12.0]]
    assert adjoint_trace(torch.ones(1, 4), mask, 0.5, "both").tolist() == [[4.0, 2.0, 1.5, 1.0]]


def test_floor_literal_values():
    x, mask = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.ones(1, 4)
    # row 3 of "recent" with floor .3: weights .3 (for .125), .3 (for .25), .5, 1
    assert eligibility_trace(x, mask, 0.5, floor=0.3)[0, 3] == pytest.approx(0.3 * 1 + 0.3 * 2 + 0.5 * 4 + 8)


@pytest.mark.parametrize("style", ["recent", "both"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("decay", [0.3, 0.9, 0.99, 1.0])
def test_operator_and_transpose_match_the_dense_matrix(style, floor, decay):
    mask = masks(31)
    x = torch.randn(5, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[mask == 0] = torch.nan  # what stands there does not matter
    traced = eligibility_trace(x, mask, decay, style, floor)
    normalised = eligibility_trace(x, mask, decay, style, floor, "mean")
    transposed = adjoint_trace(x, mask, decay, style, floor)
    row_sums = trace_weights(mask, decay, style, floor)
    for b in range(5):
        tokens = mask[b].nonzero()[:, 0]
        matrix = dense_trace(len(tokens), decay, style, floor)
        close = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(traced[b, tokens], matrix @ x[b, tokens], **close)
        torch.testing.assert_close(transposed[b, tokens], matrix.T @ x[b, tokens], **close)
        torch.testing.assert_close(row_sums[b, tokens].double(), matrix.sum(1), rtol=1e-6, atol=1e-6)
        if len(tokens):
            scale = matrix.sum() / len(tokens)
            torch.testing.assert_close(normalised[b, tokens], matrix @ x[b, tokens] / scale, rtol=1e-6, atol=1e-6)
    for result in (traced, normalised, transposed, row_sums):
        assert (result[mask == 0] == 0).all()


@pytest.mark.parametrize("style", ["recent", "both"])
def test_gradient_is_the_transpose(style):
    mask = masks(12)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 12, dtype=torch.float64)
    (grad,) = torch.autograd.grad(eligibility_trace(x, mask, 0.9, style, 0.2), x, g)
    torch.testing.assert_close(grad, adjoint_trace(g, mask, 0.9, style, 0.2))


def test_effective_weights_have_the_closed_form_of_the_paper():
    length, decay = 256, 0.99
    ones, steps = torch.ones(1, length), torch.arange(length, dtype=torch.float64)
    recent = (1 - decay ** (length - steps)) / (1 - decay)
    torch.testing.assert_close(adjoint_trace(ones, ones, decay)[0].double(), recent, rtol=1e-5, atol=0)
    assert adjoint_trace(ones, ones, decay)[0, 0] == pytest.approx(92.4, abs=0.1)
    both = adjoint_trace(ones, ones, decay, "both")[0]
    assert both[0] == pytest.approx(256, rel=1e-5)
    assert both[-1] == 1
    assert adjoint_trace(ones.expand(1, length), ones, decay, "both").argmax() == 0


def test_mean_normalization_averages_one_over_each_completion():
    mask = masks(40)
    weights = adjoint_trace(torch.ones(5, 40), mask, 0.99, "both", normalization="mean")
    means = weights.sum(1) / mask.sum(1)
    assert means[mask.any(1)].tolist() == pytest.approx([1.0] * 4, rel=1e-5)


def test_tool_tokens_are_no_time_steps():
    x = torch.tensor([[1.0, 7.0, 7.0, 2.0]])
    mask = torch.tensor([[1, 0, 0, 1]])
    for style in ("recent", "both"):
        without = eligibility_trace(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), 0.5, style)
        assert eligibility_trace(x, mask, 0.5, style)[0, [0, 3]].tolist() == without[0].tolist()


@pytest.mark.parametrize("style", ["recent", "both"])
def test_no_decay_at_all_is_the_identity(style):
    x = torch.randn(5, 9)
    assert torch.equal(eligibility_trace(x, torch.ones(5, 9), 0.0, style), x)


def test_float32_error_at_8192_tokens():
    x = torch.randn(2, 8192, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(x)
    for style, decay in itertools.product(("recent", "both"), (0.9, 0.99, 1.0)):
        exact = eligibility_trace(x.double(), mask, decay, style)
        error = (eligibility_trace(x, mask, decay, style) - exact).abs().max() / exact.abs().max()
        assert error < 2e-6, (style, decay)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches_pass_through(shape):
    for style in ("recent", "both"):
        assert eligibility_trace(torch.zeros(shape), torch.zeros(shape), 0.9, style).shape == shape
        assert adjoint_trace(torch.zeros(shape), torch.zeros(shape), 0.9, style).shape == shape


def test_value_gap_bound_literal_values():
    eos_prob = torch.tensor([[0.5, 0.9, 0.5, 1.0, 0.3]])
    # The tool token (second) is no choice of the policy: 0;  1-.5;  1-.5;  1-.5·.5;  1
    bound = value_gap_bound(eos_prob, torch.tensor([[1, 0, 1, 1, 1]]))
    torch.testing.assert_close(bound, torch.tensor([[0.0, 0.5, 0.5, 0.75, 1.0]]))
