import copy
import html
import json
import logging
import multiprocessing
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from click.testing import CliRunner
from peft import PeftModel
from rich.console import Console
from support.base_models import make_old
from support.models import base_config, chat_dataset, run_axolotl, write_rows
from support.processes import finish, start_train
from support.routed import add_domain, meter_of, new_library, random_rows, tiny_base
from support.seeds import seeded_random
from transformers import AutoModelForCausalLM, PreTrainedModel

from axolotl_brainstacks import cli
from axolotl_brainstacks.args import BrainstacksBlock
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.evaluation import IGNORED
from axolotl_brainstacks.library import DomainEntry, Library
from axolotl_brainstacks.library.report import PAGE
from axolotl_brainstacks.router.router import Router
from axolotl_brainstacks.router.thresholds import gate
from axolotl_brainstacks.router_args import GateArgs, RouterArgs
from axolotl_brainstacks.router_training import pipeline as make_module
from axolotl_brainstacks.router_training import report
from axolotl_brainstacks.router_training.data import Sample, load_samples
from axolotl_brainstacks.router_training.evaluate import CHOICES
from axolotl_brainstacks.router_training.measure import LossMeter
from axolotl_brainstacks.router_training.pipeline import EVALUATION, made_before, make_router
from axolotl_brainstacks.router_training.split import split, warn_of_few

DOMAINS = ["chat", "code", "math"]
pytestmark = pytest.mark.slow  # a router is fitted and evaluated in most of them
SETTINGS: dict[str, Any] = {"width": 16, "epochs": 3, "mixed_pairs": 6, "floors": {"chat": 0.2}}


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_base()


def some_samples(count: int = 24) -> list[Sample]:
    return [Sample(row, name, (name,)) for name in DOMAINS for row in random_rows(count, seeded_random())]


def make(library: Library, meter: LossMeter, samples: list[Sample], **settings: Any) -> dict[str, Any]:
    with library.writing():
        return make_router(library, meter, samples, RouterArgs(**SETTINGS | settings))


@torch.no_grad()
def plain_loss(meter: LossMeter, sample: Sample, weights: dict[str, float]) -> float:
    """Loss of one row with every stack of a domain at that domain's weight."""
    stacks = [stack for stack in meter.stacks if weights.get(stack.domain)]
    factors = torch.tensor([[weights[stack.domain] for stack in stacks]])
    with meter.tuner.using_stacks([stack.name for stack in stacks], factors), meter.model.disable_adapter():
        logits = meter.model(input_ids=torch.tensor([sample.row.input_ids])).logits[0, :-1]
    return float(F.cross_entropy(logits, torch.tensor(sample.row.labels[1:]), ignore_index=IGNORED))


def with_contexts(library: Library) -> Library:
    """Every domain of it trained with the earlier ones on, but math without code."""
    contexts: dict[str, list[str]] = {name: [] for name in DOMAINS}
    with library.writing():
        for name in DOMAINS:
            earlier = ["chat", "math"] if name == "math" else DOMAINS[: DOMAINS.index(name) + 1]
            contexts[name] = [stack.name for stack in library.manifest.stacks if stack.domain in earlier]
            # Of the domains before it one stack was there: the domain counts all the same.
            library.update_domain(name, context=[s for s in contexts[name] if s.endswith(name) or int(s[1:4]) % 2])
    return library


TRAINED_WITH = {"chat": ["chat"], "code": ["chat", "code"], "math": ["chat", "math"]}


