"""lm-eval's view of a library, in one of three modes.

    python -m axolotl_brainstacks.serving.lm_harness run --model brainstacks \
        --model_args pretrained=BASE,peft=LIBRARY,mode=routed --tasks ...

All other options are those of `lm_eval`; `mode` is base, ungated or routed.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from tqdm import tqdm

from axolotl_brainstacks.serving.model import BrainstacksModel

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("brainstacks")
class BrainstacksLM(HFLM):
    """`hf` with a mode. Routed: requests take the route of their context alone, so all choices of a question are scored
    by the same stacks; the prompts of `generate_until` take their own. A document for perplexity has no context but one
    special token, which is all that its route is read from.

    Args:
        pretrained, peft: base model and library, or `pretrained` a loaded `PeftModel`; further arguments as HFLM's.
    """

    def __init__(self, *args: Any, mode: str = "routed", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.model, PeftModel) and isinstance(self.model.base_model, BrainstacksModel)
        self.tuner = self.model.base_model
        self.tuner.mode = mode

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.tuner.mode != "routed":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        for context, numbers in tqdm(by_context.items(), "Routed contexts", disable=disable_tqdm or self.rank != 0):
            with self.tuner.routed(torch.tensor([context])):
                scored = super()._loglikelihood_tokens([requests[number] for number in numbers], True, override_bs)
            answers.update(zip(numbers, scored, strict=True))
        return [answers[number] for number in range(len(requests))]


if __name__ == "__main__":
    cli_evaluate()
