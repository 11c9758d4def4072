"""GenAC written as its paper does: one completion, one state, one answer at a time, no padding, float64."""

import copy
import re
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM


@dataclass
class Sample:
    prompt: str
    prompt_ids: list[int]
    completion: list[int]
    trained: list[bool]  # False: a tool's token
    reward: float | None
    segments: list[str]
    ends: list[int]
    answers: list[list[int]]  # of the critic, sampled by the trainer
    old_logps: list[float] | None = None


class Oracle:
    def __init__(self, policy, critic, tokenizer, args):
        self.args, self.tokenizer = args, tokenizer
        # From its checkpoint: TRL has patched the forward of the one in the trainer.
        self.policy = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64)
        self.critic = copy.deepcopy(critic).double()
        self.optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=args.critic_learning_rate, eps=args.adam_epsilon, weight_decay=0.0
        )
        self.rollouts, self.success, self.value = 0, 0.0, 0.0
        self.rollouts_with_values = 0

    def hint(self, samples):
        """That of the rollouts before this one."""
        c = self.args.hint_momentum
        told = self.success / (1 - c**self.rollouts) if self.rollouts else 0.5
        rewards = [sample.reward for sample in samples if sample.reward is not None]
        self.success = c * self.success + (1 - c) * sum(rewards) / len(rewards)
        self.rollouts += 1
        return told

    def state(self, sample, k, hint):
        """The prompt of state k: the first has read nothing of the completion."""
        template = self.args.critic_template
        text = template.replace("{success_rate}", f"{hint:.2f}").replace("{problem}", sample.prompt)
        text = text.replace("{partial_solution}", "".join(sample.segments[:k]))
        return self.tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]

    def judge(self, samples, hint):
        """Values, advantages of the tokens, and rewards of the answers."""
        scored = [sample for sample in samples if sample.reward is not None]
        said = []
        for sample in scored:
            texts = self.tokenizer.batch_decode(sample.answers)
            found = [re.findall(r"<score>(\d+)</score>", text) for text in texts]
            said.append([int(scores[-1]) / 10 if scores and int(scores[-1]) <= 10 else None for scores in found])
        parsed = [v for values in said for v in values if v is not None]
        c = self.args.hint_momentum
        self.value = c * self.value + (1 - c) * sum(parsed) / len(parsed)
        self.rollouts_with_values += 1
        stand_in = self.value / (1 - c**self.rollouts_with_values)

        credit, number = [], sum(map(len, said))
        rewards = [
            [0.0 if v is None else 1 - (sample.reward - v) ** 2 for v in values]
            for sample, values in zip(scored, said, strict=True)
        ]
        total = sum(map(sum, rewards))
        by_sample = dict(zip(map(id, scored), zip(said, rewards, strict=True), strict=True))
        for sample in samples:
            if sample.reward is None:
                credit.append(({}, []))
                continue
            values, own = by_sample[id(sample)]
            filled = []
            for v in values:
                filled.append(v if v is not None else filled[-1] if filled else stand_in)
            values = filled
            weights = own
            if self.args.critic_baseline == "leave_one_out":
                weights = [reward - (total - reward) / (number - 1) for reward in own]
            credit.append((self.advantages(sample, values), weights))
        return credit

    def advantages(self, sample, values):
        out, following, advantage = {}, 0.0, 0.0
        segments = list(zip([0, *sample.ends[:-1]], sample.ends, values, strict=True))
        # A segment in which the policy wrote nothing is no step of it.
        segments = [segment for segment in segments if any(sample.trained[segment[0] : segment[1]])]
        for k in reversed(range(len(segments))):
            start, end, value = segments[k]
            reward = sample.reward if k + 1 == len(segments) else 0.0
            advantage = reward + following - value + self.args.segment_lambda * advantage
            following = value
            out.update({t: advantage for t in range(start, end) if sample.trained[t]})
        return out

    def policy_logps(self, sample):
        ids = torch.tensor([sample.prompt_ids + sample.completion])
        logits = self.policy(ids).logits[0, len(sample.prompt_ids) - 1 : -1]
        return logits.log_softmax(-1)[range(len(sample.completion)), sample.completion]

    def policy_loss(self, samples, credit):
        trained = sum(sum(sample.trained) for sample in samples)
        loss = 0.0
        for sample, (advantages, _) in zip(samples, credit, strict=True):
            now = self.policy_logps(sample)
            for t, advantage in advantages.items():
                ratio = (now[t] - sample.old_logps[t]).exp()
                clipped = ratio.clamp(1 - self.args.epsilon, 1 + self.args.epsilon)
                loss = loss - torch.minimum(ratio * advantage, clipped * advantage)
        return loss / trained

    def critic_loss(self, samples, credit, hint):
        loss, tokens = 0.0, 0
        for sample, (_, weights) in zip(samples, credit, strict=True):
            for k, weight in enumerate(weights):
                state, answer = self.state(sample, k, hint), sample.answers[k]
                logits = self.critic(torch.tensor([state + answer])).logits[0, len(state) - 1 : -1]
                logps = (logits / self.args.critic_temperature).log_softmax(-1)[range(len(answer)), answer]
                loss, tokens = loss - weight * logps.sum(), tokens + len(answer)
        return loss / tokens

    def step(self, loss, network):
        """One clipped update; returns the loss before it and the norm of its gradient."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).item()
        if network is self.critic:
            self.optimizer.step()
        else:
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= self.args.learning_rate * parameter.grad
        network.zero_grad()
        return loss.item(), norm
