# Copyright 2026 The trl_spo authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Why this file exists: the comparison decides which method is called better. So the rival's loss is checked by hand, what is
called equal compute is counted exactly, standard errors are held against data whose variance is known, and a study of
many hours must go on where it stopped and must not hide a run that failed.
"""

import json
import math
import shutil
import types
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk

from benchmarks.compare import methods, report, run, tasks
from benchmarks.compare.evaluate import compute_to_reach, exact_scores, interpolate, pairwise_distance, two_way
from examples.shapes import world
from examples.shapes.base_scores import load_pipeline
from examples.shapes.preferences import decode_image
from examples.shapes.settings import CLIP, SPO_SETTINGS
from trl_spo import StepAwareRewardModel

from .testing_utils import state_of


PLAN = {
    "budget": 768,  # of fine-tuning: two updates of 128 images
    "checkpoints": 2,
    "num_pairs": 150,
    "reward_steps": 1,
    "validation_repeats": 1,
    "heldout_repeats": 2,
    "accuracy_pairs": 8,
    "guidance_repeats": 1,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the study; it also makes small tensors faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A study of one arm, done in this process, as its processes would do it."""
    folder = tmp_path_factory.mktemp("compare")
    run.write_json(folder / "plan.json", PLAN)
    for task in ("base", "reward/step/0", "run/sft/0"):
        run.work(task, folder, PLAN)
    return folder


def arguments(output, *others):
    sizes = [text for name, value in PLAN.items() for text in (f"--{name}", str(value))]
    return ["--output", str(output), "--seeds", "0", "--no_sweep", "--quick", *sizes, *others]


def random_pairs(count=12):
    generator = torch.Generator().manual_seed(0)
    prompts = [f"a small red circle on a {colour} background" for colour in ("blue", "green", "white")] * (count // 3)
    names = ("chosen_mean", "chosen_std", "rejected_mean", "rejected_std")
    return {name: torch.rand(count, 4, 8, 8, generator=generator) for name in names} | {"prompts": prompts}


class TestDiffusionDPO:
    def make(self, **settings):
        return methods.DiffusionDPO(
            load_pipeline(), random_pairs(), 0, {"beta": 500.0, "learning_rate": 1e-3, "batch_size": 8, **settings}
        )

    def test_loss_by_hand(self):
        chosen, rejected = torch.tensor([0.30, 0.20]), torch.tensor([0.50, 0.10])
        ref_chosen, ref_rejected = torch.tensor([0.32, 0.15]), torch.tensor([0.49, 0.12])
        losses = methods.diffusion_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=200.0)
        for i, inner in enumerate([(0.30 - 0.32) - (0.50 - 0.49), (0.20 - 0.15) - (0.10 - 0.12)]):
            assert losses[i].item() == pytest.approx(math.log(1 + math.exp(100.0 * inner)), rel=1e-4)
        assert losses[0] < math.log(2) < losses[1]  # the first pair has moved as preferred, the second against it

    def test_starts_at_ln_2_and_then_moves(self):
        trainer = self.make()
        first = trainer.update()
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["grad_norm"] > 0
        assert abs(trainer.update()["loss"] - math.log(2)) > 1e-5

    def test_images_of_a_pair_share_noise_and_timestep(self):
        trainer, seen = self.make(), []
        trainer.pipeline.unet.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
        drawn = []
        draw = trainer.draw
        trainer.draw = lambda count: drawn.append(draw(count)) or drawn[-1]
        rows = torch.tensor([0, 3, 5, 7])
        trainer.losses(rows)
        assert len(seen) == 2  # reference and policy, on the same input
        assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
        (latents, timesteps), (posterior_noise, _, _) = seen[0], drawn[0]
        assert torch.equal(timesteps[:4], timesteps[4:])
        alphas = trainer.pipeline.scheduler.alphas_cumprod[timesteps[:4]][:, None, None, None]
        noises = [
            (part - alphas.sqrt() * trainer.latents(which, rows, posterior_noise)) / (1 - alphas).sqrt()
            for which, part in zip(("chosen", "rejected"), latents.chunk(2), strict=True)
        ]
        assert torch.allclose(*noises, atol=1e-2)  # divided by little at small t
        assert noises[0].std() == pytest.approx(1, abs=0.1)

    def test_reference_is_the_base_model(self):
        trainer = self.make()
        base = load_pipeline()
        for _ in range(3):
            trainer.update()
        weights = {
            name.replace(".base_layer", ""): value
            for name, value in state_of(trainer.pipeline.unet).items()
            if "lora" not in name
        }
        expected = state_of(base.unet)
        assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in weights)
        latents, steps = torch.randn(2, 4, 8, 8), torch.tensor([101, 701])
        embeds = trainer.texts[torch.tensor([0, 1])]
        with torch.no_grad():
            policy = trainer.pipeline.predict(latents, steps, embeds, 1.0)
            with trainer.pipeline.reference() as reference:
                frozen = trainer.pipeline.predict(latents, steps, embeds, 1.0, reference)
            plain = base.unet(latents, steps, embeds.prompt_embeds).sample
        assert torch.allclose(frozen, plain, atol=1e-5)
        assert not torch.allclose(policy, plain, atol=1e-4)


