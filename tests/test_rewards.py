"""The ready rewards: what counts as the right answer, and what the programs of a model can and cannot do."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from axolotl_brainstacks.rewards import answer_format, exact_choice, numeric_answer, python_tests, sandbox
from axolotl_brainstacks.rewards.data import question_answer


def reward(function: Any, completion: Any, prompt: Any = "?", **row: Any) -> float | None:
    values = function(
        prompts=[prompt], completions=[completion], trainer_state=None, **{k: [v] for k, v in row.items()}
    )
    assert len(values) == 1
    return values[0]


def test_importing_the_rewards_is_light() -> None:
    code = "import sys, axolotl_brainstacks.rewards; print(*{'torch', 'trl', 'axolotl', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("First 3, then 4, so 42.", "42"),
        ("#### 7\nThat took 9 steps.", 7),
        ("#### 5\nNo:\n#### 7", 7),
        (r"We get \boxed{\frac{1}{2}}, after 3 steps.", "0.5"),
        ("The answer is:\n\n**1,234** apples, not 9.", 1234),
        ("The answer is 3 + 4 = 7.", 7),
        ("It costs -$5", -5),
        ("It costs $1,000.50.", 1000.5),
        ("10-5", 5),
        ("x = -5", "-5"),
        ("\u22125", -5),
        ("3 1/2", "7/2"),
        (r"1\frac{1}{2}", 1.5),
        ("1/3", r"\frac{1}{3}"),
        ("50%", 0.5),
        ("50%", "50"),
        (r"0.5", "50%"),
        ("1e-3", "0.001"),
        ("12 m^2", 12),
        ("3.5kg", "3.50"),
        ("42", "He eats 40, and 2 more. #### 42"),
        (".5", "1/2"),
    ],
)
def test_numeric_answer_right(completion: str, answer: Any) -> None:
    assert reward(numeric_answer, completion, answer=answer) == 1.0
    assert reward(numeric_answer, [{"role": "assistant", "content": completion}], answer=answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("", "42"),
        ("I do not know", "42"),
        ("42, I mean 43", "42"),
        ("The answer is 43, not 42", "42"),
        ("The answer is 1, 2, 42", "42"),
        ("0.333", "1/3"),
        ("-42", "42"),
        ("42.0001", "42"),
        ("10^3", "10"),
        ("x_42", "42"),
        ("x2", "2"),
        ("7/0", "7"),
        ("500%", "5%"),
        ("5,000", "5"),
        ("1e999", "1e998"),
        ("9" * 10_000, "9"),
        ("#### ", "42"),
    ],
)
def test_numeric_answer_wrong(completion: str, answer: Any) -> None:
    assert reward(numeric_answer, completion, answer=answer) == 0.0


@pytest.mark.parametrize("answer", [None, True, "blue", float("nan"), float("inf")])
def test_numeric_answer_of_a_row_without_number(answer: Any) -> None:
    assert reward(numeric_answer, "42", answer=answer) is None


def test_numbers_of_hostile_texts_are_read_fast() -> None:
    started = time.monotonic()
    for text in ("1," * 50_000, "1" * 100_000, "=" * 100_000, "1/" * 50_000, "####" * 50_000, "\\frac{" * 50_000):
        assert reward(numeric_answer, text, answer=-7) == 0.0
        assert reward(exact_choice, text, answer="B") == 0.0
    assert time.monotonic() - started < 20


CITIES = ["London", "New York", "New York City"]


@pytest.mark.parametrize(
    ("completion", "answer", "choices", "expected"),
    [
        ("B", "B", None, 1.0),
        ("(b)", "B", None, 1.0),
        ("d).", "D", None, 1.0),
        ("The answer is B because A is too small.", "b", None, 1.0),
        ("A is small. B is big.\nSo it is B.", "B", None, 1.0),
        ("A dog is no cat.\nAnswer: C", "C", None, 1.0),
        (r"\boxed{\text{B}}, as A fails", "B", None, 1.0),
        ("C", "B", None, 0.0),
        ("A or B", "A", None, 0.0),
        ("The answer is A or B", "A", None, 0.0),
        ("The answer is not A", "A", None, 0.0),
        ("A. small B. big", "A", None, 0.0),
        ("A dog", "A", None, 0.0),
        ("", "A", None, 0.0),
        ("**Yes.**", "yes", None, 1.0),
        ("Maybe!", "maybe", None, 1.0),
        ("yes, or no", "yes", None, 0.0),
        ("No", "yes", None, 0.0),
        ("Now", "no", None, 0.0),
        ("new york!", "New York", CITIES, 1.0),
        ("New York City", "New York", CITIES, 0.0),
        ("It is b) New York", "B", CITIES, 1.0),
        ("B", 1, CITIES, 1.0),
        ("London, or New York", "London", CITIES, 0.0),
        ("Paris", "London", CITIES, 0.0),
        ("no change", "no change", ["no", "no change"], 1.0),
        ("2.5", "2", ["2", "3"], 0.0),
        ("-5", "5", ["5", "-5"], 0.0),
        ("4", 4, [3, 4], 1.0),
        ("C", 2, ["4", "2", "0"], 1.0),
        ("B", "C++", ["C", "C++", "Java"], 1.0),
        ("Vitamin A", "Vitamin B", ["Vitamin B", "Vitamin A"], 0.0),
        ("whatever", "a sentence", None, None),
        ("A", None, None, None),
    ],
)
def test_exact_choice(completion: str, answer: Any, choices: Any, expected: float | None) -> None:
    row = {"answer": answer} | ({"choices": choices} if choices else {})
    assert reward(exact_choice, completion, **row) == expected
    assert reward(exact_choice, [{"role": "assistant", "content": completion}], **row) == expected


def test_an_answer_that_is_no_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`answer` holds 'Rome'.*`choices`.*correct"):
        reward(exact_choice, "London", answer="Rome", choices=CITIES)
    with pytest.raises(ValueError, match="`answer` holds 3"):
        reward(exact_choice, "London", answer=3, choices=CITIES)
    with pytest.raises(ValueError, match=r"`choices` holds 'London'.*list"):
        reward(exact_choice, "London", answer="London", choices="London")


@pytest.mark.parametrize(
    ("completion", "pattern", "expected"),
    [
        ("It is 4 + 3.\n#### 7\n", None, 1.0),
        ("#### 7\nor so", None, 0.0),
        ("####", None, 0.0),
        ("<think>a\nb</think> c", r"(?s)^<think>.*</think>\s*\S+$", 1.0),
        ("<think>a\nb", r"(?s)^<think>.*</think>", 0.0),
    ],
)
def test_answer_format(completion: str, pattern: str | None, expected: float) -> None:
    assert reward(answer_format, completion, **({"pattern": pattern} if pattern else {})) == expected
    assert reward(answer_format, [{"role": "assistant", "content": completion}], pattern=pattern) == expected


def test_a_pattern_without_end_is_cut_short_and_a_wrong_one_named() -> None:
    started = time.monotonic()
    assert reward(answer_format, "a" * 60 + "b", pattern=r"^(a|aa|a*a)+$") == 0.0
    assert 0.9 * 0.5 < time.monotonic() - started < 10  # it ran into the limit
    with pytest.raises(ValueError, match=r"`pattern` holds '\(a'.*correct"):
        reward(answer_format, "a", pattern="(a")


@pytest.mark.parametrize(
    ("function", "name"), [(numeric_answer, "answer"), (exact_choice, "answer"), (python_tests, "tests")]
)
def test_a_missing_column_is_named(function: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{function.__name__}` needs the column `{name}`.*datasets.*`level`.*add"):
        reward(function, "42", level=3)


def test_completions_of_messages_and_parts() -> None:
    turns = [
        {"role": "assistant", "content": "41"},
        {"role": "tool", "content": "9"},
        {"role": "assistant", "content": "42"},
    ]
    assert reward(numeric_answer, turns, answer=42) == 1.0
    assert (
        reward(numeric_answer, [{"role": "assistant", "content": [{"type": "text", "text": "42"}]}], answer=42) == 1.0
    )
    assert reward(numeric_answer, [{"role": "assistant", "content": None}], answer=42) == 0.0
    assert numeric_answer(["?"] * 3, ["1", "2", "3"], answer=[1, None, 1]) == [1.0, None, 0.0]


DOUBLE = "assert f(2) == 4\nassert f(3) != 7\nassert f(5) == 10"


@pytest.fixture(scope="module")
def isolated() -> None:
    try:
        sandbox.require_isolation()
    except RuntimeError as reason:
        pytest.skip(str(reason))


@pytest.mark.usefixtures("isolated")
class TestPythonTests:
    @pytest.mark.parametrize(
        "completion",
        [
            "def f(x): return 2 * x",
            "Here:\n```python\ndef f(x):\n    return 2 * x\n```\nIt prints:\n```\n4 $\n```",
            "```\ndef f(x):\n    return 2 * x\n```",
            "```python\ndef f(x):\n    return 2 * x",
            "```py\nimport math\n```\n```py\ndef f(x):\n    return math.ceil(2 * x)\n```",
            "def f(x):\n    print('x' * 10**8)\n    return 2 * x",
            "import sys\ndef f(x):\n    sys.stderr.write('x' * 10**7)\n    return 2 * x",
            "def f(x): return 2 * x\nif __name__ == '__main__':\n    raise SystemExit(f(input()))",
            "import threading\ndef f(x):\n    t = threading.Thread(target=print)\n    t.start()\n    t.join()\n    return 2 * x",
            "import asyncio\nasync def g(x): return 2 * x\ndef f(x): return asyncio.run(g(x))",
            "import json, re, collections, dataclasses, tempfile, sqlite3, decimal\ndef f(x): return 2 * x",
            "def f(x):\n    open('mine', 'w').write(str(2 * x))\n    return int(open('mine').read())",
            "assert True\ndef f(x): return 2 * x",
        ],
    )
    def test_right(self, completion: str) -> None:
        assert reward(python_tests, completion, tests=DOUBLE) == 1.0
        message = [{"role": "assistant", "content": completion}]
        assert reward(python_tests, message, tests=DOUBLE.splitlines(), entry_point=None) == 1.0

    @pytest.mark.parametrize(
        "completion",
        [
            "",
            "def f(x): return x * x",
            "def f(x): return",
            "def f(x) return 2 * x",
            "I would double it.",
            "import numpy\ndef f(x): return 2 * x",
            # Cheats.
            "raise SystemExit(0)",
            "import sys; sys.exit(0)",
            "import os; os._exit(0)",
            "def f(x): raise SystemExit(0)",
            "import os\ndef f(x): os._exit(0)",
            "exit = quit = print\ndef f(x): exit()",
            "import atexit, os\natexit.register(os._exit, 0)",
            "class Anything:\n    def __eq__(self, other): return True\ndef f(x): return Anything()",
            "class Anything(int):\n    __eq__ = lambda self, other: True\n    __ne__ = __eq__\ndef f(x): return Anything()",
            "import builtins\nbuiltins.AssertionError = BaseException\nAssertionError = None\ndef f(x): return 5",
            "import builtins\nbuiltins.bool = lambda *x: True\nbool = builtins.bool\ndef f(x): return 5",
            "import sys\nfor fd in range(64):\n    try:\n        import os; os.write(fd, b'passed')\n    except OSError: pass",
            "import sys\ntests = sys.stdin.read() + open(0).read()",
            "__same__ = lambda *x: True\n__counted__ = __same__\ndef f(x): return 5",
            "import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass\ndef f(x): return 2 * x",
        ],
    )
    def test_wrong(self, completion: str) -> None:
        assert reward(python_tests, completion, tests=DOUBLE) == 0.0

    def test_equality_inside_containers_is_python_s_own(self) -> None:
        cheat = "class Any:\n    def __eq__(self, other): return True\n    def __hash__(self): return hash(4)\n"
        for value, returned in [
            ("[4]", "[Any()]"),
            ("{'a': (4,)}", "{'a': (Any(),)}"),
            ("{4}", "{Any()}"),
            ("4", "Any()"),
        ]:
            program = f"{cheat}def f(x): return {{}}"
            assert reward(python_tests, program.format(returned), tests=f"assert f(1) == {value}") == 0.0
            assert reward(python_tests, program.format(value), tests=f"assert f(1) == {value}") == 1.0

    def test_a_class_that_is_asked_for_may_compare(self) -> None:
        program = (
            "import dataclasses, collections\n@dataclasses.dataclass\nclass P:\n    x: int\n"
            "def c(s): return collections.Counter(s)"
        )
        tests = [
            "assert P(1) == P(1) and [P(1)] == [P(1)]",
            "assert P(1) != P(2)",
            "assert c('aab') == {'a': 2, 'b': 1}",
        ]
        assert reward(python_tests, program, tests=tests) == 1.0

    def test_the_tests_use_python_s_own_built_ins(self) -> None:
        cheat = "def abs(x): return 0\ndef f(x): return 5"
        assert reward(python_tests, cheat, tests="assert abs(f(2) - 4) < 1e-6") == 0.0
        assert (
            reward(python_tests, "def sum(a, b): return a + b", tests="assert sum(1, 2) == 3", entry_point="sum") == 1.0
        )

    def test_human_eval_s_form(self) -> None:
        prompt = 'def f(x):\n    """Doubles."""\n'
        row = {"tests": "def check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "f"}
        assert reward(python_tests, "    return 2 * x\n", prompt=prompt, **row) == 1.0
        assert reward(python_tests, "    return x\n", prompt=prompt, **row) == 0.0
        assert (
            reward(python_tests, "def f(x): return 2 * x", prompt=[{"role": "user", "content": prompt}], **row) == 1.0
        )

    def test_asserts_that_never_run_prove_nothing(self) -> None:
        assert reward(python_tests, "def f(x): return 4", tests="def unused():\n    assert f(2) == 4") == 0.0

    def test_mistakes_in_the_tests_are_named(self) -> None:
        for tests, what in [("f(2) == 4", "no `assert`"), ("assert f(2) ==", "no Python")]:
            with pytest.raises(ValueError, match=f"`tests` holds .*{what}"):
                reward(python_tests, "def f(x): return 4", tests=tests)
        with pytest.raises(ValueError, match="`entry_point` holds 'f g'"):
            reward(python_tests, "def f(x): return 4", tests=DOUBLE, entry_point="f g")

    def test_a_batch_keeps_its_order(self) -> None:
        programs = [f"def f(x): return {x}" for x in ("x", "2 * x", "3 * x", "x + x")] * 2
        tests = [DOUBLE] * 7 + [None]
        assert python_tests(["?"] * 8, programs, tests=tests) == [0, 1, 0, 1, 0, 1, 0, None]


def run(program: str, tests: str = "assert f(2) == 4", **limits: Any) -> bool:
    compiled = sandbox.Tests(
        compile(tests.replace("assert f(2) == 4", "assert __counted__(f(2) == 4)"), "<tests>", "exec")
    )
    return sandbox.passes(program, compiled, sandbox.Limits(**limits))


@pytest.mark.usefixtures("isolated")
class TestSandbox:
    def test_time(self) -> None:
        started = time.monotonic()
        assert not run("while True: pass", cpu_seconds=1, wall_seconds=60)
        assert not run("import time; time.sleep(60)", wall_seconds=1)
        ignoring = "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        assert not run(ignoring + "while True: pass", cpu_seconds=1, wall_seconds=60)
        assert time.monotonic() - started < 40

    def test_memory(self) -> None:
        program = "def f(x):\n    block = bytearray({} << 20)\n    return 4"
        assert run(program.format(20), memory_bytes=512 << 20)
        assert not run(program.format(600), memory_bytes=512 << 20)
        assert not run("x = []\nwhile True: x.append(x * 2)", memory_bytes=512 << 20)

    @pytest.mark.parametrize(
        "start",
        [
            "os.fork()",
            "os.posix_spawn('/bin/true', ['true'], {})",
            "subprocess.run(['true'])",
            "os.execv('/bin/true', ['true'])",
        ],
    )
    def test_no_process_can_be_started(self, start: str) -> None:
        """The fork bomb's first fork is refused, and the program learns it."""
        program = f"import os, subprocess\ndef f(x):\n    try:\n        {start}\n    except PermissionError:\n        return 4"
        assert run(program)

    def test_no_process_can_be_signalled(self) -> None:
        program = (
            "import os\ndef f(x):\n    try:\n        os.kill({}, 0)\n    except PermissionError:\n        return 4"
        )
        sleeper = subprocess.Popen(["sleep", "60"])
        try:
            assert run(program.format("os.getppid()")) and run(program.format(sleeper.pid))
        finally:
            sleeper.kill()
            sleeper.wait()

    def test_no_network(self, tmp_path: Path) -> None:
        """Neither a server on this machine, nor a socket in the file system."""
        connected = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
            local.bind(str(tmp_path / "socket"))
            local.listen()

            def accept(listening: socket.socket) -> None:
                with contextlib.suppress(OSError):  # closed at the end
                    listening.accept()[0].close()
                    connected.set()

            for listening in (server, local):
                threading.Thread(target=accept, args=[listening], daemon=True).start()
            program = "import socket\ndef f(x):\n    try:\n        {}\n    except OSError:\n        return 4"
            assert run(program.format(f"socket.create_connection({server.getsockname()}, 5)"))
            assert run(program.format(f"socket.socket(socket.AF_UNIX).connect({str(tmp_path / 'socket')!r})"))
            assert not connected.is_set()
            socket.create_connection(server.getsockname(), 5).close()
            assert connected.wait(10)  # the server does answer

    def test_files(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.write_text("untouched")
        program = "import os\ndef f(x):\n    try:\n        {}\n    except OSError:\n        return 4"
        for attempt in (
            f"open({str(outside)!r}, 'w')",
            f"os.remove({str(outside)!r})",
            f"os.rename({str(outside)!r}, {str(outside)!r} + '2')",
            f"os.chmod({str(outside)!r}, 0)",
            f"open({str(tmp_path / 'new')!r}, 'w')",
            "open('big', 'wb').write(bytes(9 << 20))",  # one file
            "[open(str(i), 'wb').write(bytes(1 << 20)) for i in range(9)]",  # all files
        ):
            assert run(program.format(attempt), disk_bytes=8 << 20), attempt
        assert outside.read_text() == "untouched" and list(tmp_path.iterdir()) == [outside]

    def test_starts_in_an_empty_folder_without_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SECRET_TOKEN", "a secret")
        empty = "import os\ndef f(x): return 4 if os.listdir() == [] and 'SECRET_TOKEN' not in os.environ else 5"
        assert run(empty)
        parent = (
            "import os\ndef f(x):\n    try:\n        open(f'/proc/{os.getppid()}/environ').read()\n"
            "    except OSError: return 4"
        )
        assert run(parent)

    def test_confinement_cannot_be_taken_back(self, tmp_path: Path) -> None:
        program = f"""
import ctypes, os, resource
libc = ctypes.CDLL(None)
def f(x):
    libc.mount(b"none", b"/", None, 32 | 4096, None)
    libc.umount2(os.getcwd().encode(), 2)
    for call in (os.unshare, os.setns):
        try: call(0x10000000, 0)
        except (OSError, TypeError): pass
    try: resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))
    except (OSError, ValueError): pass
    try: open({str(tmp_path / "new")!r}, "w")
    except OSError: return 4
"""
        assert run(program)
        assert list(tmp_path.iterdir()) == []

    def test_crashes_and_hostile_output(self) -> None:
        assert not run("import ctypes; ctypes.string_at(0)")
        assert not run("import sys; sys.setrecursionlimit(10**9)\ndef f(x): return f(x)", memory_bytes=256 << 20)
        flood = (
            "import os\nfor fd in range(64):\n    try:\n"
            "        while True: os.write(fd, bytes(10**6))\n    except OSError: pass"
        )
        assert not run(flood, wall_seconds=2)

    def test_no_trace_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
        assert run("open('a', 'w').write('b')\ndef f(x): return 4")
        assert not run("import time; time.sleep(60)", wall_seconds=0.5)
        assert list(tmp_path.iterdir()) == []


def test_without_isolation_nothing_runs_unless_the_user_says_so(tmp_path: Path) -> None:
    """As where user namespaces are forbidden."""
    code = """
import sys
from pathlib import Path
from axolotl_brainstacks.rewards import python_tests
row = {"prompts": ["?"], "completions": ["def f(x): return 4"], "tests": ["assert f(2) == 4"]}
Path("/proc/sys/user/max_net_namespaces").write_text("0")
print(python_tests(**row))
"""
    inside = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
    probe = ["unshare", "--user", "--map-root-user", "sh", "-c", "echo 0 > /proc/sys/user/max_net_namespaces"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("user namespaces are not permitted here")
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    refused = subprocess.run(inside, capture_output=True, text=True, env=environment)
    assert refused.returncode and refused.stdout == ""
    error = refused.stderr.splitlines()[-1]
    assert "RuntimeError" in error and "unshare" in error and "BRAINSTACKS_ALLOW_UNISOLATED_CODE=1" in error
    allowed = environment | {"BRAINSTACKS_ALLOW_UNISOLATED_CODE": "1"}
    assert subprocess.run(inside, capture_output=True, text=True, env=allowed).stdout.strip() == "[1.0]"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "2+2?", "answer": 4, "level": "easy"}, {"answer": 4, "level": "easy"}),
        ({"prompt": "2+2?", "answer": 4}, {"answer": 4}),
        ({"prompt": [{"role": "user", "content": "2+2?", "name": None}], "answer": 4}, {"answer": 4}),
        ({"messages": [{"role": "user", "content": "2+2?"}], "answer": 4}, {"answer": 4}),
        (
            {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "#### 4"}]},
            {"answer": "#### 4"},
        ),
        (
            {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "So"}], "answer": 4},
            {"answer": 4},
        ),
    ],
)
def test_question_answer(row: dict[str, Any], expected: dict[str, Any]) -> None:
    transform, options = question_answer({}, dataset_idx=0)
    sources = [name for name in options["remove_columns"] if name in row]
    # Axolotl renames these before, so that `prompt` can change its type.
    renamed = Dataset.from_list([row]).rename_columns({name: f"_{name}" for name in sources})
    made = renamed.map(
        lambda sample: transform({key.removeprefix("_"): value for key, value in sample.items()}),
        remove_columns=[f"_{name}" for name in sources],
    )
    assert made[0] == {"prompt": [{"role": "user", "content": "2+2?"}], **expected}


def test_question_answer_with_a_system_prompt_and_without_a_question() -> None:
    transform, _ = question_answer({})
    assert transform({"question": "2+2?", "system": "Be short.", "answer": 4})["prompt"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2+2?"},
    ]
    with pytest.raises(ValueError, match=r"`datasets:`.*`prompt`, `question`.*only `text`, `answer`.*rename"):
        transform({"text": "2+2?", "answer": 4})


def test_axolotl_finds_the_transform_and_the_rewards() -> None:
    from axolotl.core.trainers.grpo import GRPOStrategy
    from axolotl.prompt_strategies.dpo import load

    transform, _ = load("axolotl_brainstacks.question_answer", {}, dataset_idx=0)
    assert transform({"question": "?", "answer": 4}) == {"prompt": [{"role": "user", "content": "?"}], "answer": 4}
    assert GRPOStrategy.get_reward_func("axolotl_brainstacks.rewards.numeric_answer") is numeric_answer
