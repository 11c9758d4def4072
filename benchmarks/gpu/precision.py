"""Pure functions and log-probabilities in float32 and bfloat16 against float64, with their times."""

from functools import partial

import torch
from shapes import SHAPES, TOY, arguments, device_of, qwen, random_model, report, timed

from trl_credit.credit.gae import gae
from trl_credit.credit.recurrence import linear_recurrence
from trl_credit.credit.traces import eligibility_trace
from trl_credit.seam.lm_head import tiled_lm_head


def credit_functions(rows: int, tokens: int, device: str) -> dict:
    """Name -> (function, arguments in float64)."""
    generator = torch.Generator(device).manual_seed(0)
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    x = torch.randn(rows, tokens, generator=generator, dtype=torch.float64, device=device)
    values = torch.rand(rows, tokens, generator=generator, dtype=torch.float64, device=device)
    rewards = torch.zeros_like(x)
    rewards[:, -1] = 1
    return {
        "linear_recurrence": (lambda x: linear_recurrence(x, 0.999), (x,)),
        "gae": (lambda rewards, values: gae(rewards, values, mask, gamma=1.0, lam=0.999)[0], (rewards, values)),
        "eligibility_trace": (lambda x: eligibility_trace(x, mask, 0.999), (x,)),
    }


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error over the largest value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    """Of each next token, by TRL's chunked head."""
    with torch.no_grad(), tiled_lm_head(model, 1.0):
        return model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs


def main():
    args = arguments(__doc__)
    device = device_of(args.toy)
    rows, tokens = (2, 64) if args.toy else (32, 8192)
    results = []
    for name, (function, exact) in credit_functions(rows, tokens, device).items():
        for dtype in (torch.float32, torch.bfloat16):
            given = [x.to(dtype) for x in exact]
            rounded = function(*(x.double() for x in given))  # what is lost is lost by the function, not before it
            seconds, _ = timed(partial(function, *given), device, 3 if args.toy else 20)
            off = error(function(*given), rounded)
            results.append({"what": name, "dtype": str(dtype)[6:], "error": off, "seconds": seconds})
    shape = TOY if args.toy else SHAPES["0.5B"][:1] + (4, *SHAPES["0.5B"][2:])
    exact = random_model(qwen(shape), device, torch.float64)
    ids = torch.randint(shape[-1], (1, 16 if args.toy else 512), device=device)
    with torch.no_grad():  # TRL's head computes in float32 whatever it is given
        truth = exact(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(qwen(shape), device, torch.float64).to(dtype)
        seconds, _ = timed(partial(log_probs, model, ids), device, 3)
        off = error(log_probs(model, ids), truth)
        results.append({"what": "log-probabilities", "dtype": str(dtype)[6:], "error": off, "seconds": seconds})
    report({"shape": [rows, tokens], "rows": results})


if __name__ == "__main__":
    main()
