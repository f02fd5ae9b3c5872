"""The assignments of a Python file as data: what may stand in it is read off its syntax tree, nothing is executed.

Values are None, booleans, numbers, text, ``[..]``, ``(..)``, ``{..}`` with keys of text or whole numbers,
``dict(key=value)``, names that were assigned above, and arithmetic (``+ - * / // % **``) on numbers; lists can also be
joined and repeated. Everything else is refused with its line. Results are bounded: 64 bits, so many values. The tree
comes from ``ast``; before it is made the tokens are counted, as one that is deep enough would end the interpreter.
"""

import ast
import io
import keyword
import math
import operator
import re
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from opensora.config.strict_yaml import MAX_DEPTH, MAX_VALUES, Keys, Lines, read_text
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parsing, short

MAX_CHAIN = 64  # operators in a row, as in 1 + 1 + 1
MAX_TOKENS = 10 * MAX_VALUES  # words and signs of a file
MAX_LINE = 100_000  # characters; the tokenizer takes seconds for one much longer
MAX_DIGITS = 40  # of a number as it is written
MAX_WHOLE = 2**63  # what tensors, generators and files hold
TEXT_UNIT = 64  # characters of a text that count as one value

_STOPS: dict[type[ast.AST], str] = {
    ast.Import: "an import",
    ast.ImportFrom: "an import",
    ast.FunctionDef: "a function",
    ast.AsyncFunctionDef: "a function",
    ast.ClassDef: "a class",
    ast.AugAssign: "an augmented assignment",
    ast.AnnAssign: "a type annotation",
    ast.Delete: "del",
    ast.Expr: "an expression that is not assigned",
    ast.Attribute: "an attribute",
    ast.Subscript: "an index",
    ast.Lambda: "a lambda",
    ast.IfExp: "a conditional expression",
    ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a generator",
    ast.JoinedStr: "an f-string",
    ast.NamedExpr: "an assignment inside an expression",
    ast.Starred: "a starred value",
    ast.Set: "a set",
    ast.Compare: "a comparison",
    ast.BoolOp: "and / or",
    ast.Await: "await",
    ast.Yield: "yield",
    ast.YieldFrom: "yield",
}
_SIGNS: dict[Any, str] = {
    ast.Not: "not",
    ast.Invert: "~",
    ast.MatMult: "@",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.BitAnd: "&",
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_OPERANDS = (tokenize.NAME, tokenize.STRING, tokenize.NUMBER)
_CONSTANTS = ("True", "False", "None")
_TEMPLATE = re.compile(r"\{\{\s*(?:\$|_base_|file)")  # what MMEngine would put in from elsewhere
ALLOWED = "a configuration is data: name = value, with numbers, text, lists, dict(key=value) and names from above"


def read_assignments(path: Path) -> tuple[dict[str, Any], Lines]:
    """Name -> value of every assignment in a file, and for every key path the ``file:line`` that set it.

    Tuples stay tuples. A name that is assigned again has its last value, as in Python.

    Raises:
        UserError: no such file, not UTF-8, not Python, or something that is not data.
    """
    return _Reader(path).read()


class _Reader:
    """One file: its assignments in order, without those of its bases."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, Any] = {}
        self.lines: Lines = {}
        self.values = 0

    def read(self) -> tuple[dict[str, Any], Lines]:
        for statement in _syntax_tree(self.path).body:
            if not isinstance(statement, ast.Assign):
                raise self.refused(statement)
            target = statement.targets[0]
            if len(statement.targets) > 1 or not isinstance(target, ast.Name):
                raise self.fail(statement, "one name is assigned at a time: name = value")
            if target.id == "dict" or target.id.startswith("__"):
                raise self.fail(statement, f"{short(target.id)} cannot be assigned; give it another name")
            value = self.value(statement.value, 1)
            if _depth(value) > MAX_DEPTH:
                raise self.fail(statement, f"nested deeper than {MAX_DEPTH} levels")
            if target.id in self.names:
                forget(self.lines, (target.id,), self.names[target.id])
            self.names[target.id] = value
            self.note(statement.value, value, (target.id,))
        return self.names, self.lines

    def note(self, node: ast.expr, value: Any, keys: Keys) -> None:
        """Where ``value``, and what is in it as it is written, was set."""
        self.lines[keys] = f"{self.path}:{node.lineno}"
        if isinstance(node, (ast.List, ast.Tuple)):
            for index, item in enumerate(node.elts):
                self.note(item, value[index], (*keys, index))
        elif isinstance(node, (ast.Dict, ast.Call)):
            for (entry, item), key in zip(_entries(node), value, strict=True):
                path = (*keys, key)
                self.note(item, value[key], path)
                self.lines[path] = f"{self.path}:{entry.lineno}"

    def fail(self, node: ast.AST, reason: str) -> UserError:
        return UserError(f"{self.path}:{getattr(node, 'lineno', 1)}: {reason}")

    def refused(self, node: ast.AST) -> UserError:
        """What has no place in a configuration, by its name."""
        name = _STOPS.get(type(node)) or _SIGNS.get(type(getattr(node, "op", None))) or type(node).__name__.lower()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return self.fail(node, f"{name} is refused; write comments with #")
        return self.fail(node, f"{name} is refused; {ALLOWED}")

    def count(self, node: ast.AST, values: int) -> None:
        """Bound what a file holds, written out, whatever the way it is put together."""
        self.values += values
        if self.values > MAX_VALUES:
            raise self.fail(node, f"more than {MAX_VALUES} keys and values; give long lists as files")

    def value(self, node: ast.expr, depth: int) -> Any:
        """What an expression stands for, ``depth`` levels inside its statement."""
        if depth > MAX_DEPTH + MAX_CHAIN:
            raise self.fail(node, f"nested deeper than {MAX_DEPTH} levels")
        self.count(node, 1)
        if isinstance(node, ast.Constant):
            return self.constant(node)
        if isinstance(node, ast.Name):
            return self.earlier(node)
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [self.value(item, depth + 1) for item in node.elts]
            return tuple(items) if isinstance(node, ast.Tuple) else items
        if isinstance(node, (ast.Dict, ast.Call)):
            return self.mapping(node, depth)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            number = self.number(node, self.value(node.operand, depth + 1))
            return -number if isinstance(node.op, ast.USub) else number
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = self.value(node.left, depth + 1), self.value(node.right, depth + 1)
            return self.arithmetic(node, node.op, left, right)
        raise self.refused(node)

    def constant(self, node: ast.Constant) -> Any:
        value = node.value
        if isinstance(value, str):
            if _TEMPLATE.search(value):
                raise self.fail(node, "{{...}} is not replaced here; write the value")
            self.count(node, len(value) // TEXT_UNIT)
            return value
        if value is None or isinstance(value, bool):
            return value
        if not isinstance(value, (int, float)):
            raise self.fail(node, f"{type(value).__name__} is refused; {ALLOWED}")
        return self.number(node, value)

    def number(self, node: ast.AST, value: Any) -> Any:
        """A number that any other language could hold, too."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            kind = "text" if isinstance(value, str) else type(value).__name__
            raise self.fail(node, f"{kind} where a number must be; arithmetic is for numbers")
        if isinstance(value, int) and abs(value) >= MAX_WHOLE:
            raise self.fail(node, "a whole number beyond 64 bits")
        if not math.isfinite(value):
            raise self.fail(node, "a number beyond what a double holds")
        return value

    def earlier(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise self.fail(node, f"{short(node.id)}: no such name above; only values assigned before it can be used")
        value = self.names[node.id]
        self.count(node, size_of(value) - 1)
        return value

    def mapping(self, node: ast.Dict | ast.Call, depth: int) -> dict[Any, Any]:
        """``{key: value}`` or ``dict(key=value)``."""
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id == "dict"):
            name = _called(node.func)
            raise self.fail(node, f"a call of {name} is refused, as nothing is executed; {ALLOWED}")
        if isinstance(node, ast.Call) and (node.args or any(word.arg is None for word in node.keywords)):
            raise self.fail(node, "dict(..) takes key=value only")
        if isinstance(node, ast.Dict) and None in node.keys:
            raise self.fail(node, f"a starred value is refused; {ALLOWED}")
        result: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        for entry, item in _entries(node):
            key = entry.arg if isinstance(entry, ast.keyword) else self.value(entry, depth + 1)
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise self.fail(entry, "a key must be text or a whole number")
            if key in result:
                raise self.fail(entry, f"{short(key)}: is given twice, before in line {lines[key]}; keep one")
            result[key], lines[key] = self.value(item, depth + 1), entry.lineno
        return result

    def arithmetic(self, node: ast.AST, operation: ast.operator, left: Any, right: Any) -> Any:
        """As Python computes it, where the result is a number of 64 bits, or a list of bounded length."""
        lists = (list, tuple)
        if isinstance(operation, ast.Add) and type(left) is type(right) and isinstance(left, lists):
            return left + right
        if isinstance(operation, ast.Mult) and isinstance(left, lists) != isinstance(right, lists):
            items, times = (left, right) if isinstance(left, lists) else (right, left)
            if not isinstance(times, int) or isinstance(times, bool):
                raise self.fail(node, "a list is repeated by a whole number only")
            self.count(node, max(0, times - 1) * size_of(items))
            return items * times
        base, other = self.number(node, left), self.number(node, right)
        whole = isinstance(base, int) and isinstance(other, int)
        if isinstance(operation, ast.Pow) and whole and other * (abs(base).bit_length() - 1) > 63:
            raise self.fail(node, "a whole number beyond 64 bits")
        with parsing(lambda reason: self.fail(node, f"cannot be computed: {reason}")):
            result = _ARITHMETIC[type(operation)](base, other)
        return self.number(node, result)


def _called(node: ast.expr) -> str:
    """What a call names, as it is written, as far as that is names; the inner call of ``f(..).g(..)`` is f(..)."""
    names: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Call)):
        names.insert(0, f".{node.attr}" if isinstance(node, ast.Attribute) else "(..)")
        node = node.value if isinstance(node, ast.Attribute) else node.func
    if isinstance(node, ast.Name):
        return short("".join([node.id, *names]))
    return f"the method {short(names[-1][1:])}" if names and names[-1] != "(..)" else "an expression"


