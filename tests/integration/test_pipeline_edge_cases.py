"""Whatever lies in the folder of the sources ends as rows or as an error with a kind; nothing hangs or ends the run."""

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.pipeline_runs import outputs, results, run
from tests.integration.odd_files import ODD, ROWS

pytestmark = pytest.mark.timeout(1200)
PROGRAM = "data_pipeline.run"
LAST = "measure"
STAGES = ("probe", "frames", "shots", LAST)
CONFIG = """
source: {source}
out: {out}
limits: {{time_s: 60}}
"""
NAMES = [
    b"it's.mp4", b'a "quote".mp4', b"new\nline.mp4", b"tab\there.mp4", b"caf\xe9.mp4", b"\xff\xfe.mp4", b"100%.mp4",
    b"-dash.mp4", b"a#b.mp4", b"a@1+2.mp4", b"back\\slash.mp4", b" spaces .mp4", b"star*.mp4", b"[x].mp4", b"{y}.mp4",
    b"$HOME.mp4", b"~.mp4", "\u202e\u6620\u753b \U0001f3ac.mp4".encode(), b"x" * 251 + b".mp4", b"file:.mp4",
    b"concat:a.mp4",
]  # fmt: skip


def write_config(folder: Path, source: Path) -> Path:
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(source=source, out=folder / "run"))
    return config


def ends(out: Path) -> dict[str, str]:
    """Source -> the kind of its error, or ROWS if it came to the end."""
    every = [(name, done) for stage in STAGES for name, (done, _) in results(out, stage).items()]
    kinds = {name: done.kind for name, done in every if done.error}
    done = {name for name, (end, _) in results(out, LAST).items() if not end.error}
    assert not done & kinds.keys()
    return kinds | dict.fromkeys(done, ROWS)


def test_every_odd_file_is_a_row(tmp_path: Path) -> None:
    assert len(ODD) >= 40
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, odd in ODD.items():
        (folder / name).write_bytes(odd.content())
    run(write_config(tmp_path, folder), "--until", LAST, program=PROGRAM)
    found = ends(tmp_path / "run")
    assert found.keys() == ODD.keys()
    wrong = {name: kind for name, kind in found.items() if kind not in (ODD[name].kinds or (ROWS,))}
    assert not wrong, {name: (kind, message(tmp_path / "run", name)) for name, kind in wrong.items()}
    assert "mistake" not in found.values() and "poison" not in found.values()
    print(Counter(found.values()))


def message(out: Path, name: str) -> str:
    found = [results(out, stage) for stage in STAGES]
    return "; ".join(of_stage[name][0].error for of_stage in found if name in of_stage)


def test_every_edge_case_of_the_real_clips_is_a_row(shared_media: Path, tmp_path: Path) -> None:
    folder = shared_media / "edge_cases"
    run(write_config(tmp_path, folder), "--until", LAST, program=PROGRAM)
    found = ends(tmp_path / "run")
    assert found.keys() == {path.name for path in folder.iterdir()}
    assert {name for name, kind in found.items() if kind != ROWS} == {"truncated.jpg"}
    found_out = results(tmp_path / "run", "probe").items()
    probed = {name: rows.to_pylist()[0] for name, (done, rows) in found_out if not done.error}
    assert (probed["nasa_13013.mp4"]["height"], probed["nasa_13013.mp4"]["width"]) == (270, 480)
    assert probed["nasa_13013_rotated.mp4"]["rotation"] in (90, 270) and probed["video_90.mov"]["rotation"] in (90, 270)
    assert probed["nasa_13013_hdr.mp4"]["hdr"] == "PQ"
    assert probed["traffic_camera_vfr.mp4"]["variable_rate"] and not probed["h265_video.mp4"]["variable_rate"]


def test_names_of_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    content = ODD["no suffix"].content()
    for name in NAMES:
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(content)
    run(write_config(tmp_path, folder), "--until", LAST, program=PROGRAM)
    found = ends(tmp_path / "run")
    assert len(found) == len(NAMES) and set(found.values()) == {ROWS}, found
    before = outputs(tmp_path / "run")
    run(write_config(tmp_path, folder), "--until", LAST, program=PROGRAM)
    assert outputs(tmp_path / "run") == before


def test_what_is_no_file_is_left_out_and_told(tmp_path: Path) -> None:
    folder = tmp_path / "things"
    (folder / "a folder.mp4").mkdir(parents=True)
    (folder / "clip.mp4").write_bytes(ODD["no suffix"].content())
    (folder / "nothing.mp4").symlink_to(tmp_path / "nowhere")
    (folder / "again.mp4").symlink_to(folder / "clip.mp4")
    (folder / "round.mp4").symlink_to(folder / "round.mp4")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.mp4")
    config = write_config(tmp_path, folder)
    said = run(config, "--dry-run", program=PROGRAM)
    assert "nothing.mp4: a link to nothing" in said and "pipe.mp4: a pipe, socket or device" in said
    run(config, "--until", LAST, program=PROGRAM)
    assert ends(tmp_path / "run") == {"clip.mp4": ROWS, "again.mp4": ROWS}


def test_files_of_a_list_that_are_none_are_rows(tmp_path: Path) -> None:
    """A list names what a walk would pass over."""
    (tmp_path / "clip.mp4").write_bytes(ODD["no suffix"].content())
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "nothing.mp4").symlink_to(tmp_path / "nowhere")
    names = ["clip.mp4", "pipe.mp4", "folder.mp4", "nothing.mp4", "missing.mp4", "/dev/zero"]
    (tmp_path / "list.txt").write_text("# of tests\n" + "\n".join(names) + "\n")
    run(write_config(tmp_path, tmp_path / "list.txt"), "--until", LAST, program=PROGRAM)
    found = {Path(name).name: kind for name, kind in ends(tmp_path / "run").items()}
    others = dict.fromkeys(["pipe.mp4", "folder.mp4", "zero"], "no file")
    missing = dict.fromkeys(["nothing.mp4", "missing.mp4"], "missing")
    assert found == {"clip.mp4": ROWS, **others, **missing}


def test_a_file_that_may_not_be_read_is_a_row(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    content = ODD["no suffix"].content()
    for name in ("clip.mp4", "secret.mp4"):
        (folder / name).write_bytes(content)
    (folder / "secret.mp4").chmod(0)
    without = ()
    if os.geteuid() == 0:  # who may read everything, unless the right to is given up
        without = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--")
        denied = subprocess.run([*without, "cat", str(folder / "secret.mp4")], capture_output=True, check=False)
        if b"Permission denied" not in denied.stderr:
            pytest.skip("root may read everything, and cannot give it up here (setpriv)")
    run(write_config(tmp_path, folder), "--until", LAST, program=PROGRAM, prefix=without)
    assert ends(tmp_path / "run") == {"clip.mp4": ROWS, "secret.mp4": "no video"}
    assert "Permission denied" in message(tmp_path / "run", "secret.mp4")
