"""Records the base model that a library was trained on, and tells whether a loaded model is the same one.

The comparison has three parts: the architecture's config; digests of the checkpoint's files, where both sides found the
files (in a local folder or the Hub's cache); and samples of every parameter in memory (`weight_samples`), which reveal
fine-tunes and merged LoRAs but accept the same model in every dtype and quantisation.

The comparison cannot detect three kinds of change: a change of only a few entries, because it samples a few entries of
each parameter; a change of a vocabulary beyond its first 1,024 rows, because new tokens may have been added there; and
a fine-tune smaller than the rounding error of the quantisation (`weight_samples` has the figures), if the checkpoint's
files cannot be found or were saved in another dtype.
"""

import hashlib
import json
import logging
import math
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from axolotl_brainstacks.library.checkpoint_files import CheckpointDigest, digest_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from axolotl_brainstacks.library.weight_samples import WeightSamples

LOG = logging.getLogger(__name__)

# Loading, saving or training a model may set these keys, and none of them changes what its linear layers compute. Axolotl
# itself raises max_position_embeddings, takes special tokens from the tokenizer and grows the vocabulary for new ones.
VOLATILE_KEYS = {
    *("architectures", "bos_token_id", "dtype", "eos_token_id", "gradient_checkpointing", "id2label", "label2id"),
    *("max_position_embeddings", "name_or_path", "num_labels", "pad_token_id", "problem_type", "quantization_config"),
    *("return_dict", "torch_dtype", "transformers_version", "use_cache", "vocab_size"),
}
FINGERPRINT_SAMPLES = 32
# bf16 rounds by at most 0.2 % of a value, and none of 32 values exceeds sqrt(32) = 5.7 times their RMS: 1.1 % of it.
FINGERPRINT_TOLERANCE = 0.02

Fingerprint = Annotated[list[FiniteFloat], Field(min_length=FINGERPRINT_SAMPLES, max_length=FINGERPRINT_SAMPLES)]


