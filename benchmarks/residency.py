"""Making a stack resident, against torch.load into fresh modules; and what a second prompt of a route reads."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from libraries import load, new_library
from measure import DEVICE, Result, alternate, compare, counted, main, quantity, repeats
from models import PROJECTIONS, random_ids, smollm2, tuner_of
from peers import LoopStack
from torch import nn
from transformers import PreTrainedModel


def run(short: bool) -> Result:
    base = smollm2()
    with TemporaryDirectory() as path:
        library = new_library(Path(path) / "library", base, ["chat", "code"], 1)
        pickled = Path(path) / "stack.pt"
        torch.save(fresh_modules(base).state_dict(), pickled)
        model = load(library, base)
        tuner, (chat, code) = tuner_of(model), (stack.name for stack in library.manifest.stacks)
        resident = tuner.resident
        assert resident is not None
        first = alternate({"ours": lambda: tuner.use_stacks([chat])}, 1, warm_ups=0)["ours"]
        stack_bytes = resident.bytes
        resident.max_bytes = stack_bytes  # room for one: the other one leaves
        times = alternate(
            {"ours": lambda: tuner.use_stacks([chat]), "torch": lambda: load_pickled(base, pickled)},
            repeats(short),
            lambda name: tuner.use_stacks([code]),
        )
        resident.max_bytes = None
        prompt = random_ids(base, 1, 16)
        answer = {"max_new_tokens": 2, "do_sample": False, "domains": {"chat": 1.0}}
        read = [resident.bytes_read]
        for _ in range(2):
            model.generate(input_ids=prompt, **answer)
            read.append(resident.bytes_read)
    again = read[2] - read[1]
    what = f"making a stack of {quantity(stack_bytes, 'B')} resident"
    return Result(
        [
            compare(what, "torch.load into fresh modules", times["ours"], times["torch"], reach=1 / 10),
            compare(f"{what}, the first time: its hash is checked", "the same", first, times["torch"][:1]),
            counted("second prompt of a route: bytes read", "bytes of the stack", again, stack_bytes, "B", 0.0),
        ],
        {"model": "SmolLM2-135M shapes", "stack_bytes": stack_bytes},
        {"seconds": times, "first": first},
    )


def fresh_modules(base: PreTrainedModel) -> nn.ModuleDict:
    """One stack as modules of their own, an expert a module."""
    linears = {name: module for name, module in base.named_modules() if name.rpartition(".")[2] in PROJECTIONS}
    return nn.ModuleDict(
        {name.replace(".", "/"): LoopStack(linear.in_features, linear.out_features) for name, linear in linears.items()}
    )


def load_pickled(base: PreTrainedModel, path: Path) -> nn.ModuleDict:
    modules = fresh_modules(base)
    modules.load_state_dict(torch.load(path, weights_only=True))
    return modules.to(DEVICE)


if __name__ == "__main__":
    main(run)
