"""Kills all that writes, at random moments and at every write, and starts it once more: `make faults`.

    make faults ARGS="--kills 20 --only sft,ppo"

Each piece of work (see `work`) is done once without a kill. Then it is killed by SIGKILL at seeded random moments, and
begun again from what each of its writes would have left behind (see `states`). One more start must come to the same
bits as the work that nobody killed; before that, `report` must show what there is, or say in one line why not.

A process that has imported all forks for each start, so that one costs no imports.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  of the reward card, which imports it late
import torch
from faults.states import States
from faults.work import WORK, begin, contents, differences, make_inputs, use_cache

from rlhf_recipes.report.write import write_report

LONGEST = 300.0  # seconds that a start may take: more is a hang


def start(work: Callable[[], Any], log: Path) -> int:
    """Begin some work in a process of its own. Returns its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process: int, seconds: float) -> int | None:
    """The exit code of a process that ends within some seconds; one that does not is killed, and None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


class Trial:
    """All kills of one piece of work."""

    def __init__(self, root: Path, name: str, seed: int) -> None:
        self.root, self.name, self.seed = root, name, seed
        self.log = root / "logs" / f"{name}.txt"
        self.log.parent.mkdir(exist_ok=True)
        self.inputs, self.place = root / "inputs", root / "places" / name
        self.kills = self.states = self.writes = 0  # that were tried
        self.lost: list[str] = []  # what went wrong
        self.started = time.monotonic()
        self.seconds = self._finish_whole()

    def _do(self) -> None:
        WORK[self.name].do(self.inputs, self.place)

    def _whole(self) -> Path:
        return self.root / "done" / self.name

    def _finish_whole(self) -> float:
        """Do the work without a kill, and keep what it comes to. Returns the seconds that it took."""
        begin(self.root, self.name)
        start_time = time.monotonic()
        if ended(start(self._do, self.log), LONGEST) != 0:
            raise SystemExit(f"{self.name} fails without any kill: see {self.log}")
        seconds = time.monotonic() - start_time
        shutil.rmtree(self._whole(), ignore_errors=True)
        shutil.copytree(self.place, self._whole())
        self.whole = contents(self._whole())
        return seconds

    def kill_at_random(self, count: int) -> None:
        """Kill it at seeded random moments. One that comes after the end is none, and another is drawn."""
        rng = random.Random(f"{self.seed} {self.name}")
        while self.kills < count:
            moment = rng.uniform(0, self.seconds)
            begin(self.root, self.name)
            if ended(start(self._do, self.log), moment) is None:
                self.kills += 1
                self._start_again(f"killed after {moment:.3f} s")

    def kill_at_writes(self, most: int) -> None:
        """Begin it again from what each write leaves; of more states than `most`, from so many seeded ones."""
        states = States(begin(self.root, self.name), self.root / "copies" / self.name, self.seed)
        shutil.rmtree(states.copies, ignore_errors=True)
        states.copies.mkdir(parents=True)

        def watched() -> None:
            with states.watching():
                self._do()

        assert ended(start(watched, self.log), LONGEST) == 0, self.log
        if told := differences(contents(self.place), self.whole):
            self.lost.append(f"two runs that nobody killed: {'; '.join(told)}")
        found = list(states)
        self.writes = len({path.name.partition(" ")[0] for path in found})
        chosen = sorted(random.Random(self.seed).sample(found, min(most, len(found))))
        for state in chosen:
            begin(self.root, self.name)  # the run is known as the user's own
            shutil.rmtree(self.place)
            shutil.copytree(state, self.place)
            self.states += 1
            self._start_again(state.name)
        shutil.rmtree(states.copies)

    def _start_again(self, when: str) -> None:
        """Start the work once more, and note what is not as it should be."""
        if (self.place / "run" / "recipe.json").is_file():
            self._expect_report(when)
        code = ended(start(self._do, self.log), LONGEST)
        if code == 0:
            told = differences(contents(self.place), self.whole)
        else:
            told = ["it hangs" if code is None else f"the next start ends with {code}: see {self.log}"]
        if told:
            self.lost.append(f"{when}: {'; '.join(told)}")
            print(f"  {self.name}, {self.lost[-1]}", flush=True)

    def _expect_report(self, when: str) -> None:
        """What there is can be shown, or it is said why not."""

        def show() -> None:
            try:
                write_report([self.place / "run"], self.root / "report.html")
            except ValueError as error:
                print(f"report: {error}")

        if ended(start(show, self.log), LONGEST) != 0:
            self.lost.append(f"{when}: no report: see {self.log}")
            print(f"  {self.name}, {self.lost[-1]}", flush=True)

    def row(self) -> dict[str, Any]:
        """Its row of the table."""
        minutes = (time.monotonic() - self.started) / 60
        lost = {line.partition(":")[0] for line in self.lost}
        killed = sum(line.startswith("killed") for line in lost)
        return {
            "stage": self.name,
            "kills": self.kills,
            "kills survived": self.kills - killed,
            "writes": self.writes,
            "states": self.states,
            "states survived": self.states - (len(lost) - killed),
            "seconds of one run": round(self.seconds, 1),
            "minutes": round(minutes, 1),
        }


def needed(names: list[str]) -> Iterator[str]:
    """The work of these names, each behind what it builds on."""
    wanted: dict[str, None] = {}

    def add(name: str) -> None:
        if WORK[name].begins_with:
            add(WORK[name].begins_with)
        wanted[name] = None

    for name in names:
        add(name)
    yield from wanted


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a table of Markdown."""
    lines = [" | ".join(rows[0]), " | ".join(["---"] + ["---:"] * (len(rows[0]) - 1))]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(map(str, row.values())) for row in rows)])


def main() -> None:
    """Kill, start again, and print what survived; exit with 1 where something did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="at random moments, of each (default: 20)")
    parser.add_argument("--states", type=int, default=10**6, help="at writes, of each at most (default: all)")
    parser.add_argument("--only", default=",".join(WORK), help="stages and commands, by comma (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("faults.json"), help="for the rows (default: faults.json)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    root = Path(tempfile.mkdtemp(prefix="rlhf-recipes-faults-"))
    use_cache(root)
    gc.freeze()
    assert ended(start(lambda: make_inputs(root / "inputs"), root / "inputs.txt"), LONGEST) == 0, root / "inputs.txt"
    names, rows, lost = options.only.split(","), [], []
    for name in needed(names):
        trial = Trial(root, name, options.seed)
        if name in names:
            trial.kill_at_random(options.kills)
            trial.kill_at_writes(options.states)
            rows.append(trial.row())
            lost += [f"{name}, {line}" for line in trial.lost]
            options.out.write_text(json.dumps({"rows": rows, "lost": lost}, indent=2) + "\n")
            print(rows[-1], flush=True)
    print(table(rows))
    if lost:
        print(f"{len(lost)} did not survive; logs and places: {root}", *lost, sep="\n")
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
