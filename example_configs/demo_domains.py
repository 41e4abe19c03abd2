"""The five domains of the demo: prompts and answers from Python packages, cleaned and split into train and test."""

import ast
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

SEED = 2604
TRAIN_ROWS, TEST_ROWS = 600, 64
MAX_TOKENS = 160
PACKAGES = ("chatterbot-corpus", "reasoning-gym", "simple-icd-10-cm")

Pair = tuple[str, str]
Row = dict[str, list[dict[str, str]]]

# Special tokens and markers of common chat formats, an opening marker with the role's name that follows it.
TEMPLATE_TOKENS = re.compile(
    r"(?:<\|im_start\|>|<\|start_header_id\|>|<\|start\|>|<start_of_turn>)(?:(?:system|user|assistant|model|tool)\b)?"
    r"|<\|\w+\|>|<\uff5c[^\uff5c>]+\uff5c>|<end_of_turn>|(?<!\?P)</?s>|<(?:bos|eos|pad|unk|mask)>|<</?SYS>>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT)\]|\[(?:CLS|SEP|gMASK)\]"
    r"|</?(?:think|tool_call|tool_response)>|### (?:Instruction|Input|Response|System|Human|Assistant):"
)


def clean(text: str) -> str:
    """Remove chat-template tokens from a text (arXiv 2604.01152, data hygiene).

    Removing a token can join the text around it into another token, so this repeats until there is none.
    """
    while TEMPLATE_TOKENS.search(text):
        text = TEMPLATE_TOKENS.sub("", text)
    return text.strip()


def chat() -> Iterator[Pair]:
    """Consecutive turns of English dialogues, without the corpus' code snippets and quiz questions."""
    import chatterbot_corpus
    import yaml

    for path in sorted((Path(chatterbot_corpus.__file__).parent / "data" / "english").glob("*.yml")):
        if path.stem not in ("coding", "trivia"):
            for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
                yield from pairwise(map(str, turns))


def load_reasoning_gym() -> Any:
    """Import reasoning-gym without pycosat, a solver in C that needs a compiler.

    Only its logic puzzles, which the demo does not use, call pycosat; an empty module lets the import succeed.
    """
    if "pycosat" not in sys.modules and find_spec("pycosat") is None:
        sys.modules["pycosat"] = ModuleType("pycosat")
    import reasoning_gym

    return reasoning_gym


