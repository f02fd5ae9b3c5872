"""What is sampled: names, seeds and tables of prompts."""

from pathlib import Path

import pytest

from opensora.config import SampleConfig
from opensora.inference.prompts import read_jobs
from opensora.utils.errors import UserError
from opensora.utils.sampling import SamplingOption


def test_every_prompt_gets_its_seeds_and_a_name_of_its_own() -> None:
    cfg = SampleConfig(weights="w", prompt="a", prompts=("b",), num_sample=2, sampling=SamplingOption(seed=0))
    jobs = read_jobs(cfg)
    assert [(job.text, job.seed, job.name) for job in jobs] == [
        ("a", 0, "sample_0000_0"),
        ("a", 1, "sample_0000_1"),
        ("b", 0, "sample_0001_0"),
        ("b", 1, "sample_0001_1"),
    ]


def test_a_table_names_its_samples(tmp_path: Path) -> None:
    table = tmp_path / "cats.csv"
    table.write_text("\ufefftext,name,neg,score\na cat,first,blurry,3\na dog,,,\n", encoding="utf-8")
    jobs = read_jobs(SampleConfig(weights="w", prompt_csv=str(table)))
    assert [(job.text, job.neg, job.name) for job in jobs] == [("a cat", "blurry", "first"), ("a dog", "", "cats_0001")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ("text\n", "empty"),
        ("caption\na\n", "no column text"),
        ("text,name\na,x\nb,x\n", "'x' stands for two"),
        ("text,name\na,../x\n", "must be a file name"),
        ("text,ref\na,x.png\n", "ref"),
        ("text,name\n,x\n", "line 2 has no text"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, content: str, expected: str) -> None:
    table = tmp_path / "t.csv"
    table.write_text(content)
    with pytest.raises(UserError, match=expected):
        read_jobs(SampleConfig(weights="w", prompt_csv=str(table)))


def test_a_missing_table_and_no_prompt_are_refused() -> None:
    with pytest.raises(UserError, match="no such file"):
        read_jobs(SampleConfig(weights="w", prompt_csv="nowhere.csv"))
    with pytest.raises(ValueError, match="prompt"):
        SampleConfig(weights="w")
