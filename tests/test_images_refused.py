"""Critics read text: who has images is told so by every trainer with one, when it is made."""

import genac_runs
import pytest
import sppo_runs
import vapo_runs
from datasets import Dataset
from tiny import tiny_vision_language_model

from trl_credit import GenACConfig, GenACTrainer, SPPOConfig, SPPOTrainer, VAPOConfig, VAPOTrainer


TRAINERS = {
    "vapo": (VAPOTrainer, VAPOConfig, vapo_runs.SETTINGS),
    "sppo": (SPPOTrainer, SPPOConfig, vapo_runs.SETTINGS),
    "genac": (GenACTrainer, GenACConfig, {**vapo_runs.SETTINGS, **genac_runs.GENAC}),
}
TEXT = {"prompt": [[{"role": "user", "content": "What?"}]] * 4}
WITH_IMAGES = TEXT | {"image": ["a picture"] * 4}


def make(trainer, model, folder, train=TEXT, evaluate=None, streaming=False, **kwargs):
    trainer_class, config_class, settings = TRAINERS[trainer]
    train, evaluate = (None if data is None else Dataset.from_dict(data) for data in (train, evaluate))
    return trainer_class(
        model,
        sppo_runs.share_of_even,
        config_class(str(folder), **settings),
        train_dataset=train.to_iterable_dataset() if streaming else train,
        eval_dataset=evaluate,
        **kwargs,
    )


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    "data",
    [{"train": WITH_IMAGES}, {"evaluate": WITH_IMAGES}, {"train": WITH_IMAGES, "streaming": True}],
    ids=["training", "evaluation", "streaming"],
)
def test_a_dataset_with_images_is_refused(trainer, data, model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"The dataset has the columns \['image'\], which the critic cannot take"):
        make(trainer, model_dir, tmp_path, **data)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_vision_language_policy_is_refused_whatever_the_data_and_the_critic(trainer, model_dir, tmp_path):
    processor, model = tiny_vision_language_model()
    for critic in (None, model_dir):
        with pytest.raises(ValueError, match="is read with a LlavaProcessor, .* and the critic reads text only"):
            make(trainer, model, tmp_path, processing_class=processor, critic=critic)
