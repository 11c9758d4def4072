"""What a generative critic is asked, and how its answer is read (arXiv:2604.10701, figure 3, reworded)."""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...segmenting import DelimiterSegmenter, Segmenter, segment_texts
from ..facts import FACTS_FILE, CriticFacts
from .packed import CriticQuery
from .reading import Reading


HINT = " On problems like this one it has lately succeeded at a rate of {success_rate}."
# All that differs between the states of a completion is the partial solution, and what follows it is read anew for each
# of them: the instructions come first, and only the form of the answer comes last.
TEMPLATE = (
    "{actor} is working on a problem. You are given the problem and what it has written so far, which may be nothing. "
    "Estimate how likely it is that it reaches a correct result if it goes on by itself." + HINT + "\n\n"
    "Instructions:\n"
    "1. Judge how hard the problem is.\n"
    "2. Infer from the partial solution how able its author is.\n"
    "3. Look through the partial solution for progress, mistakes and confusion.\n"
    "4. Weigh how likely the author is to succeed from there; do not solve the problem for it.\n"
    "5. End with a score, an integer from 0 (certain to fail) to 10 (certain to succeed).\n\n"
    "<problem>\n{problem}\n</problem>\n\n"
    "<partial_solution>\n{partial_solution}\n</partial_solution>\n\n"
    "Think briefly, then end with <score>n</score>, n an integer from 0 to 10."
)
TEMPLATE_WITHOUT_HINT = TEMPLATE.replace(HINT, "")
# For rewards that are not from 0 to 1.
HINT_OF_REWARDS = " On problems like this one its reward has lately been {success_rate} on average."
TEMPLATE_OF_REWARDS = (
    "{actor} is working on a problem. You are given the problem and what it has written so far, which may be nothing. "
    "Its work is rewarded with a number from {lowest_reward} to {highest_reward}. Estimate the reward that it gets if "
    "it goes on by itself." + HINT_OF_REWARDS + "\n\n"
    "Instructions:\n"
    "1. Judge how hard the problem is.\n"
    "2. Infer from the partial solution how able its author is.\n"
    "3. Look through the partial solution for progress, mistakes and confusion.\n"
    "4. Weigh what the author is likely to earn from there; do not solve the problem for it.\n"
    "5. End with a score, an integer from 0 (certain to get {lowest_reward}) to 10 (certain to get {highest_reward}), "
    "in equal steps.\n\n"
    "<problem>\n{problem}\n</problem>\n\n"
    "<partial_solution>\n{partial_solution}\n</partial_solution>\n\n"
    "Think briefly, then end with <score>n</score>, n an integer from 0 to 10."
)
_OF_REWARDS = {
    TEMPLATE: TEMPLATE_OF_REWARDS,
    TEMPLATE_WITHOUT_HINT: TEMPLATE_OF_REWARDS.replace(HINT_OF_REWARDS, ""),
}
SLOTS = ("actor", "success_rate", "lowest_reward", "highest_reward", "problem", "partial_solution")
_SCORE = re.compile(r"<score>\s*(10|[0-9])\s*</score>")


