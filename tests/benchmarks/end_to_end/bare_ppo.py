"""The rival of `ppo`: an iteration of PPO as a notebook would have it, of transformers' models and plain torch.

All prompts have one length and so have all answers, so that it needs no masks. It draws by `generate`, computes under
autocast, and takes the updates that ours takes. Left out, which ours does: entropies, a proof that the generator holds
the policy's weights, figures.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from framework.optim.config import OptimConfig
from framework.stages.config import PpoRun


@dataclass(frozen=True)
class Judged:
    """Of the answers [B, A]: what an update needs."""

    tokens: Tensor  # [B, P+A]
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> "Judged":
        return Judged(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class BareLoop:
    """Policy, critic, reference and reward model on one device, weights in fp32."""

    def __init__(self, config: PpoRun, device: torch.device, dtype: torch.dtype):
        """`dtype`: of autocast."""
        self.ppo, self.optim, self.device = config.ppo, config.optim, device
        self.answer, self.size = config.rollout.max_tokens, config.batch.size  # tokens; rows of an update
        causal, scoring = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
        self.policy, self.reference = (_loaded(causal, config.init_from, device) for _ in range(2))
        self.critic, self.reward = (_loaded(scoring, config.reward_from, device) for _ in range(2))
        self.computing = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.learning = [(model, _adamw(model, config.optim, device)) for model in (self.critic, self.policy)]

    def iterate(self, prompts: Tensor) -> tuple[float, float]:
        """One iteration on prompts[B,P]."""
        order = [rows for _ in range(self.ppo.epochs) for rows in torch.randperm(len(prompts)).split(self.size)]
        return self.update(self.judge(self.draw(prompts)), order)

    @torch.no_grad()
    def draw(self, prompts: Tensor) -> Tensor:
        """prompts[B,P] -> [B,P+A], answers behind them."""
        words: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "eos_token_id": None}
        asked = prompts.to(self.device)
        with self.computing:
            drawn: Tensor = self.policy.generate(
                asked, attention_mask=torch.ones_like(asked), max_new_tokens=self.answer, **words
            )
        return drawn

    @torch.no_grad()
    def judge(self, tokens: Tensor) -> Judged:
        """Log-probs, values, scores; the KL into the rewards; GAE; whitening."""
        parts = [self._said(rows) for rows in tokens.split(self.size)]
        log_probs, reference, values, scores = (torch.cat(part) for part in zip(*parts, strict=True))
        rewards = -self.ppo.kl_coefficient * (log_probs - reference)
        rewards[:, -1] += scores
        advantages = self.advantages(rewards, values)
        whitened = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
        return Judged(tokens, log_probs, values, whitened, advantages + values)

    def _said(self, rows: Tensor) -> tuple[Tensor, ...]:
        with self.computing:
            log_probs = (self.log_probs(model, rows) for model in (self.policy, self.reference))
            return *log_probs, self.values(rows), _states_scored(self.reward, rows)[:, -1]

    def log_probs(self, model: Any, tokens: Tensor) -> Tensor:
        """[B,A] of the answers."""
        logits = model(tokens[:, :-1], use_cache=False, logits_to_keep=self.answer).logits
        labels = tokens[:, -self.answer :]
        return -F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)

    def values(self, tokens: Tensor) -> Tensor:
        """[B,A]: of the state before each token of the answers."""
        return _states_scored(self.critic, tokens[:, :-1])[:, -self.answer :]

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        """GAE, token by token from the last."""
        gamma, lam = self.ppo.gamma, self.ppo.lam
        behind = torch.zeros_like(values[:, 0])
        advantages, following = torch.zeros_like(values), behind
        for t in reversed(range(values.shape[1])):
            delta = rewards[:, t] + gamma * following - values[:, t]
            behind = delta + gamma * lam * behind
            advantages[:, t], following = behind, values[:, t]
        return advantages

    def update(self, judged: Judged, order: list[Tensor]) -> tuple[float, float]:
        """An update of critic and policy for each of the `order`ed rows; the mean losses (value, policy)."""
        losses = [
            torch.stack([self._learn(place, judged.select(rows.to(self.device))) for place in range(2)])
            for rows in order
        ]
        value, policy = torch.stack(losses).mean(0).tolist()
        return value, policy

    def _learn(self, place: int, rows: Judged) -> Tensor:
        model, adamw = self.learning[place]
        with self.computing:
            loss = self._policy_loss(rows) if place else self._value_loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.optim.clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    def _policy_loss(self, rows: Judged) -> Tensor:
        ratio = (self.log_probs(self.policy, rows.tokens) - rows.log_probs).exp()
        kept = ratio.clamp(1 - self.ppo.clip_low, 1 + self.ppo.clip_high)
        return -torch.minimum(ratio * rows.advantages, kept * rows.advantages).mean()

    def _value_loss(self, rows: Judged) -> Tensor:
        values, clip = self.values(rows.tokens), self.ppo.value_clip
        near = rows.values + (values - rows.values).clamp(-clip, clip)
        return 0.5 * torch.maximum((values - rows.returns).square(), (near - rows.returns).square()).mean()


def _loaded(kind: Any, folder: str, device: torch.device) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32).to(device).eval()  # no dropout, in updates either


def _adamw(model: Any, optim: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    betas = optim.beta1, optim.beta2
    return torch.optim.AdamW(
        model.parameters(), optim.lr, betas, optim.eps, optim.weight_decay, fused=device.type != "cpu"
    )


def _states_scored(model: Any, tokens: Tensor) -> Tensor:
    """[B,T]: what the head says of each state."""
    scored: Tensor = model.score(model.model(tokens, use_cache=False).last_hidden_state)
    return scored.squeeze(-1).float()