def test_the_evaluation_says_what_each_choice_costs_on_unseen_prompts(base: PreTrainedModel, tmp_path: Path) -> None:
    library = with_contexts(new_library(tmp_path / "library", base, DOMAINS, stacks=2))
    meter, samples = meter_of(library, base), some_samples()
    evaluation = make(library, meter, samples)
    assert json.loads((library.path / "router/evaluation.json").read_text()) == json.loads(json.dumps(evaluation))
    router = Router.load(Library.open(library.path))
    assert router.config.gate.model_dump() == evaluation["gate"]
    assert router.config.gate.weights in ("soft", "hard")
    parts = split(samples, RouterArgs(**SETTINGS))
    every: dict[str, list[float]] = {choice: [] for choice in CHOICES}
    for name in DOMAINS:
        unseen = [s for s, part in zip(samples, parts, strict=True) if part == "test" and s.source == name]
        assert evaluation["losses"][name]["prompts"] == len(unseen) > 0
        losses: dict[str, list[float]] = {choice: [] for choice in CHOICES if choice != "discovered"}
        for sample in unseen:
            (features,) = meter.features([sample.row.prompt_ids], 256)
            route = router.route(features[None], torch.ones(1, len(features)))
            assert route.weights[0, 0] >= 0.2
            probabilities = dict(zip(DOMAINS, route.probabilities[0].tolist(), strict=True))
            passed = {domain: p for domain, p in probabilities.items() if p >= 0.12}
            routed = dict(zip(DOMAINS, route.weights[0].tolist(), strict=True))
            for choice, weights in (
                ("base", {}),
                ("ungated", dict.fromkeys(DOMAINS, 1.0)),
                ("own_label", floored({name: 1.0})),
                ("trained_with", floored(dict.fromkeys(TRAINED_WITH[name], 1.0))),
                ("soft", floored(passed)),
                ("hard", floored(dict.fromkeys(passed, 1.0))),
                ("router", routed),
            ):
                losses[choice].append(plain_loss(meter, sample, weights))
        row = evaluation["losses"][name]
        for choice, values in losses.items():
            assert row[choice] == pytest.approx(sum(values) / len(values), abs=1e-5), (name, choice)
            every[choice] += values
        for choice in ("ungated", "own_label", "trained_with", "hard"):
            assert row["discovered"] <= row[choice] + 0.02, "at most min_gain for each domain more"
        assert row["regret"] == pytest.approx(row["router"] - row["discovered"])
    for choice in losses:
        overall = evaluation["losses"]["all domains"][choice]
        assert overall == pytest.approx(sum(every[choice]) / len(every[choice]), abs=1e-5)
    assert evaluation["losses"]["_mixed"]["prompts"] == evaluation["prompts"]["_mixed"]["test"] == 1
    assert evaluation["prompts"] == {
        **{name: {"train": 16, "validation": 4, "test": 4} for name in DOMAINS},
        "_mixed": {"train": 4, "validation": 1, "test": 1},
    }
    for counted in ("winners", "found_by"):
        assert {name: sum(wins.values()) for name, wins in evaluation[counted].items()} == {
            **dict.fromkeys(DOMAINS, 24), "_mixed": 6
        }  # fmt: skip
    assert library.verify() == []
    assert (library.path / "report/router.png").read_bytes().startswith(b"\x89PNG")
    console = Console(record=True, width=80)
    report.show(evaluation, console)
    printed = console.export_text()
    for name in DOMAINS:
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert all(f"{evaluation['losses'][name][choice]:.3f}" in line for choice in CHOICES)
        assert f"{evaluation['leaves_out_own'][name]:.0%}" in printed
    shown = report.tables(evaluation)
    assert f'<pre class="tables">{shown}</pre>' in html.unescape((library.path / PAGE).read_text())
    assert "regret" in shown and "found by" in shown and "\x1b" not in shown


def floored(weights: dict[str, float]) -> dict[str, float]:
    return weights | {"chat": max(weights.get("chat", 0.0), 0.2)}