@dataclass(frozen=True)
class Question:
    """
    What a generative critic is asked about completions.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The critic's.
        policy_tokenizer (`PreTrainedTokenizerBase`):
            The policy's, whose tokens the completions are.
        template (`str`, *optional*):
            See [`check_template`].
        actor_description (`str`, *optional*, defaults to `"A language model"`):
            Who writes the solutions; the text of `{actor}`.
        segmenter ([`~trl_credit.segmenting.Segmenter`], *optional*):
            Divides completions into segments, at each of which there is a state.
        reward_range (`Sequence[float]`, *optional*, defaults to `(0.0, 1.0)`):
            The rewards that the scores 0 and 10 stand for. It may grow while it is held here.
    """

    tokenizer: Any
    policy_tokenizer: Any
    template: str = TEMPLATE
    actor_description: str = "A language model"
    segmenter: Segmenter = DelimiterSegmenter()
    reward_range: Sequence[float] = (0.0, 1.0)

    @property
    def wording(self) -> str:
        """The template with which the critic is asked: that of the package says what the scores mean."""
        is_usual = list(self.reward_range) == [0, 1]
        return self.template if is_usual else _OF_REWARDS.get(self.template, self.template)

    @property
    def slots(self) -> dict[str, str]:
        """What the scores stand for, as texts for a template."""
        low, high = self.reward_range
        return {"lowest_reward": f"{low:g}", "highest_reward": f"{high:g}"}

    def value(self, text: str) -> float | None:
        """The reward that an answer predicts, see [`parse_score`]."""
        score = parse_score(text)
        low, high = self.reward_range
        return None if score is None else low + (high - low) * score

    def about(
        self,
        completion_ids: list[int],
        prompt: str | list[dict],
        success_rate: float,
        trained: Sequence[bool] | None = None,
        cuts: list[int] | None = None,
    ) -> Reading:
        """
        Lay out what the critic is asked about the states of a completion.

        Args:
            completion_ids (`list[int]`):
                The completion, without padding.
            prompt (`str` or `list[dict]`):
                Its prompt, as it is in the dataset.
            success_rate (`float`):
                What the critic is told of the policy.
            trained (`Sequence[bool]`, *optional*):
                Which of its tokens the policy chose. Default: all.
            cuts (`list[int]`, *optional*):
                Its tokens before each state, rising. Default: the states at which its segments begin.

        Returns:
            [`~trl_credit.critics.generative.reading.Reading`]: Without answers.
        """
        length = len(completion_ids)
        if cuts is None:
            ends = self.segmenter(completion_ids, self.policy_tokenizer, trained)
            texts = segment_texts(completion_ids, ends, self.policy_tokenizer)
            return Reading(self._query(texts, prompt, success_rate), texts, ends)
        ends = sorted({*cuts, length} - {0})
        # One more, empty, so that there is a state after the last token.
        texts = [*segment_texts(completion_ids, ends, self.policy_tokenizer), ""]
        query = self._query(texts, prompt, success_rate)
        asked = [k for k, start in enumerate([0, *ends]) if start in cuts]
        query = CriticQuery(query.shared_ids, [query.cuts[k] for k in asked], query.tail_ids)
        between = ["".join(texts[k:after]) for k, after in zip(asked, [*asked[1:], None], strict=True)]
        return Reading(query, between, [*cuts[1:], length], start=cuts[0])

    def settings(self) -> dict[str, Any]:
        """The options of a [`~trl_credit.GenACConfig`] with which the same is asked."""
        told = "{success_rate}" in self.template
        asked = {
            "critic_template": self.template,
            "actor_description": self.actor_description,
            "reward_range": list(self.reward_range),
        }
        if isinstance(self.segmenter, DelimiterSegmenter):
            lengths: dict = {
                "segment_min_length": self.segmenter.min_length,
                "segment_target_length": self.segmenter.target_length,
                "segment_max_length": self.segmenter.max_length,
                "max_segments": self.segmenter.max_segments,
            }
        else:
            lengths = {"segmenter": name_of(self.segmenter)}
        return {**asked, **lengths, **({} if told else {"hint_momentum": None})}

    def _query(self, texts: list[str], prompt: str | list[dict], success_rate: float) -> CriticQuery:
        actor = self.actor_description
        return critic_query(self.tokenizer, self.wording, prompt, texts, actor, success_rate, **self.slots)


def name_of(segmenter: Any) -> str:
    """What a segmenter of the user's is called in `critic.json`."""
    segmenter = segmenter if hasattr(segmenter, "__qualname__") else type(segmenter)
    return f"{segmenter.__module__}.{segmenter.__qualname__}"


def refuse_other_segmenter(facts: CriticFacts, segmenter: Any, source: Any) -> None:
    """Raise if a critic was asked about segments of a user's function and is now to be asked about others."""
    own = facts.settings.get("segmenter")
    is_own = segmenter is not None and not isinstance(segmenter, DelimiterSegmenter)
    given = name_of(segmenter) if is_own else None
    if "critic_template" in facts.settings and own != given:
        words = [f"`{name}`" if name else "the package's rules" for name in (own, given)]
        raise ValueError(
            f"The critic {source} was asked about segments by {words[0]}, and is now to be asked about segments by "
            f"{words[1]}. Pass the same `segmenter`; or, if it is to learn another question, delete its {FACTS_FILE}."
        )


def check_template(template: str, slots: Sequence[str] = ("success_rate", "problem", "partial_solution")) -> None:
    """
    Refuse an incomplete template.

    Args:
        template (`str`):
            Text with slots in braces: `{actor}`, `{success_rate}`, `{lowest_reward}`, `{highest_reward}`, `{problem}`,
            `{partial_solution}`. Other braces are text.
        slots (`Sequence[str]`, *optional*, defaults to `("success_rate", "problem", "partial_solution")`):
            Those that it must have.

    Raises:
        ValueError: If one of `slots` is missing, by name; if `{partial_solution}` is there twice or at the very end.
    """
    missing = [slot for slot in slots if f"{{{slot}}}" not in template]
    if missing:
        names = ", ".join(f"{{{slot}}}" for slot in missing)
        raise ValueError(f"The critic's template has no {names}. It needs {', '.join(f'{{{s}}}' for s in slots)}.")
    if template.count("{partial_solution}") > 1:
        raise ValueError("The critic's template must have {partial_solution} once; it has it more than once.")
    if template.endswith("{partial_solution}"):
        raise ValueError("The critic's template must say something after {partial_solution}, e.g. how to answer.")


def render(template: str, **slots: str) -> str:
    """
    Fill the slots of a template. What is filled in is not searched for slots.

    Args:
        template (`str`):
            See [`check_template`].
        slots:
            Text for each slot.

    Returns:
        `str`: The text.
    """
    return re.sub(r"\{(" + "|".join(slots) + r")\}", lambda slot: slots[slot[1]], template)


