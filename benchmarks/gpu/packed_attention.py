"""FlexAttention with block masks against a dense mask, in the packed rows that GenAC's critic is trained on."""

import torch
from shapes import SHAPES, TOY, arguments, device_of, qwen, random_model, report, timed

from trl_credit.critics.generative import packed


def packed_row(tokens: int, segment: int, answer: int) -> packed.Row:
    """All answers about a completion of this length, one for each segment."""
    cuts = list(range(1, tokens, segment))
    ids = [1 + i % 200 for i in range(tokens)]
    return packed.Row(0, packed.CriticQuery(ids, cuts, [3]), list(range(len(cuts))), [[7] * answer] * len(cuts))


def main():
    args = arguments(__doc__)
    device = device_of(args.toy)
    shape = TOY if args.toy else (SHAPES["0.5B"][0], 4, *SHAPES["0.5B"][2:])
    results = []
    for tokens in (64,) if args.toy else (2048, 8192):
        row = packed_row(tokens, 16 if args.toy else 120, 4 if args.toy else 128)
        found = {}
        for attention in ("sdpa", "flex_attention"):
            network = random_model(qwen(shape, attn_implementation=attention), device)

            def update(network=network, row=row):
                network.zero_grad()
                # On a CPU FlexAttention has no backward pass.
                with (
                    torch.set_grad_enabled(not args.toy),
                    torch.autocast(device, torch.bfloat16, enabled=not args.toy),
                ):
                    loss = -packed.answer_log_probs(network, [row])[0].sum() / row.answer_tokens
                if loss.requires_grad:
                    loss.backward()
                return loss.item()

            seconds, peak = timed(update, device, 1 if args.toy else 3)
            found[attention] = {"loss": update(), "seconds": seconds, "peak_gib": peak}
        results.append({"tokens": tokens, "row": len(row), **found})
    report({"layers": shape[1], "rows": results})


if __name__ == "__main__":
    main()
