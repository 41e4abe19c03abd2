"""Takes `weight_samples` from a model in memory, and dequantises no more than the sampled entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from axolotl_brainstacks.distributed import gathered
from axolotl_brainstacks.library.weight_samples import FLOATS, Sample, WeightSamples, name_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRIX_ENTRIES, VECTOR_ENTRIES, FEWEST_ENTRIES = 64, 32, 4
# The most entries of a whole model. If it has very many parameters (unfused experts), each gives fewer entries.
MOST_ENTRIES = 2**17
# Only the first rows of a vocabulary are sampled, because resizing it keeps these. If it has fewer, their number is rounded
# down to a power of two, so that a small vocabulary that grew a little is sampled at the same positions.
VOCABULARY_ROWS = 1024
# 2^64 divided by the golden ratio: its multiples modulo 2^64 are spread evenly (Fibonacci hashing).
GOLDEN = 0x9E3779B97F4A7C15


@torch.no_grad()
def sample_weights(model: PreTrainedModel) -> WeightSamples:
    """Sample every parameter of the base model; parameters of adapters around its modules are left out.

    Only the sampled entries are dequantised, and one copy a device brings them to the CPU. Under ZeRO-3 this gathers
    parameters one at a time, so every rank has to call it. The samples of two kinds of parameters are empty: those on the
    meta device (offloaded), and 4-bit ones that bitsandbytes has repacked for a CPU's bf16 kernels.
    """
    owners: dict[int, tuple[str, nn.Module, nn.Parameter]] = {}
    for name, module, parameter in _base_parameters(model):
        owners.setdefault(id(parameter), (name, module, parameter))  # a tied weight counts once
    share = max(FEWEST_ENTRIES, MOST_ENTRIES // max(len(owners), 1))
    head = model.get_output_embeddings()
    output = None if head is None else _unwrapped(head)
    loaded = _load_dtype(model)
    place: Callable[..., tuple[Tensor, ...]] = cache(_places)
    read: dict[str, tuple[str, list[Tensor]]] = {}
    tables: dict[str, Tensor] = {}
    for name, module, parameter in owners.values():
        with gathered([parameter]):
            vocabulary = isinstance(module, nn.Embedding) or module is output
            read[name] = _read(module, parameter, loaded, share, vocabulary, place)
        state = getattr(parameter, "quant_state", None)
        if state is not None and read[name][1]:
            tables.setdefault(state.quant_type, state.code.float())
    # All tensors of all parameters go to the CPU in one list, and are taken from it again in the same order.
    pieces = [piece for _, tensors in read.values() for piece in tensors]
    host = iter(_to_host([*pieces, *tables.values()]))
    samples = {name: _sample(kind, [next(host) for _ in parts], loaded) for name, (kind, parts) in read.items()}
    return WeightSamples(samples, dict(zip(tables, host, strict=True)))


def _base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield name, owning module and value of each parameter, with the name that it has in a model without adapters."""
    module = _unwrapped(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, module, parameter
    for name, child in module.named_children():
        yield from _base_parameters(child, f"{prefix}{name}.")


def _unwrapped(module: nn.Module) -> nn.Module:
    """The base model's module inside PEFT's wrappers around it."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def _load_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The dtype that the checkpoint was cast to when loaded; a later cast to a finer dtype does not undo that rounding."""
    dtype: Any = getattr(model.config, "dtype", None)
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def _places(shape: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Choose `count` evenly spread positions in a tensor of this shape.

    Returns:
        Indices (count,) into the flattened tensor, then one index tensor (count,) for each dimension.
    """
    size = prod(shape)
    flat = range(size) if size <= count else [(i * GOLDEN % 2**64) * size >> 64 for i in range(count)]
    positions = torch.tensor(flat, device=device, dtype=torch.long)
    return positions, *torch.unravel_index(positions, shape)


def _read(
    module: nn.Module,
    parameter: nn.Parameter,
    loaded: torch.dtype | None,
    share: int,
    vocabulary: bool,
    place: Callable[..., tuple[Tensor, ...]],
) -> tuple[str, list[Tensor]]:
    """Sample one parameter.

    Args:
        module: the module that owns it.
        loaded: what `_load_dtype` returns.
        share: the most entries of one parameter.
        vocabulary: whether its first dimension is the vocabulary.
        place: `_places`, cached.

    Returns:
        The sample's kind, and fp32 tensors (n,) on the parameter's device: values, or codes with scales and slack.
    """
    state = getattr(parameter, "quant_state", None)
    if parameter.is_meta or getattr(state, "packing_format_for_cpu", False):
        return "unseen", []
    shape = tuple(parameter.shape if state is None else state.shape) or (1,)
    if vocabulary:
        shape = (1 << min(shape[0], VOCABULARY_ROWS).bit_length() - 1, *shape[1:])
    count = min(share, MATRIX_ENTRIES if len(shape) > 1 else VECTOR_ENTRIES)
    flat, *index = place(shape, count, parameter.device)
    if state is not None:
        return f"{state.quant_type} from {name_of(state.dtype)}", _four_bit(parameter, state, flat)
    values = (parameter.data if parameter.dim() else parameter.data.reshape(1))[tuple(index)].float()
    scales = getattr(parameter, "SCB", None)
    if scales is None:  # bitsandbytes moves the scales from the parameter to the module's state in the first forward
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if parameter.dtype == torch.int8 and scales is not None:
        # bitsandbytes casts weights of any dtype to fp16 before it quantises them to int8.
        source = torch.bfloat16 if loaded == torch.bfloat16 else torch.float16
        rows = scales.to(parameter.device)[index[0]].float()
        return f"int8 from {name_of(source)}", [values, rows, torch.zeros_like(rows)]
    return name_of(parameter.dtype), [values]


def _four_bit(parameter: nn.Parameter, state: Any, flat: Tensor) -> list[Tensor]:
    """Codes, scales and slack, each (n,) fp32, of the entries `flat` of a bitsandbytes 4-bit weight."""
    packed = parameter.data.view(torch.uint8).flatten()[
        flat // 2
    ]  # a byte has two codes, the even entry's in its upper half
    codes = torch.where(flat % 2 == 0, packed >> 4, packed & 15).float()
    if state.quant_type == "fp4":
        codes.masked_fill_(codes == 8, 0)  # code 8 is -0; some kernels write it in place of 0
    block = flat // state.blocksize
    if not state.nested:
        scales = state.absmax[block].float()
        return [codes, scales, torch.zeros_like(scales)]
    # Double quantisation: absmax = offset + second code * second absmax, with 256 second codes in ascending order.
    second = state.absmax[block].long()
    unit = state.state2.absmax[block // state.state2.blocksize].float()
    steps = state.state2.code.float()
    scales = (steps[second] * unit + state.offset.to(unit.device)).float()
    gaps = torch.cat([steps.diff(prepend=steps[:1])[None], steps.diff(append=steps[-1:])[None]]).amax(0)
    # Rounding to the nearest code errs by half a gap. 1e-4 is for the CPU's kernel, which does not always take the nearest
    # code, and 1 % for the slack itself, which is stored in bf16.
    return [codes, scales, (gaps[second] / 2 + 1e-4) * unit * 1.01]


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy fp32 vectors to the CPU, with one transfer for each device."""
    host: dict[int, Tensor] = {}
    for device in {tensor.device for tensor in tensors}:
        there = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        together = torch.cat([tensors[i] for i in there]).cpu()
        host |= zip(there, together.split([len(tensors[i]) for i in there]), strict=True)
    return [host[i] for i in range(len(tensors))]


def _sample(kind: str, parts: list[Tensor], loaded: torch.dtype | None) -> Sample:
    if not parts:
        return Sample(kind, torch.empty(0))
    values, *scales = parts
    if scales:
        codes = values.to(torch.int8 if kind.startswith("int8") else torch.uint8)
        return Sample(kind, codes, scales[0], scales[1].bfloat16())
    held = getattr(torch, kind)
    if held not in (*FLOATS, torch.float64):
        return Sample(kind, values)
    # Preparing a quantised base for training upcasts its other weights to fp32 after loading. Such fp32 values are still
    # rounded to bf16, so the sample is recorded as bf16.
    for dtype in FLOATS[:2]:
        if dtype in (held, loaded) and torch.equal(values.to(dtype).float(), values):
            return Sample(name_of(dtype), values.to(dtype))
    return Sample("float32", values)
