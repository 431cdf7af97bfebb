"""The grid of a comparison: which cells it makes, how they are named, and what is refused before anything runs."""

import pytest

from nca_align.commands.compare.grid import KEYS, EvaluationSettings, expand, from_mapping
from nca_align.errors import UserError

BASE = {"model_name_or_path": "a-model", "dataset_name": "rows.jsonl", "bf16": False, "use_cpu": True, "alpha": 0.7}


def names(grid, base=BASE) -> list[str]:
    return [cell.name for cell in expand(base, grid, "compare.yaml")]


def refusal(grid, base=BASE) -> str:
    with pytest.raises(UserError) as error:
        expand(base, grid, "compare.yaml")
    return str(error.value)


def test_a_grid_is_a_product_and_a_list_a_union():
    product = {"method": ["nca", "infonca"], "alpha": [0.1, 1], "seed": [1, 2, 3]}
    assert len(names(product)) == 12
    both = names([product, {"method": "dpo", "seed": [1, 2, 3]}])
    assert both[:12] == names(product)
    assert both[12:] == ["dpo-seed1", "dpo-seed2", "dpo-seed3"]
    assert len(set(both)) == 15


def test_the_papers_ablation_has_forty_cells_a_method():
    betas, alphas = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1], [0.01, 0.1, 0.33, 1, 3.33]
    assert len(set(names({"method": "nca", "beta": betas, "alpha": alphas}))) == 40


def test_what_a_method_does_not_read_makes_no_cells():
    grid = {"method": ["nca", "dpo", "sft"], "alpha": [0.1, 1.0], "beta": [0.1, 0.2], "seed": 5}
    cells = expand(BASE, grid, "compare.yaml")
    count = {method: sum(cell.settings["method"] == method for cell in cells) for method in grid["method"]}
    assert count == {"nca": 4, "dpo": 2, "sft": 1}
    (sft,) = [cell for cell in cells if cell.settings["method"] == "sft"]
    assert sft.name == "sft-seed5"
    assert sft.settings["alpha"] is sft.settings["beta"] is None
    assert "beta" not in sft.options


def test_settings_are_whole_and_typed():
    """From the grid, from `base`, and from the options' defaults; YAML reads 5e-6 as text."""
    (cell,) = expand(BASE | {"learning_rate": "5e-6"}, {"method": "NCA", "beta": "3e-4", "seed": 7}, "compare.yaml")
    assert tuple(cell.settings) == KEYS
    assert cell.settings == {
        "method": "nca", "strategy": "rewards", "alpha": 0.7, "beta": 3e-4, "learning_rate": 5e-6,
        "num_completions": None, "reward_weights": None, "seed": 7,
    }  # fmt: skip
    assert cell.name == "nca-beta0.0003-seed7"
    (pairs,) = expand(BASE, {"method": "dpo", "num_completions": 2}, "compare.yaml")
    assert pairs.settings["strategy"] == "best_worst"
    assert pairs.name == "dpo-K2"


def test_weights_of_several_rewards_are_an_axis():
    given = [{"help": 1}, {"help": 0.7, "long": -0.1}, '{"help": 1.0}', [0.5, 2]]
    cells = expand(BASE, {"method": ["nca", "dpo"], "reward_weights": given}, "compare.yaml")
    assert [cell.settings["reward_weights"] for cell in cells[:3]] == ["help 1", "help 0.7 long -0.1", "0.5 2"]
    assert [cell.name for cell in cells[:3]] == ["nca-whelp_1", "nca-whelp_0.7_long_-0.1", "nca-w0.5_2"]
    assert len(cells) == 6  # those in JSON are the first
    assert cells[1].options["reward_weights"] == given[1]
    assert len({repr(sorted(cell.identity().items(), key=str)) for cell in cells}) == 6
    assert "`reward_weights` is 0.5; it must be" in refusal({"method": "nca", "reward_weights": [0.5, 2]})
    assert "unknown key `weights` in `grid`" in refusal({"method": "nca", "weights": given})


def test_a_name_stays_when_values_join_the_grid():
    small = names({"method": "nca", "strategy": ["rewards", "best_plus_1"], "beta": 0.1})
    large = names({"method": ["nca", "infonca"], "strategy": ["best_plus_1", "rewards"], "beta": [0.1, 1]})
    assert small == ["nca-rewards-beta0.1", "nca-best_plus_1-beta0.1"]
    assert set(small) < set(large)


def test_equal_cells_are_one():
    assert names([{"method": "nca", "alpha": 0.7}, {"method": "nca"}, {"method": "nca", "seed": 42}]) == [
        "nca-alpha0.7"
    ]


