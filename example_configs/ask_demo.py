"""Asks the demo's library one unseen prompt per domain, and shows which domains' stacks the router chose for each."""

import json
from pathlib import Path

import click
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import axolotl_brainstacks  # noqa: F401  (registers the adapter type BRAINSTACKS with PEFT)


@click.command()
@click.option("--demo", type=click.Path(exists=True, path_type=Path), default=".demo", show_default=True)
def main(demo: Path) -> None:
    folder = demo / "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(demo / "library")).eval()
    domains = list(dict.fromkeys(stack.domain for stack in model.base_model.stacks))
    rows = [json.loads((demo / f"data/{domain}/test.jsonl").read_text().splitlines()[-1]) for domain in domains]
    prompts = [row["messages"][:-1] for row in rows]
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    # The router reads the prompts without any stack. `generate` routes each prompt again in the same way.
    routes = model.base_model.route(batch["input_ids"], batch["attention_mask"])
    answers = model.generate(**batch, max_new_tokens=60, do_sample=False)[:, batch["input_ids"].shape[1] :]
    table = Table("domain", "prompt", "route", "answer", title="One batch, in which every prompt has its own route")
    for domain, prompt, route, answer in zip(domains, prompts, routes, answers, strict=True):
        table.add_row(
            domain,
            prompt[-1]["content"],
            str(route),
            tokenizer.decode(answer, skip_special_tokens=True),
            end_section=True,
        )
    Console().print(table)


if __name__ == "__main__":
    main()
