"""Samples of a model's parameters: a few entries of each, comparable across dtypes and quantisations.

A load knows a weight up to its own rounding, so a sampled entry stands for an interval: a point and half a unit in the
last place for a float; the cell of a code times the scale of its block for NF4, FP4 and int8. Two loads of one model have
intervals that overlap at every entry, whatever the weights were cast or quantised to. Two loads of the same kind have
equal values.

How small a change is seen, measured on a merged LoRA in every matrix of SmolLM2-135M, as the standard deviation of the
change over that of the weights: 1e-5 between loads in bf16 or fp32; 1e-3 between loads in NF4 or FP4, and between int8 and
unquantised ones; 3e-3 between double-quantised NF4 or FP4 and unquantised ones; 1e-2 between different quantisations.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor, nn

from axolotl_brainstacks.distributed import gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRIX_ENTRIES, VECTOR_ENTRIES, FEWEST_ENTRIES = 64, 32, 4
# Most entries of a model; with very many parameters (unfused experts), fewer of each are sampled.
MOST_ENTRIES = 2**17
# A resized vocabulary keeps its first rows. A power of two, so that a small vocabulary may grow too.
VOCABULARY_ROWS = 1024
# CPU and GPU kernels round a weight on the border between two codes differently, about one in a million.
STRAY_CODES = 1 / 2000
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: multiples of it spread evenly
_CODED = ("nf4", "fp4", "int8")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # coarsest first
_UNPACKED_BYTES = 2**26


@dataclass(frozen=True)
class Sample:
    """Entries of one parameter at fixed positions, n of them; 0 if the parameter was not in memory.

    kind: a dtype's name, such as "bfloat16", or a quantisation and what it was made from: "nf4 from bfloat16".
    values: (n,) in that dtype, or codes (uint8; int8 for int8).
    scales: (n,) fp32, the absmax that each code is multiplied by; None for floats.
    slack: (n,) bf16, how far a scale may be from the block's true absmax, because double quantisation rounds it too.
    """

    kind: str
    values: Tensor
    scales: Tensor | None = None
    slack: Tensor | None = None

    @property
    def format(self) -> str:
        return self.kind.partition(" from ")[0]

    @property
    def source(self) -> str:
        """The dtype that the model's weights had been cast to: this one's, or before they were quantised."""
        return self.kind.rpartition(" from ")[2]

    def interval(self, tables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Least and greatest weight in the dtype `source` behind each entry, (n,) fp64."""
        if self.scales is None or self.slack is None:
            return self.values.double(), self.values.double()
        low, high = _cells(self.values, tables.get(self.format))
        # Quantisers compute in fp32, with borders written in six digits.
        slack = self.slack.double() + 1e-5 * self.scales.abs()
        scales = torch.stack([self.scales - slack, self.scales + slack])
        low, high = (low * scales).amin(0), (high * scales).amax(0)
        return _widened(low, high, torch.float16) if self.format == "int8" else (low, high)  # int8 is made from fp16


