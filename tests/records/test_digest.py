"""Hashes that stand in files and caches: they must not change from one version to the next."""

from rlhf_recipes.records.digest import digest, row_id


def test_hashes_are_those_of_the_files_that_there_are() -> None:
    assert digest("answer", {"b": 1, "a": None}, [1.5, "é"]) == "836090f1750cd008d83d6c9805a6342d"
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1}, {"b": 2})
    assert row_id([{"role": "user", "content": "hi"}]) == "5e0e587876e28e72"
