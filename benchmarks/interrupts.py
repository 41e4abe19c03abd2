"""Interrupts a model at random moments while it loads a library, selects stacks, routes and generates, and asks again; then
asks from eight threads at once.

    python benchmarks/interrupts.py --count 200 --seed 7      # interrupts in all
    python benchmarks/interrupts.py --threads 500             # answers of eight threads instead

An interrupt is a SIGINT of the system, from a thread that waits for a random time, or an exception (KeyboardInterrupt,
MemoryError, RuntimeError) at a random one of the points at which the interpreter looks for signals. Afterwards the next
answers, of every domain, by the router, in batches and of the base, have to be right to the last bit, or errors.
"""

import argparse
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

sys.path[0] = str(Path(__file__).parents[1] / "tests")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from support.interrupts import ERRORS, interrupted, points_of  # noqa: E402
from support.routed import tuner_of  # noqa: E402
from test_interrupts import SHORT, answers, library_of, loaded, questions, same, small_base  # noqa: E402
from test_threads import ways_to_ask  # noqa: E402

PHASES = ("loading", "selecting", "routing", "generating")
KINDS = ("SIGINT", *(error.__name__ for error in ERRORS))


class Tries:
    """A library, what its answers are, and one interrupt after the other."""

    def __init__(self, folder: Path, rng: Random) -> None:
        self.rng, self.prompts = rng, questions()
        self.library = library_of(small_base(), folder)
        self.expected = answers(self.fresh(), self.prompts)
        self.model = self.fresh()
        # Points and seconds of an undisturbed call, by its name.
        self.lengths: dict[str, tuple[int, float]] = {}

    def fresh(self) -> PeftModel:
        return loaded(small_base(), self.library)

    def interrupt(self, phase: str, kind: str) -> tuple[str, bool]:
        """The outcome of the answers afterwards, right, error or wrong; and whether the call was interrupted at all."""
        if phase == "loading":
            return self._interrupt_loading(kind)
        resident = tuner_of(self.model).resident
        assert resident is not None
        answers(self.model, self.prompts)  # from all stacks; each call below then has some leave and others come
        resident.max_bytes = resident.bytes // 4 * 3
        name, call = self.rng.choice(self._calls(phase))
        came = self._disturb(name, kind, call, call)
        outcome = self._outcome(lambda: self.model)
        if outcome != "right":
            self.model = self.fresh()
        return outcome, came

    def _interrupt_loading(self, kind: str) -> tuple[str, bool]:
        """Loading and the first answer. What was interrupted answers again; the base model, perhaps half wrapped, is loaded
        into again if that did not come about."""
        made: list[PeftModel] = []

        def load(base: Any) -> None:
            made.append(PeftModel.from_pretrained(base, str(self.library.path)).eval())
            made[-1].generate(self.prompts[0], **SHORT)

        base = small_base()
        came = self._disturb("load", kind, lambda: load(base), lambda: load(small_base()))
        if len(made) > 1:  # one of them to see how long it takes
            del made[0]
        return self._outcome(lambda: made[0] if made else self._loaded_into(base)), came

    def _loaded_into(self, base: Any) -> PeftModel:
        return PeftModel.from_pretrained(base, str(self.library.path)).eval()

    def _calls(self, phase: str) -> list[tuple[str, Callable[[], Any]]]:
        """Calls that leave nothing on."""
        model, tuner, prompts = self.model, tuner_of(self.model), self.prompts

        def select() -> None:
            with torch.no_grad(), tuner.using_stacks(["s002_code", "s004_medical"], torch.tensor([[1.0, 0.5]])):
                model(prompts[1])
            tuner.mode = "base"
            tuner.mode = "auto"

        def hold() -> None:
            with torch.no_grad(), tuner.routed(domains={"chat": 1.0, "math": 0.5}), tuner.disable_adapter():
                model(prompts[0])

        def route() -> None:
            tuner.route(prompts[0])
            with torch.no_grad(), tuner.routed(prompts[2]):
                model(prompts[2])

        def named() -> None:
            for name in ("math", "code", "chat"):
                model.generate(prompts[0], domains={name: 1.0}, **SHORT)

        def routed() -> None:
            for prompt in prompts[1:]:
                model.generate(prompt, **SHORT)

        calls = {"selecting": (select, hold), "routing": (route,), "generating": (named, routed)}
        return [(call.__name__, call) for call in calls[phase]]

    def _disturb(self, name: str, kind: str, call: Callable[[], Any], undisturbed: Callable[[], Any]) -> bool:
        """Interrupt a call anywhere; whether it was. `undisturbed` shows, once for each name, how long one takes."""
        if name not in self.lengths:
            start = time.perf_counter()
            undisturbed()
            seconds = time.perf_counter() - start
            self.lengths[name] = points_of(undisturbed), seconds
        points, seconds = self.lengths[name]
        if kind == "SIGINT":
            return signalled(self.rng.random() * seconds, call)
        return interrupted(self.rng.randint(1, points), dict(zip(KINDS[1:], ERRORS, strict=True))[kind], call)

    def _outcome(self, model: Callable[[], PeftModel]) -> str:
        try:
            asked = model()
            resident, tuner_of(asked).mode = tuner_of(asked).resident, "auto"
            if resident is not None:
                resident.max_bytes = None
            found = answers(asked, self.prompts)
        except (ValueError, RuntimeError) as error:
            print(f"error: {error!s:.150}", file=sys.stderr)
            return "error"
        return "right" if same(found, self.expected) else "wrong"