def end_of_turn(tokenizer) -> int | None:
    """
    The token by which a chat template ends what the assistant says: the first special one after it. A model that has
    learned its answers in the template stops there, which need not be its tokenizer's end of sequence.

    Args:
        tokenizer:
            The critic's.

    Returns:
        `int` or `None`: Its id; `None` without a template, or if the template has no such token.
    """
    if tokenizer.chat_template is None:
        return None
    answer = uuid.uuid4().hex
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    _, found, after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return next((token for token in ids if token in special), None)


def problem_text(prompt: str | list[dict]) -> str:
    """
    The prompt of a completion as the text of a problem.

    Args:
        prompt (`str` or `list[dict]`):
            A plain prompt, or messages. A single user message becomes its content; with several, each is preceded by
            its role.
    """
    if isinstance(prompt, str):
        return prompt
    contents = [_content_text(message) for message in prompt]
    if [message["role"] for message in prompt] == ["user"]:
        return contents[0]
    return "\n\n".join(f"{message['role']}: {text}" for message, text in zip(prompt, contents, strict=True))


def _content_text(message: dict) -> str:
    """The text of a message, of which the content may be a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def parse_score(text: str) -> float | None:
    """
    The value in a critic's answer: n / 10 for the last `<score>n</score>` in which n is an integer from 0 to 10.

    Nothing else counts as a score: no number outside the tags, no fraction, sign, digit from another script, or leading
    zero.

    Args:
        text (`str`):
            What the critic has written, without its prompt.

    Returns:
        `float` or `None`: The value in [0, 1], or `None` if there is no score.

    Example:

    ```python
    >>> parse_score("Perhaps <score>3</score>, no: <score>7</score>")
    0.7
    ```
    """
    scores = _SCORE.findall(text)
    return int(scores[-1]) / 10 if scores else None


def critic_query(
    tokenizer,
    template: str,
    prompt: str | list[dict],
    segments: Sequence[str],
    actor: str,
    success_rate: float,
    **slots: str,
) -> CriticQuery:
    """
    What the critic reads to value the states of one completion.

    Each segment is tokenized by itself, so that the tokens of a state do not depend on what follows. Special tokens
    spelled out in a segment are plain text: it can neither end the user's turn nor begin another.

    Args:
        tokenizer:
            The critic's. Without a chat template, the rendered `template` itself is the prompt.
        template (`str`):
            See [`check_template`].
        prompt (`str` or `list[dict]`):
            The prompt that the completion answers, see [`problem_text`].
        segments (`Sequence[str]`):
            Texts of the K segments, see [`~trl_credit.segmenting.segment_texts`].
        actor (`str`):
            Who writes the solution, e.g. `"A language model of 8B parameters"`; the text of `{actor}`.
        success_rate (`float`):
            The mean reward that the critic is told, to two decimals.
        slots:
            Texts of further slots of the template.

    Returns:
        [`~trl_credit.critics.generative.packed.CriticQuery`]: K states; none if there are no segments.

    Raises:
        ValueError: If the tokenizer's chat template does not repeat the text of the user exactly once.
    """
    marker = uuid.uuid4().hex  # stands for the partial solution while the rest is laid out
    text = render(
        template,
        **slots,
        actor=actor,
        success_rate=f"{success_rate:.2f}",
        problem=problem_text(prompt),
        partial_solution=marker,
    )
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        special = {"add_special_tokens": False}
    else:
        special = {"add_special_tokens": True}
    if text.count(marker) != 1:
        raise ValueError(
            f"The chat template of the critic's tokenizer shows the user's text {text.count(marker)} times, not once: "
            "the states of a completion cannot share their prefix."
        )
    head, tail = text.split(marker)
    shared = list(tokenizer(head, **special)["input_ids"])
    cuts = []
    for segment in segments:
        cuts.append(len(shared))
        if len(cuts) < len(segments):
            shared += tokens_behind_others(tokenizer, segment, split_special_tokens=True)
    return CriticQuery(shared, cuts, tokens_behind_others(tokenizer, tail))


def tokens_behind_others(tokenizer, text: str, **kwargs) -> list[int]:
    """
    The tokens of a text that follows another. Some tokenizers put a space before whatever they are given, which would
    end up between the pieces of a question but is not in the oracle's question.

    Args:
        tokenizer:
            The critic's.
        text (`str`):
            The text.
        kwargs:
            Of the tokenizer.
    """

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, **kwargs)["input_ids"])

    if tokenizer.decode(2 * tokens("x")) != "xx":
        for before in ("x", "\n", "."):  # one that does not become a token together with the text's beginning
            ids = tokens(before)
            both = tokens(before + text)
            if both[: len(ids)] == ids:
                return both[len(ids) :]
    return tokens(text)
