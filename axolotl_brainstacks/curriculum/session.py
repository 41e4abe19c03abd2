"""What all rounds of one run share: the model, its library, and how losses and answers are measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.args import SampleArgs
from axolotl_brainstacks.curriculum.ledger import Ledger
from axolotl_brainstacks.curriculum.signals import Interruption
from axolotl_brainstacks.evaluation import Example, answer, mean_loss


@dataclass(frozen=True)
class Session:
    """One run of a curriculum.

    batch_size: validation rows a forward. It is not a stage's own, so that the same rows are padded alike in every stage.
    """

    model: PeftModel
    tuner: StackTuner
    tokenizer: PreTrainedTokenizerBase
    ledger: Ledger
    interruption: Interruption
    output_dir: Path
    batch_size: int

    def loss(self, rows: list[Example]) -> float:
        """Mean loss in nats per answer token, with the frozen stacks that are on."""
        return mean_loss(self.model, rows, self.batch_size)

    def answers(self, rows: list[Example], domain: str, rules: SampleArgs) -> list[dict[str, Any]]:
        """Answers to the first prompts of a domain's `rows`, as the domain's stacks give them, beside what was expected."""
        asked = [row for row in rows if row.prompt_ids][: rules.prompts]
        if not asked:
            return []
        decode, pad = self.tokenizer.decode, self.tokenizer.pad_token_id
        with self.tuner.using_stacks(self.ledger.context_of(domain)), self.model.disable_adapter():
            pad = self.tokenizer.eos_token_id if pad is None else pad
            answers = answer(self.model, asked, pad, rules.max_new_tokens)
        return [
            {
                "prompt": decode(row.prompt_ids),
                "answer": decode(tokens, skip_special_tokens=True),
                "reference": decode(row.input_ids[len(row.prompt_ids) :], skip_special_tokens=True),
            }
            for row, tokens in zip(asked, answers, strict=True)
        ]
