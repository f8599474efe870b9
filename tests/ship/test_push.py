"""Pushing to the Hub, against a stand-in on loopback: what goes up, what is refused, what a failure leaves."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.command_line import error_of, failed
from support.hub import Hub, Repo, hub_stand_in
from support.shipped import make_run
from support.worded import make_recipe

from rlhf_recipes import replace
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.model.base import load_tokenizer
from rlhf_recipes.recipe.overrides import to_dict
from rlhf_recipes.recipe.values import Source
from rlhf_recipes.records.folder import read_recipe
from rlhf_recipes.records.trust import remember_own
from rlhf_recipes.ship import push

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the Hub's own client
PEOPLE = ("Ada Lovelace", "Grace Hopper")


def write_labels(path: Path) -> None:
    """Two people and a model have ranked the same three samples."""
    path.parent.mkdir(parents=True)
    rows = []
    for n in range(3):
        row = {"id": f"s{n}", "prompt": f"w{4 + n}", "responses": ["w5 w6", "w7"], "mine": "a column of one's own"}
        for name in PEOPLE:
            said = {"note": f"by {name}", "time": "2026-11-28T10:00:00Z", "browser": "b1", "seconds": 3.5}
            rows.append({**row, "ranking": [1, 2], "labeler": name, **said})
        rows.append({**row, "ranking": [2, 1], "labeler": "judge:/home/ada/model", "preferences": [0.25]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_run(tmp_path_factory.mktemp("push"))
    write_labels(made / "feedback" / "samples.labels.jsonl")
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_stand_in(monkeypatch) as hub:
        yield hub


def command(run: Path, *words: str) -> list[str]:
    return ["push", str(run), "org/name", "--base-id", "org/base", *words]


def test_each_kind_has_its_repository_and_all_of_them_are_private(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    main_cli(command(run, "--what", "adapter,reward,data", "--yes"))
    printed = capsys.readouterr().out
    assert list(hub.repos) == ["models/org/name", "models/org/name-reward", "datasets/org/name-data"]
    assert all(repo.private and repo.commits == 1 for repo in hub.repos.values())
    for place, names in {
        "models/org/name": {"adapter_model.safetensors", "adapter_config.json", "generation_config.json"},
        "models/org/name-reward": {"model.safetensors", "config.json"},
        "datasets/org/name-data": {"labels.jsonl"},
    }.items():
        files = hub.repos[place].files
        assert names | {"README.md"} <= files.keys()
        for name, data in files.items():
            assert f"  {name}\n" in printed
            assert str(run.parent).encode() not in data, f"{place}/{name}"
    card = hub.repos["models/org/name"].files["README.md"].decode()
    assert "token of its answers" not in card and "against the adapter on its own base" in card, (
        "measured by the export"
    )
    assert "how close what is uploaded is" not in card
    assert printed.splitlines()[-3:] == [f"{hub.url}/org/name", f"{hub.url}/org/name-reward",
                                         f"{hub.url}/datasets/org/name-data"]  # fmt: skip
    assert not (run / "push").exists()


def test_labels_go_without_names_and_can_be_trained_on(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With its other storage the client uploads in another way. It asks for no more where all files are small.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    main_cli(command(run, "--what", "data", "--yes", "--public"))
    repo = hub.repos["datasets/org/name-data"]
    assert not repo.private
    for data in repo.files.values():
        for word in (*PEOPLE, "Ada", "2026-11-28", "b1", "a column of", "/home"):
            assert word.encode() not in data
    rows = [json.loads(line) for line in repo.files["labels.jsonl"].splitlines()]
    assert [row["labeler"] for row in rows[:3]] == ["person-1", "person-2", "judge:model"]
    assert [row["preferences"] for row in rows[:3]] == [None, None, [0.25]], "all rows have the same columns"
    assert "9 rankings of responses to 3 prompts, given by 2 people and 1 model or function" in (
        repo.files["README.md"].decode()
    )
    (tmp_path / "labels.jsonl").write_bytes(repo.files["labels.jsonl"])
    recipe = read_recipe(run)
    source = Source(str(tmp_path / "labels.jsonl"), heldout=0.0)
    assert prepare("reward", source, load_tokenizer(recipe.base), 64, 0).report["used"] == 9
    main_cli(command(run, "--what", "data", "--yes", "--public", "--labelers"))
    assert PEOPLE[0].encode() in repo.files["labels.jsonl"] and b"by Ada" in repo.files["labels.jsonl"]
    assert repo.commits == 2


def test_labels_of_rounds_and_those_that_were_trained_on_are_found_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_labels(run / "round-2" / "feedback" / "labels.jsonl")
    write_labels(run / "feedback" / "samples.labels.jsonl")
    (run / "feedback" / "samples.labels.trained.jsonl").write_text("{}\n")
    write_labels(tmp_path / "given" / "mine.jsonl")
    recipe = replace(make_recipe(tmp_path), reward={"data": str(tmp_path / "given" / "mine.jsonl")})
    assert list(push.find_labels(run, recipe)) == ["samples", "round-2"], "a stranger's run takes no other file"
    remember_own(run, to_dict(recipe))
    found = push.find_labels(run, recipe)
    assert list(found) == ["samples", "round-2", "mine"]
    again = replace(recipe, reward={"data": str(found["samples"])})
    assert list(push.find_labels(run, again)) == ["samples", "round-2"]
    pairs = make_recipe(tmp_path)  # whose comparisons are nobody's labels
    with pytest.raises(ValueError, match="nobody has judged anything for this run"):
        push.find_labels(tmp_path, pairs)


def test_what_failed_in_the_middle_goes_on_there(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main_cli(["export", str(run), "--to", str(tmp_path / "mine"), "--shard-size", "10KB"])
    shards = list((tmp_path / "mine").glob("*.safetensors"))
    assert len(shards) > 3
    words = command(run, "--what", "merged,reward", "--exported", str(tmp_path / "mine"), "--yes")
    hub.refuses = lambda request: request.startswith("PUT") and len(hub.puts()) > 2
    error = failed(capsys, words)
    assert error.startswith("error: org/name: Error while uploading") and "Private storage limit reached." in error
    assert error.endswith("The same command goes on with what is not up yet.")
    assert hub.repos["models/org/name"].files == {} and len(hub.stored) == 2
    stored = set(hub.stored)
    hub.refuses = lambda request: "name-reward" in request and "commit" in request
    failed(capsys, words)
    assert hub.repos["models/org/name"].commits == 1 and hub.repos["models/org/name-reward"].commits == 0

    def never(*_: Any) -> None:
        raise AssertionError("it is exported already")

    hub.refuses, hub.requests = lambda request: False, []
    monkeypatch.setattr(push, "EXPORTS", dict.fromkeys(push.EXPORTS, never))
    main_cli(words)
    assert [repo.commits for repo in hub.repos.values()] == [1, 1] and hub.puts() == []
    files = hub.repos["models/org/name"].files
    assert {path.name: path.read_bytes() for path in shards}.items() <= files.items() and stored <= set(hub.stored)
    assert not (run / "push").exists() and not (tmp_path / "mine" / "README.md").exists()


def test_the_other_form_of_a_policy_takes_the_place_of_the_first(run: Path, hub: Hub) -> None:
    main_cli(command(run, "--yes"))
    main_cli(command(run, "--what", "merged", "--yes"))
    files = hub.repos["models/org/name"].files
    assert "model.safetensors" in files and not {"adapter_config.json", "adapter_model.safetensors"} & files.keys()


def test_it_asks_before_it_sends_anything(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda words: "n")
    main_cli(command(run))
    printed = capsys.readouterr().out
    assert "org/name (model, private)" in printed and "kB  adapter_model.safetensors" in printed
    assert "Nothing was uploaded." in printed and hub.repos == {}
    monkeypatch.setattr("builtins.input", lambda words: "y")
    main_cli(command(run))
    assert "models/org/name" in hub.repos


def test_what_cannot_go_up_is_said_before_anything_is_made(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()

    def said(*words: str) -> str:
        return error_of(capsys, [*command(run, *words), "--yes"])

    assert "Did you mean adapter?" in said("--what", "adaptor")
    assert "--what names the same twice: data, data." in said("--what", "data,data")
    assert "--samples must not be negative" in said("--samples", "-1")
    assert "--base-id: Repo id must be" in said("--base-id", "a/b/c")
    assert "is the bare base" in said("--model", "base")
    assert "reward is a reward model" in said("--model", "reward")
    assert f"--exported {tmp_path} holds no export.json" in said("--exported", str(tmp_path))
    for name, words in {"name": "names no owner", "a/b/c": "Repo id must be", "org/.name": "cannot start"}.items():
        assert words in error_of(capsys, ["push", str(run), name, "--base-id", "org/base", "--yes"])
    assert "set --base-id" in error_of(capsys, ["push", str(run), "org/name", "--yes"])
    assert "add --yes" in error_of(capsys, command(run))
    with monkeypatch.context() as patched:
        patched.delenv("HF_TOKEN")
        patched.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        assert "There is no token of the Hub: run `hf auth login`, or set HF_TOKEN." in said()
        main_cli(command(run, "--card"))  # which needs none
        assert "base_model: org/base" in capsys.readouterr().out
        patched.setenv("HF_TOKEN", "hf_of_another")
        assert "Invalid user token" in said()
    hub.user["auth"]["accessToken"]["role"] = "read"
    assert "The token can only read" in said()
    hub.user["auth"]["accessToken"]["role"], hub.user["orgs"] = "write", []
    assert "the token is me's, who can write to me." in said()
    hub.user["orgs"] = [{"name": "org"}]
    hub.repos["models/org/name"] = Repo(private=False)
    assert "org/name is there, and is public: push with --public" in said()
    hub.repos["models/org/name"] = Repo(private=True)
    assert "org/name is there, and is private: push without --public" in said("--public")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub: [Errno" in said()
    assert not (run / "push").exists() and hub.puts() == []


def test_an_export_of_other_weights_or_another_form_is_refused(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main_cli(["export", str(run), "--to", str(out)])
    record = json.loads((out / "export.json").read_text())
    capsys.readouterr()
    exported = ["--exported", str(out), "--yes"]
    assert "the same twice: merged, merged" in error_of(capsys, command(run, *exported, "--exported", str(out)))
    assert "the folders hold merged, and of each in --what (reward) it takes one" in error_of(
        capsys, command(run, *exported, "--what", "reward")
    )
    (out / "export.json").write_text(json.dumps({**record, "adapter": "another"}))
    assert "was made of other weights than ppo has in" in error_of(capsys, command(run, *exported))
    (out / "export.json").write_text(json.dumps({**record, "format": "gguf"}))
    assert "is of --format gguf: name a folder" in error_of(capsys, command(run, *exported))


def test_what_a_link_leads_to_is_not_sent(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_cli(["export", str(run), "--format", "adapter", "--base-id", "org/base", "--to", str(tmp_path / "made")])
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "made" / "notes.txt").symlink_to(tmp_path / "secret")
    words = command(run, "--exported", str(tmp_path / "made"), "--yes")
    capsys.readouterr()
    assert "notes.txt is a link that leads out of" in error_of(capsys, words)
    assert not hub.repos
