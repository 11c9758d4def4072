"""What the logits of GenAC's answers take, whole and in tiles, with Qwen2.5's vocabulary and one layer below it."""

from unittest.mock import patch

import torch
from shapes import SHAPES, TOY, arguments, device_of, qwen, random_model, report, timed

from trl_credit.critics.generative import packed


def main():
    args = arguments(__doc__)
    device = device_of(args.toy)
    shape = TOY if args.toy else (SHAPES["0.5B"][0], 1, *SHAPES["0.5B"][2:])
    network = random_model(qwen(shape), device)
    results = []
    for number in (8, 16) if args.toy else (2048, 8192):
        answers = [[1 + i % 200 for i in range(number)]]
        rows = [packed.Row(0, packed.CriticQuery([5], [1], [3]), [0], answers)]

        def update(rows=rows):
            network.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=not args.toy):
                loss = -packed.answer_log_probs(network, rows)[0].mean()
            loss.backward()
            return loss.item()

        found = {}
        for how in ("tiles", "whole"):
            with patch.object(packed, "why_not_tiled", lambda network, how=how: None if how == "tiles" else how):
                seconds, peak = timed(update, device, 3)
                found[how] = {"loss": update(), "seconds": seconds, "peak_gib": peak}
        results.append({"tokens": number, **found})
    report({"words": shape[-1], "rows": results})


if __name__ == "__main__":
    main()
