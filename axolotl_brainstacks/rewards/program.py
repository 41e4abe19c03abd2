"""A reward for completions whose Python program passes its example's tests; the program runs in a sandbox."""

from __future__ import annotations

import ast
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from axolotl_brainstacks.rewards.sandbox import Tests, passes, require_isolation
from axolotl_brainstacks.rewards.text import Completion, column, text_of

_FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_AT_ONCE = 4


def python_tests(prompts: list[Any], completions: list[Completion], **columns: list[Any]) -> list[float | None]:
    """Return 1.0 if the completion's program passes all tests in the column ``tests``, else 0.0.

    ``tests`` is Python source with ``assert`` statements, or a list of such sources. The optional column ``entry_point`` names
    the function that the prompt asks for. With it, tests may define ``check(candidate)`` as HumanEval does, and a plain-text
    prompt that begins the function is put before a completion that only continues it. The program is all Python in fenced
    blocks, or, without any, the whole completion.

    Each program runs in its own process, several at a time, with Python's standard library only and limits on time, memory
    and files (`axolotl_brainstacks.rewards.sandbox.Limits`); `axolotl_brainstacks.rewards.sandboxed` says what it cannot do.
    At least one assert has to run. Tests use Python's own ``abs``, ``len`` and so on even if the program redefines them, except
    for ``entry_point``, and an object of the program that claims to equal everything equals nothing. A program that searches
    its own process for the tests' source can still find it.

    Args:
        prompts: the prompts, for completions that continue a function.
        completions: the completions to score.
        columns: the data's columns, with one entry per completion.

    Returns:
        One reward per completion; None if it has no tests.

    Raises:
        ValueError: if the data have no column ``tests``, or tests are not Python or have no assert.
        RuntimeError: if this machine does not permit the isolation.
    """
    tests = column(columns, "tests", "python_tests")
    entries = columns.get("entry_point") or [None] * len(tests)
    jobs = [
        (_program(text_of(completion), prompt, entry), _tests(source, entry)) if source else None
        for prompt, completion, source, entry in zip(prompts, completions, tests, entries, strict=True)
    ]
    # After the data are parsed, so that mistakes in them show on every machine.
    require_isolation()
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda job: job and float(passes(*job)), jobs))


def _program(text: str, prompt: Any, entry_point: str | None) -> str:
    """The program in a completion's text, completed with the prompt if it only continues that."""
    blocks = _FENCED.findall(text)
    python = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
    code = "\n".join(python or [code for language, code in blocks if not language]) if blocks else text
    definition = f"def {entry_point}("
    continues = entry_point and isinstance(prompt, str) and definition in prompt and definition not in code
    return prompt + code if continues else code


def _tests(source: str | list[str], entry_point: str | None) -> Tests:
    """Compile tests so that the sandbox counts their asserts and checks their comparisons."""
    text = source if isinstance(source, str) else "\n".join(source)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"the column `tests` holds {text!r:.200}, which is no Python ({error}): correct it in the data"
        ) from None
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        raise ValueError(
            f"the column `tests` holds {text!r:.200}, which has no `assert`: any program would pass it; add one"
        )
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if entry_point and not entry_point.isidentifier():
        raise ValueError(
            f"the column `entry_point` holds {entry_point!r}, which is no function's name: correct it in the data"
        )
    if entry_point and "check" in defined:
        tree.body += ast.parse(f"check({entry_point})").body
    tree = ast.fix_missing_locations(_Watched().visit(tree))
    return Tests(compile(tree, "<tests>", "exec"), entry_point)


class _Watched(ast.NodeTransformer):
    """Rewrites tests: asserts call `__counted__`, and == and != call `__same__`. The sandbox defines both functions."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.generic_visit(node)
        node.test = _call("__counted__", node.test)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
            return node
        same = _call("__same__", node.left, node.comparators[0])
        return same if isinstance(node.ops[0], ast.Eq) else ast.UnaryOp(ast.Not(), same)


def _call(function: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), list(arguments), [])