def test_the_share_of_prompts_whose_best_set_leaves_their_own_domain_out(
    base: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = new_library(tmp_path / "library", base, DOMAINS)
    samples = some_samples(8)
    evaluation = make(library, meter_of(library, base), samples)
    assert sum("Few test prompts" in message for message in caplog.messages) == 1
    for name in DOMAINS:
        lines = (library.path / f"router/discovery/{name}.jsonl").read_text().splitlines()[1:]
        left_out = sum(name not in json.loads(line)["best"] for line in lines)
        assert evaluation["leaves_out_own"][name] == left_out / len(lines)


def test_answers_use_the_calibrated_gate(base: PreTrainedModel, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, DOMAINS)
    evaluation = make(library, meter_of(library, base), some_samples(), epochs=1, gate_threshold=0.99, label_blend=0)
    tried = {(trial["gate_threshold"], trial["weights"]): trial["loss"] for trial in evaluation["calibration"]}
    assert len(tried) == 14, "the grid and the configured threshold, soft and hard"
    chosen = evaluation["gate"]
    assert tried[chosen["gate_threshold"], chosen["weights"]] <= tried[0.99, "soft"], "it may only be better"
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(library.path)).eval()
    prompts = [row.prompt_ids for row in random_rows(6, Random(3))]
    router = Router.load(library)
    for prompt in prompts:
        (route,) = model.base_model.route(torch.tensor([prompt]))
        (features,) = meter_of(library, base).features([prompt], 256)
        expected = router.route(features[None], torch.ones(1, len(features)))
        weights, _ = gate(expected.probabilities, DOMAINS, GateArgs(**chosen))
        on = {name: weight for name, weight in zip(DOMAINS, weights[0].tolist(), strict=True) if weight}
        assert route.weights == pytest.approx(on, abs=1e-5)


def test_named_weights_keep_the_configured_threshold(base: PreTrainedModel, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, DOMAINS)
    evaluation = make(library, meter_of(library, base), some_samples(8), weights="hard", gate_threshold=0.33)
    assert evaluation["calibration"] == []
    assert evaluation["gate"] == {"gate_threshold": 0.33, "weights": "hard", "floors": {"chat": 0.2}}
    for row in evaluation["losses"].values():
        assert row["router"] == row["hard"]


@pytest.mark.parametrize("few", [9, 10])
def test_few_test_prompts_are_one_warning(caplog: pytest.LogCaptureFixture, few: int) -> None:
    warn_of_few({"chat": {"test": few}, "code": {"test": few + 5}, "math": {"test": few}, "_mixed": {"test": 1}})
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == (few < 10)
    for line in told:
        assert "chat has 9, math has 9;" in line and "code" not in line and "_mixed" not in line
        assert "`brainstacks.router.samples`" in line and "`router_datasets`" in line


def test_the_same_seed_gives_the_same_files(base: PreTrainedModel, tmp_path: Path) -> None:
    seed, samples, contents = seeded_random().randrange(10**6), some_samples(8), []
    for name in ("one", "two"):
        torch.manual_seed(seed)
        library = new_library(tmp_path / name, base, DOMAINS)
        torch.rand(len(contents))  # whatever the state of the global generator
        make(library, meter_of(library, base), samples)
        files = sorted(path for path in (library.path / "router").rglob("*") if path.is_file())
        contents.append({path.relative_to(library.path): path.read_bytes() for path in files})
    assert len(contents[0]) == 11 and contents[0] == contents[1]