class TestEqualCompute:
    """What a run is charged, against what its method asks for on paper."""

    def test_dpo_and_sft(self):
        for method, per_pair in (("dpo", 2 * (1 + 1 + 2)), ("sft", 1 + 2)):  # images x (reference, forward, backward)
            pipeline = load_pipeline()
            evaluated = []
            recorder = methods.Recorder(
                pipeline.unet,
                [4 * per_pair, 8 * per_pair],
                lambda pipeline=pipeline, evaluated=evaluated: (
                    evaluated.append(forward_without_gradients(pipeline)) or {"utility": 0.0}
                ),
            )
            settings = {**methods.DEFAULTS[method], "batch_size": 4}
            methods.train(method, pipeline, recorder, 0, settings, None, random_pairs(), None)
            assert [point["evaluations"] for point in recorder.points] == [4 * per_pair, 8 * per_pair]
            assert [point["updates"] for point in recorder.points] == [1, 2]
            assert len(evaluated) == 2  # and nothing of it was charged
            different = [not torch.equal(*(s[name] for s in recorder.states)) for name in recorder.states[0]]
            assert any(different)

    @pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
    def test_spo(self, tmp_path, guidance_scale):
        pipeline = load_pipeline()
        prompts, start, end, candidates = 8, 2, 4, 3
        settings = {
            **methods.DEFAULTS["spo"],
            "branch_end_step": end,
            "num_candidates": candidates,
            "guidance_scale": guidance_scale,
            "per_device_rollout_batch_size": prompts,
            "per_device_train_batch_size": prompts,  # half of the pairs: two updates per rollout
            "gradient_accumulation_steps": 1,
            "preference_threshold": 0.0,
        }
        passes = 1 if guidance_scale == 1 else 2
        # Per prompt: each step up to the last branching one, and K predictions of x_0 at each of those; that of the
        # candidate that goes on is the next step's own.
        rollout = passes * prompts * (start + 1 + (end - start) * candidates)
        update = passes * prompts * (1 + 1 + 2)
        recorder = methods.Recorder(pipeline.unet, [1, rollout + 2 * update])
        methods.train("spo", pipeline, recorder, 0, settings, methods.exact_reward, None, tmp_path)
        assert [point["evaluations"] for point in recorder.points] == [rollout + update, rollout + 2 * update]

    def test_marks_passed_together_are_one_point(self):
        unet = torch.nn.Linear(2, 2)
        recorder = methods.Recorder(unet, [1, 2, 50])
        recorder.meter.forward = 10
        assert not recorder()
        assert not recorder()
        recorder.meter.backward = 20
        assert recorder()
        assert [point["mark"] for point in recorder.points] == [2, 50]


def forward_without_gradients(pipeline):
    """Samples without gradients through the UNet, as an evaluation does."""
    with torch.no_grad():
        return pipeline.unet(torch.zeros(3, 4, 8, 8), 1, torch.zeros(3, 12, 64)).sample


