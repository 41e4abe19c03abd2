"""What the router sees of a prompt: hidden states of the base model alone (arXiv 2604.01152, outcome router)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor

from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.evaluation import evaluating

MAX_TOKENS = 256
MIDDLE_SHARE, LAST_SHARE = 0.45, 0.55


@torch.no_grad()
def base_features(
    model: PeftModel | StackTuner,
    tuner: StackTuner,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_tokens: int = MAX_TOKENS,
) -> tuple[Tensor, Tensor]:
    """``0.45 * middle layer + 0.55 * last layer`` of the base, all stacks off, without the vocabulary's logits.

    Of a longer prompt the last `max_tokens` tokens are read, as a text of their own: in a conversation the question
    stands at its end. Padding may be on either side; what is returned is padded on the right.

    Args:
        input_ids: (rows, tokens).
        attention_mask: (rows, tokens), 1 at real tokens; every row needs one.

    Returns:
        hidden (rows, at most max_tokens, features) in fp32, mask of the same rows and tokens, bool.
    """
    rows = [ids[mask][-max_tokens:] for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]
    ids, mask = pad_right(rows)
    with tuner.using_stacks([]), model.disable_adapter(), evaluating(model):
        output = tuner.model.get_decoder()(
            input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False, return_dict=True
        )
    layers = output.hidden_states
    middle, last = (states.to(mask.device).float() for states in (layers[len(layers) // 2], output.last_hidden_state))
    return MIDDLE_SHARE * middle + LAST_SHARE * last, mask


def pad_right(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors (tokens, ...) of any length as (rows, tokens, ...) filled with 0, and the bool mask (rows, tokens)."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=lengths.device) < lengths.unsqueeze(1)
