"""The exact worlds: what is enumerated is right, a killed command goes on, and every told figure is one of a run."""

import math
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts/study_worlds"
sys.path.insert(0, str(SCRIPTS))

import choose  # noqa: E402
import plan  # noqa: E402
import runs  # noqa: E402
from training import Run, train, world_of  # noqa: E402
from world import COMPLETION, COMPLETIONS, ENTROPY, PROMPTS, TOKENS, digits  # noqa: E402

import results  # noqa: E402
from nca_align.store.files import read_csv  # noqa: E402

SEED = 999  # of no run of the study


@pytest.fixture(scope="module")
def world():
    return world_of(SEED, "reference")


class TestWorld:
    def test_every_completion_has_the_probability_that_its_own_row_gives_it(self, world):
        prompts = world.prompts["test"][:2]
        exact = world.reference.all_logps(prompts)
        assert exact.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-6)
        some = torch.randint(COMPLETIONS, (2, 64), generator=torch.Generator().manual_seed(0))
        assert torch.allclose(world.reference.logps(prompts, some).double(), exact.gather(1, some), atol=1e-5)

    def test_numbers_are_tokens_the_first_one_highest(self):
        tokens = digits(torch.tensor([0, 1, 8, COMPLETIONS - 1]), COMPLETION).tolist()
        assert tokens == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [TOKENS - 1] * 4]

    def test_rewards_have_mean_0_and_spread_1_under_the_reference(self, world):
        share = world.logps["train"].exp()
        assert (share * world.rewards["train"]).sum(1).abs().max() < 1e-6
        assert (share * world.rewards["train"] ** 2).sum(1).mean().item() == pytest.approx(1, abs=1e-6)
        assert -(share * world.logps["train"]).sum(1).mean().item() == pytest.approx(ENTROPY, abs=0.6)

    def test_no_prompt_is_in_both_splits(self, world):
        both = torch.cat([*world.prompts.values()]).tolist()
        assert len(both) == len(set(both)) <= PROMPTS

    @pytest.mark.parametrize("kind", ["noise", "hack"])
    def test_wrong_rewards_hold_half_of_the_true_ones(self, world, kind):
        seen, true = world.seen(kind).flatten(), world.seen("true").flatten()
        assert seen.std().item() == pytest.approx(1, abs=0.25)
        assert torch.corrcoef(torch.stack([seen, true]))[0, 1].item() == pytest.approx(math.sqrt(0.5), abs=0.25)

    def test_ties_are_of_rewards_that_differ(self, world):
        seen, true = world.seen("ties"), world.seen("true")
        assert (seen - true).abs().max() <= 0.75
        assert seen.unique().numel() < 12 < true.unique().numel()

    @pytest.mark.slow
    def test_another_policy_samples_what_the_reference_finds_unlikely(self, world):
        """The same prompts, rewards and reference."""
        other = world_of(SEED, "other")
        means = [w.logps["train"].gather(1, w.sampled["train"]).mean().item() for w in (world, other)]
        assert means[1] < means[0] - 1
        assert all(
            torch.equal(getattr(world, name)["test"], getattr(other, name)["test"]) for name in ("rewards", "logps")
        )

    def test_near_the_reference_a_tilt_has_the_kl_and_gain_of_its_expansion(self, world):
        """KL is t²·Var(r)/2, the gain t·Var(r)."""
        share = world.logps["test"].exp()
        variance = (share * world.rewards["test"] ** 2).sum(1).mean().item()
        kl, gain = world.tilted(0.01)
        assert (kl, gain) == pytest.approx((0.01**2 * variance / 2, 0.01 * variance), rel=0.03)
        assert world.limit(kl) == pytest.approx(gain, rel=0.02)


class TestTraining:
    def test_without_a_step_the_policy_is_the_reference(self):
        figures = train(Run(SEED, "nca", 0.1, 0.0, steps=2))
        assert {
            name: value for name, value in figures.items() if name not in ("seconds", "optimum_kl")
        } == pytest.approx(
            dict.fromkeys([name for name in figures if name not in ("seconds", "optimum_kl")], 0.0), abs=1e-5
        )

    @pytest.mark.parametrize("loss", ["nca", "infonca", *plan.DPO])
    def test_a_run_gains_reward_below_the_limit_and_is_repeatable(self, loss, world):
        run = Run(SEED, loss, 0.3, 2e-3, steps=24)
        figures = train(run)
        assert 0.02 < figures["test_reward"] < figures["limit"] == pytest.approx(world.limit(figures["test_kl"]))
        assert figures["train_best"] > figures["train_worst"]
        again = train(run)
        assert figures | {"seconds": 0} == again | {"seconds": 0}

    def test_with_two_completions_all_of_dpos_pairs_are_one(self):
        """Their order in the pair is drawn, so that sums may round otherwise."""
        found = [train(Run(SEED, loss, 0.3, 2e-3, completions=2, steps=4))["test_reward"] for loss in plan.DPO]
        assert found == pytest.approx([found[0]] * 3, rel=0.2)


