"""Peak memory of a training step with the first stack, against PEFT's LoRA; each in a process of its own."""

from __future__ import annotations

from measure import Comparison, Result, counted, in_fresh_process, main, memory, peak_memory
from models import SMOLLM2_SIZES, loss_of, random_ids, smollm2, training_step, with_lora, with_stacks
from peft import PeftModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

FROZEN = 9


def run(short: bool) -> Result:
    found = {"lora": in_fresh_process(measured, None), "ours": in_fresh_process(measured, 0)}
    if not short:
        found["ours, 9 frozen stacks"] = in_fresh_process(measured, FROZEN)

    def row(what: str, key: str, name: str = "ours", reach: float | None = None) -> Comparison:
        return counted(what, "PEFT LoRA r=64", found[name][key], found["lora"][key], "B", reach)

    rows = [
        row("peak memory of the step, base model included", "peak", reach=1.10),
        row("peak memory of the step, without the base model", "step", reach=1.10),
        row("tensors saved for backward", "saved"),
    ]
    if not short:
        rows.append(row("peak memory of the step, 9 frozen stacks and base model included", "peak", [*found][-1]))
    return Result(rows, SMOLLM2_SIZES, found)


def measured(frozen: int | None) -> dict[str, int]:
    """Bytes of a step: with a LoRA for None, else with a stack in training on so many frozen ones.

    peak: all of it. step: what comes on top of the base model. saved: kept from forward to backward, weights apart.
    """
    empty = memory()
    base = smollm2()
    loaded = memory()
    model = with_lora(base) if frozen is None else with_stacks(base, frozen)
    step = training_step(model)
    step()
    peak = peak_memory(step)
    return {"peak": peak - empty, "step": peak - loaded, "saved": saved_bytes(model)}


def saved_bytes(model: PeftModel) -> int:
    """Bytes of the distinct storages that a forward keeps for its backward, those of weights and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, random_ids(model))
    del loss
    return sum(saved.values())


if __name__ == "__main__":
    main(run)
