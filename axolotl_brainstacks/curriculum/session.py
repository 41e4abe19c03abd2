"""What all rounds of one run share: the model, the library, and the ways to measure losses and to sample answers."""

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

    interruption: the handler of SIGTERM and SIGINT.
    batch_size: validation examples per forward. It is the same for all domains, so that an example is always padded to the
        same length, and its loss comes out the same to the last bit.
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
        """Answer the first validation prompts of a domain with the stacks of its context.

        Returns:
            Texts under `prompt`, `answer` and `reference`, the expected answer, for each example.
        """
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
