"""What PEFT loads a library as: it routes every prompt to the stacks that it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from axolotl_brainstacks.serving import routes
from axolotl_brainstacks.serving.library_tuner import LibraryTuner
from axolotl_brainstacks.serving.routes import Domains, PromptRoute


class BrainstacksModel(LibraryTuner):
    """The model that answers, each prompt with the stacks of its route.

    Threads: `generate`, `route`, `routed` and `mode` take the model's `lock`, as `StackTuner` says of its methods; a block
    of `with routed(...)` holds it. What `mode` chooses holds for all threads.
    """

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode == "routed":
            return routes.routed_forward(self, *args, **kwargs)
        return super()._compute(*args, **kwargs)

    def generate(self, *args: Any, domains: Domains | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, each row of the batch with the stacks of its own route.

        Args:
            domains: weights of domains instead of the router's, for all rows or one mapping a row; {} is the base model.

        Raises:
            ValueError: if `domains` names a domain without stacks, or the router does not belong to the library.
        """
        return routes.generate(self, *args, domains=domains, **kwargs)

    def route(
        self, prompts: Tensor | Sequence[str], attention_mask: Tensor | None = None, tokenizer: Any = None
    ) -> list[PromptRoute]:
        """The router's choice for each prompt: token ids (rows, tokens), or texts and their tokenizer."""
        return routes.route(self, prompts, attention_mask, tokenizer)

    @contextmanager
    def routed(
        self,
        prompts: Tensor | Sequence[str] | None = None,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
        domains: Domains | None = None,
    ) -> Iterator[list[PromptRoute]]:
        """Hold the routes of these prompts, or those of `domains`, for every forward inside: one a row, or one for all."""
        with self.lock:
            chosen = routes.routes_for(self, prompts, attention_mask, tokenizer, domains)
            with self.using_stacks(*routes.stack_weights(self, chosen)):
                yield chosen