def test_what_changes_no_figure_is_no_part_of_a_cells_identity():
    def identity(**options):
        return expand(BASE | options, {"method": "nca"}, "compare.yaml")[0].identity()

    assert identity() == identity(cpu_threads=2, logging_steps=1)
    for options in ({"alpha": 0.1}, {"num_train_epochs": 2}, {"per_device_train_batch_size": 2}):
        assert identity() != identity(**options)


@pytest.mark.parametrize(
    ("grid", "base", "message"),
    [
        ({}, BASE, "`grid` is {}; it must map method, strategy, alpha"),
        (3, BASE, "`grid` is 3; it must map method"),
        ({"methods": "nca"}, BASE, "unknown key `methods` in `grid` (did you mean `method`?)"),
        ({"method": "nca", "lora_r": [4, 8]}, BASE, "unknown key `lora_r` in `grid`; it varies method, strategy,"),
        ({"alpha": 1}, BASE, "`method` is missing from `grid`"),
        ({"method": "ncaa"}, BASE, "`grid` can't be run: "),
        ({"method": "dpo", "strategy": "first_2"}, BASE, "`grid` can't be run: `strategy` is 'first_2'"),
        ({"method": "nca", "num_completions": 1}, BASE, "`num_completions` in `grid` is 1; it must be a whole number"),
        ({"method": "nca", "alpha": -1}, BASE, "`alpha` is -1, but must be a finite number above 0"),
        ({"method": "nca", "beta": "much"}, BASE, "`beta` in compare.yaml is 'much'; it must be a number"),
        ({"method": "nca"}, None, "`base` is None; it must map options of `nca-align train` to values"),
        ({"method": "nca"}, BASE | {"eval_steps": 3}, "`base` holds `eval_steps`, which a comparison sets itself"),
        ({"method": "nca"}, BASE | {"strategy": "first_2"}, "`base` holds `strategy`, which a comparison sets itself"),
        ({"method": "nca"}, BASE | {"show_answers": 1}, "`base` holds `show_answers`, which a comparison sets itself"),
        ({"method": "nca"}, BASE | {"lerning_rate": 1}, "unknown key `lerning_rate` in `base` (did you mean `learn"),
        ({"method": "nca"}, {"dataset_name": "x"}, "`model_name_or_path` is missing from `base`"),
    ],
)  # fmt: skip
def test_refusals(grid, base, message):
    assert refusal(grid, base).startswith(message)


def test_evaluation():
    assert from_mapping(EvaluationSettings, "evaluation", {"scorer": "m:f"}).scorer == ["m:f"]
    for values, message in [
        ({"scorers": "m:f"}, "unknown key `scorers` in `evaluation` (did you mean `scorer`?)"),
        ("m:f", "`evaluation` is 'm:f'; it must be a mapping in the YAML file"),
        ({}, "`scorer` is missing from `evaluation`"),
        ({"scorer": 3}, "`scorer` is missing from `evaluation`"),
        ({"scorer": "m:f", "steps": 0}, "`steps` of `evaluation` is 0; it must be a whole number, at least 1"),
        ({"scorer": "m:f", "validation_steps": -1}, "`validation_steps` of `evaluation` is -1; it must be a whole"),
        ({"scorer": "m:f", "reference_completions": 0}, "`reference_completions` of `evaluation` is 0; it must be a"),
        ({"scorer": "m:f", "ranked": "best"}, "`strategy` is 'best'; it must be one of rewards"),
        ({"scorer": "m:f", "prompts": True}, "`prompts` of `evaluation` is True; it must be a whole number"),
    ]:
        with pytest.raises(ValueError) as error:
            from_mapping(EvaluationSettings, "evaluation", values)
        assert str(error.value).startswith(message)


def test_a_weight_a_scorer_or_none():
    with pytest.raises(ValueError, match="`scorer_weights` has 1 values for 2 scorers; give one each, or none"):
        EvaluationSettings(scorer=["a:b", "c:d"], scorer_weights=[1.0])
    for wrong in (float("nan"), "x", True):
        with pytest.raises(ValueError, match="they must be finite numbers, one a scorer"):
            EvaluationSettings(scorer="a:b", scorer_weights=[wrong])
    assert EvaluationSettings(scorer="a:b", scorer_weights=2.0).scorer_weights == [2.0]
    with pytest.raises(ValueError, match=r"`seed` of `evaluation` is 1.5; it must be a whole number"):
        EvaluationSettings(scorer=["a:b"], seed=1.5)
