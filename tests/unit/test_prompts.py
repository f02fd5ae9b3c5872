"""What is sampled: names, seeds and tables of prompts."""

import csv
import random
import time
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as papq
import pytest

from opensora.config.run import SampleConfig
from opensora.inference.prompts import MAX_PROMPT, Job, read_jobs, with_names
from opensora.sampling.options import SamplingOption
from opensora.utils.errors import UserError


def test_every_prompt_gets_its_seeds_and_a_name_of_its_own() -> None:
    cfg = SampleConfig(weights="w", prompt="a", prompts=("b",), num_sample=2, sampling=SamplingOption(seed=0))
    jobs = read_jobs(cfg)
    assert [(job.text, job.seed, job.name) for job in jobs] == [
        ("a", 0, "sample_0000"),
        ("a", 1, "sample_0000_1"),
        ("b", 0, "sample_0001"),
        ("b", 1, "sample_0001_1"),
    ]


def jobs_of(folder: Path, content: str | bytes, *, file: str = "cats.csv", num_sample: int = 1) -> list[Job]:
    table = folder / file
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_jobs(SampleConfig(weights="w", prompt_csv=str(table), num_sample=num_sample))


def names_of(folder: Path, content: str, **more: int) -> list[str]:
    return [job.name for job in jobs_of(folder, content, **more)]  # type: ignore[arg-type]


def test_a_table_names_its_samples(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "\ufefftext,name,neg,score\na cat,first,blurry,3\na dog,,,\n")
    assert [(job.text, job.neg, job.name) for job in jobs] == [("a cat", "blurry", "first"), ("a dog", "", "cats_0001")]


def test_references_of_a_table(tmp_path: Path) -> None:
    """Files that are not where the command runs are those beside the table; an empty cell is no reference."""
    (tmp_path / "a.png").touch()
    jobs = jobs_of(tmp_path, f"text,ref\na,a.png; {tmp_path}/b.mp4\nb,\nc, x.png ;\n")
    assert [job.ref for job in jobs] == [f"{tmp_path / 'a.png'};{tmp_path}/b.mp4", "", "x.png"]
    cfg = SampleConfig(weights="w", prompt="a", ref="x.png;y.mp4", num_sample=2)
    assert [job.ref for job in read_jobs(cfg)] == ["x.png;y.mp4"] * 2
    with pytest.raises(ValueError, match="ref: is for prompt and prompts"):
        SampleConfig(weights="w", prompt_csv="t.csv", ref="x.png")


def test_a_parquet_table_is_read_as_its_csv(tmp_path: Path) -> None:
    """Any columns beside those that are known, in any order, empty cells, and more rows than are read at once."""
    rows = [(f"p{i},\n{i}", "" if i % 3 else "a.png;b.mp4", f"n{i}" if i % 2 else "") for i in range(2500)]
    columns: dict[str, Any] = {
        "score": pa.array(range(2500)),
        "name": pa.array([row[2] or None for row in rows]),
        "text": pa.array([row[0] for row in rows], pa.large_string()),
        "neg": pa.nulls(2500),
        "ref": pa.array([row[1] for row in rows]),
    }
    papq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=700)
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "ref", "name"), *rows])
    found, wanted = (
        read_jobs(SampleConfig(weights="w", prompt_csv=str(tmp_path / f"t.{kind}"))) for kind in ("parquet", "csv")
    )
    assert [replace(job, place="") for job in found] == [replace(job, place="") for job in wanted]
    assert found[0].place == f"prompt_csv={tmp_path}/t.parquet row 1" and found[2499].place.endswith(" row 2500")
    assert wanted[0].place.endswith("t.csv line 3") and found[2499].text == "p2499,\n2499"


