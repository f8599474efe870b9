"""What `doctor` finds on this machine, and what it says where something is missing."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.plan import doctor
from rlhf_recipes.plan.doctor import Finding, examine, table


@pytest.fixture
def lonely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a token or a key, in an empty folder."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "get_token", lambda: None)
    monkeypatch.setattr(doctor, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


def test_this_machine_can_run(lonely: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_cli(["doctor"])  # exits with 1 where it cannot
    printed = capsys.readouterr().out
    assert f"torch {version('torch')}" in printed and "NF4       works on" in printed
    assert "hf auth login" in printed and "wandb login, or tracker=none" in printed
    assert ("GPU       none" in printed) != torch.cuda.is_available()


def test_what_is_missing_or_too_old_is_named_with_what_installs_it(
    lonely: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = ["trl<1,>=0.1", "no-such-package>=3", "rich", 'torch; extra == "good"', 'absent; extra == "bad"']
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    findings = examine()
    assert of(findings, "Packages").stops
    assert of(findings, "Packages").remedy == "pip install 'trl<1,>=0.1' 'no-such-package>=3'"
    assert of(findings, "Extras").found == "good; without bad"
    with pytest.raises(SystemExit) as exit:
        main_cli(["doctor"])
    assert exit.value.code == 1 and "! pip install" in capsys.readouterr().out


def test_a_gpu_that_torch_does_not_see_is_told_from_none(lonely: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "has no CUDA: install one that has" in str(of(list(doctor._devices()), "GPU").remedy)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "whether the driver does" in str(of(list(doctor._devices()), "GPU").remedy)


def test_kernels_that_do_not_work_and_a_folder_that_cannot_be_written(
    lonely: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor.bitsandbytes.functional, "quantize_4bit", broken)
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: False)
    findings = examine()
    assert of(findings, "NF4").found == "does not work: no kernel image"
    assert of(findings, "Runs").stops and str(lonely) in str(of(findings, "Runs").remedy)
    assert not of(findings, "Cache").stops, "a run needs no cache"


def test_what_mends_it_stands_below() -> None:
    said = table([Finding("A", "fine"), Finding("Long", "off", "do this"), Finding("B", "gone", "do that", stops=True)])
    assert said.splitlines() == ["A     fine", "Long  off", "      - do this", "B     gone", "      ! do that"]
