"""The router's input: a prompt's hidden states in the base model, without stacks (arXiv 2604.01152, outcome router)."""

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
    """``0.45 * middle layer + 0.55 * last layer`` of the base model's hidden states, with all stacks off.

    Args:
        model: the PeftModel, or its tuner; its trainable adapter is switched off meanwhile.
        tuner: of the model.
        input_ids: (rows, tokens), padded on either side.
        attention_mask: (rows, tokens), 1 at real tokens; every row needs at least one.
        max_tokens: most tokens to read of a prompt. Only the last ones of a longer prompt are read, as if it began there,
            because a conversation ends with the question.

    Returns:
        hidden (rows, at most max_tokens, features) in fp32, padded on the right, and its mask (rows, at most max_tokens), bool.
    """
    rows = [ids[mask][-max_tokens:] for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]
    ids, mask = pad_right(rows)
    with tuner.using_stacks([]), model.disable_adapter(), evaluating(model):
        # The decoder without its head: the logits of the vocabulary would be the largest tensor, and are not needed.
        output = tuner.model.get_decoder()(
            input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False, return_dict=True
        )
    layers = output.hidden_states
    # A model that is split over several GPUs has its layers' outputs on different ones.
    middle = layers[len(layers) // 2].to(mask.device).float()
    last = output.last_hidden_state.to(mask.device).float()
    return MIDDLE_SHARE * middle + LAST_SHARE * last, mask


def pad_right(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack tensors (tokens, ...) of different lengths.

    Returns:
        (rows, tokens, ...), padded with 0 on the right, and the mask (rows, tokens), bool, true at real tokens.
    """
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=lengths.device) < lengths.unsqueeze(1)
