"""Verifiable rewards for GRPO: functions that compare a completion with the row it answers, without a reward model.

Name them in a config, e.g. ``trl.reward_funcs: [axolotl_brainstacks.rewards.numeric_answer]``. All have TRL's form,
``f(prompts, completions, **columns)``: lists with one entry per completion. A completion is a string, or a list of messages
whose last assistant message counts. They return 1.0 or 0.0 per completion, and None where the row is of another kind, so
that a mixture of tasks can share several rewards; TRL leaves None out.
"""

from axolotl_brainstacks.rewards.choice import exact_choice
from axolotl_brainstacks.rewards.numeric import numeric_answer
from axolotl_brainstacks.rewards.pattern import answer_format
from axolotl_brainstacks.rewards.program import python_tests

__all__ = ["answer_format", "exact_choice", "numeric_answer", "python_tests"]
