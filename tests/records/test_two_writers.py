"""A file that two write at once is one of the two, whole."""

from pathlib import Path
from threading import Thread

from rlhf_recipes.records.files import write_text


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path, texts, failures = tmp_path / "file", ["a" * 10_000, "b" * 20_000], []

    def writes(text: str) -> None:
        try:
            for _ in range(30):
                write_text(path, text)
                assert path.read_text() in texts
        except (OSError, AssertionError) as error:
            failures.append(error)

    threads = [Thread(target=writes, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and [each.name for each in tmp_path.iterdir()] == ["file"]
