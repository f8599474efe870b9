"""PPO's roles in one list, which training attaches to the shared base and planning counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...model.shared import SharedBase
from ...recipe.values import Recipe
from ..job import Job
from ..options import PPOConfig
from ..reward.adapters import JUDGE, check_probes
from ..scores import ROLE


@dataclass(frozen=True)
class Role:
    """A role on the shared base: an adapter, maybe with a head; or a head alone, on the features of another role."""

    name: str
    start: Path | Literal["sft", "policy"] | None = None  # its first adapter; a path is inside the run
    trained: bool = False
    head: Literal["saved", "zero"] | None = None  # saved: with the adapter
    on: str | None = None  # the role whose features a head alone reads
    copy: bool = False  # of the policy, which PPOTrainer makes and keeps in float32


def copies(config: PPOConfig) -> list[str]:
    """Roles that are copies of the policy at some time: its moving average, and the best so far (see `max_kl`)."""
    return ["ema"] * (config.ema_decay is not None) + ["best"] * (config.max_kl is not None)


def ppo_roles(recipe: Recipe, config: PPOConfig) -> list[Role]:
    """The roles that the stage needs, and no others: each is an adapter in memory."""
    assert recipe.ppo is not None
    reward, args = Path("reward"), {} if recipe.reward is None else recipe.reward.args
    roles = [Role("reference", "sft"), Role("policy", "policy", trained=True)]
    if ROLE in recipe.ppo.reward_sources:
        roles.append(Role("reward", reward, head="saved"))
        members = range(1, args.get("ensemble_size", 1))
        roles += [Role(f"reward_{number}", reward / f"member-{number}", head="saved") for number in members]
    if args.get("judge_share"):
        roles.append(Role(JUDGE, reward / JUDGE, head="saved"))
    if config.has_critic:
        starts = {
            "reward": Role("critic", reward, trained=True, head="saved"),
            "sft": Role("critic", "sft", trained=True, head="zero"),
            "head": Role("critic", trained=True, head="zero", on="policy"),
        }
        roles.append(starts[config.critic or ("reward" if recipe.reward is not None else "sft")])
    return roles + [Role(name, copy=True) for name in copies(config)]


def add_roles(shared: SharedBase, job: Job, roles: Sequence[Role]) -> None:
    """Attach roles to the base, but for the copies, and check that frozen reward models score as in training."""
    for role in roles:
        if role.copy:
            continue
        if role.on is None:
            folder = {"sft": job.sft, "policy": job.start}[role.start] if isinstance(role.start, str) else role.start
            if isinstance(role.start, Path):
                folder = job.run_dir / role.start
            shared.add_role(role.name, folder, trainable=role.trained, head=role.head == "saved")
        if role.head == "zero":
            shared.add_head(role.name, on=role.on)
        elif role.head == "saved" and not role.trained:
            assert folder is not None
            check_probes(shared, folder, role.name)
