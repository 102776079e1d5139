"""Recurrent PPO: act one step at a time, then train on whole rollouts with `reset_mask` at episode starts."""

from __future__ import annotations

import torch
from torch import nn

import fastlstm

from ..device import TEST_DEVICE
from ..module_pairs import data

T, B = 12, 5


class Policy(nn.Module):
    """Actor and critic on one LSTM; observations [T, B, 3], two actions."""

    def __init__(self, H: int = 8, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        dtype = dtype or TEST_DEVICE.dtype
        self.lstm = fastlstm.LSTM(3, H, dtype=dtype)
        self.actor, self.critic = nn.Linear(H, 2, dtype=dtype), nn.Linear(H, 1, dtype=dtype)

    def forward(self, x, state, starts):
        """Logits [T, B, 2], values [T, B], state; starts [T, B]: the step is the first of an episode."""
        output, state = self.lstm(x, state, reset_mask=starts)
        return self.actor(output), self.critic(output)[..., 0], state

    def zero_state(self, rows):
        zeros = self.actor.weight.new_zeros(1, rows, self.lstm.hidden_size)
        return zeros, zeros


def step_by_step(policy, x, state, starts):
    """The step loop of other recurrent PPO implementations, which zeroes the state at episode starts."""
    logits, values = [], []
    for t in range(len(x)):
        keep = (~starts[t]).to(x.dtype)[None, :, None]
        output, state = policy.lstm(x[t : t + 1], (state[0] * keep, state[1] * keep))
        logits.append(policy.actor(output))
        values.append(policy.critic(output)[..., 0])
    return torch.cat(logits), torch.cat(values), state


def ppo_loss(logits, values, actions, old, advantages, returns):
    """The clipped objective of Schulman et al. 2017, with the value's error and the entropy."""
    distribution = torch.distributions.Categorical(logits=logits)
    ratio = (distribution.log_prob(actions) - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    objective = torch.minimum(ratio * advantages, clipped * advantages).mean()
    return -objective + 0.5 * (values - returns).pow(2).mean() - 0.01 * distribution.entropy().mean()


def rollout_data():
    starts = data(T, B, seed=2) > 0.8
    starts[0, 1] = True
    assert starts.any(0).sum() > 1
    assert not starts.all()
    state = (data(1, B, 8, seed=3), data(1, B, 8, seed=4))  # not at an episode start
    return data(T, B, 3), state, starts


def test_training_pass_equals_the_rollout(backend):
    policy, (x, state, starts) = Policy(), rollout_data()
    with torch.no_grad():
        logits, values, last = step_by_step(policy, x, state, starts)
        results = policy(x, state, starts)
    torch.testing.assert_close(results[:2], (logits, values))
    torch.testing.assert_close(results[2], last)


def test_gradients_of_ppo_equal_those_of_the_step_loop(backend):
    policy, (x, state, starts) = Policy(), rollout_data()
    actions = (data(T, B, seed=6) > 0).long()
    targets = (actions, *(data(T, B, seed=k) for k in (7, 8, 9)))
    gradients = []
    for run in (step_by_step, lambda policy, *args: policy(*args)):
        policy.zero_grad()
        logits, values, _ = run(policy, x, state, starts)
        ppo_loss(logits, values, *targets).backward()
        gradients.append({name: w.grad.clone() for name, w in policy.named_parameters()})
    torch.testing.assert_close(*gradients)
    rows = torch.tensor([3, 0])  # a minibatch consists of whole rows with their states
    part = policy(x[:, rows], tuple(s[:, rows] for s in state), starts[:, rows])
    torch.testing.assert_close(part[0], policy(x, state, starts)[0][:, rows])


def test_recurrent_policy_learns_a_memory_task():
    """A cue is visible in the first step of an episode only; actions equal to it are rewarded."""
    policy = Policy(H=16, dtype=torch.float32)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    rows, steps, length = 32, 16, 5
    clock = torch.arange(steps)[:, None] + torch.arange(rows)  # episodes begin at different times
    starts = clock % length == 0
    starts[0] = True
    accuracy = 0.0
    for _ in range(60):
        cue, observed = torch.zeros(rows, dtype=torch.long), []
        cues = []
        for t in range(steps):
            cue = torch.where(starts[t], torch.randint(2, (rows,)), cue)
            cues.append(cue)
            shown = torch.nn.functional.one_hot(cue, 2).float() * starts[t, :, None]
            observed.append(torch.cat([shown, torch.ones(rows, 1)], 1))
        x, cues = torch.stack(observed), torch.stack(cues)
        with torch.no_grad():
            logits, values, _ = step_by_step(policy, x, policy.zero_state(rows), starts)
            acting = torch.distributions.Categorical(logits=logits)
            actions = acting.sample()
            old, rewards = acting.log_prob(actions), (actions == cues).float()
        accuracy = float(rewards[-length:].mean())
        for _ in range(2):
            logits, values, _ = policy(x, policy.zero_state(rows), starts)
            loss = ppo_loss(logits, values, actions, old, rewards - values.detach(), rewards)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert accuracy > 0.9  # 0.5 without memory
