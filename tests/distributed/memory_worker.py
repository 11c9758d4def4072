"""
What each process of the test runs: `python memory_worker.py MODEL_DIR OUTPUT_DIR`. Each process leaves in `OUTPUT_DIR`
how every trainer with a critic refused a policy whose weights ZeRO-3 had already split.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from sppo_runs import share_of_even
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer
from vapo_runs import PROMPTS, SETTINGS

from trl_credit import GenACConfig, GenACTrainer, SPPOConfig, SPPOTrainer, VAPOConfig, VAPOTrainer


DATA = Dataset.from_dict({"prompt": PROMPTS})
TRAINERS = {"vapo": (VAPOTrainer, VAPOConfig), "sppo": (SPPOTrainer, SPPOConfig), "genac": (GenACTrainer, GenACConfig)}


def refusal(name: str, model_dir: str, output_dir: str) -> str:
    trainer_class, config_class = TRAINERS[name]
    settings = {**SETTINGS, "use_cpu": False, "ddp_backend": "gloo", "num_generations": 2}
    args = config_class(f"{output_dir}/{name}", **settings)  # makes the weights of later models be split
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    assert all(hasattr(p, "ds_id") for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    try:
        trainer_class(model, share_of_even, args, train_dataset=DATA, processing_class=tokenizer)
    except ValueError as error:
        return str(error)
    return "was not refused"


if __name__ == "__main__":
    model_dir, output_dir = sys.argv[1:]
    for name in TRAINERS:
        error = refusal(name, model_dir, output_dir)
        Path(output_dir, f"{name}_{distributed.get_rank()}.txt").write_text(error)
    distributed.destroy_process_group()