def test_a_second_run_reads_what_the_first_one_measured(base: PreTrainedModel, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, DOMAINS)
    samples = some_samples(8)
    first = make(library, meter_of(library, base), samples)
    second = make(library, meter_of(library, base), samples)
    features = -(-30 // 8)
    # Hard weights were all measured; soft ones, of at most 4 validation and 4 test prompts, are not kept.
    assert first["forwards"] > second["forwards"] <= features + 4 * 3 + 4
    assert first["losses"] == second["losses"] and first["calibration"] == second["calibration"]


@pytest.mark.parametrize("last", ["chart", "write_report"])
def test_a_killed_run_is_never_taken_for_a_finished_one(
    base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Neither an earlier router beside the new evaluation, nor a router without its report."""
    library, samples = new_library(tmp_path / "library", base, DOMAINS), some_samples(8)
    make(library, meter_of(library, base), samples, epochs=1)
    wanted = make_module.inputs_digest(library, samples, RouterArgs(**SETTINGS))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make_module, last, killed)
        with pytest.raises(KeyboardInterrupt):
            make(library, meter_of(library, base), samples)
    assert made_before(Library.open(library.path), wanted) is None
    assert library.verify() == []
    made = make(library, meter_of(library, base), samples)
    assert made_before(Library.open(library.path), wanted) == json.loads(json.dumps(made))


def test_damaged_files_of_an_earlier_run(base: PreTrainedModel, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, DOMAINS)
    samples, meter = some_samples(8), meter_of(library, base)
    made = make(library, meter, samples)
    (library.path / EVALUATION).write_text("[]")
    assert made_before(library, made["origin"]) is None, "it is made again"
    assert "evaluation.json is truncated" in library.verify()[0]
    assert make(library, meter, samples)["origin"] == made["origin"] and library.verify() == []
    kept = library.path / "router/prompts/code.safetensors"
    kept.write_bytes(kept.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"code\.safetensors is truncated .*name `code` with its `datasets:`"):
        load_samples(Plan({}, BrainstacksBlock(domain="new"), library.path, True), library, DOMAINS)


def as_rank(rank: int, ranks: int, folder: Path, model: Path, samples: list[Sample]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}.meeting", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    library, base = Library.open(folder), AutoModelForCausalLM.from_pretrained(model)
    with library.writing() if rank == 0 else nullcontext():
        make_router(library, meter_of(library, base, batch_size=4), samples, RouterArgs(**SETTINGS))
    dist.destroy_process_group()


def test_two_processes_make_the_router_that_one_makes(base: PreTrainedModel, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["axolotl_brainstacks.router_training.pipeline", "peft", "transformers.models.llama"]
    )
    torch.set_num_threads(1)
    samples = some_samples(7)
    library = new_library(tmp_path / "library", base, DOMAINS)
    folder = shutil.copytree(library.path, tmp_path / "of two")
    base.save_pretrained(tmp_path / "model")
    processes = [context.Process(target=as_rank, args=(r, 2, folder, tmp_path / "model", samples)) for r in range(2)]
    for process in processes:
        process.start()
    make(library, meter_of(library, base, batch_size=4), samples)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = ({path.name: data for path, data in contents(of / "router").items()} for of in (library.path, folder))
    assert len(one) == 11 and one == two


# The command itself


def config(folder: Path, model: Path, library: Path, **router: Any) -> dict[str, Any]:
    """Domain `code` has its datasets here; those of the library's other domains were in YAMLs of their own."""
    rows = chat_dataset(write_rows(folder / "code.jsonl", 40, Random(9)))
    block = {"library": str(library), "domain": "code", "router": SETTINGS | router}
    return base_config(
        model, folder / "out", adapter="brainstacks", brainstacks=block, datasets=[rows], val_set_size=0.4
    )


def written(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "config.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "config.yml"


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Library]:
    """A model with a tokenizer, and a library of three finished domains on it."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    return tiny_llama_dir, new_library(tmp_path_factory.mktemp("tiny") / "library", base, DOMAINS)


def test_the_command_makes_a_router(tiny: tuple[Path, Library], tmp_path: Path) -> None:
    model, library = tiny
    content = config(tmp_path, model, library.path, samples=12)
    content["brainstacks"]["max_resident_bytes"] = 1  # of inference
    path = written(tmp_path, content)
    base = make_old(library)
    printed = run_axolotl(["brainstacks-router", path], tmp_path)
    assert Library.open(library.path).manifest.base == base and base.weights is not None
    assert "Mean loss per answer token on unseen prompts" in printed and "report.html" in printed
    assert Router.load(Library.open(library.path)).domains == DOMAINS
    rows = {name: (library.path / f"router/discovery/{name}.jsonl").read_text().count("row") for name in DOMAINS}
    assert rows == {"chat": 10, "code": 12, "math": 10}, (
        "from held-out rows of the YAML, and from validation rows in the library"
    )
    assert library.verify() == []
    assert (library.path / "report/report.html").read_text().count("data:image/png") == 2
    before = contents(library.path)
    assert "nothing has changed" in finish([start_train(content, tmp_path / "again", "router")], tmp_path / "again")
    assert contents(library.path) == before
    content = config(tmp_path, model, library.path, samples=12, seed=1)
    assert "saved" in finish([start_train(content, tmp_path / "seed", "router")], tmp_path / "seed")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def assert_refused(content: dict[str, Any], folder: Path, message: str) -> None:
    """The command ends with status 1 and one line, and leaves the library as it was."""
    library = Path(content.get("brainstacks", {}).get("library", folder / "none"))
    before = contents(library)
    result = CliRunner().invoke(cli.router, [str(written(folder, content))])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), result.output
    assert result.output.rstrip().endswith(errors[0]), "something is printed after the error"
    assert contents(library) == before


def test_an_option_that_does_not_exist(tiny: tuple[Path, Library], tmp_path: Path) -> None:
    path = written(tmp_path, config(tmp_path, tiny[0], tiny[1].path))
    result = CliRunner().invoke(cli.router, [str(path), "--laucher", "torchrun"])
    assert result.exit_code == 2 and "No such option or argument: --laucher torchrun" in result.output


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (
            {"floors": {"kitchen": 0.2}},
            "brainstacks.router.floors names `kitchen`, but the domains are chat, code, math",
        ),
        ({"soft_domains": ["kitchen"]}, "brainstacks.router.soft_domains names `kitchen`"),
        ({"gate_threshold": 1.5}, "brainstacks.router.gate_threshold"),
        ({"floors": {"chat": 7}}, "brainstacks.router.floors.chat is 7"),
        ({"wieghts": "hard"}, "brainstacks.router.wieghts"),
    ],
)
def test_settings_that_cannot_be(
    tiny: tuple[Path, Library], tmp_path: Path, router: dict[str, Any], message: str
) -> None:
    model, library = tiny
    assert_refused(config(tmp_path, model, library.path, **router), tmp_path, message)


def test_no_library(tiny_llama_dir: Path, tmp_path: Path) -> None:
    content = config(tmp_path, tiny_llama_dir, tmp_path / "nowhere")
    assert_refused(content, tmp_path, "nowhere is not a library.*train a library first")


def test_a_library_without_stacks(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    library = new_library(tmp_path / "library", base, [])
    with library.writing():
        library.add_domain(DomainEntry(name="chat", base_loss=2.0, done=True))
    assert_refused(config(tmp_path, tiny_llama_dir, library.path), tmp_path, "no finished domain with a stack")


def test_a_config_of_another_adapter(tiny_llama_dir: Path, tmp_path: Path) -> None:
    content = base_config(tiny_llama_dir, tmp_path / "out", adapter="lora")
    content["datasets"] = [chat_dataset(write_rows(tmp_path / "rows.jsonl", 3, seeded_random()))]
    assert_refused(content, tmp_path, "does not say `adapter: brainstacks`")


def test_a_domain_whose_rows_have_no_prompt(tiny: tuple[Path, Library], tmp_path: Path) -> None:
    model, library = tiny
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"a text {i}"}) + "\n" for i in range(9)))
    texts = {"path": str(tmp_path / "texts.jsonl"), "ds_type": "json", "type": "completion"}
    content = config(tmp_path, model, library.path) | {"datasets": [texts]}
    assert_refused(content, tmp_path, "held-out rows of `code` have no row with a prompt before an answer")


def test_a_domain_that_has_no_prompts_anywhere(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    library = new_library(tmp_path / "library", base, [])
    for name in ("chat", "law"):
        add_domain(library, base, name, rows=random_rows(5, seeded_random()) if name == "chat" else ())
    assert_refused(config(tmp_path, tiny_llama_dir, library.path), tmp_path, "`law` of .* has no prompts to measure on")
