"""Every method cites its own paper, in its card and on its page."""

import re
from pathlib import Path

import pytest

from trl_credit.methods import METHODS


DOCS = Path(__file__).parent.parent / "docs" / "trainers"
PAPERS = {
    "grpo-lambda": ("2510.00194", "GRPO-λ: Credit Assignment improves LLM Reasoning"),
    "vineppo": ("2410.01679", "VinePPO: Refining Credit Assignment in RL Training of LLMs"),
    "vapo": ("2504.05118", "VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks"),
    "sao": ("2607.07508", "Single-Rollout Asynchronous Optimization for Agentic Reinforcement Learning"),
    "bpco": ("2608.23566", "Best Practice Critic Optimization"),
    "sppo": ("2604.08865", "SPPO: Sequence-Level PPO for Long-Horizon Reasoning Tasks"),
    "genac": (
        "2604.10701",
        "Bringing Value Models Back: Generative Critics for Value Modeling in LLM Reinforcement Learning",
    ),
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_card_and_a_page_cite_the_paper_of_the_method(name):
    number, title = PAPERS[name]
    trainer = METHODS[name].load()[1]
    assert re.search(r"papers/(\d{4}\.\d{5})", trainer.__doc__)[1] == number
    assert number in (DOCS / f"{METHODS[name].folder}.md").read_text(encoding="utf-8")
    if trainer._paper is not None:
        assert (trainer._paper["id"], trainer._paper["title"]) == (number, title)
        citation = trainer._paper["citation"]
        assert f"arXiv:{number}" in citation
        assert re.search(r"^    author +=", citation, re.MULTILINE), "by whom"
