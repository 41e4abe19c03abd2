"""Reads `weight_samples` of a model in memory, without dequantising more than the sampled entries."""

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
# Most entries of a model; with very many parameters (unfused experts), fewer of each are sampled.
MOST_ENTRIES = 2**17
# A resized vocabulary keeps its first rows. A power of two, so that a small vocabulary may grow too.
VOCABULARY_ROWS = 1024
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: multiples of it spread evenly


@torch.no_grad()
def sample_weights(model: PreTrainedModel) -> WeightSamples:
    """Sample every parameter of the base model, adapters around it left out.

    Only sampled entries are dequantised and leave their device, in one copy a device. Under ZeRO-3 parameters are
    gathered one at a time, so every rank has to call this. Not seen are parameters on the meta device (offloaded) and
    4-bit ones that bitsandbytes has repacked for a CPU's bf16 kernels.
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
    pieces = [piece for _, tensors in read.values() for piece in tensors]
    host = iter(_to_host([*pieces, *tables.values()]))
    samples = {name: _sample(kind, [next(host) for _ in parts], loaded) for name, (kind, parts) in read.items()}
    return WeightSamples(samples, dict(zip(tables, host, strict=True)))


def _base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Name, owner and value of each parameter, named as if no adapter were around any module."""
    module = _unwrapped(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, module, parameter
    for name, child in module.named_children():
        yield from _base_parameters(child, f"{prefix}{name}.")


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def _load_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The type that the checkpoint was cast to when loaded: later casts to a finer one do not bring the bits back."""
    dtype: Any = getattr(model.config, "dtype", None)
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def _places(shape: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, ...]:
    """`count` positions in a tensor, spread evenly: indices into its flat form, then one index tensor a dimension."""
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
    """A parameter's kind and fp32 tensors (values, and for codes scales and slack), where the parameter is."""
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
    if scales is None:  # where the first forward puts them
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if parameter.dtype == torch.int8 and scales is not None:
        # Weights of any type are cast to fp16 before they become int8.
        source = torch.bfloat16 if loaded == torch.bfloat16 else torch.float16
        rows = scales.to(parameter.device)[index[0]].float()
        return f"int8 from {name_of(source)}", [values, rows, torch.zeros_like(rows)]
    return name_of(parameter.dtype), [values]


def _four_bit(parameter: nn.Parameter, state: Any, flat: Tensor) -> list[Tensor]:
    """Codes, scales and slack of entries of a bitsandbytes 4-bit weight."""
    packed = parameter.data.view(torch.uint8).flatten()[flat // 2]  # the even entry in the upper half
    codes = torch.where(flat % 2 == 0, packed >> 4, packed & 15).float()
    if state.quant_type == "fp4":
        codes.masked_fill_(codes == 8, 0)  # a negative zero, which is up to the kernel
    block = flat // state.blocksize
    if not state.nested:
        scales = state.absmax[block].float()
        return [codes, scales, torch.zeros_like(scales)]
    # absmax = offset + second code * second absmax, the code one of 256 in ascending order.
    second = state.absmax[block].long()
    unit = state.state2.absmax[block // state.state2.blocksize].float()
    steps = state.state2.code.float()
    scales = (steps[second] * unit + state.offset.to(unit.device)).float()
    gaps = torch.cat([steps.diff(prepend=steps[:1])[None], steps.diff(append=steps[-1:])[None]]).amax(0)
    # The CPU's kernel does not always take the nearest code; slack is rounded to bf16 later.
    return [codes, scales, (gaps[second] / 2 + 1e-4) * unit * 1.01]


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of fp32 vectors on the CPU, with one transfer a device."""
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
    # Upcast after loading, as for training on a quantised base: bf16's values in fp32 are known as exactly as bf16 is.
    for dtype in FLOATS[:2]:
        if dtype in (held, loaded) and torch.equal(values.to(dtype).float(), values):
            return Sample(name_of(dtype), values.to(dtype))
    return Sample("float32", values)
