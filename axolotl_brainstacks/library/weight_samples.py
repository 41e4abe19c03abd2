"""Samples of a model's parameters: a few entries of each, comparable across dtypes and quantisations.

Casting or quantising rounds a weight, so a sampled entry tells only an interval that the original weight lies in. For a
float the interval is its value and half a unit in the last place on both sides; for NF4, FP4 and int8 it is the cell of the
code, times the scale of its block. Two loads of one model have intervals that overlap at every entry, whatever the weights
were cast or quantised to. Two loads of the same kind have equal values.

The smallest change that the comparison detects was measured with a LoRA merged into every matrix of SmolLM2-135M, as the
standard deviation of the change relative to that of the weights: 1e-5 between loads in bf16 or fp32; 1e-3 between loads in
NF4 or FP4, and between int8 and unquantised ones; 3e-3 between double-quantised NF4 or FP4 and unquantised ones; 1e-2
between different quantisations.
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from axolotl_brainstacks.guarded import parse_json, parse_tensors

# The share of codes that may differ between two loads of one model: CPU and GPU kernels round a weight on the border of two
# codes differently, about one weight in a million.
STRAY_CODES = 1 / 2000
_CODED = ("nf4", "fp4", "int8")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # coarsest first
_UNPACKED_BYTES = 2**26


@dataclass(frozen=True)
class Sample:
    """n entries of one parameter at fixed positions; n is 0 if the parameter was not in memory.

    kind: a dtype's name, such as "bfloat16", or a quantisation and the dtype before it, such as "nf4 from bfloat16".
    values: (n,) in that dtype, or codes (uint8; int8 for int8).
    scales: (n,) fp32, the absmax of the block, which multiplies each code's value; None for floats.
    slack: (n,) bf16, the largest error of each scale, because double quantisation rounds scales too; None for floats.
    """

    kind: str
    values: Tensor
    scales: Tensor | None = None
    slack: Tensor | None = None

    @property
    def format(self) -> str:
        """The format of `values`: a dtype's name, "nf4", "fp4" or "int8"."""
        return self.kind.partition(" from ")[0]

    @property
    def source(self) -> str:
        """The dtype that the weights were cast to: the dtype of `values`, or the one before quantisation."""
        return self.kind.rpartition(" from ")[2]

    def interval(self, tables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The smallest and the largest weight of dtype `source` that rounds to each entry, both (n,) fp64."""
        if self.scales is None or self.slack is None:
            return self.values.double(), self.values.double()
        low, high = _cells(self.values, tables.get(self.format))
        # Quantisers compute in fp32, and their source code gives the borders of the cells in six digits.
        slack = self.slack.double() + 1e-5 * self.scales.abs()
        scales = torch.stack([self.scales - slack, self.scales + slack])
        return (low * scales).amin(0), (high * scales).amax(0)


@dataclass(frozen=True)
class WeightSamples:
    """Samples of all parameters by name, and the code tables (16 fp32 values each) of the formats "nf4" and "fp4"."""

    samples: dict[str, Sample]
    tables: dict[str, Tensor]

    @property
    def kinds(self) -> str:
        """All kinds of samples, separated by commas."""
        return ", ".join(sorted({sample.kind for sample in self.samples.values()}))

    def differing(self, other: WeightSamples) -> list[str]:
        """Names of the parameters that cannot come from the same weights, in the model's order.

        If only one side has some parameters, those are the result, and nothing else is compared.
        """
        if lone := self.samples.keys() ^ other.samples.keys():
            return [name for name in {**self.samples, **other.samples} if name in lone]
        found: list[str] = []
        stray: list[str] = []  # one name for each code that differs
        codes = 0  # how many codes were compared
        for name, mine in self.samples.items():
            its = other.samples[name]
            if not mine.values.numel() or not its.values.numel():
                continue
            if mine.values.shape != its.values.shape or not self._overlap(mine, other, its):
                found.append(name)
            elif mine.kind == its.kind:  # of one kind, two loads of a model have equal values
                different = int(mine.values.ne(its.values).sum())
                if mine.scales is None:
                    if different:
                        found.append(name)
                    continue
                codes += mine.values.numel()
                stray += [name] * different
                if not _same_scales(mine, its):
                    found.append(name)
        # A few stray codes come from different kernels; more of them mean other weights.
        if len(stray) > max(2, STRAY_CODES * codes):
            found += [name for name in dict.fromkeys(stray) if name not in found]
        return found

    def _overlap(self, mine: Sample, other: WeightSamples, its: Sample) -> bool:
        dtypes = {name_of(dtype): dtype for dtype in FLOATS}
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
        """The number of parameters that were not in memory."""
        return sum(not sample.values.numel() for sample in self.samples.values())

    def to_text(self) -> str:
        """This object as text: a safetensors file, compressed with zlib, in base64."""
        tensors = {f"{name}/table": table for name, table in self.tables.items()}
        for name, sample in self.samples.items():
            parts = {"": sample.values, "/scales": sample.scales, "/slack": sample.slack}
            tensors |= {name + part: tensor.clone() for part, tensor in parts.items() if tensor is not None}
        # Safetensors sorts tensors by dtype and name, so the metadata keeps the model's order.
        kinds = json.dumps([[name, sample.kind] for name, sample in self.samples.items()])
        return base64.b64encode(zlib.compress(safetensors.torch.save(tensors, {"kinds": kinds}), 9)).decode()

    @classmethod
    def from_text(cls, text: str) -> WeightSamples:
        """The inverse of `to_text`. Raises ValueError if the text is damaged."""
        try:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(base64.b64decode(text, validate=True), _UNPACKED_BYTES)
            tensors = parse_tensors(data, "the record")
            header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
            samples = {
                name: Sample(kind, tensors[name], tensors.get(f"{name}/scales"), tensors.get(f"{name}/slack"))
                for name, kind in parse_json(header["__metadata__"]["kinds"])
            }
            tables = {name: tensors[f"{name}/table"] for name in _CODED if f"{name}/table" in tensors}
        except (ValueError, KeyError, TypeError, zlib.error, SafetensorError) as error:
            raise ValueError(f"samples of the weights cannot be read ({type(error).__name__}: {error})") from error
        for name, sample in samples.items():
            if not _well_formed(sample, tables):
                raise ValueError(f"the sample of {name!r} does not fit its kind {sample.kind!r}")
        return cls(samples, tables)


def _cells(codes: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """The lower and upper end of each code's cell, relative to its scale, both (n,) fp64.

    Args:
        codes: (n,).
        table: the 16 values of the codes; None for int8.
    """
    if table is None:
        return (codes.double() - 0.5) / 127, (codes.double() + 0.5) / 127
    levels = table.double().unique()
    # A code stands for the weights nearest to its value, so cells meet halfway between two values.
    borders = torch.cat([levels[:1], (levels[:-1] + levels[1:]) / 2, levels[-1:]])  # (levels + 1,)
    level = torch.searchsorted(levels, table.double()[codes.long()])
    return borders[level], borders[level + 1]


def _widened(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The interval before its ends were rounded to `dtype`, which moved each by at most half a unit in the last place."""
    info = torch.finfo(dtype)

    def half_unit(end: Tensor) -> Tensor:
        power_of_two = end.abs().clamp(min=info.smallest_normal).log2().floor().exp2()
        return info.eps / 2 * power_of_two

    return low - half_unit(low), high + half_unit(high)


def _same_scales(a: Sample, b: Sample) -> bool:
    """Whether the scales of two samples of one quantisation are equal up to their slack and fp32's rounding."""
    assert a.scales is not None and b.scales is not None and a.slack is not None and b.slack is not None
    slack = a.slack.float() + b.slack.float() + 1e-6 * a.scales.abs()
    return bool(((a.scales - b.scales).abs() <= slack).all())


def _well_formed(sample: Sample, tables: dict[str, Tensor]) -> bool:
    """Whether a sample read from a file has the tensors, shapes and dtypes that its kind says."""
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


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name without the package: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
