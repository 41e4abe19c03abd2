"""Verifiable rewards for GRPO: functions that compare a completion with the columns of its example, without a reward model.

Name them in a config, e.g. ``trl.reward_funcs: [axolotl_brainstacks.rewards.numeric_answer]``. All have the form that TRL
asks for, ``f(prompts, completions, **columns)``, where each argument is a list with one entry per completion. A completion is
a string, or a list of messages whose last assistant message counts. Each function returns a list with 1.0 or 0.0 per
completion, and None for an example of another kind. TRL leaves None out, so a dataset with several kinds of tasks can use
several rewards.
"""

from axolotl_brainstacks.rewards.choice import exact_choice
from axolotl_brainstacks.rewards.numeric import numeric_answer
from axolotl_brainstacks.rewards.pattern import answer_format
from axolotl_brainstacks.rewards.program import python_tests

__all__ = ["answer_format", "exact_choice", "numeric_answer", "python_tests"]
