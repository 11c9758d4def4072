from ..vapo.vapo_trainer import VAPOTrainer
from .sao_config import SAOConfig


class SAOTrainer(VAPOTrainer):
    """
    Trainer for SAO, single-rollout asynchronous optimization: [`VAPOTrainer`] with one completion per prompt, a mask on
    the ratio to the sampler in the place of clipping, and a critic with frozen attention.

    The method was introduced in [Single-Rollout Asynchronous Optimization for Agentic Reinforcement
    Learning](https://huggingface.co/papers/2607.07508). Arguments are those of [`VAPOTrainer`], with `args` a
    [`SAOConfig`]. Rollouts are made between steps, as in every trainer of TRL: what is asynchronous in the paper is not
    in here.

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_credit import SAOConfig, SAOTrainer

    trainer = SAOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=SAOConfig("Qwen2.5-0.5B-SAO", critic_pretraining_steps=50),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-credit", "sao"]
    _name = "SAO"
    _paper = {
        "title": "Single-Rollout Asynchronous Optimization for Agentic Reinforcement Learning",
        "id": "2607.07508",
        # docstyle-ignore
        "citation": """\
@article{hou2026sao,
    title        = {{Single-Rollout Asynchronous Optimization for Agentic Reinforcement Learning}},
    author       = {Zhenyu Hou and Yujiang Li and Jie Tang and Yuxiao Dong},
    year         = 2026,
    eprint       = {arXiv:2607.07508},
}""",
    }
    args: SAOConfig
    config_class = SAOConfig