def _entries(node: ast.Dict | ast.Call) -> Iterable[tuple[ast.expr | ast.keyword, ast.expr]]:
    """(what names the key, expression of the value) of every entry of a mapping without stars."""
    if isinstance(node, ast.Call):
        return [(word, word.value) for word in node.keywords]
    return [(key, item) for key, item in zip(node.keys, node.values, strict=True) if key is not None]


def forget(lines: Lines, keys: Keys, value: Any) -> None:
    """Take out where ``value`` and all that is in it was set."""
    lines.pop(keys, None)
    for key, item in _inside(value):
        forget(lines, (*keys, key), item)


def _inside(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def _depth(value: Any) -> int:
    return 1 + max((_depth(item) for _, item in _inside(value)), default=0)


def size_of(value: Any) -> int:
    """Keys and values of something, written out."""
    text = len(value) // TEXT_UNIT if isinstance(value, str) else 0
    return 1 + text + sum(size_of(item) for _, item in _inside(value))


def _syntax_tree(path: Path) -> ast.Module:
    """The statements of a file that is known not to be nested deeply.

    Raises:
        UserError: it cannot be read, or is not Python.
    """
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: a NUL character; save the file as text")
    if long := next((n for n, line in enumerate(text.split("\n"), 1) if len(line) > MAX_LINE), None):
        raise UserError(f"{path}:{long}: a line of more than {MAX_LINE} characters; break it")
    _check_nesting(path, text)
    try:
        with warnings.catch_warnings(), parsing(lambda reason: UserError(f"{path}: not valid Python: {reason}")):
            warnings.simplefilter("ignore")  # of escapes that Python does not know, for one
            return ast.parse(text)
    except UserError as error:
        if isinstance(error.__cause__, SyntaxError):
            raise _invalid(path, error.__cause__.msg, error.__cause__.lineno) from error
        raise


def _check_nesting(path: Path, text: str) -> None:
    """That brackets, operators in a row and statements within statements stay within bounds.

    Args:
        text: with the line ends of Unix.
    """
    open_chains, branches = [0], 0  # operators since the last comma, for every bracket that is open
    last: tokenize.TokenInfo | None = None
    for number, token in enumerate(_tokens(path, text)):
        place = f"{path}:{token.start[0]}"
        if number > MAX_TOKENS:
            raise UserError(f"{place}: more than {MAX_TOKENS} words and signs; give long lists as files")
        is_word = token.type == tokenize.NAME and keyword.iskeyword(token.string) and token.string not in _CONSTANTS
        if token.type == tokenize.NEWLINE or token.string == ",":
            open_chains[-1] = 0
        elif token.type == tokenize.OP and token.string in "([{":
            open_chains[-1] += last is not None and (last.type in _OPERANDS or last.string in (")", "]", "}"))
            open_chains.append(0)
        elif token.type == tokenize.OP and token.string in ")]}":
            open_chains = open_chains[:-1] or [0]
        elif is_word or (token.type == tokenize.OP and token.string not in (":", ";", "=")):
            open_chains[-1] += 1
            branches += token.string == "elif"
        elif token.type == tokenize.NUMBER and len(token.string) > MAX_DIGITS:
            raise UserError(f"{place}: a number of {len(token.string)} characters; must have at most {MAX_DIGITS}")
        elif _is_f_string(token):
            raise UserError(f"{place}: an f-string is refused; {ALLOWED}")
        if len(open_chains) > MAX_DEPTH + 1:
            raise UserError(f"{place}: nested deeper than {MAX_DEPTH} levels")
        if max(open_chains[-1], branches) > MAX_CHAIN:
            raise UserError(f"{place}: more than {MAX_CHAIN} operators in a row; write the value")
        last = token


def _tokens(path: Path, text: str) -> Iterator[tokenize.TokenInfo]:
    stream = tokenize.generate_tokens(io.StringIO(text).readline)
    while True:
        try:
            with parsing(lambda reason: UserError(f"{path}: not valid Python: {reason}")):
                token = next(stream, None)
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, SyntaxError):
                raise _invalid(path, cause.msg, cause.lineno) from error
            if isinstance(cause, tokenize.TokenError) and len(cause.args) == 2:
                raise _invalid(path, str(cause.args[0]), cause.args[1][0]) from error
            raise
        if token is None:
            return
        yield token


def _invalid(path: Path, reason: str, line: int | None) -> UserError:
    return UserError(f"{path}:{line or 1}: not valid Python: {reason}")


def _is_f_string(token: tokenize.TokenInfo) -> bool:
    """Of any version: one token until Python 3.11, afterwards one that begins it; also template strings."""
    if token.type == tokenize.STRING:
        return bool({"f", "t"} & set(re.split("['\"]", token.string, maxsplit=1)[0].lower()))
    return tokenize.tok_name[token.type] in ("FSTRING_START", "TSTRING_START")