def test_a_part_of_a_table_and_names_as_asked(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,name\n" + "".join(f"p{i}.,{'cat' * (i == 3)}\n" for i in range(6)))
    part = {"prompt_csv": str(tmp_path / "t.csv"), "start_index": 2, "end_index": 5, "save_prefix": "p_"}
    jobs = read_jobs(SampleConfig(weights="w", **part, num_sample=2))  # type: ignore[arg-type]
    assert [job.name for job in jobs] == ["p_t_0002", "p_t_0002_1", "p_cat", "p_cat_1", "p_t_0004", "p_t_0004_1"]
    jobs = read_jobs(SampleConfig(weights="w", **part, prompt_as_path=True))  # type: ignore[arg-type]
    assert [job.name for job in jobs] == ["p_p2-0", "p_p3-0", "p_p4-0"]
    cfg = SampleConfig(weights="w", prompts=("a/b\nc", "x" * 400), prompt_as_path=True, num_sample=2)
    assert [job.name for job in read_jobs(cfg)] == ["a_b_c-0", "a_b_c-1", f"{'x' * 200}-0", f"{'x' * 200}-1"]
    with pytest.raises(UserError, match="start_index=9: must be below the number of prompts, 6"):
        read_jobs(SampleConfig(weights="w", prompt_csv=str(tmp_path / "t.csv"), start_index=9))
    for wrong in ({"start_index": -1}, {"start_index": 3, "end_index": 3}, {"end_index": 0}):
        with pytest.raises(ValueError, match=r"(start|end)_index="):
            SampleConfig(weights="w", prompt="a", **wrong)  # type: ignore[arg-type]


def test_a_negative_prompt_for_all_that_have_none(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,neg\na,fog\nb,\n")
    cfg = SampleConfig(weights="w", prompt="c", prompt_csv=str(tmp_path / "t.csv"), neg="rain")
    assert [job.neg for job in read_jobs(cfg)] == ["rain", "fog", "rain"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_table_in_any_encoding_that_names_itself(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith(("-le", "-be")) else ""
    jobs = jobs_of(tmp_path, f"{mark}text,name\nein Kätzchen 🐱,größe\n".encode(encoding))
    assert [(job.text, job.name) for job in jobs] == [("ein Kätzchen 🐱", "größe")]


def test_a_text_file_is_a_prompt_per_line(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, 'a cat, sitting\n\n  \nthe "big" dog\r\nlast', file="my prompts.TXT")
    assert [(job.text, job.name) for job in jobs] == [
        ("a cat, sitting", "my prompts_0000"),
        ('the "big" dog', "my prompts_0001"),
        ("last", "my prompts_0002"),
    ]


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "column 'text' is missing; it has none"),
    "a header alone": ("text\n", "the table is empty"),
    "another column": ("caption\na\n", "column 'text' is missing; it has caption"),
    "a column twice": ("text,name,name\na,b,c\n", "column 'name' is there twice"),
    "a path": ("text,name\na,../x\n", r"line 2: name '\.\./x' must be a file name"),
    "a path of Windows": ("text,name\na,x\\y\n", "must be a file name"),
    "no text": ("text,name\n,x\n", "line 2 has no text"),
    "a short row": ("name,text\nx\n", "line 2 has no text"),
    "a long row": ("text,name\na cat, sitting,x\n", "line 2: 3 fields, the header has 2"),
    "252 characters": (f"text,name\na,{'n' * 252}\n", "252 bytes in UTF-8.*shorten"),
    "100 emoji": (f"text,name\na,{'😀' * 100}\n", "400 bytes in UTF-8.*shorten"),
    "a hidden file": ("text,name\na,.cat\n", "begin with a dot"),
    "the folder": ("text,name\na,.\n", "begin with a dot"),
    "the folder above": ("text,name\na,..\n", "begin with a dot"),
    "an option": ("text,name\na,-rf\n", "begin with a dash"),
    "a newline": ('text,name\na,"x\ny"\n', "control characters"),
    "an escape": ("text,name\na,x\x1b[31m\n", "control characters"),
    "a device": ("text,name\na,Con\n", "name of a device"),
    "a device with a suffix": ("text,name\na,lpt1.x\n", "name of a device"),
    "cp1252": (b"text\nvol\xe9\n", "line 2: not UTF-8"),
    "a cut UTF-16": ("text\nhello".encode("utf-16")[:-1], "not UTF-16"),
    "NUL": (b"text\na\0b\n", "line 2: holds a NUL"),
    "a field of 200,000 characters": (f"text\n{'word ' * 40_000}\n", f"line 2: a prompt of .*at most {MAX_PROMPT}"),
    "a field of 2,000,000 characters": (f"text\n{'word ' * 400_000}\n", "line 2: a field of more than"),
    "a long negative prompt": (f"text,neg\na,{'b' * 200_000}\n", "line 2 neg: a prompt of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tables_that_are_refused(tmp_path: Path, case: str) -> None:
    content, expected = REFUSED[case]
    with pytest.raises(UserError, match=expected) as caught:
        jobs_of(tmp_path, content)
    line = str(caught.value)
    assert line.startswith(f"prompt_csv={tmp_path / 'cats.csv'}") and "\n" not in line and len(line) < 500


def test_a_missing_table_and_no_prompt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_jobs(SampleConfig(weights="w", prompt_csv="nowhere.csv"))
    with pytest.raises(UserError, match="not a regular file"):
        read_jobs(SampleConfig(weights="w", prompt_csv=str(tmp_path)))
    with pytest.raises(UserError, match="the file is empty; it needs a prompt per line"):
        jobs_of(tmp_path, " \n", file="a.txt")
    with pytest.raises(UserError, match=r"^prompt: missing; give --prompt TEXT"):
        read_jobs(SampleConfig(weights="w"))


@pytest.mark.parametrize("text", ["lone \ud83d half", "bytes of another encoding \udce9", "x" * 100_001, "a\0b"])
def test_a_prompt_that_no_file_can_hold_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^prompt: "):
        read_jobs(SampleConfig(weights="w", prompt=text))
    with pytest.raises(UserError, match=r"^prompt: "):
        read_jobs(SampleConfig(weights="w", prompts=("a", text)))


def test_a_name_that_is_there_twice_gets_a_number(tmp_path: Path) -> None:
    assert names_of(tmp_path, "text,name\na,cat\nb,cat\nc,cat\nd,dog\n") == ["cat", "cat_1", "cat_2", "dog"]
    assert names_of(tmp_path, "text,name\na,cat\nb,cat\nc,cat_1\n") == ["cat", "cat_2", "cat_1"]
    assert names_of(tmp_path, "text,name\na,cat\nb,cat\n", num_sample=2) == ["cat", "cat_1", "cat_2", "cat_2_1"]
    assert names_of(tmp_path, "text,name\na,cats_0001\nb,\nc,\n") == ["cats_0001", "cats_0001_1", "cats_0002"]
    assert names_of(tmp_path, "text,name\na, cat \n") == ["cat"]


def test_names_that_some_file_system_takes_for_the_same_differ(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    found = names_of(tmp_path, f"text,name\na,Cat\nb,cat\nc,{composed}\nd,{decomposed}\ne,STRASSE\nf,straße\n")
    assert found == ["Cat", "cat_1", composed, f"{decomposed}_1", "STRASSE", "straße_1"]
    assert names_of(tmp_path, "text,name\na,Contact_Sheet\n") == ["Contact_Sheet_1"]


def test_names_at_the_limit_of_a_file_name(tmp_path: Path) -> None:
    longest = "n" * 251
    assert names_of(tmp_path, f"text,name\na,{longest}\n") == [longest]
    for content, more in ((f"text,name\na,{longest}\nb,{longest}\n", {}), (f"text,name\na,{longest}\n", {"k": 2})):
        with pytest.raises(UserError, match=r"253 bytes in UTF-8.*shorten"):
            names_of(tmp_path, content, num_sample=more.get("k", 1))


@pytest.mark.parametrize("stem", ["s" * 240, "😀" * 60, "-rf", ".hidden", "con", "a\nb", "x\\y", "   "])
def test_any_name_of_a_table_gives_names_for_its_prompts(tmp_path: Path, stem: str) -> None:
    name = names_of(tmp_path, "text\na\n", file=f"{stem}.csv")[0]  # type: ignore[arg-type]
    assert name.endswith("_0000") and name.isprintable() and name[0] not in ".-" and len(name.encode()) <= 251


def test_files_that_are_there_are_not_replaced() -> None:
    jobs = read_jobs(SampleConfig(weights="w", prompts=("a", "b")))
    assert [job.name for job in with_names(jobs, ["sample_0007", "sample_0003_1", "other_9999"])] == [
        "sample_0008",
        "sample_0009",
    ]
    assert [job.name for job in with_names(jobs, ["Sample_0001", "contact_sheet"])] == ["sample_0002", "sample_0003"]
    once = with_names(jobs, ["sample_0000"])
    assert with_names(once) == jobs and with_names(once, ["sample_0000"]) == once


def test_a_given_name_that_is_there_gets_a_number(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "text,name\na,cat\nb,dog\n", num_sample=2)
    assert [job.name for job in with_names(jobs, ["CAT_1", "dog_1_0"])] == ["cat_2", "cat_2_1", "dog", "dog_1"]


def test_random_names_never_collide() -> None:
    draw = random.Random("names")
    parts = ["cat", "Cat", "CAT", "cat_1", "cat_1_0", "sample", "sample_0000", "ſ", "s", "é", "e\u0301", ""]
    for _ in range(300):
        given = [draw.choice(parts) for _ in range(draw.randint(1, 12))]
        copies = draw.choice([1, 2])
        jobs = [
            Job(
                text="t",
                neg="",
                name="",
                seed=0,
                row=row,
                wanted=name or "sample",
                number=None if name else row,
                copy=k if copies > 1 else None,
            )
            for row, name in enumerate(given)
            for k in range(copies)
        ]
        taken = [draw.choice(parts) + draw.choice(["", "_0", "_1", "_0001"]) for _ in range(draw.randint(0, 6))]
        names = [job.name for job in with_names(jobs, taken)]
        keys = [unicodedata.normalize("NFC", name).casefold() for name in (*names, *taken)]
        assert len(set(keys[: len(names)])) == len(names) and not set(keys[: len(names)]) & set(keys[len(names) :])


@pytest.mark.parametrize("name", ["cat", ""])
def test_time_is_linear_in_the_number_of_prompts(tmp_path: Path, name: str) -> None:
    """16,000 prompts that want the same name, against 1,000: 16 times the time, not 256."""
    times = []
    for count in (1000, 16_000):
        (tmp_path / "t.csv").write_text("text,name\n" + f"a,{name}\n" * count)
        start = time.process_time()
        names = [job.name for job in read_jobs(SampleConfig(weights="w", prompt_csv=str(tmp_path / "t.csv")))]
        times.append(time.process_time() - start)
        assert len(set(names)) == count
    assert times[1] < 64 * max(times[0], 0.005), times