def signalled(seconds: float, call: Callable[[], Any]) -> bool:
    """Run `call`; another thread sends this process a SIGINT after so many seconds, unless it has ended. Whether that, or an
    error for it, came through."""
    ended = threading.Event()

    def ring() -> None:
        if not ended.wait(seconds):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=ring)
    try:
        thread.start()
        try:
            call()
        finally:
            ended.set()
            thread.join()
    except (KeyboardInterrupt, ValueError, SystemError):
        ended.set()
        thread.join()
        return True
    return False


def interrupts(count: int, seed: int) -> bool:
    """Print the table; whether no answer was wrong."""
    rng, outcomes, came = Random(seed), Counter[tuple[str, str, str]](), Counter[str]()
    with TemporaryDirectory() as folder:
        tries = Tries(Path(folder), rng)
        for number in range(count):
            phase, kind = PHASES[number % len(PHASES)], rng.choice(KINDS)
            outcome, was = tries.interrupt(phase, kind)
            outcomes[phase, kind, outcome] += 1
            came[phase] += was
    print(f"| {count} interrupts | {' | '.join(KINDS)} | came before the call's end |\n|{' --- |' * (len(KINDS) + 2)}")
    names = ("right", "error", "wrong")
    for phase in PHASES:
        cells = [" / ".join(str(outcomes[phase, kind, name]) for name in names) for kind in KINDS]
        print(f"| {phase}: {' / '.join(names)} | {' | '.join(cells)} | {came[phase]} |")
    return not any(outcome == "wrong" for _, _, outcome in outcomes)


def threads(count: int, seed: int) -> bool:
    """Print how many answers of eight threads at once, half of them with stacks that come and go, are those of one thread."""
    wrong: Counter[str] = Counter()
    with TemporaryDirectory() as folder:
        library = library_of(small_base(), Path(folder))
        for limited in (False, True):
            model = loaded(small_base(), library)
            asks, rng = ways_to_ask(model, library, questions()), Random(seed + limited)
            answers(model, questions())
            resident = tuner_of(model).resident
            assert resident is not None
            if limited:
                resident.max_bytes = resident.bytes // 4 * 3
            expected = {name: ask() for name, ask in asks.items()}
            wanted = [rng.choice(list(asks)) for _ in range(count // 2)]
            with ThreadPoolExecutor(8) as pool:
                found = pool.map(lambda name, asks=asks: asks[name](), wanted)
                wrong.update(n for n, it in zip(wanted, found, strict=True) if not torch.equal(it, expected[n]))
    print(f"{count // 2 * 2} answers of eight threads: {wrong.total()} differ from one thread's {dict(wrong) or ''}")
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="interrupts in all phases together")
    parser.add_argument("--threads", type=int, help="answers of eight threads instead")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of calls and moments; the system's add to it"
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"seed {given.seed}", flush=True)
    fine = threads(given.threads, given.seed) if given.threads else interrupts(given.count, given.seed)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
