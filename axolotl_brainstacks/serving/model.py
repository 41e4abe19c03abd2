"""The tuner class that PEFT uses for the type BRAINSTACKS: it answers each prompt with the stacks of its route."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from axolotl_brainstacks.serving import routes
from axolotl_brainstacks.serving.library_tuner import LibraryTuner
from axolotl_brainstacks.serving.routes import Domains, PromptRoute


class BrainstacksModel(LibraryTuner):
    """A base model with stacks that answers each prompt with the stacks of its route.

    Threads: `generate`, `route`, `routed` and the setter of `mode` take the model's `lock`, like the methods that `StackTuner`
    lists. A block of `with routed(...)` holds the lock. The mode holds for all threads.
    """

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode == "routed":
            return routes.routed_forward(self, *args, **kwargs)
        return super()._compute(*args, **kwargs)

    def generate(self, *args: Any, domains: Domains | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with the stacks of each row's own route.

        Args:
            args, kwargs: as for the base model's `generate`.
            domains: weights of domains to use instead of the router's: one mapping for all rows, or one per row. {} answers with
                the base model alone.

        Returns:
            What the base model's `generate` returns.

        Raises:
            ValueError: if `domains` names a domain without stacks, or the router is stale or damaged.
        """
        return routes.generate(self, *args, domains=domains, **kwargs)

    def route(
        self, prompts: Tensor | Sequence[str], attention_mask: Tensor | None = None, tokenizer: Any = None
    ) -> list[PromptRoute]:
        """The router's choice for each prompt, without an answer.

        Args:
            prompts: token ids (rows, tokens), or texts.
            attention_mask: (rows, tokens), 1 at real tokens; default: all are real. Not used for texts.
            tokenizer: for texts.

        Returns:
            One route per prompt.

        Raises:
            ValueError: if there is no usable router, a prompt is empty, or texts come without a tokenizer.
        """
        return routes.route(self, prompts, attention_mask, tokenizer)

    @contextmanager
    def routed(
        self,
        prompts: Tensor | Sequence[str] | None = None,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
        domains: Domains | None = None,
    ) -> Iterator[list[PromptRoute]]:
        """Use fixed routes for every forward inside a `with` block, as in a decoding loop of your own.

        Args:
            prompts, attention_mask, tokenizer: prompts to route, as for `route`; a single one serves all rows of a batch.
            domains: weights of domains to use instead of the router's, as for `generate`.

        Yields:
            The routes.

        Raises:
            ValueError: as `route` and `generate`.
        """
        with self.lock:
            chosen = routes.routes_for(self, prompts, attention_mask, tokenizer, domains)
            with self.using_stacks(*routes.stack_weights(self, chosen)):
                yield chosen