class TestRuns:
    @pytest.mark.slow
    def test_a_cut_line_is_run_again_and_finished_ones_are_not(self, tmp_path):
        path, wanted = tmp_path / "runs.csv", [Run(SEED, "nca", beta, 1e-3, steps=2) for beta in (1.0, 0.5, 0.1)]
        whole = runs.run_all(wanted, path, 1)
        assert [runs.run_of(row) for row in whole] == wanted
        kept = path.read_text().splitlines(keepends=True)
        path.write_text("".join(kept[:3]) + kept[3][:20])
        again = runs.run_all(wanted, path, 1)
        assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in whole]
        assert path.read_text().splitlines(keepends=True)[:3] == kept[:3]


def planned() -> set[Run]:
    return {run for part in plan.PARTS.values() for run in part()}


class TestStudy:
    """What is committed in docs/study."""

    def test_each_run_of_the_plan_is_there_once(self):
        rows = [runs.run_of(row) for row in runs.finished(runs.WORLDS_CSV)]
        assert len(rows) == len(set(rows))
        assert set(rows) == planned()

    def test_rates_and_ladders_are_what_the_pilots_say(self):
        rows = runs.finished(runs.PILOTS_CSV)
        assert {runs.run_of(row) for row in rows} == set(plan.pilots())
        assert not {row["world"] for row in rows} & {run.world for run in planned()}
        for (loss, weight), tried in plan.PILOT_RATES.items():
            found = choose.rates(rows, loss, weight)
            assert found.keys() == {*tried}
            assert plan.RATES[loss, weight] == max(found, key=found.__getitem__)
        assert {key: choose.ladder_for(rows, *key) for key in plan.LADDERS} == plan.LADDERS

    def test_tables_and_pages_are_made_of_the_runs(self, tmp_path):
        results.main(tmp_path)
        made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.suffix in (".csv", ".md")]
        assert len(made) == 5
        for path in made:
            assert (tmp_path / path).read_text() == (results.ROOT / path).read_text(), path

    def test_what_the_pages_say_is_what_the_tables_say(self):
        """A difference is told as one where its adjusted p is below 0.05, and as none where it isn't."""
        rows = {
            (row["table"], row["figure"], float(row["kl"]), row["method"]): row
            for row in read_csv(runs.FOLDER / "tables.csv")
        }
        own, other, infonca = "a. completions of the reference", "a. completions of another policy", "InfoNCA"
        dpo, pairs = "DPO, best and worst", "DPO, all pairs"

        def sign(table: str, figure: str, kl: float, method: str) -> int:
            row = rows[table, figure, kl, method]
            return (1 if float(row["difference"]) > 0 else -1) if float(row["p_holm"]) < 0.05 else 0

        def mean(table: str, figure: str, kl: float, method: str) -> float:
            return float(rows[table, figure, kl, method]["mean"])

        def gap(table: str, figure: str, kl: float, method: str) -> tuple[float, float]:
            row = rows[table, figure, kl, method]
            return float(row["difference"]), float(row["difference_high"]) - float(row["difference"])

        def ends(table: str, figure: str, kl: float, method: str) -> tuple[float, float]:
            return tuple(float(rows[table, figure, kl, method][f"mean_{end}"]) for end in ("low", "high"))

        assert all(ends(own, "train_best", kl, method)[0] > 0 for kl in (0.5, 1) for method in ("NCA", infonca, dpo))
        assert ends(own, "train_best", 2, dpo)[1] < 0
        assert ends(own, "train_best", 2, "NCA") == pytest.approx((-0.22 - 0.23, -0.22 + 0.23), abs=0.01)
        assert {sign(own, "train_best", kl, method) for kl in (0.5, 1) for method in (infonca, dpo)} == {-1}
        assert sign(own, "train_best", 2, infonca) == 1
        for check, cost in (("a. 256 steps", 0.02), (f"a. learning rate {plan.FAST}", 0.04)):
            assert {sign(check, "train_best", kl, method) for kl in plan.KLS for method in (infonca, dpo)} == {-1}
            less = mean("a. 128 steps", "test_reward", 1, "NCA") - mean(check, "test_reward", 1, "NCA")
            assert less == pytest.approx(cost, abs=0.005)
        assert all(ends(own, "test_best", 2, method)[1] < 0 for method in ("NCA", infonca, dpo, "NCA, λ 0.5"))
        assert gap(own, "test_best", 2, infonca)[0] == pytest.approx(0.50, abs=0.005)
        kept = [mean(other, "train_best", kl, "NCA") for kl in plan.KLS]
        assert kept == pytest.approx([1.3, 1.7, 2.0], abs=0.05)
        for figure, told in (
            ("train_best", (-0.66, 0.51)),
            ("test_best", (-0.65, 0.48)),
            ("test_reward", (0.07, 0.07)),
        ):
            assert gap(other, figure, 1, infonca) == pytest.approx(told, abs=0.005)
        assert {sign(own, "test_reward", kl, infonca) for kl in plan.KLS} == {1}
        assert {sign(own, "test_reward", kl, dpo) for kl in plan.KLS} == {-1}
        for kl in plan.KLS:
            assert mean(own, "test_reward", kl, "NCA, λ 0.5") < 2 / 3 * mean(own, "test_reward", kl, "NCA")
            assert sign(own, "test_best", kl, "NCA, λ 0.5") == -1
        for loss in (infonca, "NCA", pairs):
            by_k = [mean(f"b. {loss}, 128 prompts", "test_reward", 1, f"K = {K}") for K in (2, 4, 8, 16)]
            assert by_k == sorted(by_k)
            assert {sign(f"b. {loss}, 128 prompts", "test_reward", 1, f"K = {K}") for K in (4, 8, 16)} == {1}
            for few in (dpo, "DPO, random pair"):
                gain = gap(f"b. {few}, 128 prompts", "test_reward", 1, "K = 16")[0]
                assert gain < 0.55 * (by_k[-1] - by_k[0])
            table = f"b. {loss}, 512 annotations"
            assert 0.045 < gap(table, "test_reward", 1, "K = 4")[0] < 0.085
            assert mean(table, "test_reward", 1, "K = 16") == pytest.approx(
                mean(table, "test_reward", 1, "K = 4"), abs=0.02
            )
        assert [sign(f"b. {dpo}, 512 annotations", "test_reward", 1, f"K = {K}") for K in (4, 8, 16)] == [0, -1, -1]
        for K in (4, 8, 16):
            assert -0.085 < gap(f"b. K = {K}", "test_reward", 1, pairs)[0] < -0.065
            assert sign(f"b. K = {K}", "test_reward", 1, pairs) == -1
            level = mean(f"b. K = {K}", "test_reward", 1, "NCA") - mean(f"b. K = {K}", "test_reward", 1, pairs)
            assert abs(level) < 0.02
        for loss in ("NCA", infonca):
            assert [sign(f"c. {loss}", "test_reward", 1, f"α = {alpha}") for alpha in (0.3, 3)] == [-1, 0]
            assert [sign(f"c. {loss}", "train_best", 1, f"α = {alpha}") for alpha in (0.3, 3)] == [1, -1]
        for kl in (0.5, 1):
            kinds = {kind: sign(f"d. {kind}", "test_reward", kl, infonca) for kind in ("true", "noise", "hack", "ties")}
            assert kinds == {"true": 1, "noise": 0, "hack": 0, "ties": 1}
        assert sign("d. noise", "test_reward", 2, infonca) == 0
        assert {sign("d. hack", "test_reward", kl, method) for kl in plan.KLS for method in (infonca, dpo)} == {0}
        optimum = [row for row in read_csv(runs.FOLDER / "optimum.csv") if float(row["alpha"]) == 1]
        for loss, share in ((infonca, 0.5), ("NCA", 0.2)):
            ratios = [float(row["over_optimum"]) for row in optimum if row["method"] == loss]
            assert sum(ratios) / len(ratios) == pytest.approx(share, abs=0.05)

    @pytest.mark.slow
    def test_runs_of_the_study_come_out_again(self):
        """On another machine, sums round otherwise: figures agree to a hundredth."""
        rows = [row for row in runs.finished(runs.WORLDS_CSV) if row["world"] == 1][::40]
        assert len(rows) > 3
        for row in rows:
            again = train(runs.run_of(row))
            assert again | {"seconds": 0} == pytest.approx(
                {name: row[name] for name in again} | {"seconds": 0}, abs=0.02
            )
