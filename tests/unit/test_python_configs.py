"""Configuration files in Python are data: what they may say, how they build on one another, and what is refused."""

import random
import time
from pathlib import Path
from typing import Any

import pytest

from opensora.config import python_values
from opensora.config.mmengine import read_python
from opensora.utils.errors import UserError

REFUSED: dict[str, tuple[str | bytes, int, str]] = {
    # name -> (the file, the line that the message names, what it says)
    "import": ("a = 1\nimport os\n", 2, "an import is refused"),
    "from import": ("from os import system\n", 1, "an import is refused"),
    "lazy bases": ("from mmengine.config import read_base\nwith read_base():\n    from .a import *\n", 1, "an import"),
    "call": ("a = print(1)\n", 1, "a call of print is refused"),
    "__import__": ("a = 1\nb = __import__('os')\n", 2, "a call of __import__ is refused"),
    "__import__ and an attribute": (
        "a = __import__('os').system('touch ran')\n",
        1,
        "a call of __import__(..).system is refused",
    ),
    "eval": ("a = eval('1')\n", 1, "a call of eval is refused"),
    "open": ("a = dict(x=open('ran', 'w'))\n", 1, "a call of open is refused"),
    "call of what is no name": ("a = (lambda: 1)()\n", 1, "a call of an expression is refused"),
    "method": ("a = 'x'.join(['a'])\n", 1, "a call of the method join is refused"),
    "method of a name": ("a = dict.fromkeys([1])\n", 1, "a call of dict.fromkeys is refused"),
    "method of a method": ("a = ''.format.join(['a'])\n", 1, "a call of the method join is refused"),
    "call of what is called": ("a = f(1)(2)\n", 1, "a call of f(..) is refused"),
    "attribute": ("a = dict(x=1)\nb = a.x\n", 2, "an attribute is refused"),
    "attribute of _base_": ("_base_ = []\nb = _base_.x\n", 2, "an attribute is refused"),
    "attribute is set": ("a = dict()\na.b = 1\n", 2, "one name is assigned at a time"),
    "index": ("a = [1]\nb = a[0]\n", 2, "an index is refused"),
    "slice": ("a = [1]\nb = a[0:1]\n", 2, "an index is refused"),
    "index is set": ("a = [1]\na[0] = 2\n", 2, "one name is assigned at a time"),
    "lambda": ("a = 1\nb = lambda: 1\n", 2, "a lambda is refused"),
    "list comprehension": ("a = [i for i in (1, 2)]\n", 1, "a comprehension is refused"),
    "set comprehension": ("a = {i for i in (1, 2)}\n", 1, "a comprehension is refused"),
    "dict comprehension": ("a = {i: i for i in (1, 2)}\n", 1, "a comprehension is refused"),
    "generator": ("a = dict(b=(i for i in (1, 2)))\n", 1, "a generator is refused"),
    "f-string": ("a = 1\nb = f'{a}'\n", 2, "an f-string is refused"),
    "f-string with code": ("a = f\"{__import__('os').system('touch ran')}\"\n", 1, "an f-string is refused"),
    "raw f-string": ("a = Rf'{1}'\n", 1, "an f-string is refused"),
    "walrus": ("a = (b := 1)\n", 1, "an assignment inside an expression is refused"),
    "starred in a list": ("a = [1]\nb = [*a]\n", 2, "a starred value is refused"),
    "starred in a dict": ("a = {}\nb = {'x': 1, **a}\n", 2, "a starred value is refused"),
    "starred in dict()": ("a = {}\nb = dict(**a)\n", 2, "dict(..) takes key=value only"),
    "dict() of pairs": ("a = dict([('x', 1)])\n", 1, "dict(..) takes key=value only"),
    "starred target": ("*a, b = [1, 2]\n", 1, "one name is assigned at a time"),
    "two targets": ("a, b = 1, 2\n", 1, "one name is assigned at a time"),
    "chained": ("a = b = 1\n", 1, "one name is assigned at a time"),
    "function": ("def f():\n    return 1\n", 1, "a function is refused"),
    "decorator": ("@print\ndef f():\n    pass\n", 2, "a function is refused"),
    "async function": ("async def f():\n    pass\n", 1, "a function is refused"),
    "class": ("class A:\n    x = 1\n", 1, "a class is refused"),
    "del": ("a = 1\ndel a\n", 2, "del is refused"),
    "augmented": ("a = 1\na += 1\n", 2, "an augmented assignment is refused"),
    "annotated": ("a: int = 1\n", 1, "a type annotation is refused"),
    "if": ("if True:\n    a = 1\n", 1, "if is refused"),
    "conditional": ("a = 1 if True else 2\n", 1, "a conditional expression is refused"),
    "for": ("for i in (1,):\n    a = i\n", 1, "for is refused"),
    "while": ("while True:\n    pass\n", 1, "while is refused"),
    "with": ("with open('ran', 'w'):\n    pass\n", 1, "with is refused"),
    "try": ("try:\n    a = 1\nexcept Exception:\n    pass\n", 1, "try is refused"),
    "assert": ("assert True\n", 1, "assert is refused"),
    "raise": ("raise ValueError\n", 1, "raise is refused"),
    "global": ("global a\n", 1, "global is refused"),
    "pass": ("pass\n", 1, "pass is refused"),
    "expression": ("a = 1\n(1 + 1)\n", 2, "an expression that is not assigned is refused"),
    "docstring": ('"""About."""\n', 1, "an expression that is not assigned is refused; write comments with #"),
    "yield": ("a = (yield 1)\n", 1, "yield is refused"),
    "await": ("a = 1\nb = await a\n", 2, "await is refused"),
    "match": ("a = 1\nmatch a:\n    case 1:\n        b = 2\n", 2, "match is refused"),
    "comparison": ("a = 1 < 2\n", 1, "a comparison is refused"),
    "and": ("a = True and False\n", 1, "and / or is refused"),
    "not": ("a = not True\n", 1, "not is refused"),
    "invert": ("a = ~1\n", 1, "~ is refused"),
    "shift": ("a = 1 << 3\n", 1, "<< is refused"),
    "bits": ("a = 1 | 2\n", 1, "| is refused"),
    "matrix product": ("a = 1 @ 2\n", 1, "@ is refused"),
    "set": ("a = {1, 2}\n", 1, "a set is refused"),
    "template": ("a = '{{ fileDirname }}/x'\n", 1, "{{...}} is not replaced here"),
    "template of a base": ("a = {{_base_.x}}\n", 1, "a set is refused"),
    "bytes": ("a = b'x'\n", 1, "bytes is refused"),
    "ellipsis": ("a = ...\n", 1, "ellipsis is refused"),
    "complex": ("a = 1j\n", 1, "complex is refused"),
    "later name": ("a = b\nb = 1\n", 1, "b: no such name above"),
    "own name": ("a = [a]\n", 1, "a: no such name above"),
    "builtin": ("a = int\n", 1, "int: no such name above"),
    "dunder": ("a = __file__\n", 1, "__file__: no such name above"),
    "dunder is set": ("__builtins__ = 1\n", 1, "__builtins__ cannot be assigned"),
    "dict is set": ("dict = 1\n", 1, "dict cannot be assigned"),
    "tuple as key": ("a = {(1, 2): 1}\n", 1, "a key must be text or a whole number"),
    "bool as key": ("a = {True: 1}\n", 1, "a key must be text or a whole number"),
    "float as key": ("a = {1.0: 1}\n", 1, "a key must be text or a whole number"),
    "key twice": ("a = {\n    1: 2,\n    1: 3,\n}\n", 3, "1: is given twice, before in line 2"),
    "keyword twice": ("a = dict(b=1, b=2)\n", 1, "twice|repeated"),
    "sum of text": ("a = 'x' + 'y'\n", 1, "text where a number must be"),
    "sum of bool": ("a = True + 1\n", 1, "bool where a number must be"),
    "list plus tuple": ("a = [1] + (2,)\n", 1, "list where a number must be"),
    "list times list": ("a = [1] * [2]\n", 1, "list where a number must be"),
    "list times float": ("a = [1] * 2.0\n", 1, "repeated by a whole number"),
    "list times bool": ("a = [1] * True\n", 1, "repeated by a whole number"),
    "minus text": ("a = -'x'\n", 1, "text where a number must be"),
    "by zero": ("a = 1\nb = 1 / 0\n", 2, "cannot be computed: division by zero"),
    "whole by zero": ("a = 1 // 0\n", 1, "cannot be computed"),
    "modulo zero": ("a = 1 % 0\n", 1, "cannot be computed"),
    "zero to the minus first": ("a = 0 ** -1\n", 1, "cannot be computed"),
    "root of a negative number": ("a = (-8) ** 0.5\n", 1, "complex where a number must be"),
    # what would fill memory or time
    "9**9**9": ("a = 9**9**9\n", 1, "beyond 64 bits"),
    "huge power": ("a = 2**10000000000\n", 1, "beyond 64 bits"),
    "power of a power": ("a = 10**18\nb = a**a\n", 2, "beyond 64 bits"),
    "float power": ("a = 1e200**2.0\n", 1, "cannot be computed"),
    "product": ("a = 10**18 * 10**18\n", 1, "beyond 64 bits"),
    "whole number": ("a = 9223372036854775808\n", 1, "beyond 64 bits"),
    "digits": ("a = " + "9" * 50_000 + "\n", 1, "a number of 50000 characters"),
    "infinite": ("a = 1e999\n", 1, "beyond what a double holds"),
    "text times a billion": ("a = 'x' * 1000000000\n", 1, "text where a number must be"),
    "list times a billion": ("a = [0] * 1000000000\n", 1, "more than 20000 keys and values"),
    "list times twice": ("a = [0] * 1000\nb = [a] * 1000\n", 2, "more than 20000 keys and values"),
    "doubling": ("a = [0, 0]\n" + "a = a + a\n" * 40, 14, "more than 20000 keys and values"),
    "lists of lists": (
        "a = [0]\n"
        + "".join(f"{x} = [{y}, {y}]\n" for x, y in zip("bcdefghijklmnopq", "abcdefghijklmnop", strict=True)),
        13,
        "more than 20000 keys and values",
    ),
    "text repeated by name": (f"a = '{'x' * 90_000}'\nb = {['a'] * 30}\n".replace("'a'", "a"), 2, "more than 20000"),
    "deep brackets": ("a = " + "[" * 60 + "]" * 60 + "\n", 1, "nested deeper than 32 levels"),
    "deeper brackets": ("a = " + "(" * 90_000 + "\n", 1, "nested deeper than 32 levels"),
    "deep dicts": ("a = " + "dict(a=" * 60 + "1" + ")" * 60 + "\n", 1, "nested deeper than 32 levels"),
    "deep by names": ("a = [1]\n" + "a = [a]\n" * 100, 32, "nested deeper than 32 levels"),
    "deep minus": ("a = " + "-" * 90_000 + "1\n", 1, "operators in a row"),
    "deep sum": ("a = " + "1+" * 40_000 + "1\n", 1, "operators in a row"),
    "deep power": ("a = " + "1**" * 30_000 + "1\n", 1, "operators in a row"),
    "deep not": ("a = " + "not " * 20_000 + "1\n", 1, "operators in a row"),
    "deep lambda": ("a = " + "lambda:" * 10_000 + "1\n", 1, "operators in a row"),
    "deep conditional": ("a = " + "1 if 1 else " * 8_000 + "1\n", 1, "operators in a row"),
    "deep attribute": ("a = b" + ".b" * 40_000 + "\n", 1, "operators in a row"),
    "deep call": ("a = b" + "()" * 40_000 + "\n", 1, "operators in a row"),
    "deep index": ("a = b" + "[0]" * 30_000 + "\n", 1, "operators in a row"),
    "deep sum of brackets": ("a = " + "(1)+" * 20_000 + "1\n", 1, "operators in a row"),
    "deep elif": ("if 1:\n    a = 1\n" + "elif 1:\n    a = 1\n" * 5000, 131, "operators in a row"),
    "deep indentation": ("".join(" " * n + "if 1:\n" for n in range(300)), 101, "not valid Python"),
    "long line": ("a = [" + "1," * 100_000 + "]\n", 1, "a line of more than 100000 characters"),
    "many values": ("a = [\n" + "1,\n" * 30_000 + "]\n", 0, "more than 20000 keys and values"),
    "many words": ("a = 1;" * 15_000 + "\n" + ("a = 1;" * 15_000 + "\n") * 4, 0, "more than 200000 words and signs"),
    "huge": (b"#" * (2 << 20), 0, "a configuration has at most 1048576"),
    # what is no text, or no Python
    "no UTF-8": (b"a = 1\nb = '\xff\xfe'\n", 2, "not UTF-8 (byte 0xff)"),
    "latin-1 cookie": (b"# -*- coding: latin-1 -*-\na = '\xe9'\n", 2, "not UTF-8 (byte 0xe9)"),
    "UTF-16": ("a = 1\n".encode("utf-16"), 1, "not UTF-8"),
    "NUL": (b"a = 1\nb = '\0'\n", 2, "a NUL character"),
    "no Python": ("a = 1\nb = = 2\n", 2, "not valid Python"),
    "YAML": ("model:\n  kind: mmdit\n", 1, "not valid Python|a type annotation"),
    "bracket left open": ("a = [1,\nb = 2\n", 0, "not valid Python"),
    "text left open": ("a = 'x\n", 1, "not valid Python"),
    "long text left open": ("a = '''x\n\n", 0, "not valid Python"),
    "indented": ("  a = 1\n", 1, "not valid Python|indent"),
    "dedent to nowhere": ("if 1:\n    a = 1\n  b = 1\n", 3, "not valid Python"),
    "leading zeros": ("a = 007\n", 1, "not valid Python"),
    "print statement": ("print 'x'\n", 1, "not valid Python"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_in_one_line_and_nothing_is_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, line, expected = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.py"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        read_python(path)
    message = str(caught.value)
    assert any(part in message for part in expected.split("|")), message
    assert message.startswith(f"{path}:{line}: " if line else f"{path}:") and "\n" not in message
    assert [file.name for file in tmp_path.iterdir()] == ["run.py"]
    assert time.process_time() - began < 10  # quadratic work on such files takes minutes


def test_what_a_file_may_say(tmp_path: Path) -> None:
    path = tmp_path / "run.py"
    path.write_text(
        "# comment\nfps = 24 // 2; scale = 2 / 3\nimage_size = (512, 512)\n"
        'model = dict(\n    type="X",  # a comment\n    size=image_size,\n    none=None,\n    on=True,\n)\n'
        "buckets = {\n    '256': {1: (1.0, 8), -2: [0.5, fps]},\n}\n"
        "memory = [(260 + 20) * 1024 * 1024] * 2 + [25 * 1024**3]\n"
        "text = 'a' \"b\" r'\\d' u'é'\nlr = 1e-5\nlr = -lr\n"
        "limit = 10_000\nrest = 7 % 4 - +1.5\nhexed = 0x10\nempty = ()\n",
        encoding="utf-8-sig",
    )
    data, lines = read_python(path)
    assert data == {
        "fps": 12,
        "scale": 2 / 3,
        "image_size": [512, 512],
        "model": {"type": "X", "size": [512, 512], "none": None, "on": True},
        "buckets": {"256": {1: [1.0, 8], -2: [0.5, 12]}},
        "memory": [293601280, 293601280, 26843545600],
        "text": "ab\\dé",
        "lr": -1e-5,
        "limit": 10000,
        "rest": 1.5,
        "hexed": 16,
        "empty": [],
    }
    assert lines[("model", "on")] == f"{path}:8" and lines[("buckets", "256", -2)] == f"{path}:11"
    assert lines[("lr",)] == f"{path}:16" and ("memory", 0) not in lines


def test_any_line_ends(tmp_path: Path) -> None:
    for end in (b"\n", b"\r\n", b"\r"):
        (tmp_path / "run.py").write_bytes(end.join([b"a = [", b"  1,", b"]", b"b = 2", b""]))
        assert read_python(tmp_path / "run.py")[0] == {"a": [1], "b": 2}


def files(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        (folder / f"{name}.py").write_text(content)
    return folder / "run.py"


def test_files_build_on_others(tmp_path: Path) -> None:
    """As MMEngine merges them: mappings key by key, all else replaced; ``_delete_`` replaces a mapping, too."""
    path = files(
        tmp_path,
        top="lr = 1\noptim = dict(lr=lr, eps=2)\nsize = [1, 2]\nae = dict(type='x', deep=dict(a=1, b=2))\n",
        plugin="plugin = dict(sp=8)\n",
        run="_base_ = ['middle.py', 'plugin.py']\nlr = 3\noptim = dict(lr=lr)\nplugin = None\n",
        middle="_base_ = 'top.py'\nsize = (3,)\n"
        "ae = dict(deep={'_delete_': True, 'c': 3}, new=dict(_delete_=True, d=4))\n",
    )
    data, lines = read_python(path)
    assert data == {
        "lr": 3,
        "optim": {"lr": 3, "eps": 2},
        "size": [3],
        "ae": {"type": "x", "deep": {"c": 3}, "new": {"d": 4}},
        "plugin": None,
    }
    assert lines[("optim", "lr")] == f"{path}:3" and lines[("optim", "eps")] == f"{tmp_path / 'top.py'}:2"
    assert ("ae", "deep", "a") not in lines and ("plugin", "sp") not in lines


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({"run": "_base_ = 'run.py'"}, "_base_ goes round in a circle (run.py -> run.py)"),
        ({"run": "_base_ = ['a.py']", "a": "_base_ = 'run.py'"}, "circle (run.py -> a.py -> run.py)"),
        ({"run": "_base_ = 'none.py'"}, "_base_=none.py (*run.py:1): no such .py file"),
        ({"run": "_base_ = '../../../../etc/passwd'"}, "must be a relative path to a file in"),
        ({"run": "_base_ = '/etc/hostname'"}, "must be a relative path to a file in"),
        ({"run": "_base_ = '../other/a.py'"}, "must be a relative path to a file in"),
        ({"run": "x = 1\n_base_ = 'run.txt'"}, "(*run.py:2): no such .py file"),
        ({"run": "_base_ = 1"}, "must be the path of a .py file, or a list of them"),
        ({"run": "_base_ = dict(a=1)"}, "must be the path of a .py file, or a list of them"),
        ({"run": "_base_ = ['']"}, "must be the path of a .py file, or a list of them"),
        ({"run": "_base_ = ['a.py']", "a": "import os"}, "a.py:1: an import is refused"),
        ({"run": "_base_ = ['a.py', 'b.py']", "a": "x = 1", "b": "y = 1\nx = 2"}, "x: two files of _base_"),
        ({"run": "_base_ = 'a.py'\nx = dict(y=1)", "a": "x = 1"}, "x (*run.py:2): its base has a single value here"),
        ({"run": "_base_ = 'a.py'\nx = dict(y=1)", "a": "x = None"}, "its base has null here"),
        ({"run": "_base_ = 'a.py'\nx = dict(_delete_=1)", "a": "x = {}"}, "x._delete_=1 (*run.py:2): must be True or"),
        ({"run": "_base_ = 'a.py'\ny = lr", "a": "lr = 1"}, "lr: no such name above"),
        ({"run": "x = 1\n_base_ = 'run.py'"}, "*run.py:2: _base_ goes round in a circle (run.py -> run.py)"),
        ({"run": "_base_ = 'a.py'", "a": "\n_base_ = 'run.py'"}, "*a.py:2: _base_ goes round in a circle"),
        ({"run": "_base_ = '\\0.py'"}, "_base_='\\x00.py' (*run.py:1): cannot be read (embedded null"),
        ({"run": "_base_ = ['\\ud800.py']"}, "_base_='\\ud800.py' (*run.py:1): cannot be read"),
        ({"run": f"_base_ = '{'a' * 300}.py'"}, "aaa.py (*run.py:1): no such .py file"),
        ({"run": f"_base_ = '{'a/' * 3000}b.py'"}, "b.py (*run.py:1): "),
        ({"run": "_base_ = 'loop.py'"}, "_base_=loop.py (*run.py:1): "),
        ({"run": "_delete_ = True"}, "_delete_=True (*run.py:1): stands in a mapping"),
        ({"run": "_base_ = 'a.py'", "a": "_delete_ = 'x'"}, "_delete_='x' (*a.py:1): stands in a mapping"),
        ({"run": "x = dict(y=[dict(_delete_='x')])"}, "x.y.0._delete_='x' (*run.py:1): must be True or False"),
        ({"run": "x = [1, (\n {'_delete_': 0},)]"}, "x.1.0._delete_=0 (*run.py:2): must be True or False"),
        (
            {"run": "_base_ = 'a.py'", "a": "x = dict(_delete_=None)"},
            "x._delete_=None (*a.py:1): must be True or False",
        ),
    ],
)
def test_bases_that_are_refused(contents: dict[str, str], expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.py").write_text("x = 1")
    (folder / "loop.py").symlink_to("loop.py")
    path = files(folder, **contents)
    try:
        message = f"read: {read_python(path)}"
    except UserError as error:
        message = str(error).replace(f"{folder}/", "*")
    assert expected in message and "\n" not in message


def test_paths_of_files_that_can_be_none(tmp_path: Path) -> None:
    (tmp_path / "loop.py").symlink_to("loop.py")
    for name in ("loop.py", "a" * 300 + ".py", "\0.py", "\ud800.py", "none.py"):
        with pytest.raises(UserError, match=r"cannot be read \(.*; give the path of a configuration file$"):
            read_python(tmp_path / name)


def test_what_replaces_a_base_says_nothing_inside_a_list(tmp_path: Path) -> None:
    path = files(tmp_path, run="x = [dict(_delete_=True, y=1), (dict(_delete_=False),)]")
    data, lines = read_python(path)
    assert data == {"x": [{"y": 1}, [{}]]}
    assert not any("_delete_" in keys for keys in lines)


def test_bases_below_the_folder_of_all_configurations(tmp_path: Path) -> None:
    (tmp_path / "configs/a/b").mkdir(parents=True)
    (tmp_path / "configs/plain.py").write_text("x = 1")
    (tmp_path / "configs/a/b/run.py").write_text("_base_ = '../../plain.py'")
    assert read_python(tmp_path / "configs/a/b/run.py")[0] == {"x": 1}
    (tmp_path / "secret.py").write_text("x = 2")
    (tmp_path / "configs/a/link.py").symlink_to(tmp_path / "secret.py")
    (tmp_path / "configs/a/b/run.py").write_text("_base_ = '../link.py'")
    try:
        found = str(read_python(tmp_path / "configs/a/b/run.py"))
    except UserError as error:
        found = str(error)
    assert "must be a relative path to a file in" in found


def test_a_hundred_bases_are_enough(tmp_path: Path) -> None:
    for number in range(150):
        (tmp_path / f"f{number}.py").write_text(f"_base_ = 'f{number + 1}.py'\nx{number} = {number}\n")
    (tmp_path / "f150.py").write_text("x = 1")
    with pytest.raises(UserError, match="adds up to more than 100 files"):
        read_python(tmp_path / "f0.py")
    assert len(read_python(tmp_path / "f60.py")[0]) == 91


# A file by a grammar, together with its value: which is computed while it is drawn, and not read from the text.


def draw_number(rng: random.Random) -> tuple[str, Any]:
    if rng.random() < 0.6:
        value: Any = rng.choice([0, 1, 2, 3, 7, 16, 24, 256, 1000, 2**40])
        return rng.choice([str(value), hex(value), f"{value:_}"]), value
    value = rng.choice([0.5, 1.0, 2.5, 1e-5, 3e8, 0.31622777])
    return rng.choice([repr(value), f"{value:.12e}"]), value


def draw_arithmetic(rng: random.Random, names: dict[str, Any], depth: int) -> tuple[str, Any]:
    numbers = [(name, value) for name, value in names.items() if type(value) in (int, float)]
    if depth > 2 or rng.random() < 0.4:
        return rng.choice(numbers) if numbers and rng.random() < 0.4 else draw_number(rng)
    if rng.random() < 0.2:
        text, value = draw_arithmetic(rng, names, depth + 1)
        return f"-({text})", -value
    (left, a), (right, b) = draw_arithmetic(rng, names, depth + 1), draw_arithmetic(rng, names, depth + 1)
    sign = rng.choice(["+", "-", "*", "/", "//", "%", "**"])
    if sign in ("/", "//", "%") and b == 0:
        sign = "+"
    if sign == "**" and not (0 <= b <= 3 and type(b) is int and abs(a) < 1000):
        sign = "-"
    value = {
        "+": lambda: a + b,
        "-": lambda: a - b,
        "*": lambda: a * b,
        "/": lambda: a / b,
        "//": lambda: a // b,
        "%": lambda: a % b,
        "**": lambda: a**b,
    }[sign]()
    if abs(value) >= 2**63 or value != value:
        return right, b
    return f"({left}) {sign} ({right})", value


def draw_value(rng: random.Random, names: dict[str, Any], depth: int = 0) -> tuple[str, Any]:
    kind = rng.choice(["number", "text", "constant", "name", "list", "tuple", "dict", "call", "joined"])
    if kind == "name" and names:
        return rng.choice(list(names.items()))
    if kind == "text":
        text = rng.choice(["", "a b", "É", "#", "\\", "'", '"', "{x}", "dict(", "256px"]) * rng.randint(1, 2)
        return repr(text), text
    if kind == "constant":
        return rng.choice([("None", None), ("True", True), ("False", False)])
    if depth > 3 or kind in ("number", "name"):
        return draw_arithmetic(rng, names, 0)
    parts = [draw_value(rng, names, depth + 1) for _ in range(rng.randint(0, 3))]
    texts, values = [text for text, _ in parts], [value for _, value in parts]
    space = rng.choice(["", "\n    ", "  # a comment ] } )\n"])
    if kind == "list":
        return f"[{space}{f',{space}'.join(texts)}]", values
    if kind == "tuple":
        return f"({space}{''.join(f'{text},{space}' for text in texts)})", tuple(values)
    if kind == "joined":
        times = rng.randint(-1, 3)
        return f"[{', '.join(texts)}] * ({times}) + [1]", values * times + [1]
    if kind == "call":
        return f"dict({space}{f',{space}'.join(f'k{i}={t}' for i, t in enumerate(texts))})", {
            f"k{i}": value for i, value in enumerate(values)
        }
    keys = rng.sample(["a", "b c", 1, -3, 129, "É"], len(parts))
    pairs = [f"{key!r}: {text}" for key, text in zip(keys, texts, strict=True)]
    return f"{{{space}{f',{space}'.join(pairs)}}}", dict(zip(keys, values, strict=True))


def draw_file(rng: random.Random) -> tuple[str, dict[str, Any]]:
    lines, names = [], {}
    for _ in range(rng.randint(1, 8)):
        name = rng.choice(["a", "lr", "model", "type", "match", "_x", "é", "num_frames"])
        text, value = draw_value(rng, names)
        lines.append(f"{name}{rng.choice([' = ', '='])}{text}{rng.choice(['', '  # why', ';'])}")
        names[name] = value
    return "\n".join(lines) + rng.choice(["\n", ""]), names


def without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_tuples(item) for key, item in value.items()}
    return [without_tuples(item) for item in value] if isinstance(value, (list, tuple)) else value


def typed(value: Any) -> Any:
    """So that 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return [(key, typed(item)) for key, item in value.items()]
    return [typed(item) for item in value] if isinstance(value, list) else (type(value), value)


PIECES = (
    *(sign.encode() for sign in "()[]{},:=*-;\n'\0"),
    *(b"", b"**", b"  ", b"\xff", b"9" * 30, b"f'", b".x", b" if ", b"for ", b"lambda:", b"import os"),
    *(b"dict", b"dict(", b"_base_='a'"),
)


def fuzz(path: Path, seeds: range) -> int:
    """How many mutated files were still read."""
    kept = 0
    for seed in seeds:
        rng = random.Random(seed)
        text, expected = draw_file(rng)
        path.write_text(text, encoding="utf-8")
        assert typed(read_python(path)[0]) == typed(without_tuples(expected)), (seed, text)
        for _ in range(4):
            mutated = bytearray(text.encode())
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(mutated))
                piece = rng.choice(PIECES)
                mutated[at : at + rng.randint(0, 3)] = piece
                if not mutated:
                    mutated = bytearray(b"\n")
            path.write_bytes(bytes(mutated))
            try:
                data, _ = read_python(path)
                assert typed(data) == typed(without_tuples(data))
                kept += 1
            except UserError as error:
                message = str(error)
                assert message.isprintable() and (str(path) in message or "_base_" in message), (seed, mutated)
    return kept


def test_files_by_a_grammar_and_their_mutations(tmp_path: Path) -> None:
    """A valid file has the value that was drawn with it; a damaged one has a value, or is refused in one line."""
    assert fuzz(tmp_path / "run.py", range(120)) > 30


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_more_files_by_a_grammar(tmp_path: Path) -> None:
    assert fuzz(tmp_path / "run.py", range(1000, 13_000)) > 3000


def test_nothing_of_a_file_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader needs no compile() to code, exec or eval: all three may be gone."""

    def gone(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("executed")

    path = files(tmp_path, run="a = dict(b=2 * 3)\n")
    for name in ("exec", "eval"):
        monkeypatch.setattr(f"builtins.{name}", gone)
    assert read_python(path)[0] == {"a": {"b": 6}}
    assert not {"exec", "eval", "compile", "__import__"} & set(python_values.__dict__)
