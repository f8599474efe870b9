"""What a run folder holds, by name."""

from pathlib import Path

from rlhf_recipes.records.checkpoints import last_checkpoint
from rlhf_recipes.records.folder import checkpoints, newest_round_first, policy_checkpoints


def test_what_a_user_has_put_aside_is_no_checkpoint_and_no_round(tmp_path: Path) -> None:
    for name in (
        "checkpoint-40",
        "checkpoint-5",
        "checkpoint-40-old",
        "checkpoint-x",
        "checkpoint-9.bak",
        "checkpoint-²",
    ):
        (tmp_path / "ppo" / name / "policy").mkdir(parents=True)
        (tmp_path / "ppo" / name / "policy" / "adapter_config.json").write_text("{}")
        (tmp_path / "ppo" / name / "trainer_state.json").write_text("{}")
    for name in ("round-2", "round-10", "round-2.bak", "round-", "rounds"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path / "ppo")] == ["checkpoint-5", "checkpoint-40"]
    assert policy_checkpoints(tmp_path) == ["ppo/checkpoint-5", "ppo/checkpoint-40"]
    assert last_checkpoint(tmp_path / "ppo") == str(tmp_path / "ppo" / "checkpoint-40")
    assert newest_round_first(tmp_path) == [tmp_path / "round-10", tmp_path / "round-2", tmp_path]
