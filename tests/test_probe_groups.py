"""Completions of a prompt as the report has them: each knows the rewards of the others, and not its own."""

from vapo_runs import PROMPTS

from trl_credit.critic_report import LeaveOneOutMean, ProbeSettings, draw_probes, load_policy


def length(completion_ids, **kwargs):
    return [len(ids) / 8 for ids in completion_ids]


def test_the_other_rewards_of_a_completion_are_those_of_the_others_of_its_prompt(model_dir, tmp_path):
    settings = ProbeSettings(completions=3, continuations=2, candidates=0, max_completion_length=8)
    rows = [{"prompt": prompt} for prompt in PROMPTS[:3]]
    probes = draw_probes(tmp_path, load_policy(model_dir), rows, length, settings)
    groups = [[rollout for rollout in probes.rollouts if rollout.group == group] for group in range(3)]
    assert len({rollout.reward for rollout in probes.rollouts}) > 3
    for group in groups:
        rewards = [rollout.reward for rollout in group]
        assert rewards == [len(rollout.completion_ids) / 8 for rollout in group] and len(rewards) == 3
        for place, rollout in enumerate(group):
            assert rollout.other_rewards == rewards[:place] + rewards[place + 1 :]
    means = [values[0] for values in LeaveOneOutMean().values(probes.rollouts)]
    assert means == [sum(rollout.other_rewards) / 2 for rollout in probes.rollouts]


def test_chunks_of_one_run_have_random_numbers_of_their_own(model_dir, tmp_path):
    settings = ProbeSettings(completions=8, continuations=2, candidates=0, max_completion_length=8)
    policy = load_policy(model_dir, batch_size=2)
    probes = draw_probes(tmp_path, policy, [{"prompt": PROMPTS[0]}], length, settings)
    pairs = [tuple(tuple(r.completion_ids) for r in probes.rollouts[at : at + 2]) for at in range(0, 8, 2)]
    assert len(set(pairs)) == 4, "the same seed gives the same samples of the same prompt"


def test_no_continuation_makes_a_completion_longer_than_it_may_be(model_dir, tmp_path):
    settings = ProbeSettings(completions=4, continuations=8, candidates=0, max_completion_length=6)
    policy, wholes = load_policy(model_dir), []

    def watched(completion_ids, **kwargs):
        wholes.extend(map(len, completion_ids))
        return length(completion_ids)

    draw_probes(tmp_path, policy, [{"prompt": prompt} for prompt in PROMPTS[:4]], watched, settings)
    assert max(wholes) == 6 and wholes.count(6) > 8
