"""What a run that cannot learn looks like, and what to change: said once, when it is seen."""

from statistics import mean

from transformers import TrainerCallback


# An explained variance below it is none; a critic that has begun to learn is above.
NOTHING = 0.01
# A λ below it, over all completions, is that of completions which are nearly all too short for another.
NO_LAMBDA = 0.05


class Symptoms(TrainerCallback):
    """Looks at what is logged."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        lam = logs.get("policy_lambda/mean")
        if lam is not None and lam < NO_LAMBDA and getattr(args, "policy_lambda", None) == "length_adaptive":
            self.trainer.warn_once(
                "λ of the policy is 0 for nearly all completions: each token's advantage comes from the next value of "
                "the critic alone, and the reward reaches the last token only. "
                f"`policy_lambda='length_adaptive'` gives 0 up to a length of 1 / α, which is "
                f"{1 / args.length_adaptive_alpha:g}: raise `length_adaptive_alpha` ({args.length_adaptive_alpha:g}), "
                "or set `policy_lambda` to a number."
            )
        if 0 in (logs.get("critic/parse_rate"), logs.get("critic_pretraining/parse_rate")):
            self.trainer.warn_once(
                "None of the critic's answers could be read: every value is the running mean, and the critic is not "
                "trained. It has to end with `<score>7</score>`: start from a critic that was taught to "
                "(`trl-credit genac-sft`), or raise `critic_max_completion_length` "
                f"({args.critic_max_completion_length}) if its answers are cut off."
            )


def warn_of_fruitless_pretraining(trainer, stage: str) -> None:
    """Warn if what was logged of a pretraining says that the critic knows nothing at its end."""
    parts = ("held_out_explained_variance", "explained_variance")
    logged: dict[str, list[float]] = {f"{stage}/{part}{of}": [] for part in parts for of in ("_within_prompt", "")}
    for key, points in logged.items():
        points += [entry[key] for entry in trainer.state.log_history if entry.get(key) is not None]
    name = next((key for key, points in logged.items() if points), None)
    if name is None:
        trainer.warn_once(
            "The critic's pretraining could teach it nothing: within every rollout, all completions had the same "
            "reward. Look at the reward functions, and at prompts that are neither always nor never solved."
        )
        return
    # Of what is held out, the best was kept.
    latest = max(logged[name]) if "held_out" in name else mean(logged[name][-3:])
    if latest < NOTHING:
        rate, head_rate = trainer.of_critic.critic_learning_rates()
        trainer.warn_once(
            f"After its pretraining the critic explains nothing of the returns: `{name}` is {latest:.3f} over the last "
            "points that were logged, and advantages from its values are noise. Pretrain longer "
            f"(`critic_pretraining_steps={trainer.args.critic_pretraining_steps}`), raise `critic_learning_rate` "
            f"({rate:g}) and `critic_head_learning_rate` ({head_rate:g}), or start from a reward model; "
            "`policy_lambda=1.0` leans on it least."
        )
