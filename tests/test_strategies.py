"""What each strategy takes of K rewarded completions, and TRL's formats from them."""

import random

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from nca_align import to_preference_pairs, to_unpaired
from nca_align.data.strategies import PAIRS, check_strategy, select_completions, select_indices
from nca_align.errors import UserError

REWARDS = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=7)


def rows(*rewards: list[float]) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": f"p{i}", "completions": [f"p{i}c{k}" for k in range(len(own))], "rewards": own, "source": "x"}
            for i, own in enumerate(rewards)
        ]
    )


class TestChoose:
    @given(REWARDS, st.sampled_from(PAIRS), st.integers(0, 9))
    def test_pairs_are_of_unequal_rewards_and_the_better_is_first(self, rewards, strategy, seed):
        pairs = select_indices(rewards, strategy, random.Random(seed))
        assert all(rewards[i] > rewards[j] for i, j in pairs)
        assert len(set(map(tuple, pairs))) == len(pairs)
        unequal = sum(a > b for a in rewards for b in rewards)
        if strategy == "all_pairs":
            assert len(pairs) == unequal
        else:
            assert all(rewards[i] == max(rewards) for i, _ in pairs)
            worse = sum(reward < max(rewards) for reward in rewards)
            assert len(pairs) == (worse if strategy == "best_each" else min(worse, 1))
        if strategy == "best_worst" and pairs:
            assert rewards[pairs[0][1]] == min(rewards)

    @given(REWARDS, st.integers(1, 8), st.integers(0, 9))
    def test_best_plus_n_holds_the_best_and_n_others(self, rewards, n, seed):
        chosen = select_indices(rewards, f"best_plus_{n}", random.Random(seed))
        if n >= len(rewards):
            assert chosen == []
            return
        (places,) = chosen
        assert len(places) == len(set(places)) == n + 1
        assert rewards[places[0]] == max(rewards)

    def test_random_ones_reach_every_worse_completion(self):
        drawn = {select_indices([3.0, 1.0, 2.0], "best_random", random.Random(seed))[0][1] for seed in range(40)}
        assert drawn == {1, 2}

    def test_first_n_keeps_the_order_and_leaves_out_shorter_rows(self):
        assert select_indices([1.0, 5.0, 3.0], "first_2", random.Random(0)) == [[0, 1]]
        assert select_indices([1.0, 5.0], "first_3", random.Random(0)) == []

    @pytest.mark.parametrize("name", ["best", "first_0", "first_x", "best_plus_0", None, 3])
    def test_another_name_is_refused_with_the_list(self, name):
        with pytest.raises(ValueError, match="must be one of rewards, first_N, best_plus_N, best_random"):
            check_strategy(name)


class TestRows:
    def test_rewards_come_back_as_they_are(self):
        dataset = rows([1.0, 2.0, 3.0])
        assert select_completions(dataset, "rewards").to_list() == dataset.remove_columns("source").to_list()

    def test_pairs_are_rewards_of_1_and_0_and_subsets_keep_theirs(self):
        dataset = rows([1.0, 4.0, 3.0], [2.0, 2.0, 2.0])
        assert select_completions(dataset, "best_worst").to_list() == [
            {"prompt": "p0", "completions": ["p0c1", "p0c0"], "rewards": [1.0, 0.0]}
        ]
        assert select_completions(dataset, "first_2")["rewards"] == [[1.0, 4.0], [2.0, 2.0]]

    def test_a_row_draws_the_same_whatever_is_beside_it(self):
        many = rows(*[[3.0, 1.0, 2.0, 0.0]] * 30)
        first = to_preference_pairs(many, "best_random")["rejected"]
        assert to_preference_pairs(many.select(range(10)), "best_random")["rejected"] == first[:10]
        assert to_preference_pairs(many, "best_random", seed=7)["rejected"] != first

    def test_pairs_are_in_trls_format_with_their_scores(self):
        from trl.data_utils import is_conversational

        message = [{"role": "assistant", "content": "a"}]
        chat = Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": "q"}],
                    "completions": [message, [{"role": "assistant", "content": "b"}]],
                    "rewards": [0.0, 7.0],
                }
            ]
        )
        (pair,) = to_preference_pairs(chat).to_list()
        assert is_conversational(pair)
        assert (pair["chosen"][0]["content"], pair["rejected"]) == ("b", message)
        assert (pair["score_chosen"], pair["score_rejected"]) == (7.0, 0.0)

    def test_only_pairs_make_preference_pairs(self):
        with pytest.raises(ValueError, match="a preference pair comes from one of best_random"):
            to_preference_pairs(rows([1.0, 2.0]), "rewards")

    def test_unpaired_labels_are_above_and_below_the_prompts_mean_or_a_threshold(self):
        dataset = rows([0.0, 1.0, 2.0], [5.0, 5.0, 5.0])
        assert [(row["completion"], row["label"]) for row in to_unpaired(dataset)] == [
            ("p0c0", False), ("p0c2", True),
        ]  # fmt: skip
        assert to_unpaired(dataset, threshold=1.0)["label"] == [False, True, True, True, True]

    @pytest.mark.parametrize("convert", [to_preference_pairs, to_unpaired])
    def test_splits_are_given_one_at_a_time(self, convert):
        with pytest.raises(TypeError, match="`dataset` is a DatasetDict, but must be a Dataset: give one split"):
            convert(DatasetDict(train=rows([1.0, 2.0])))

    @pytest.mark.parametrize("convert", [to_preference_pairs, to_unpaired])
    @pytest.mark.parametrize("role", ["tool", "assistant"])
    def test_turns_that_trl_would_train_on_all_of_are_refused(self, convert, role):
        """TRL's trainers make a completion's mask by its length."""
        answer, other = ({"role": own, "content": "a"} for own in ("assistant", role))
        sound = {
            "prompt": [{"role": "user", "content": "q"}],
            "completions": [[answer], [answer]],
            "rewards": [0.0, 1.0],
        }
        assert len(convert(Dataset.from_list([sound]))) > 0
        given = Dataset.from_list([sound, sound | {"completions": [[answer], [answer, other, answer]]}])
        with pytest.raises(
            UserError, match=r"row 1: `completions\[1\]` is not one turn of the assistant. TRL's trainers"
        ):
            convert(given)

    @pytest.mark.parametrize("convert", [to_preference_pairs, to_unpaired])
    def test_equal_rewards_everywhere_leave_no_row_and_say_so(self, convert):
        with pytest.raises(ValueError, match="leaves no row: every prompt has too few completions, or equal rewards"):
            convert(rows([1.0, 1.0], [0.0, 0.0]))