def puzzles(name: str, size: int, **config: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield question, answer and metadata of each puzzle that a reasoning-gym generator makes."""
    reasoning_gym = load_reasoning_gym()
    for item in reasoning_gym.create_dataset(name, size=size, seed=SEED, **config):
        yield item["question"], item["answer"], item["metadata"]


def running_totals(expression: str) -> str:
    """Spell out a sum term by term: ``4 - 1 - 7`` becomes ``4 - 1 = 3, 3 - 7 = -4``."""
    first, *rest = expression.split()
    total, steps = int(first), []
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(number) if sign == "+" else total - int(number)
        steps.append(f"{total} {sign} {number} = {result}")
        total = result
    return ", ".join(steps)


def math() -> Iterator[Pair]:
    """Word problems with worked solutions, sums term by term, equations, fractions, prime factors."""
    for question, _, meta in puzzles("gsm_symbolic", 900):
        yield question.removesuffix(" Give the result as your final answer. Do not include units."), meta["answer_cot"]
    for _, _, meta in puzzles("chain_sum", 200, min_digits=2, max_digits=3, max_terms=4):
        yield f"Add up step by step: {meta['expression']}", running_totals(meta["expression"])
    for question, answer, meta in puzzles("simple_equations", 150):
        yield question, f"{meta['variable']} = {answer}"
    for _, answer, meta in puzzles("fraction_simplification", 150, styles=("plain",)):
        fraction = f"{meta['numerator']}/{meta['denominator']}"
        yield f"Simplify {fraction}.", f"Both are divisible by {meta['reduction_factor']}: {fraction} = {answer}"
    for _, answer, meta in puzzles("prime_factorization", 150):
        yield f"Write {meta['number']} as a product of primes.", f"{meta['number']} = {answer}"


def reasoning() -> Iterator[Pair]:
    """Knights and knaves, syllogisms, rotated cubes, number sequences.

    The generator of family trees is left out, because it confuses some relations, such as nieces and in-laws, and its output
    depends on Python's hash seed.
    """
    for question, answer, _ in puzzles("knights_knaves", 250):
        yield question.split(" (Format your answer")[0], answer
    for question, answer, meta in puzzles("syllogism", 300):
        # The generator takes "All A are B, some B are C, so some A are C" for valid, but it is a fallacy.
        if answer == "Yes" and meta["premise1"].startswith("All") and meta["premise2"].startswith("Some"):
            continue
        verdict = "it follows" if answer == "Yes" else "it does not follow"
        conclusion = meta["conclusion"][0].lower() + meta["conclusion"][1:]
        yield question.removesuffix("\n(Answer Yes or No)"), f"{answer}, {verdict} that {conclusion}."
    for question, answer, meta in puzzles("color_cube_rotation", 200, max_rotations=2):
        question = question.removesuffix("\nProvide only the color as your final answer.")
        yield question, f"The {meta['target_side']} side is {answer} now."
    for question, answer, meta in puzzles("number_sequence", 250):
        yield f"Which number comes next? {question}", f"The rule is: {meta['rule']}. The next number is {answer}."


def medical() -> Iterator[Pair]:
    """Questions about diagnoses and their ICD-10-CM codes, one for each code, so that no test code occurs in training."""
    import simple_icd_10_cm as icd

    codes = [c for c in icd.get_all_codes() if c[0] in "ABCDEFGHIJKLMNOPQR" and icd.is_category_or_subcategory(c)]
    for index, code in enumerate(Random(SEED).sample([c for c in codes if len(c) <= 5], 1000)):
        name = icd.get_description(code)
        *categories, group, chapter = [icd.get_description(ancestor) for ancestor in icd.get_ancestors(code)]
        chain = " > ".join([chapter, group, *reversed(categories), f"{name} ({code})"])
        yield (
            (f"What does the ICD-10-CM code {code} stand for?", f"{code} stands for {name}. It belongs to {group}."),
            (f"Which ICD-10-CM code is used for: {name}?", f"{code}, in the group {group}."),
            (f"Where is this diagnosis filed in ICD-10-CM: {name}?", chain),
            (f"Name the chapter and group of ICD-10-CM code {code}.", f"Chapter: {chapter}. Group: {group}."),
        )[index % 4]


def code() -> Iterator[Pair]:
    """Functions of Python's standard library: the prompt has signature and docstring, the answer is the body."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "idlelib", "lib2to3", "turtledemo", "__phello__"}
    paths = [p for pattern in ("*.py", "*/*.py") for p in stdlib.glob(pattern) if p.parent.name not in skipped]
    for path in sorted(paths):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)):
                continue
            body = node.body[1:]
            if not body or isinstance(body[0], ast.Pass | ast.Raise):
                continue
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            summary = " ".join(docstring.split("\n\n")[0].split())
            prompt = f'Write the body of this Python function.\n\n{signature}\n    """{summary}"""'
            yield prompt, "\n".join(map(ast.unparse, body))


DOMAINS: dict[str, Callable[[], Iterator[Pair]]] = {
    "chat": chat,
    "code": code,
    "math": math,
    "medical": medical,
    "reasoning": reasoning,
}


def prompt_key(prompt: str) -> str:
    """A key that is equal for two prompts with the same words, whatever their case, spaces and punctuation."""
    return " ".join(re.findall(r"\w+", prompt.casefold()))


def split(pairs: Iterable[Pair], count_tokens: Callable[[Row], int]) -> dict[str, list[Row]]:
    """Split pairs into examples under the keys "train" and "test".

    All answers to one prompt go to the same side, so no test prompt is ever trained on.

    Args:
        count_tokens: the number of tokens of an example; examples with `MAX_TOKENS` or more are left out.
    """
    by_prompt: dict[str, list[Row]] = {}
    for prompt, answer in dict.fromkeys((clean(prompt), clean(answer)) for prompt, answer in pairs):
        row = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        if prompt_key(prompt) and answer and count_tokens(row) < MAX_TOKENS:
            by_prompt.setdefault(prompt_key(prompt), []).append(row)
    keys = sorted(by_prompt)
    Random(SEED).shuffle(keys)
    train = [row for key in keys[TEST_ROWS:] for row in by_prompt[key]]
    return {"train": train[:TRAIN_ROWS], "test": [by_prompt[key][0] for key in keys[:TEST_ROWS]]}
