"""Checks before the first stage: sources, gates, presets, writers, benchmarks; the graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.recipe.graph import GRAPH, STAGES, graph, in_use, refuse_stale, write_graph
from tasks.recipe.load import load, parse, recipes
from tasks.recipe.plan import check, check_contents
from tasks.recipe.section import ParamsError
from tests.recipes import FINETUNE, experts, write

Change = Callable[[dict[str, Any]], object]
GATE = {
    "split": "test",
    "model": "merged",
    "benchmarks": {"retrieval": "recall_at_1"},
    "minimal_gain": 0.0,
    "maximal_regression": 2.0,
}


def streamed(**sections: object) -> dict[str, object]:
    """A recipe whose members are merged as they are."""
    return {
        "kind": "models",
        "fetch": {"checkpoints": {"a": "given/a", "b": "given/b"}},
        "members": ["a", "b"],
        "merge": {"result": "average", "arms": {"average": {"method": "linear"}}},
        "evaluate": {"tssd_keep": 0.2},
        "register": {"name": "streamed", "model": "merged"},
        **sections,
    }


def aligned(**sections: object) -> dict[str, object]:
    """A recipe whose members are aligned first, with labels."""
    return {
        "kind": "models",
        "fetch": {"checkpoints": {"a": "given/a", "b": "given/b"}},
        "members": ["a", "b"],
        "prepare": {
            "seed": 0,
            "calibration": {"own": {"writer": "mnist", "examples": 8}},
            "benchmarks": {"digits": {"writer": "mnist", "options": {"validation": 8, "test": 8}}},
        },
        "collect": {"batch_size": 8, "joint": False, "grams": False},
        "align": {"alignments": {"dual": {"preset": "dual", "settings": {"weight_share": 0.5}}}},
        "merge": {
            "result": "dual",
            "arms": {"dual": {"alignment": "dual", "method": "linear"}},
        },
        "evaluate": {"tssd_keep": 0.2},
        "register": {"name": "aligned", "model": "merged"},
        **sections,
    }


@pytest.fixture(autouse=True)
def three(workspace: Path) -> Path:
    """A recipe of each sort, and no gates."""
    write(workspace, toy=experts(), streamed=streamed(), aligned=aligned())
    promote({})
    return workspace


def promote(gates: dict[str, object]) -> None:
    Path("params/promote.yaml").write_text(yaml.safe_dump({"gates": gates}))


def changed(sections: dict[str, Any], change: Change) -> dict[str, Any]:
    copied = yaml.safe_load(yaml.safe_dump(sections))
    change(copied)
    return copied


@pytest.mark.parametrize("name", ["toy", "streamed", "aligned"])
def test_each_sort_of_recipe_passes(name) -> None:
    check_contents(check(name))


def several(**sections: object) -> dict[str, object]:
    """A recipe of experts whose result is the best of two arms."""
    arms = {name: {"checkpoint": "specific", "method": "linear"} for name in ("average", "other")}
    merge = {"result": "best", "candidates": ["average", "other"], "arms": arms, **sections}
    complete = experts()
    evaluate = {**complete["evaluate"], "naive": "average"}
    return {**complete, "merge": merge, "evaluate": evaluate}


def best_aligned(change: Change) -> dict[str, object]:
    """A recipe of models with labels whose result is the best of two arms."""
    arm = {"alignment": "dual", "method": "linear"}
    merge = {
        "result": "best",
        "candidates": ["dual", "other"],
        "arms": {"dual": arm, "other": arm},
    }
    return changed(aligned(merge=merge), change)


def without_labels(recipe: dict[str, Any], held_out: int) -> None:
    del recipe["prepare"]["benchmarks"]
    recipe["prepare"]["calibration"]["own"]["held_out"] = held_out


@pytest.mark.parametrize(
    "sections",
    [
        several(),
        several(result="other"),
        best_aligned(lambda r: None),
        best_aligned(lambda r: without_labels(r, 8)),
    ],
)
def test_candidates_for_a_result_pass(sections) -> None:
    check_contents(parse("toy", sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (several(candidates=[]), "'best', of what"),
        (several(result="othr"), r"merge\.result: 'othr': did you mean 'other'"),
        (several(candidates=["average", "othr"]), r"merge\.candidates: 'othr': did you mean"),
        (several(candidates=["average"]), "name two or more arms"),
        (several(candidates=["other", "other"]), "each once"),
        (
            several(arms={"best": {"checkpoint": "specific", "method": "linear"}}),
            "give the arm another name",
        ),
        (
            several(
                arms={
                    "average": {"checkpoint": "specific", "method": "linear"},
                    "other": {"checkpoint": "unseeded", "method": "linear"},
                }
            ),
            "compare merges of one",
        ),
        (
            {**several(), "finetune": {**FINETUNE, "arms": ["other"]}},
            r"finetune\.arms: 'other' is among merge\.candidates",
        ),
        (best_aligned(lambda r: without_labels(r, 0)), r"calibration\.own\.held_out"),
        (
            streamed(
                merge={
                    "result": "best",
                    "candidates": ["a", "b"],
                    "arms": {"a": {"method": "linear"}, "b": {"method": "linear"}},
                }
            ),
            "there are no data to compare them on",
        ),
    ],
)
def test_candidates_that_nothing_tells_apart_are_refused(sections, message) -> None:
    with pytest.raises(ParamsError, match=message):
        parse("toy", sections)


def test_candidates_need_a_benchmark_without_training() -> None:
    benchmarks = {"vqa": {"train": 4, "validation": 4, "test": 4}}
    sections = several()
    sections["prepare"] = {**sections["prepare"], "benchmarks": benchmarks}
    with pytest.raises(ParamsError, match="needs one of retrieval"):
        check_contents(parse("toy", sections))


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        ("aligned", aligned(), "lora: adapters are folded where members are merged as they are"),
        ("toy", experts(), "lora: recipes of kind experts take whole checkpoints"),
    ],
)
def test_adapters_are_refused_where_models_are_loaded(name, recipe, message) -> None:
    def add(r: dict[str, Any]) -> None:
        base = next(iter(r["fetch"]["checkpoints"]))
        r["fetch"]["checkpoints"]["lora"] = {"adapter": "given/lora", "base": base}

    write(Path(), **{"toy": experts(), "streamed": streamed(), name: changed(recipe, add)})
    with pytest.raises(ParamsError, match=rf"params/{name}\.yaml: fetch\.checkpoints: {message}"):
        check(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://", "source 'hf://' is unknown; write it as one of hf://org/name@revision"),
        ("hf://a/b/c", "is unknown; write it as one of"),
        ("s3://bucket", "is unknown; write it as one of"),
        ("gs://bucket/x", "is unknown; write it as one of"),
        ("mlflow:models/x", "is unknown; write it as one of"),
        ("mlflow:x@champion", "is unknown; write it as one of"),
    ],
)
def test_a_source_that_is_none_is_named_with_its_key(source, message) -> None:
    write(Path(), streamed=streamed(fetch={"checkpoints": {"a": source, "b": "given/b"}}))
    promote({})
    with pytest.raises(ParamsError, match=rf"fetch\.checkpoints\.a: .*{message}"):
        check("streamed")


def test_two_recipes_under_one_registered_name_are_refused() -> None:
    write(Path(), toy=experts(), streamed=streamed(register={"name": "toy", "model": "merged"}))
    promote({})
    for name, other in (("toy", "streamed"), ("streamed", "toy")):
        with pytest.raises(ParamsError, match=rf"'toy' is the name of recipe '{other}', too"):
            check(name)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"toi": GATE}, r"gates\.toi: no recipe has this name: did you mean 'toy'"),
        ({"toy": {**GATE, "split": "tset"}}, r"gates\.toy\.split: 'tset': did you mean 'test'"),
        ({"toy": {**GATE, "split": "train"}}, r"gates\.toy\.split: 'train'"),
        ({"toy": {**GATE, "model": "mergd"}}, r"gates\.toy\.model: 'mergd': did you mean 'merged'"),
        ({"toy": {**GATE, "model": "finetuned"}}, r"gates\.toy\.model: 'finetuned'"),
        (
            {"toy": {**GATE, "benchmarks": {"retreival": "recall_at_1"}}},
            r"gates\.toy\.benchmarks: 'retreival': did you mean 'retrieval'",
        ),
        ({"toy": {**GATE, "benchmarks": {}}}, "benchmarks"),
        ({"toy": {**GATE, "maximal_regression": -1}}, "maximal_regression"),
        ({"toy": None}, "toy"),
    ],
)
def test_gates_that_fit_no_result_are_refused(gates, message) -> None:
    promote(gates)
    with pytest.raises(ParamsError, match=rf"params/promote\.yaml: .*{message}"):
        check("toy")


def test_gates_of_sets_are_checked_by_their_own_splits() -> None:
    """Splits: validation and test with labels, calibration without, none if merged as they are."""
    fitting = {**GATE, "model": "dual", "benchmarks": {"aligned": "joint_accuracy"}}
    promote({"aligned": fitting})
    check("aligned")
    promote({"aligned": {**fitting, "split": "calibration"}})
    with pytest.raises(ParamsError, match=r"gates\.aligned\.split: 'calibration'"):
        check("aligned")
    promote({"aligned": {**fitting, "model": "parent_2"}})
    with pytest.raises(ParamsError, match=r"gates\.aligned\.model: 'parent_2'"):
        check("aligned")
    promote({"streamed": {**GATE, "benchmarks": {"streamed": "l2"}}})
    with pytest.raises(ParamsError, match="merged as they are and have no scores"):
        check("streamed")


@pytest.mark.parametrize(
    "text", ["", "gates: [toy]\n", "gate: {}\n", "gates: {toy: {split: test}}\n"]
)
def test_a_file_of_gates_that_is_none_is_refused(text) -> None:
    Path("params/promote.yaml").write_text(text)
    with pytest.raises(ParamsError, match=r"params/promote\.yaml"):
        check("toy")


def alignment(**changes: object) -> Change:
    return lambda r: r["align"]["alignments"]["dual"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (alignment(preset="duel"), r"dual\.preset: 'duel': did you mean 'dual'"),
        (alignment(settings={"weight_shar": 1}), "'dual' has no setting 'weight_shar': did you"),
        (alignment(settings={"weight_share": 2}), r"weight_share: 2 does not lie in 0\.\.1"),
        (
            alignment(settings={"weight_share": "serch"}),
            r"weight_share: .*or Input should be 'sear",
        ),
        (alignment(settings={"scale": "unti"}), r"settings\.scale: .*'unit' \(found 'unti'\)"),
        (alignment(settings={"method": "permut"}), r"settings\.method: 'permut': did you mean"),
        (alignment(settings={"max_sweeps": "x"}), r"settings\.max_sweeps: .*valid integer"),
        (alignment(settings={"fold": 1}), r"settings\.fold: .*valid boolean"),
        (
            alignment(preset="identity", settings={}, score="merge"),
            "'identity' chooses by no score",
        ),
        (alignment(preset="zipit", settings={}), r"set collect\.joint to true"),
        (
            lambda r: r["prepare"]["calibration"]["own"].update(writer="mnst"),
            r"calibration\.own\.writer: 'mnst': did you mean 'mnist'",
        ),
        (
            lambda r: r["prepare"]["calibration"]["own"].update(options={"x": 1}),
            r"calibration\.own\.options: 'x' is unknown",
        ),
        (
            lambda r: r["prepare"]["benchmarks"]["digits"].update(writer="digits"),
            r"benchmarks\.digits\.writer: 'digits'",
        ),
        (
            lambda r: r["prepare"]["benchmarks"]["digits"]["options"].update(tst=1),
            r"benchmarks\.digits\.options: 'tst' is unknown: did you mean 'test'",
        ),
        (
            lambda r: r["prepare"]["benchmarks"]["digits"]["options"].pop("test"),
            "missing a required argument: 'test'",
        ),
    ],
)
def test_presets_and_writers_are_checked_before_the_first_stage(change, message) -> None:
    recipe = parse("aligned", changed(aligned(), change))
    with pytest.raises(ParamsError, match=rf"params/aligned\.yaml: .*{message}"):
        check_contents(recipe)


FINETUNED = {**FINETUNE, "batch_sizes": {"retrieval": 4}}
SIZES = {"train": 8, "validation": 4, "test": 4}


@pytest.mark.parametrize(
    ("benchmarks", "batch_sizes", "message"),
    [
        ({"retreival": SIZES}, None, "'retreival' is unknown: did you mean 'retrieval'"),
        ({"retrieval_hard": {**SIZES, "test": 5}}, None, r"retrieval_hard\.test: 5 is no multiple"),
        ({"retrieval": SIZES}, {"retreival": 4}, r"batch_sizes: 'retreival': did you mean"),
        ({"retrieval": SIZES}, {"statements": 4}, r"batch_sizes: 'statements'"),
        ({"retrieval": SIZES}, {"vqa": 4}, r"prepare\.benchmarks has no 'vqa'"),
        ({"retrieval": SIZES}, {"retrieval": 9}, "a step of 9 examples takes more than the 8"),
        ({"retrieval": {**SIZES, "train": 0}}, {"retrieval": 4}, "takes more than the 0"),
    ],
)
def test_benchmarks_are_checked_before_the_first_stage(benchmarks, batch_sizes, message) -> None:
    sections = experts()
    sections["prepare"] = {**sections["prepare"], "benchmarks": benchmarks}  # ty: ignore
    if batch_sizes:
        sections["finetune"] = {**FINETUNE, "batch_sizes": batch_sizes}
    with pytest.raises(ParamsError, match=rf"params/toy\.yaml: .*{message}"):
        check_contents(parse("toy", sections))


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"ALLOY_DEVICE": "cuda:99"}, {}, r"DEVICE='cuda:99' is not there"),
        ({"ALLOY_DEVICE": "meta", "ALLOY_PROCESSES": "2"}, {}, "PROCESSES=2 needs 2 devices"),
        (
            {"ALLOY_DEVICE": "meta"},
            {"precision": "bfloat16"},
            r"finetune\.training\.precision: meta has no bfloat16",
        ),
        (
            {"ALLOY_DEVICE": "cpu", "ALLOY_PROCESSES": "3"},
            {},
            r"batch_sizes\.retrieval: 4 examples a step cannot be shared evenly by PROCESSES=3",
        ),
        (
            {"ALLOY_DEVICE": "cpu", "ALLOY_PROCESSES": "4"},
            {"accumulation_steps": 2},
            r"4 examples a step in 2 parts cannot be .*that divides 2",
        ),
    ],
)
def test_devices_and_processes_are_checked_before_the_first_stage(
    monkeypatch: pytest.MonkeyPatch, environment, changes, message
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sections = experts()
    sections["prepare"] = {**sections["prepare"], "benchmarks": {"retrieval": SIZES}}  # ty: ignore
    sections["finetune"] = {**FINETUNED, "training": {**FINETUNE["training"], **changes}}
    with pytest.raises(ParamsError, match=message):
        check_contents(parse("toy", sections))


def test_what_is_no_number_of_processes_is_refused_with_the_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALLOY_PROCESSES", "two")
    with pytest.raises(ParamsError, match=r"PROCESSES='two' is no number of processes"):
        check("toy")


def test_a_step_without_examples_is_refused_with_the_recipe() -> None:
    with pytest.raises(ParamsError, match=r"finetune\.batch_sizes\.retrieval: .*greater than 0"):
        parse("toy", experts(finetune={**FINETUNE, "batch_sizes": {"retrieval": 0}}))


def test_the_graph_has_the_stages_of_each_recipe() -> None:
    """A stage stands for the recipes that have its section; what one lacks it reads anyway."""
    found = graph(recipes())
    assert list(found) == list(STAGES)
    assert {*found["prepare"]} == {*found["align"]} == {"toy", "aligned"}
    assert {*found["merge"]} == {*found["choose"]} == {"toy", "streamed", "aligned"}
    assert not found["finetune"]
    checkpoints = "models/streamed/checkpoints"
    merge = found["merge"]["streamed"]
    assert (merge["data"], merge["statistics"], merge["transforms"]) == (checkpoints,) * 3
    assert (merge["members"], merge["kept"], merge["dtype"]) == (
        "members",
        "merge.arms",
        "merge.arms",
    )
    assert found["merge"]["aligned"]["transforms"] == "models/aligned/transforms"
    assert found["register"]["streamed"]["result"] == "models/streamed/merged"
    assert {entry["code"] for entry in found["merge"].values()} == {
        "alloy/modality",
        "tasks/models/stream.py",
    }


@pytest.mark.parametrize(
    ("sections", "stage", "entry", "value"),
    [
        (streamed(kept=["embeddings.*"]), "merge", "kept", "kept"),
        (
            streamed(merge={**streamed()["merge"], "dtype": "float32"}),  # ty: ignore
            "merge",
            "dtype",
            "merge.dtype",
        ),
        (experts(finetune=FINETUNE), "evaluate", "finetuned", "models/toy/finetuned"),
        (experts(finetune=FINETUNE), "evaluate", "finetune", "finetune"),
    ],
)
def test_what_a_recipe_says_is_what_its_stages_track(sections, stage, entry, value) -> None:
    write(Path(), toy=sections)
    assert graph(recipes())[stage]["toy"][entry] == value


def test_a_stale_graph_is_refused_by_name_and_written_by_check() -> None:
    assert write_graph(*recipes())
    assert not write_graph()
    refuse_stale("streamed")
    write(Path(), toy=experts(), streamed=streamed(kept=["x"]), aligned=aligned())
    with pytest.raises(ParamsError, match=r"does not know params/streamed\.yaml as it is now"):
        refuse_stale("streamed")
    check("streamed")
    refuse_stale("streamed")
    GRAPH.unlink()
    with pytest.raises(ParamsError, match=r"params/graph\.yaml does not know"):
        refuse_stale("toy")


def test_a_broken_recipe_beside_it_is_named() -> None:
    """The graph needs all recipes in use: the one that is wrong is named; others are nobody's."""
    check("toy")
    write_graph("aligned")
    Path("params/aligned.yaml").write_text("kind: models\n")
    with pytest.raises(ParamsError, match=r"params/aligned\.yaml: fetch: this is missing"):
        check("toy")
    assert load("toy").name == "toy"
    GRAPH.unlink()
    check("toy")
    assert in_use() == ["toy"]