class TestStatistics:
    @pytest.mark.parametrize("sds", [(0.3, 0.2, 0.5), (0.0, 0.3, 0.2), (0.2, 0.0, 0.3)])
    def test_variance_of_the_mean(self, sds):
        """Many studies of known variance: the mean squared error of the mean is what the formula says."""
        generator = torch.Generator().manual_seed(0)
        seeds, captions, count = 4, 25, 1000
        truth = sds[0] ** 2 / seeds + sds[1] ** 2 / captions + sds[2] ** 2 / (seeds * captions)
        found, means, covered = [], [], 0
        for _ in range(count):
            values = 1 + sds[0] * torch.randn(seeds, 1, generator=generator, dtype=torch.float64)
            values = values + sds[1] * torch.randn(1, captions, generator=generator, dtype=torch.float64)
            values = values + sds[2] * torch.randn(seeds, captions, generator=generator, dtype=torch.float64)
            result = two_way(values)
            found.append(result["se"] ** 2)
            means.append(result["mean"])
            covered += result["low"] <= 1 <= result["high"]
        assert torch.tensor(means).var().item() == pytest.approx(truth, rel=0.12)
        # unbiased where both effects are there; where one is not, setting it to zero errs on the safe side
        average = sum(found) / count
        assert average == pytest.approx(truth, rel=0.08) or (0.0 in sds and truth < average < 1.35 * truth)
        assert 0.93 <= covered / count <= 0.99
        # an error over samples alone would be too small
        if sds[0] > 0.1:
            assert (sds[2] ** 2 + sds[1] ** 2) / (seeds * captions) < 0.5 * average

    def test_finds_the_components(self):
        generator = torch.Generator().manual_seed(1)
        values = 0.5 * torch.randn(200, 1, generator=generator) + 0.3 * torch.randn(1, 200, generator=generator)
        result = two_way(values + 0.1 * torch.randn(200, 200, generator=generator))
        assert result["sd_seeds"] == pytest.approx(0.5, rel=0.15)
        assert result["sd_captions"] == pytest.approx(0.3, rel=0.15)
        assert two_way(values[:1])["seeds"] == 1

    def test_interpolation(self):
        compute, scores = [0.0, 10.0, 20.0, 40.0], [0.0, 1.0, 0.5, 2.5]
        assert interpolate(compute, scores, 15) == pytest.approx(0.75)
        assert math.isnan(interpolate(compute, scores, 50))

    def test_compute_to_reach(self):
        """A curve four times as steep needs a quarter; one that is flat never arrives."""
        rivals = [([0.0, 100.0], [0.0, 1.0]), ([0.0, 100.0], [0.0, 1.2])]
        fast = [([0.0, 50.0, 100.0], [0.0, 2.0, 2.0]), ([0.0, 50.0, 100.0], [0.0, 2.4, 2.4])]
        result = compute_to_reach(fast, rivals, 100.0)
        assert result["target"] == pytest.approx(1.1)
        assert result["compute"] == pytest.approx(25)
        assert result["ratio"] == pytest.approx(4)
        assert result["ratio_low"] < 4 < result["ratio_high"] and result["reached"] == 1
        falling = compute_to_reach([([0.0, 50.0, 100.0], [0.0, 2.2, 0.0])], rivals, 100.0)
        assert falling["compute"] == pytest.approx(25)  # the first time counts
        flat = compute_to_reach([([0.0, 100.0], [0.0, 0.1])], rivals, 100.0)
        assert flat["compute"] == math.inf and flat["reached"] == 0 and flat["ratio"] == 0

    def test_diversity(self):
        images = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
        distances = pairwise_distance(images, ["a", "a", "b", "b"])
        assert distances.tolist() == pytest.approx([math.sqrt(12.5), 0.0])


