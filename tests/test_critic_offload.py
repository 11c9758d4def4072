"""A critic whose weights and optimizer state are on the host between its turns trains as one that stays."""

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model
from vapo_runs import make_trainer

from trl_credit import VAPOConfig
from trl_credit.critics.engine.engine import CriticEngine, CriticOptimization


def make_engine(offload: bool, optimizer=torch.optim.AdamW) -> CriticEngine:
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    settings = CriticOptimization(learning_rate=1e-2, weight_decay=0.1, optimizer=optimizer, offload=offload)
    engine = CriticEngine(model, Accelerator(cpu=True), settings)
    engine.begin(4)
    return engine


def places(engine) -> dict[str, int]:
    """Where weights and optimizer state are in memory."""
    found = {name: weight.data_ptr() for name, weight in engine.network.named_parameters()}
    for number, state in enumerate(engine.backend.optimizer.state.values()):
        found |= {f"{number} {name}": value.data_ptr() for name, value in state.items() if value.dim() > 0}
    return found


def loss(network, ids):
    return network(input_ids=ids).logits.square().sum()


def update(engine, seen=None):
    def look_and_lose(network, ids):
        if seen is not None:
            seen.append(places(engine))
        return loss(network, ids)

    return engine.update([torch.arange(1, 9).unsqueeze(0)], look_and_lose, lambda ids: torch.tensor(ids.numel()))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_updates_values_and_state_are_those_of_a_critic_that_stays(optimizer):
    offloaded, stays = make_engine(True, optimizer), make_engine(False, optimizer)
    for _ in range(4):
        assert update(offloaded) == update(stays)
        values = [
            engine.evaluate(lambda network: loss(network, torch.arange(5, 9)[None])) for engine in (offloaded, stays)
        ]
        assert values[0] == values[1]
    for own, other in zip(offloaded.network.parameters(), stays.network.parameters(), strict=True):
        assert torch.equal(own, other)
    for own, other in zip(
        offloaded.backend.optimizer.state.values(), stays.backend.optimizer.state.values(), strict=True
    ):
        assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_in_its_turn_everything_is_a_copy_and_between_turns_in_its_place_on_the_host():
    engine = make_engine(True)
    update(engine)
    at_rest, seen = places(engine), []
    assert len(at_rest) > len(list(engine.network.parameters())), "with an optimizer's state"
    update(engine, seen)
    for name, place in seen[0].items():
        assert place != at_rest[name], f"{name} is not moved"
    assert places(engine) == at_rest
    in_evaluation = []
    engine.evaluate(lambda network: in_evaluation.append(places(engine)))
    moved = {name for name, place in in_evaluation[0].items() if place != at_rest[name]}
    assert moved == {name for name, _ in engine.network.named_parameters()}, "the weights alone"
    assert places(engine) == at_rest


def test_a_turn_that_fails_leaves_everything_on_the_host():
    engine = make_engine(True)
    update(engine)
    at_rest = places(engine)
    with pytest.raises(ZeroDivisionError):
        engine.evaluate(lambda network: 1 / 0)
    assert places(engine) == at_rest


def test_a_run_with_it_is_the_run(model_dir, tmp_path):
    def weights(**settings):
        trainer = make_trainer(model_dir, tmp_path / str(settings), max_steps=2, save_strategy="no", **settings)
        trainer.train()
        return [*trainer.model.parameters(), *trainer.critic.parameters()]

    for own, other in zip(weights(critic_offload=True), weights(), strict=True):
        assert torch.equal(own, other)


def test_it_is_refused_where_it_has_no_effect():
    with pytest.raises(ValueError, match="`critic_offload=True` has no effect with `critic_share_base=True`"):
        VAPOConfig("out", critic_offload=True, critic_share_base=True, use_cpu=True, bf16=False, report_to=[])
