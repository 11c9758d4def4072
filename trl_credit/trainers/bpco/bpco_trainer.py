from ..vapo.vapo_trainer import VAPOTrainer
from .bpco_config import BPCOConfig


class BPCOTrainer(VAPOTrainer):
    """
    Trainer for BPCO, best practice critic optimization: [`VAPOTrainer`] with one completion per prompt, values bounded
    to the range of the reward, DPPO's mask in the place of clipping, and a critic that may be told more than the
    policy.

    The method was introduced in [Best Practice Critic Optimization](https://huggingface.co/papers/2608.23566).
    Arguments are those of [`VAPOTrainer`], with `args` a [`BPCOConfig`].

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_credit import BPCOConfig, BPCOTrainer

    template = "{prompt}\\n\\nReference answer: {solution}"
    trainer = BPCOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=BPCOConfig("Qwen2.5-0.5B-BPCO", critic_prompt_template=template),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-credit", "bpco"]
    _name = "BPCO"
    _paper = {
        "title": "Best Practice Critic Optimization",
        "id": "2608.23566",
        # docstyle-ignore
        "citation": """\
@article{qi2026bpco,
    title        = {{Best Practice Critic Optimization}},
    author       = {Penghui Qi and Xiangxin Zhou and Wee Sun Lee},
    year         = 2026,
    eprint       = {arXiv:2608.23566},
}""",
    }
    args: BPCOConfig
    config_class = BPCOConfig