class BaseModelInfo(BaseModel):
    """The model that the stacks were trained on.

    config_hash: SHA-256 (hex) of its architecture.
    weights: `WeightSamples.to_text` of all its parameters.
    loaded_as: the kinds of these samples, such as "bfloat16".
    checkpoint: digest of its files, None if they were not found.
    fingerprint: 32 entries of the input embedding, in fp32; libraries of earlier versions have nothing else to compare.
        None if the embedding is quantised or not in memory.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    revision: str | None = None
    config_hash: str
    fingerprint: Fingerprint | None = None
    loaded_as: str | None = None
    weights: str | None = None
    checkpoint: CheckpointDigest | None = None

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.weights is None and self.fingerprint is None:
            raise ValueError("neither weights nor fingerprint of the base model are given")
        return self

    @classmethod
    def of(cls, model: "PreTrainedModel", name: str, revision: str | None = None) -> Self:
        """Describe a loaded model, in any dtype, quantised or not, with adapters around its modules or without.

        Under ZeRO-3 this gathers parameters one at a time, so every rank has to call it.

        Raises:
            ValueError: if a sampled weight is NaN or infinite.
        """
        from axolotl_brainstacks.library.weight_sampling import sample_weights

        samples = sample_weights(model)
        if parameter := samples.not_finite():
            raise ValueError(
                f"base_model {name} has NaN or infinite weights in {parameter}: download or convert it again"
            )
        config = json.dumps(_stable(model.config.to_dict()), sort_keys=True, default=str)
        return cls(
            name=name,
            revision=revision,
            config_hash=hashlib.sha256(config.encode()).hexdigest(),
            fingerprint=_fingerprint(model),
            loaded_as=samples.kinds,
            weights=samples.to_text(),
            checkpoint=digest_checkpoint(getattr(model.config, "_name_or_path", ""), revision),
        )

    def check(self, other: Self) -> None:
        """Raise a ValueError naming both models, and what differs, unless `other` is the same model as this one."""
        if difference := self.difference(other):
            raise ValueError(
                f"the library was trained on {self.title}, but {other.title} has {difference}: set base_model to {self.name}, or "
                "name another folder in brainstacks.library"
            )

    def difference(self, other: Self) -> str | None:
        """What `other` has that makes it another model than this one, in words; None if it is the same."""
        if other.config_hash != self.config_hash:
            return "another architecture"
        details = self._difference_in_files(other) or self._difference_in_memory(other)
        return f"the same architecture with other weights ({details})" if details else None

    def completed(self, other: Self) -> Self:
        """A copy of this record with the fields that an earlier version left out, from `other`, a record of the same model."""
        if self.weights is not None:
            return self
        return self.model_copy(update={key: getattr(other, key) for key in ("loaded_as", "weights", "checkpoint")})

    def _difference_in_files(self, other: Self) -> str | None:
        if self.checkpoint is None or other.checkpoint is None:
            return None
        differing, count = self.checkpoint.differing(other.checkpoint)
        return f"{differing} of {count} tensors in the checkpoint's files differ" if differing else None

    def _difference_in_memory(self, other: Self) -> str | None:
        if self.weights is None or other.weights is None:
            LOG.warning(
                "The library has recorded only a few embeddings of the base model %s, so a difference in any other weight goes "
                "unnoticed; the next `axolotl train` or `axolotl brainstacks-router` that writes to the library records all "
                "parameters",
                self.title,
            )
            return self._difference_in_embeddings(other)
        mine, its = self._samples(self.weights), other._samples(other.weights)
        if unseen := max(mine.unseen(), its.unseen()):
            LOG.warning("%d of %d parameters of %s are not compared", unseen, len(mine.samples), self.title)
        names = mine.differing(its)
        if not names:
            return None
        return (
            f"{names[0]} differs, and {len(names) - 1} more of {len(mine.samples)} parameters; recorded as "
            f"{self.loaded_as}, loaded as {other.loaded_as}"
        )

    def _samples(self, weights: str) -> "WeightSamples":
        from axolotl_brainstacks.library.weight_samples import WeightSamples

        try:
            return WeightSamples.from_text(weights)
        except ValueError as error:
            raise ValueError(
                f"the record of the base model {self.title} is damaged at base.weights ({error}): restore manifest.json from "
                "a copy of the library"
            ) from error

    def _difference_in_embeddings(self, other: Self) -> str | None:
        if self.fingerprint is None or other.fingerprint is None:
            return "their embeddings cannot be compared"
        rms = math.sqrt(sum(v * v for v in self.fingerprint) / len(self.fingerprint))
        worst = max(abs(a - b) for a, b in zip(self.fingerprint, other.fingerprint, strict=True))
        if worst <= FINGERPRINT_TOLERANCE * rms:
            return None
        return f"embeddings differ by {worst / rms if rms else math.inf:.0%} of their RMS"

    @property
    def title(self) -> str:
        """The model's name and revision, for errors."""
        return f"{self.name}@{self.revision}" if self.revision else self.name


def _stable(value: Any) -> Any:
    """A model config without volatile keys, and without keys that are None or False.

    A new release of Transformers adds keys to every config, as a rule with None or False; dropping these keeps the hash of an
    old model the same.
    """
    if not isinstance(value, dict):
        return value
    return {
        key: _stable(item)
        for key, item in value.items()
        if str(key) not in VOLATILE_KEYS
        and not str(key).startswith(("_", "output_"))
        and item is not None
        and item is not False
    }


def _fingerprint(model: "PreTrainedModel") -> list[float] | None:
    """32 entries of the input embedding, in fp32, from its first 2,000 rows (a resized vocabulary keeps them)."""
    from axolotl_brainstacks.distributed import gathered

    weight = model.get_input_embeddings().get_parameter("weight")
    with gathered([weight]):
        if weight.is_meta or weight.dim() != 2 or not weight.is_floating_point():
            return None
        rows = [(17 + 61 * i) % weight.shape[0] for i in range(FINGERPRINT_SAMPLES)]
        columns = [(5 + 37 * i) % weight.shape[1] for i in range(FINGERPRINT_SAMPLES)]
        return weight.detach()[rows, columns].float().tolist()
