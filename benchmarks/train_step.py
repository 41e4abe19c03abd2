"""Time of a training step with the first stack: against PEFT's LoRA of equal ranks, a per-stack loop, and MixLoRA."""

from measure import Result, alternate, compare, main, repeats
from models import SMOLLM2_SIZES, smollm2, trainable_size, training_step, with_lora, with_stacks
from peers import with_loops, with_mixlora


def run(short: bool) -> Result:
    base = smollm2()
    mixlora, balance = with_mixlora(base)
    models = {"lora": with_lora(base), "ours": with_stacks(base), "loop": with_loops(base), "mixlora": mixlora}
    steps = {
        name: training_step(model, extra_loss=balance if name == "mixlora" else None) for name, model in models.items()
    }
    times = alternate(steps, repeats(short))
    what = "train step, first stack, SmolLM2-135M"
    return Result(
        [
            compare(what, "PEFT LoRA r=64", times["ours"], times["lora"], reach=1.05),
            compare(what, "loop over experts", times["ours"], times["loop"]),
            compare(what, "MixLoRA (MLP experts) + attention LoRA", times["ours"], times["mixlora"]),
        ],
        SMOLLM2_SIZES,
        {"seconds": times, "trainable_parameters": {name: trainable_size(model) for name, model in models.items()}},
    )


if __name__ == "__main__":
    main(run)