@dataclass(frozen=True)
class WeightSamples:
    """Samples of all parameters by name, and the code tables ("nf4", "fp4": 16 values, fp32) of quantised ones."""

    samples: dict[str, Sample]
    tables: dict[str, Tensor]

    @property
    def kinds(self) -> str:
        return ", ".join(sorted({sample.kind for sample in self.samples.values()}))

    def differing(self, other: WeightSamples) -> list[str]:
        """Parameters that cannot be the same in both, or that only one has; both samples in the model's order."""
        if lone := self.samples.keys() ^ other.samples.keys():
            return [name for name in {**self.samples, **other.samples} if name in lone]
        found, stray, codes = [], [], 0
        for name, mine in self.samples.items():
            its = other.samples[name]
            if not mine.values.numel() or not its.values.numel():
                continue
            if mine.values.shape != its.values.shape or not self._overlap(mine, other, its):
                found.append(name)
            elif mine.kind == its.kind:
                different = int(mine.values.ne(its.values).sum())
                if mine.scales is None:
                    found += [name] * bool(different)
                    continue
                codes += mine.values.numel()
                stray += [name] * different
                if not _same_scales(mine, its):
                    found.append(name)
        if len(stray) > max(2, STRAY_CODES * codes):
            found += [name for name in dict.fromkeys(stray) if name not in found]
        return found

    def _overlap(self, mine: Sample, other: WeightSamples, its: Sample) -> bool:
        dtypes = {_name(dtype): dtype for dtype in _FLOATS}
        if mine.source not in dtypes or its.source not in dtypes:
            return mine.kind == its.kind
        a, b = mine.interval(self.tables), its.interval(other.tables)
        if mine.source != its.source:  # else both have rounded the model's weights to the same values
            a, b = _widened(*a, dtypes[mine.source]), _widened(*b, dtypes[its.source])
        # A NaN overlaps with nothing.
        return bool(((a[0] <= b[1]) & (b[0] <= a[1])).all())

    def not_finite(self) -> str | None:
        """The first parameter with a NaN or infinite entry or scale."""
        for name, sample in self.samples.items():
            numbers = sample.values if sample.scales is None else sample.scales
            if not numbers.isfinite().all():
                return name
        return None

    def unseen(self) -> int:
        """How many parameters were not in memory when sampled."""
        return sum(not sample.values.numel() for sample in self.samples.values())

    def to_text(self) -> str:
        """A safetensors file, compressed and in base64."""
        tensors = {f"{name}/table": table for name, table in self.tables.items()}
        for name, sample in self.samples.items():
            parts = {"": sample.values, "/scales": sample.scales, "/slack": sample.slack}
            tensors |= {name + part: tensor.clone() for part, tensor in parts.items() if tensor is not None}
        # Safetensors sorts by dtype and name; the order is kept here.
        kinds = json.dumps([[name, sample.kind] for name, sample in self.samples.items()])
        return base64.b64encode(zlib.compress(safetensors.torch.save(tensors, {"kinds": kinds}), 9)).decode()

    @classmethod
    def from_text(cls, text: str) -> WeightSamples:
        """The inverse of `to_text`. Raises ValueError if the text is damaged."""
        try:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(base64.b64decode(text, validate=True), _UNPACKED_BYTES)
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            samples = {
                name: Sample(kind, tensors[name], tensors.get(f"{name}/scales"), tensors.get(f"{name}/slack"))
                for name, kind in json.loads(header["__metadata__"]["kinds"])
            }
            tables = {name: tensors[f"{name}/table"] for name in _CODED if f"{name}/table" in tensors}
        except (ValueError, KeyError, TypeError, zlib.error, SafetensorError) as error:
            raise ValueError(f"samples of the weights cannot be read ({type(error).__name__}: {error})") from error
        for name, sample in samples.items():
            if not _well_formed(sample, tables):
                raise ValueError(f"the sample of {name!r} does not fit its kind {sample.kind!r}")
        return cls(samples, tables)


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
        return f"{state.quant_type} from {_name(state.dtype)}", _four_bit(parameter, state, flat)
    values = (parameter.data if parameter.dim() else parameter.data.reshape(1))[tuple(index)].float()
    scales = getattr(parameter, "SCB", None)
    if scales is None:  # where the first forward puts them
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if parameter.dtype == torch.int8 and scales is not None:
        # Weights of any type are cast to fp16 before they become int8.
        source = torch.bfloat16 if loaded == torch.bfloat16 else torch.float16
        rows = scales.to(parameter.device)[index[0]].float()
        return f"int8 from {_name(source)}", [values, rows, torch.zeros_like(rows)]
    return _name(parameter.dtype), [values]


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
    if held not in (*_FLOATS, torch.float64):
        return Sample(kind, values)
    # Upcast after loading, as for training on a quantised base: bf16's values in fp32 are known as exactly as bf16 is.
    for dtype in _FLOATS[:2]:
        if dtype in (held, loaded) and torch.equal(values.to(dtype).float(), values):
            return Sample(_name(dtype), values.to(dtype))
    return Sample("float32", values)


def _cells(codes: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ends of what a code stands for, as shares of its scale; `table` None for int8."""
    if table is None:
        return (codes.double() - 0.5) / 127, (codes.double() + 0.5) / 127
    levels = table.double().unique()
    borders = torch.cat([levels[:1], (levels[:-1] + levels[1:]) / 2, levels[-1:]])
    level = torch.searchsorted(levels, table.double()[codes.long()])
    return borders[level], borders[level + 1]


def _widened(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What an interval's ends may have been before they were rounded to `dtype`: half a unit in the last place away."""
    info = torch.finfo(dtype)
    below, above = (
        info.eps / 2 * end.abs().clamp(min=info.smallest_normal).log2().floor().exp2() for end in (low, high)
    )
    return low - below, high + above


def _same_scales(a: Sample, b: Sample) -> bool:
    assert a.scales is not None and b.scales is not None and a.slack is not None and b.slack is not None
    slack = a.slack.float() + b.slack.float() + 1e-6 * a.scales.abs()
    return bool(((a.scales - b.scales).abs() <= slack).all())


def _well_formed(sample: Sample, tables: dict[str, Tensor]) -> bool:
    if not isinstance(sample.kind, str) or sample.values.dim() != 1:
        return False
    if sample.format not in _CODED or not sample.values.numel():
        return sample.scales is None and sample.slack is None
    if sample.scales is None or sample.slack is None:
        return False
    shapes = sample.scales.shape == sample.slack.shape == sample.values.shape
    if sample.format == "int8":
        return shapes and sample.values.dtype == torch.int8
    table = tables.get(sample.format)
    if table is None or table.shape != (16,) or not table.isfinite().all():
        return False
    return shapes and sample.values.dtype == torch.uint8 and bool((sample.values < 16).all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
