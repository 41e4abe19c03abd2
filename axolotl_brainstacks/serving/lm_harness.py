"""A model type for lm-eval that scores a library in one of three modes.

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
    """lm-eval's `hf` model with a mode.

    In mode "routed", the router reads the context of a request and not the continuation, so that all choices of a question are
    scored with the same stacks. Each prompt of `generate_until` gets its own route. A document scored for perplexity has one
    special token as its context, and the router reads that alone.

    Args:
        args, kwargs: as HFLM's, with `pretrained` the base model and `peft` the library, or `pretrained` a loaded `PeftModel`.
        mode: "routed", "ungated" or "base", as in `LibraryTuner.mode`.

    Raises:
        ValueError: for an unknown mode.
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
        # One route per context, because a block of `routed` holds one route for all forwards inside.
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(i)
        scores: dict[int, tuple[float, bool]] = {}
        for context, indices in tqdm(by_context.items(), "Routed contexts", disable=disable_tqdm or self.rank != 0):
            with self.tuner.routed(torch.tensor([context])):
                scored = super()._loglikelihood_tokens([requests[i] for i in indices], True, override_bs)
            scores.update(zip(indices, scored, strict=True))
        return [scores[i] for i in range(len(requests))]


if __name__ == "__main__":
    cli_evaluate()