class TestStudy:
    def test_a_second_call_runs_nothing(self, output, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("a process was started")

        times = {path: path.stat().st_mtime_ns for path in output.glob("r*/**/*.json")}
        monkeypatch.setattr(tasks, "subprocess", types.SimpleNamespace(Popen=refuse, STDOUT=None))
        assert run.main(arguments(output, "--only", "sft", "--no_report")) == 0
        assert times == {path: path.stat().st_mtime_ns for path in times}
        (output / "run" / "sft" / "0.json").rename(output / "hidden")
        try:
            with pytest.raises(AssertionError, match="was started"):  # what is missing is done
                run.main(arguments(output, "--only", "sft", "--no_report"))
        finally:
            (output / "hidden").rename(output / "run" / "sft" / "0.json")

    def test_a_failed_run_is_an_error_and_hides_no_result(self, output, capsys, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(output, copy)
        (copy / "reward" / "clean").mkdir()
        shutil.copy(copy / "reward" / "step" / "0.json", copy / "reward" / "clean" / "0.json")
        false = shutil.which("false")
        assert run.main(arguments(copy, "--only", "sft", "ddpo", "--ddpo_python", false)) == 1
        captured = capsys.readouterr()
        assert "FAILED run/ddpo/0" in captured.out and "1 failed: run/ddpo/0" in captured.err
        assert table_is_last(captured.out)

    def test_another_plan_is_refused(self, output):
        with pytest.raises(SystemExit, match="another plan"):
            run.main([*arguments(output, "--only", "sft"), "--budget", "769"])

    def test_ddpo_without_its_environment_is_refused(self, output):
        with pytest.raises(SystemExit, match="TRL 0.23.1"):
            run.main(arguments(output, "--only", "ddpo", "--ddpo_python", "nowhere/python"))

    def test_run_holds_what_the_report_needs(self, output):
        result = run.read_json(output / "run" / "sft" / "0.json")
        assert [p["mark"] for p in result["points"]] == [384, 768, 1536, 1920]  # it goes on, see `Arm.stretch`
        assert result["picks"]["final"] == 768 and result["picks"]["long"] == 1920
        scores = result["heldout"]["final"]["utility"]
        assert len(scores) == 103 and all(len(row) == PLAN["heldout_repeats"] for row in scores)
        assert (output / "run" / "sft" / "0" / "final" / "pytorch_lora_weights.safetensors").is_file()

    def test_order_of_predictions(self, output):
        """At timestep 0 a prediction is the image itself, so the share can be counted from the images."""
        run.work("order/0", output, PLAN)
        order = run.read_json(output / "order" / "0.json")["order"]
        assert set(order) == {"step", "CLIP, untrained"} and set(order["step"]) == {"0", "101", "301", "501", "701"}
        model = StepAwareRewardModel.from_pretrained(output / "reward" / "step" / "0").eval()
        pairs = load_from_disk(str(output / "heldout_pairs"))
        images = [torch.stack([decode_image(data) for data in pairs[f"jpg_{i}"]]) for i in (0, 1)]
        with torch.no_grad():
            scores = [model.score(image * 2 - 1, pairs["caption"], torch.zeros(len(pairs)).long()) for image in images]
        exact = [exact_scores(image, pairs["caption"]) for image in images]
        shares = {
            metric: ((scores[0] > scores[1]) == (exact[0][metric] > exact[1][metric])).double().mean().item()
            for metric in ("aesthetics", "alignment")
        }
        assert order["step"]["0"] == {**shares, "pairs": len(pairs)}

    def test_reward_with_its_clip(self, output):
        model = StepAwareRewardModel.from_pretrained(output / "reward" / "step" / "0").eval()
        clip = StepAwareRewardModel.from_clip(CLIP, processor=CLIP).eval()
        images, prompts, steps = torch.rand(2, 3, 32, 32), list(world.captions("train")[:2]), torch.tensor([101, 101])
        with torch.no_grad():
            expected = [m.score(images * 2 - 1, prompts, steps) for m in (model, clip)]
            mixed = methods.with_clip(model, 0.25)(images, prompts, steps)
        assert torch.allclose(mixed, expected[0] + 0.25 * expected[1], atol=1e-4)
        assert not torch.equal(*expected)  # one step of training

    def test_report_says_what_the_runs_say(self, output, tmp_path):
        table = report.write_report(output, tmp_path)
        data = json.loads((tmp_path / "report.json").read_text())
        result, base = (run.read_json(output / name) for name in ("run/sft/0.json", "base.json"))
        own = torch.tensor(result["heldout"]["final"]["utility"], dtype=torch.float64)
        difference = own - torch.tensor(base["scores"]["heldout"]["utility"], dtype=torch.float64)
        value = data["final"]["sft"]["utility"]
        assert value["mean"] == pytest.approx(difference.mean().item(), abs=1e-6)
        assert value["se"] == pytest.approx(difference.mean(1).std().item() / math.sqrt(103), abs=1e-6)
        assert f"{value['mean']:+.3f} ± {value['se']:.3f}*" in table
        assert "spo" in data["missing"]
        for name in ("curves.png", "front.png", "samples.png", "reward_accuracy.png"):
            assert (tmp_path / name).stat().st_size > 1000

    def test_rivals_try_as_many_settings(self):
        assert all(len(settings) >= len(run.SWEEPS["spo"]) for settings in run.SWEEPS.values())
        assert run.SWEEPS["spo"][0] == {name: SPO_SETTINGS[name] for name in ("learning_rate", "kl_coef")}

    def test_equal_settings_are_run_once(self, output):
        settings = run.read_json(output / "run" / "sft" / "0.json")["settings"]
        assert run.find_twin(output, "run/sft/0", settings) is None  # itself
        assert run.find_twin(output, "run/dpo/0", settings) is None  # another method

    def test_sweep_chooses_on_validation(self, tmp_path):
        for index, settings in enumerate(run.SWEEPS["sft"]):
            for seed, utility in ((0, 0.5 + 0.1 * (index == 2)), (1, 0.6 - 0.05 * (index == 0))):
                points = [{"utility": 0.1}, {"utility": utility}, {"utility": 0.2}]
                result = {"settings": {**methods.DEFAULTS["sft"], **settings}, "points": points}
                run.write_json(tmp_path / "sweep" / "sft" / str(index) / f"{seed}.json", result)
        assert run.chosen_settings(tmp_path, "sft") == run.SWEEPS["sft"][2]
        assert run.settings_of(tmp_path, "run/sft/7")["learning_rate"] == run.SWEEPS["sft"][2]["learning_rate"]
        assert run.settings_of(tmp_path, "run/spo_k2/7") == {**methods.DEFAULTS["spo"], "num_candidates": 2}
        assert run.settings_of(tmp_path, "run/spo_demo/7")["kl_coef"] == SPO_SETTINGS["kl_coef"]
        assert run.settings_of(tmp_path, "sweep/sft/0/7")["learning_rate"] == run.SWEEPS["sft"][0]["learning_rate"]


class TestReport:
    """Tables from invented runs whose right answers are known."""

    @pytest.fixture
    def results(self, tmp_path):
        def points(slope, cpu, count):
            rows = []
            for i in range(1, count + 1):
                scores = {
                    "aesthetics": 0.5 + slope * i,
                    "alignment": 0.8 - 0.5 * slope * i,
                    "utility": 0.65 + slope * i / 4,
                }
                point = {
                    "mark": 100 * i,
                    "evaluations": 100 * i,
                    "cpu_seconds": cpu * i,
                    "updates": i,
                    "reward": 1.0 * i,
                }
                rows.append({**point, **scores})
            return rows

        base = {"evaluations": 0, "cpu_seconds": 0.0, "updates": 0, "reward": 0.0}
        base |= {"aesthetics": 0.5, "alignment": 0.8, "utility": 0.65}
        heldout = {name: [[0.5, 0.5], [0.5, 0.5]] for name in ("utility", "aesthetics", "alignment", "reward")}
        for arm, slope, cpu, count in (("spo", 0.02, 30.0, 2), ("dpo", 0.01, 10.0, 10)):
            for seed in (0, 1):
                rows = points(slope * (1 + 0.2 * seed), cpu, count)
                value = {
                    "points": rows,
                    "base": base,
                    "picks": {"final": 200},
                    "settings": {},
                    "total_seconds": [1, 1],
                }
                value["heldout"] = {"final": heldout, "base_reward": heldout["reward"]}
                run.write_json(tmp_path / "run" / arm / f"{seed}.json", value)
        reward = {"accuracy": {}, "evaluations": 50, "cpu_seconds": 20.0}
        run.write_json(tmp_path / "reward" / "step" / "0.json", reward)
        run.write_json(tmp_path / "base.json", {"scores": {"heldout": heldout}, "plan": {**PLAN, "budget": 200}})
        return report.Results(tmp_path)

    def test_equal_time(self, results):
        data = report.equal_time_table(results)[1]
        assert data["cpu_seconds"] == {"alone": 60.0, "with the reward model": 80.0}
        for name in data["cpu_seconds"]:  # SPO has 60 seconds of its own in both
            assert data["spo"][name]["aesthetics"]["mean"] == pytest.approx(0.02 * 2 * 1.1)
        assert data["dpo"]["alone"]["aesthetics"]["mean"] == pytest.approx(0.01 * 6 * 1.1)
        assert data["dpo"]["with the reward model"]["aesthetics"]["mean"] == pytest.approx(0.01 * 8 * 1.1)
        expected = torch.tensor([0.06, 0.072], dtype=torch.float64).std().item() / math.sqrt(2)
        assert data["dpo"]["alone"]["aesthetics"]["se_seeds"] == pytest.approx(expected)

    def test_front(self, results):
        table, data = report.front_table(results)
        assert data["spo"]["0.02"] == {
            "mean": pytest.approx(-0.01),
            "se_seeds": pytest.approx(0, abs=1e-9),
            "seeds": 2,
        }
        assert data["spo"]["0.04"]["seeds"] == 2 and "0.06" not in data["spo"]  # 0.04 and 0.048 at the end
        assert data["dpo"]["0.08"]["mean"] == pytest.approx(-0.04)
        assert "not reached" in table

    def test_compute_to_reach_counts_the_reward_model(self, results):
        value = report.reach_table(results)[1]["spo"]["aesthetics/evaluations"]
        assert value["compute"] == pytest.approx(100)  # what the rival has after 200
        assert value["ratio"] == pytest.approx(2) and value["ratio_with_reward"] == pytest.approx(200 / 150)

    def test_alignment_where_a_gain_is_first_reached(self):
        aesthetics, alignment = [0.0, 0.05, 0.10, 0.02], [0.0, -0.01, -0.03, 0.0]
        assert report.alignment_at(aesthetics, alignment, 0.075) == pytest.approx(-0.02)
        assert report.alignment_at(aesthetics, alignment, 0.05) == pytest.approx(-0.01)
        assert math.isnan(report.alignment_at(aesthetics, alignment, 0.2))

    def test_tables_of_a_page_are_replaced(self):
        page = "# T\n<!-- table cost -->\nold | table\n<!-- end -->\ntext <!-- end --> stays\n"
        filled = report.fill_page(page, {"cost": "| a |\n|---|"})
        assert filled == "# T\n<!-- table cost -->\n\n| a |\n|---|\n\n<!-- end -->\ntext <!-- end --> stays\n"
        assert report.fill_page(filled, {"cost": "| a |\n|---|"}) == filled
        with pytest.raises(KeyError, match="cost"):
            report.fill_page(page, {"cost": "", "front": "| a |"})


def test_checkpoints():
    """Evenly up to the budget, half as often beyond, the end always."""
    assert run.checkpoint_marks(600, 6, 1.0) == [100, 200, 300, 400, 500, 600]
    assert run.checkpoint_marks(600, 3, 2.5) == [200, 400, 600, 1000, 1400, 1600]


def table_is_last(text: str) -> bool:
    last = text.rstrip().splitlines()[-1]
    return last.startswith("| ") and "fine-tuning" in last


@pytest.mark.parametrize("method", ["spo", "dpo", "sft"])
def test_defaults_are_what_the_sweeps_chose(method):
    """Otherwise the quick study would show a rival with worse settings than the whole one."""
    path = Path(__file__).parent.parent / "benchmarks" / "results" / "compare" / "report.json"
    best = max(json.loads(path.read_text())["sweep"][method], key=lambda entry: entry["mean"])["settings"]
    assert best.items() <= methods.DEFAULTS[method].items()


def test_learned_rewards_are_named_once():
    assert set(run.LEARNED_REWARDS) == set(methods.REWARDS)


def test_the_page_has_the_tables_of_the_report():
    root = Path(__file__).parent.parent
    tables = json.loads((root / "benchmarks" / "results" / "compare" / "report.json").read_text())["tables"]
    page = (root / "docs" / "ablations.md").read_text()
    assert report.TABLE.search(page) and report.fill_page(page, tables) == page
